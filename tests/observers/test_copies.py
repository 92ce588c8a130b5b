"""Copied, pickled and converted models: they work without a probe and carry no hook of one."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.signal_cases import net
from torch import nn
from torch.optim.swa_utils import AveragedModel

import gradprobe

INPUTS = torch.ones(2, 3)


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def probe_on(model: nn.Module, state: str) -> gradprobe.Probe:
    """Attaches a probe, and brings the model's hooks into a state."""
    probe = gradprobe.attach(model, activations=True, every=2)
    if state != "not due":
        return probe
    model(INPUTS).sum().backward()
    probe.step()
    assert not any(module._forward_hooks for module in model.modules())
    return probe


def entries(model: nn.Module) -> list[object]:
    tables = [(module._forward_hooks, module._forward_hooks_with_kwargs) for module in model.modules()]
    return [entry for both in tables for table in both for entry in table.items()]


STATES = pytest.mark.parametrize("state", ["due", "not due"])


@STATES
@pytest.mark.parametrize("of", ["the model", "a dictionary", "an average", "a layer"])
def test_a_deep_copy_has_no_hook(of: str, state: str) -> None:
    model = net(nn.ReLU())
    probe = probe_on(model, state)
    before = entries(model)
    copies: dict[str, Callable[[], nn.Module]] = {
        "the model": lambda: copy.deepcopy(model),
        "a dictionary": lambda: copy.deepcopy({"net": [model], "probed": model})["net"][0],
        "an average": lambda: AveragedModel(model).module,
        "a layer": lambda: copy.deepcopy(model[0]),
    }
    clone = copies[of]()
    assert entries(clone) == []
    assert all(getattr(module, "observer", None) is None for module in clone.modules())
    assert entries(model) == before
    clone(INPUTS).sum().backward()
    model(INPUTS).sum().backward()
    probe.step()
    assert probe.latest().activations["0"].gradient.numel == 8  # 2 rows of 4: the copy is not observed
    probe.detach()
    assert entries(model) == []


def test_other_hooks_stay_in_a_deep_copy() -> None:
    model, calls = layers(), []
    model[0].register_forward_hook(lambda *_: calls.append("before"))
    with gradprobe.attach(model, activations=True):
        model[0].register_forward_hook(lambda module, args, kwargs, output: calls.append("after"), with_kwargs=True)
        clone = copy.deepcopy(model)
    clone(INPUTS)
    assert calls == ["before", "after"]
    assert len(entries(clone)) == 3


def test_a_copy_can_be_probed_by_itself() -> None:
    model = net()
    probe = gradprobe.attach(model, activations=True)
    clone = copy.deepcopy(model)
    other = gradprobe.attach(clone, activations=True)
    for one in (model, clone):
        one(INPUTS).sum().backward()
    probe.step(), other.step()
    assert probe.latest().activations == other.latest().activations
    assert probe.latest().junctions == other.latest().junctions


LOAD = """
import sys
sys.modules["gradprobe"] = None
import torch
ones = torch.ones(2, 3)
expected = torch.load(sys.argv[1], weights_only=True)
for path in sys.argv[2:]:
    model = torch.load(path, weights_only=False)
    seen = []
    for _ in range(40):  # as many as there are numbers of hooks to run into
        model[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert torch.equal(model(ones), expected)
    assert len(seen) == 40, seen
    model(ones).sum().backward()
"""


def test_a_saved_model_loads_without_gradprobe(tmp_path: Path) -> None:
    model = layers()
    torch.save(model(INPUTS).detach(), tmp_path / "expected.pt")
    for state in ("due", "not due"):
        with probe_on(model, state):
            torch.save(model, tmp_path / f"{state}.pt")
    paths = [str(tmp_path / name) for name in ("expected.pt", "due.pt", "not due.pt")]
    result = subprocess.run([sys.executable, "-c", LOAD, *paths], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@STATES
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_model_is_not_observed(state: str, protocol: int) -> None:
    model = net()
    with probe_on(model, state) as probe:
        clone = pickle.loads(pickle.dumps(model, protocol))
        clone(INPUTS).sum().backward()
        model(INPUTS).sum().backward()
        probe.step()
        assert probe.latest().activations["0"].gradient.numel == 8  # 2 rows of 4: the copy is not observed
    assert torch.equal(clone(INPUTS), model(INPUTS))
    assert clone[1].join.observer is None


def test_a_pickle_names_nothing_of_a_probe() -> None:
    model = layers()
    with gradprobe.attach(model, activations=True):
        stream = io.BytesIO()
        torch.save(model, stream)
        assert b"gradprobe" not in pickle.dumps(model)
        assert b"gradprobe" not in stream.getvalue()


CONVERSIONS: dict[str, Callable[[nn.Module], Any]] = {
    "traced": lambda model: torch.jit.trace(model, INPUTS),
    "symbolically traced": torch.fx.symbolic_trace,
    "exported": lambda model: torch.export.export(model, (INPUTS,)).module(),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_converted_model_is_that_of_the_bare_one(name: str) -> None:
    model = layers()
    bare = CONVERSIONS[name](layers())
    with gradprobe.attach(model, activations=True):
        converted = CONVERSIONS[name](model)
    assert torch.equal(converted(INPUTS), bare(INPUTS))
    graph = converted.graph
    assert "gradprobe" not in str(graph)
    assert len(list(graph.nodes() if name == "traced" else graph.nodes)) == len(
        list(bare.graph.nodes() if name == "traced" else bare.graph.nodes)
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_a_model_is_scripted_while_the_probe_is_paused() -> None:
    model = layers()
    with gradprobe.attach(model, activations=True) as probe:
        with probe.paused():
            scripted = torch.jit.script(model)
        assert torch.equal(scripted(INPUTS), model(INPUTS))
        model(INPUTS).sum().backward()
        probe.step()
        assert list(probe.latest().activations) == ["0", "1", "2"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_a_model_without_observed_activations_is_scripted() -> None:
    model = layers()
    with gradprobe.attach(model):
        assert torch.equal(torch.jit.script(model)(INPUTS), model(INPUTS))
