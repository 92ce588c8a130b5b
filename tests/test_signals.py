"""Activations and their gradients against plain torch in float64, in nets that break other tools."""

from __future__ import annotations

import copy
import math
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradprobe


class InPlace(nn.Module):
    """ReLU in place behind a normalisation, a sum in place, a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm(self.conv(x)))
        out = self.again(x)
        out += x
        return self.head(self.relu(out).view(len(x), 4, -1).mean(2))


class DenseNet(nn.Module):
    """Every layer takes all that went before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 2 * k, 2, 3, padding=1) for k in range(4))
        self.relu = nn.ReLU()  # used again by each layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat((x, self.relu(layer(x))), dim=1)
        return x.mean((2, 3))


class UNet(nn.Module):
    """Down, up, and a shortcut across."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.middle = nn.Sequential(nn.GELU(), nn.Conv2d(4, 4, 3, padding=1))
        self.up = nn.ConvTranspose2d(8, 3, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.down(x)
        return self.up(torch.cat((low, self.middle(low)), dim=1)) + x


class Recurrent(nn.Module):
    """A module that returns a tuple with a tuple in it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 5, num_layers=2, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, (h, _) = self.lstm(x.flatten(2).mean(2, keepdim=True).expand(-1, -1, 8))
        return self.head(out[:, -1] + h[-1])


class Encoder(nn.Module):
    """Transformer layers that are checkpointed."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0) for _ in range(2))
        self.use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2).transpose(0, 1)[:, :, :1].expand(-1, -1, 8))
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return x.mean(0)


@dataclass
class Output:
    """What a module returns where it has more than one result."""

    logits: torch.Tensor
    extra: dict[str, torch.Tensor | int]


class Structured(nn.Module):
    """Returns dictionaries and dataclasses, integers among them; one part is frozen."""

    class Inner(nn.Module):
        """Returns a dataclass."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> Output:
            y = self.linear(x)
            return Output(y, {"arg": y.argmax(1), "square": y * y, "n": 3})

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.inner = Structured.Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.inner(self.frozen(x.mean((2, 3))))
        return output.logits + output.extra["square"]


NETS: dict[str, Callable[[], nn.Module]] = {
    "in place": InPlace,
    "dense": DenseNet,
    "unet": UNet,
    "lstm": Recurrent,
    "transformer, checkpointed": lambda: Encoder(use_reentrant=False),
    "transformer, reentrant checkpoint": lambda: Encoder(use_reentrant=True),
    "dataclass and frozen": Structured,
    "resnet": lambda: gradprobe.networks.resnet(8, width=4),
}


def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def build(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = NETS[name]()
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, n_steps: int) -> None:
    for _ in range(n_steps):
        optimizer.zero_grad()
        model(images()).square().sum().backward()
        optimizer.step()


@dataclass
class Seen:
    """Reference statistics of one tensor or several together, in float64."""

    values: list[torch.Tensor]

    def of(self) -> tuple[float, float, float, int]:
        flat = torch.cat([value.reshape(-1).double() for value in self.values])
        return flat.norm().item(), flat.std(correction=0).item(), (flat == 0).double().mean().item(), flat.numel()


@contextmanager
def reference(model: nn.Module, names: list[str]) -> Iterator[tuple[dict[str, Seen], dict[str, Seen]]]:
    """Copies what modules return, and the gradients that come back to copies of it, by other means than the probe's."""
    outputs: dict[str, Seen] = {}
    gradients: dict[str, Seen] = {}

    def tensors(value: object) -> list[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            return [value] if value.is_floating_point() else []
        if isinstance(value, Output):
            return [value.logits, value.extra["square"]]  # type: ignore[list-item]
        return [tensor for item in value for tensor in tensors(item)] if isinstance(value, tuple) else []

    class Observe(torch.autograd.Function):
        """The identity, with a look at the gradient."""

        @staticmethod
        def forward(ctx, x, name):  # type: ignore[no-untyped-def]
            ctx.name = name
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            gradients.setdefault(ctx.name, Seen([])).values.append(gradient.clone())
            return gradient, None

    def replace(value: object, name: str) -> object:
        if isinstance(value, torch.Tensor):
            return Observe.apply(value, name) if value.is_floating_point() else value
        if isinstance(value, Output):
            extra = {key: replace(item, name) for key, item in value.extra.items()}
            return Output(replace(value.logits, name), extra)  # type: ignore[arg-type]
        return tuple(replace(item, name) for item in value) if isinstance(value, tuple) else value

    def observe(name: str) -> Callable[..., object]:
        def hook(module: nn.Module, args: object, output: object) -> object:
            is_recomputed = torch._C._current_graph_task_id() != -1 and name in outputs
            if torch.is_grad_enabled() and not is_recomputed:
                outputs.setdefault(name, Seen([])).values += [tensor.detach().clone() for tensor in tensors(output)]
            return replace(output, name)

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(observe(name)) for name in names]
    yield outputs, gradients
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", NETS)
def test_weights_are_the_same_bit_for_bit(name: str) -> None:
    bare, bare_optimizer = build(name)
    train(bare, bare_optimizer, 3)
    model, optimizer = build(name)
    with gradprobe.attach(model, optimizer=optimizer, activations=lambda *_: True):
        train(model, optimizer, 3)
    for parameter, expected in zip(model.state_dict().values(), bare.state_dict().values(), strict=True):
        assert torch.equal(parameter, expected)


@pytest.mark.parametrize("name", NETS)
def test_statistics_equal_a_reference_in_float64(name: str) -> None:
    model, optimizer = build(name)
    probe = gradprobe.attach(model, optimizer=optimizer, activations=True)
    train(model, optimizer, 1)
    probe.detach()
    activations = probe.latest().activations
    assert activations
    model, optimizer = build(name)
    with reference(model, list(activations)) as (outputs, gradients):
        train(model, optimizer, 1)
    assert list(activations) == list(outputs)  # the order of execution
    for module, activation in activations.items():
        norm, std, zero_fraction, numel = outputs[module].of()
        assert activation.output.norm == pytest.approx(norm, rel=1e-6)
        assert activation.output.std == pytest.approx(std, rel=1e-5, abs=1e-6 * norm)
        assert activation.output.zero_fraction == pytest.approx(zero_fraction)
        assert activation.output.numel == numel
        assert (activation.gradient is not None) == (module in gradients)
        if activation.gradient is not None:
            norm, _, _, numel = gradients[module].of()
            assert activation.gradient.norm == pytest.approx(norm, rel=1e-5)
            assert activation.gradient.numel == numel


def test_a_gan_step_with_two_backwards() -> None:
    def step(probed: bool) -> tuple[list[torch.Tensor], gradprobe.Snapshot | None]:
        torch.manual_seed(0)
        generator, critic = nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.2), nn.Linear(4, 1))
        steps = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (generator, critic)]
        probe = gradprobe.attach(critic, optimizer=steps[1], activations=True) if probed else None
        real, noise = torch.randn(5, 3), torch.randn(5, 2)
        fake = generator(noise)
        (critic(real).mean() - critic(fake.detach()).mean()).backward()
        steps[1].step()
        snapshot = None if probe is None else probe.latest()
        steps[1].zero_grad()
        critic(fake).mean().backward()
        steps[0].step()
        return [*generator.parameters(), *critic.parameters()], snapshot

    bare, _ = step(probed=False)
    weights, snapshot = step(probed=True)
    assert all(torch.equal(a, b) for a, b in zip(weights, bare, strict=True))
    assert snapshot.activations["0"].output.numel == 2 * 5 * 4  # real and fake together
    assert snapshot.activations["2"].gradient.norm == pytest.approx(math.sqrt(10) / 5)


def test_evaluation_between_steps_is_not_observed() -> None:
    model, optimizer = build("in place")
    probe = gradprobe.attach(model, optimizer=optimizer, activations=["conv"])
    optimizer.zero_grad()
    loss = model(images()).square().sum()
    with torch.no_grad():
        model(torch.randn(64, 3, 8, 8))
    loss.backward()
    optimizer.step()
    assert probe.latest().activations["conv"].output.numel == 4 * 4 * 8 * 8


@pytest.mark.parametrize(
    ("every", "activations_every", "expected"), [(1, 3, [0, 3, 6]), (2, 3, [0, 6]), (2, 1, [0, 2, 4, 6])]
)
def test_cadence(every: int, activations_every: int, expected: list[int]) -> None:
    model, optimizer = build("in place")
    probe = gradprobe.attach(
        model, optimizer=optimizer, activations=True, every=every, activations_every=activations_every
    )
    train(model, optimizer, 7)
    assert [snapshot.step for snapshot in probe.history()] == list(range(0, 7, every))
    assert [snapshot.step for snapshot in probe.history() if snapshot.activations] == expected


def test_accumulation_counts_all_micro_batches() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    probe = gradprobe.attach(model, activations=True)
    outputs = []
    for seed in range(3):
        out = model(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)))
        outputs.append(out.detach())
        out.sum().backward()
    probe.step()
    activation = probe.latest().activations["0"]
    assert activation.output.norm == pytest.approx(torch.cat(outputs).norm().item())
    assert activation.gradient.numel == 3 * 4 * 2
    assert activation.gradient.mean == 1.0


def test_paused_and_detached() -> None:
    model, optimizer = build("resnet")
    probe = gradprobe.attach(model, optimizer=optimizer, activations=True)
    with probe.paused():
        train(model, optimizer, 1)
    assert probe.latest() is None
    train(model, optimizer, 1)
    snapshot = probe.latest()
    probe.detach()
    train(model, optimizer, 1)
    assert probe.latest().activations.keys() == snapshot.activations.keys()
    assert not any(module._forward_hooks for module in model.modules())
    assert all(module.tap is None for module in model.modules() if isinstance(module, gradprobe.nn.ResidualAdd))
    dead = weakref.ref(model), weakref.ref(probe)
    del model, probe, optimizer
    assert [ref() for ref in dead] == [None, None]


def test_copies_and_pickles_of_an_attached_model_are_plain() -> None:
    model, optimizer = build("resnet")
    probe = gradprobe.attach(model, optimizer=optimizer, activations=True)
    train(model, optimizer, 1)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(images()).sum().backward()
    optimizer.step()
    assert not probe.latest().activations


@pytest.mark.parametrize(
    ("activations", "names"),
    [
        (True, ["conv", "norm", "relu", "again", "head"]),
        (["conv", "*a*"], ["conv", "again", "head"]),
        (lambda name, module: isinstance(module, nn.Conv2d), ["conv", "again"]),
    ],
    ids=["all", "patterns", "function"],
)
def test_selection(activations: object, names: list[str]) -> None:
    model, optimizer = build("in place")
    probe = gradprobe.attach(model, optimizer=optimizer, activations=activations)  # type: ignore[arg-type]
    train(model, optimizer, 1)
    assert list(probe.latest().activations) == names


@pytest.mark.parametrize(
    ("activations", "message"),
    [
        (["conv", "nothing.*"], "activations: no module's name fits 'nothing.*'; there are conv, norm"),
        (lambda *_: False, "activations: the function chose none of 5 modules"),
        ("conv", "activations: need True, False, a list of patterns or a function"),
        ([3], "activations: need True, False, a list of patterns or a function"),
    ],
)
def test_bad_selections(activations: object, message: str) -> None:
    model = InPlace()
    with pytest.raises(gradprobe.ArgumentError) as raised:
        gradprobe.attach(model, activations=activations)  # type: ignore[arg-type]
    assert str(raised.value).startswith(message)
    gradprobe.attach(model).detach()


def test_a_module_that_never_runs_is_silent() -> None:
    model, optimizer = build("in place")
    model.spare = nn.ReLU()
    probe = gradprobe.attach(model, optimizer=optimizer, activations=True)
    with pytest.warns(gradprobe.GradprobeWarning, match="step 0: 1 of 6 observed modules returned nothing: spare"):
        train(model, optimizer, 1)
    assert probe.coverage().silent == ("spare",)


def test_attention_is_not_called_blind(recwarn: pytest.WarningsRecorder) -> None:
    model, optimizer = build("transformer, checkpointed")
    probe = gradprobe.attach(model, optimizer=optimizer, activations=True)
    train(model, optimizer, 1)
    assert not [warning for warning in recwarn if issubclass(warning.category, gradprobe.GradprobeWarning)]
    assert probe.coverage().silent == ()


def test_tables_hold_all() -> None:
    model, optimizer = build("resnet")
    probe = gradprobe.attach(model, optimizer=optimizer, activations=True)
    train(model, optimizer, 2)
    frame = probe.to_pandas()
    assert set(frame.kind) == {
        *("parameter", "activation", "activation_grad", "junction_x", "junction_f", "junction_y"),
        *("junction_grad", "shortcut_grad", "branch_grad"),
    }
    row = frame[(frame.step == 1) & (frame.site == "fc") & (frame.kind == "activation")].iloc[0]
    assert row.norm == probe.latest().activations["fc"].output.norm


# Without the LSTM: dynamo leaves that frame alone, but compiles around a module with hooks.
COMPILED = ["in place", "dense", "transformer, checkpointed", "dataclass and frozen", "resnet"]


class TestCompiled:
    """A compiled model keeps its graphs, and its numbers."""

    @pytest.fixture(autouse=True)
    def fresh(self) -> Iterator[None]:
        """Forgets what was compiled."""
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        yield
        torch._dynamo.reset()

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
        for snapshot, twin in zip(probe.history(), expected.history(), strict=True):
            assert list(snapshot.activations) == list(twin.activations)
            for module, activation in snapshot.activations.items():
                other = twin.activations[module]
                assert activation.output.norm == pytest.approx(other.output.norm, rel=1e-5)
                is_input = isinstance(model.get_submodule(module), nn.ReLU)  # in place: no gradient of its own there
                assert (activation.gradient is None) == (other.gradient is None or (is_input and name == "in place"))
                if activation.gradient is not None:
                    assert activation.gradient.norm == pytest.approx(other.gradient.norm, rel=1e-5)

    def test_inductor(self) -> None:
        model, optimizer = build("in place")
        probe = gradprobe.attach(model, optimizer=optimizer, activations=True)
        train(torch.compile(model), optimizer, 2)
        twin, optimizer = build("in place")
        expected = gradprobe.attach(twin, optimizer=optimizer, activations=True)
        train(twin, optimizer, 2)
        for module, activation in probe.latest().activations.items():
            other = expected.latest().activations[module]
            assert activation.output.norm == pytest.approx(other.output.norm, rel=1e-4)
            assert module == "relu" or activation.gradient.norm == pytest.approx(other.gradient.norm, rel=1e-4)

    def test_attached_too_late_is_said(self) -> None:
        model, optimizer = build("in place")
        compiled = torch.compile(model, backend="aot_eager")
        train(compiled, optimizer, 1)
        probe = gradprobe.attach(model, optimizer=optimizer, activations=True)
        with pytest.warns(gradprobe.GradprobeWarning, match="5 of 5 observed modules returned nothing: conv, norm"):
            train(compiled, optimizer, 1)
        assert probe.coverage().silent == ("conv", "norm", "relu", "again", "head")

    def test_detached_graphs_go_on(self) -> None:
        model, optimizer = build("in place")
        compiled = torch.compile(model, backend="aot_eager")
        probe = gradprobe.attach(model, optimizer=optimizer, activations=True)
        train(compiled, optimizer, 1)
        probe.detach()
        train(compiled, optimizer, 1)
        assert len(probe.history()) == 1

    def test_a_planted_nan_is_named(self) -> None:
        class Poison(torch.autograd.Function):
            """The identity, whose gradient is multiplied."""

            @staticmethod
            def forward(ctx, x, factor):  # type: ignore[no-untyped-def]
                ctx.save_for_backward(factor)
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):  # type: ignore[no-untyped-def]
                return gradient * ctx.saved_tensors[0], None

        class Poisoned(nn.Module):
            """A layer that can be told to spoil its gradient."""

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


class TestFirstNonfinite:
    """The first place and step with NaN or infinity."""

    @staticmethod
    def net() -> tuple[nn.Sequential, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.Tanh())))
        return model, torch.optim.SGD(model.parameters(), lr=0.01)

    @staticmethod
    def run(model: nn.Module, optimizer: torch.optim.Optimizer, n_steps: int) -> None:
        for _ in range(n_steps):
            optimizer.zero_grad()
            model(torch.ones(2, 6)).sum().backward()
            optimizer.step()

    @pytest.mark.parametrize(("layer", "at_step"), [(1, 0), (4, 2), (7, 3)])
    @pytest.mark.parametrize("capacity", [1, 64])
    def test_planted_in_a_backward(self, layer: int, at_step: int, capacity: int) -> None:
        class Poison(torch.autograd.Function):
            """The identity, whose gradient gets one NaN at a chosen step."""

            @staticmethod
            def forward(ctx, x, step):  # type: ignore[no-untyped-def]
                ctx.step = step
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):  # type: ignore[no-untyped-def]
                poisoned = gradient.clone()
                if ctx.step == at_step:
                    poisoned[0, 0] = math.nan
                return poisoned, None

        model, optimizer = self.net()
        counter = iter(range(100))
        model[layer].register_forward_pre_hook(lambda module, args: (Poison.apply(args[0], next(counter)),))
        probe = gradprobe.attach(model, optimizer=optimizer, activations=True, capacity=capacity)
        self.run(model, optimizer, 6)
        first = probe.first_nonfinite()
        assert (first.step, first.phase, first.module) == (at_step, "backward", str(layer))
        assert (first.site, first.kind, first.nonfinite) == (str(layer - 1), "activation_grad", 1)

    def test_planted_in_a_forward(self) -> None:
        model, optimizer = self.net()
        probe = gradprobe.attach(model, optimizer=optimizer, activations=True)
        self.run(model, optimizer, 2)
        assert probe.first_nonfinite() is None
        with torch.no_grad():
            model[4].bias[3] = math.inf
        self.run(model, optimizer, 2)
        first = probe.first_nonfinite()
        assert (first.step, first.phase, first.module, first.nonfinite) == (2, "forward", "4", 2)
        assert str(first) == "step 2, forward: output of 4 has 2 non-finite of 12 values"

    def test_parameters_alone(self) -> None:
        model, optimizer = self.net()
        probe = gradprobe.attach(model, optimizer=optimizer)
        model[2].weight.register_hook(lambda gradient: gradient * math.nan)
        self.run(model, optimizer, 1)
        first = probe.first_nonfinite()
        assert (first.step, first.site, first.module, first.kind) == (0, "2.weight", "2", "parameter")

    def test_no_synchronisation(self) -> None:
        class Refuse(torch.utils._python_dispatch.TorchDispatchMode):
            """Refuses what makes the host wait for a device."""

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                assert function is not torch.ops.aten._local_scalar_dense.default
                return function(*args, **(kwargs or {}))

        model, optimizer = build("resnet")
        probe = gradprobe.attach(model, optimizer=optimizer, activations=True)
        train(model, optimizer, 1)
        with Refuse():
            train(model, optimizer, 2)
        assert probe.latest().step == 2
