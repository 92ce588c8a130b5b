"""Activations and their gradients against plain torch in float64, in models that break other tools."""

from __future__ import annotations

import copy
import math
import pickle
import weakref

import pytest
import torch
from helpers.signal_cases import NETS, InPlace, build, images, reference, train
from torch import nn

import gradprobe

pytestmark = pytest.mark.usefixtures("any_rows")


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


def test_an_activation_has_its_modules_class_name() -> None:
    model, optimizer = build("in place")
    with gradprobe.attach(model, optimizer=optimizer, activations=True) as probe:
        train(model, optimizer, 1)
        types = {name: seen.module_type for name, seen in probe.latest(wait=True).activations.items()}
    assert types == {"conv": "Conv2d", "norm": "BatchNorm2d", "relu": "ReLU", "again": "Conv2d", "head": "Linear"}


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


class Varying(nn.Module):
    """Runs its layers in the order given."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, names: str) -> torch.Tensor:
        for name in names:
            x = self.get_submodule(name)(x)
        return x


def test_steps_that_run_different_modules() -> None:
    torch.manual_seed(0)
    model = Varying()
    probe = gradprobe.attach(model, activations=True)
    orders = [(4, "ab", False), (4, "ab", False), (4, "ba", False), (2, "ba", False), (4, "aba", False)]
    orders += [(4, "b", False), (4, "ab", False), (4, "ab", True)]
    norms = []
    for n, names, is_lower in orders:
        with torch.autocast("cpu", torch.float16, enabled=is_lower):
            out = model(torch.ones(n, 3), names)
        out.float().sum().backward()
        norms.append(out.detach().double().norm().item())
        probe.step()
        model.zero_grad()
    for (n, names, is_lower), snapshot, norm in zip(orders, probe.history(), norms, strict=True):
        assert list(snapshot.activations) == list(dict.fromkeys(names))
        for name, activation in snapshot.activations.items():
            assert activation.output.numel == activation.gradient.numel == 3 * n * names.count(name)
        if names.count(names[-1]) == 1:
            assert snapshot.activations[names[-1]].output.norm == pytest.approx(norm, rel=1e-6)
        dtype = torch.float16 if is_lower else torch.float32
        smallest_normal = snapshot.signals.events.smallest_normal  # a, its gradient, b, its gradient
        assert smallest_normal[2] == torch.finfo(dtype).smallest_normal


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
    assert all(module.observer is None for module in model.modules() if isinstance(module, gradprobe.nn.ResidualAdd))
    dead = weakref.ref(model), weakref.ref(probe)
    del model, probe, optimizer
    assert [ref() for ref in dead] == [None, None]


def test_copies_and_pickles_of_an_attached_model_are_not_observed() -> None:
    model, optimizer = build("resnet")
    probe = gradprobe.attach(model, optimizer=optimizer, activations=True)
    train(model, optimizer, 1)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        clone(images()).sum().backward()
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
        (["conv", "nothing.*"], "activations: no module name matches 'nothing.*'; the model has conv, norm"),
        (lambda *_: False, "activations: needed at least one module; the function selected none of 5"),
        ("conv", "activations: needed True, False, a list of patterns or a function"),
        ([3], "activations: needed True, False, a list of patterns or a function"),
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


def test_attention_causes_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    model, optimizer = build("transformer, checkpointed")
    probe = gradprobe.attach(model, optimizer=optimizer, activations=True)
    train(model, optimizer, 1)
    assert not [warning for warning in recwarn if issubclass(warning.category, gradprobe.GradprobeWarning)]
    assert probe.coverage().silent == ()


def test_tables_hold_every_kind() -> None:
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


@pytest.mark.usefixtures("probe_warnings_are_errors")
def test_modules_held_for_an_attribute_are_not_reported_as_silent() -> None:
    class Attention(nn.Module):
        """Keeps a dropout for its rate alone."""

        def __init__(self) -> None:
            super().__init__()
            self.query, self.drop = nn.Linear(4, 4), nn.Dropout(0.1)
            self.none, self.empty = nn.ModuleList(), nn.ModuleDict()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(self.query(x), self.drop.p, self.training)

    model = Attention()
    with gradprobe.attach(model, activations=True) as probe:
        model(torch.ones(2, 4)).sum().backward()
        probe.step()
    assert probe.coverage().silent == ()


@pytest.mark.usefixtures("probe_warnings_are_errors")
def test_parameter_containers_are_not_reported_as_silent() -> None:
    class Scaled(nn.Module):
        """A layer with its parameters in containers."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.scales = nn.ParameterList([nn.Parameter(torch.ones(3))])
            self.shifts = nn.ParameterDict({"one": nn.Parameter(torch.zeros(3))})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * self.scales[0] + self.shifts["one"]

    model = Scaled()
    with gradprobe.attach(model, activations=True) as probe:
        model(torch.ones(2, 3)).sum().backward()
        probe.step()
    assert list(probe.latest().activations) == ["linear"]
