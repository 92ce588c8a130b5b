"""Activations in compiled models: the same graphs, the same numbers."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.signal_cases import build, net, train
from torch import nn

import gradprobe

# Not the LSTM: dynamo skips its frame, but compiles around a module with hooks.
COMPILED = [
    "in place",
    "dense",
    "transformer, checkpointed",
    "dataclass and frozen",
    pytest.param("resnet", marks=pytest.mark.soak),
]


@pytest.mark.usefixtures("fresh_dynamo")
class TestCompiled:
    """Observing a compiled model changes neither its graphs nor its numbers."""

    @staticmethod
    def n_graphs() -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    @pytest.mark.parametrize("name", COMPILED)
    @pytest.mark.filterwarnings("ignore:gradprobe")
    def test_same_graphs_same_numbers(self, name: str) -> None:
        bare, bare_optimizer = build(name)
        train(torch.compile(bare, backend="aot_eager"), bare_optimizer, 4)
        n_graphs = self.n_graphs()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()

        model, optimizer = build(name)
        probe = gradprobe.attach(model, optimizer=optimizer, activations=True, junctions=False, every=3)
        train(torch.compile(model, backend="aot_eager"), optimizer, 4)
        assert self.n_graphs() == n_graphs
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), bare.parameters(), strict=True))

        eager, optimizer = build(name)
        expected = gradprobe.attach(eager, optimizer=optimizer, activations=True, junctions=False, every=3)
        train(eager, optimizer, 4)
        for snapshot, of_eager in zip(probe.history(), expected.history(), strict=True):
            assert list(snapshot.activations) == list(of_eager.activations)
            for module, activation in snapshot.activations.items():
                other = of_eager.activations[module]
                assert activation.output.norm == pytest.approx(other.output.norm, rel=1e-5)
                is_input = isinstance(model.get_submodule(module), nn.ReLU)  # in place: no gradient of its own
                assert (activation.gradient is None) == (other.gradient is None or (is_input and name == "in place"))
                if activation.gradient is not None:
                    assert activation.gradient.norm == pytest.approx(other.gradient.norm, rel=1e-5)

    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.soak)])
    def test_junctions(self, backend: str) -> None:
        bare, bare_optimizer = build("resnet")
        train(torch.compile(bare, backend=backend), bare_optimizer, 4)
        n_graphs = self.n_graphs()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()

        model, optimizer = build("resnet")
        probe = gradprobe.attach(model, optimizer=optimizer, every=3)
        train(torch.compile(model, backend=backend), optimizer, 4)
        assert self.n_graphs() == n_graphs
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), bare.parameters(), strict=True))

        eager, optimizer = build("resnet")
        expected = gradprobe.attach(eager, optimizer=optimizer, every=3)
        train(eager, optimizer, 4)
        assert [snapshot.step for snapshot in probe.history()] == [0, 3]
        for snapshot, of_eager in zip(probe.history(), expected.history(), strict=True):
            assert list(snapshot.junctions) == list(of_eager.junctions)
            for name, junction in snapshot.junctions.items():
                eager_add = of_eager.junctions[name]
                assert (junction.branch is None) == (eager_add.branch is None)
                for part in ("x", "f", "y", "gradient", "shortcut", *(["branch"] if eager_add.branch else [])):
                    ours, other = getattr(junction, part), getattr(eager_add, part)
                    assert ours.norm == pytest.approx(other.norm, rel=1e-3), (name, part)
                assert junction.cosine == pytest.approx(eager_add.cosine, abs=1e-3, nan_ok=True)
            assert sum(junction.branch is not None for junction in snapshot.junctions.values()) == 1

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_two_backwards_through_one_graph(self, backend: str) -> None:
        model = net()
        probe = gradprobe.attach(model)
        loss = torch.compile(model, backend=backend)(torch.randn(2, 3)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        probe.step()
        junction = probe.latest().junctions["1.join"]
        assert junction.branch.numel == junction.shortcut.numel == 16
        assert -1 <= junction.cosine <= 1

    @pytest.mark.soak
    def test_inductor(self) -> None:
        model, optimizer = build("in place")
        probe = gradprobe.attach(model, optimizer=optimizer, activations=True)
        train(torch.compile(model), optimizer, 2)
        eager, optimizer = build("in place")
        expected = gradprobe.attach(eager, optimizer=optimizer, activations=True)
        train(eager, optimizer, 2)
        for module, activation in probe.latest().activations.items():
            other = expected.latest().activations[module]
            assert activation.output.norm == pytest.approx(other.output.norm, rel=1e-4)
            assert module == "relu" or activation.gradient.norm == pytest.approx(other.gradient.norm, rel=1e-4)

    def test_attaching_after_compilation_warns(self) -> None:
        model, optimizer = build("in place")
        compiled = torch.compile(model, backend="aot_eager")
        train(compiled, optimizer, 1)
        probe = gradprobe.attach(model, optimizer=optimizer, activations=True)
        with pytest.warns(gradprobe.GradprobeWarning, match="5 of 5 observed modules returned nothing: conv, norm"):
            train(compiled, optimizer, 1)
        assert probe.coverage().silent == ("conv", "norm", "relu", "again", "head")

    def test_compiled_graphs_run_on_after_detach(self) -> None:
        model, optimizer = build("in place")
        compiled = torch.compile(model, backend="aot_eager")
        probe = gradprobe.attach(model, optimizer=optimizer, activations=True)
        train(compiled, optimizer, 1)
        probe.detach()
        train(compiled, optimizer, 1)
        assert len(probe.history()) == 1

    def test_a_planted_nan_is_named(self) -> None:
        class Poison(torch.autograd.Function):
            """The identity, with its gradient multiplied by a factor."""

            @staticmethod
            def forward(ctx, x, factor):  # type: ignore[no-untyped-def]
                ctx.save_for_backward(factor)
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):  # type: ignore[no-untyped-def]
                return gradient * ctx.saved_tensors[0], None

        class Poisoned(nn.Module):
            """A layer that can multiply its gradient by NaN."""

            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(6, 6)
                self.register_buffer("factor", torch.ones(()))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.linear(Poison.apply(x, self.factor))

        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), Poisoned(), nn.Tanh(), nn.Linear(6, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        probe = gradprobe.attach(model, optimizer=optimizer, activations=["?"])
        compiled = torch.compile(model, backend="aot_eager")
        for step in range(5):
            model[2].factor.fill_(math.nan if step == 3 else 1.0)
            optimizer.zero_grad()
            compiled(torch.ones(2, 6)).sum().backward()
            optimizer.step()
        first = probe.first_nonfinite()
        assert (first.step, first.module, first.site, first.phase) == (3, "2", "1", "backward")
        assert self.n_graphs() == 1


@pytest.mark.usefixtures("any_hooks", "fresh_dynamo")
class TestCompiledModels:
    """Observing does not change a compiled model's results."""

    def test_an_output_of_a_dict_subclass(self) -> None:
        class Output(dict):  # type: ignore[type-arg]
            """A model output as in transformers."""

            def __getattr__(self, name: str) -> torch.Tensor:
                return self[name]

        class Head(nn.Module):
            """Returns a mapping."""

            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(3, 2)

            def forward(self, x: torch.Tensor) -> Output:
                return Output(logits=self.layer(x))

        class Model(nn.Module):
            """Reads an attribute of the mapping."""

            def __init__(self) -> None:
                super().__init__()
                self.head = Head()

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.head(x).logits

        model = Model()
        probe = gradprobe.attach(model, activations=["head", "head.layer"])
        x = torch.randn(4, 3)
        expected = model.head.layer(x)
        assert torch.allclose(torch.compile(model, backend="aot_eager")(x), expected)
        probe.detach()

    def test_in_place_writes_through_an_alias(self) -> None:
        class Same(nn.Module):
            """Returns its input."""

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x

        class Model(nn.Module):
            """Modifies an alias of a tensor in place, and returns the tensor."""

            def __init__(self) -> None:
                super().__init__()
                self.layer, self.same, self.flat = nn.Linear(3, 3), Same(), nn.Flatten(0)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                hidden = self.layer(x)
                again = self.same(hidden)
                again += 1
                flat = self.flat(hidden)
                flat *= 2
                return hidden

        model = Model()
        x = torch.randn(4, 3)
        expected = model(x)
        gradprobe.attach(model, activations=True)
        assert torch.allclose(torch.compile(model, backend="aot_eager")(x), expected)

    @pytest.mark.parametrize(
        "transform", ["grad", *(pytest.param(name, marks=pytest.mark.soak) for name in ("jvp", "vmap of grad"))]
    )
    def test_a_compiled_transform_is_not_observed(self, transform: str) -> None:
        model = net(nn.Linear(4, 1))
        parameters, x = dict(model.named_parameters()), torch.randn(5, 3)

        def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(model, parameters, (x,)).square().sum()

        call = {
            "grad": torch.func.grad(loss),
            "jvp": lambda parameters, x: torch.func.jvp(lambda x: loss(parameters, x), (x,), (x,)),
            "vmap of grad": torch.vmap(torch.func.grad(loss), (None, 0)),
        }[transform]
        expected = call(parameters, x)
        gradprobe.attach(model, activations=True, strict=True)
        torch.testing.assert_close(torch.compile(call, backend="aot_eager")(parameters, x), expected)

    def test_an_exported_program_has_no_probe_operators(self) -> None:
        model = net()
        gradprobe.attach(model, activations=True)
        program = torch.export.export(model, (torch.randn(2, 3),))
        assert "observe" not in str(program.graph)
