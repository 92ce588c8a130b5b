"""Observers of signals go with their model, and are removed safely while other threads run the model."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
from helpers.inline_cases import OutsideFunction
from helpers.signal_cases import Block, net
from torch import nn

import gradprobe
from gradprobe.nn.residual import InlineAdd, ResidualAdd
from gradprobe.observers.tensor_hooks import TensorHooks

INPUTS = torch.ones(2, 3)


class InPlaceBlock(nn.Module):
    """x += F(x), observed."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.join = nn.Linear(4, 4), InlineAdd(shortcut_first=True, written="+=")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.join(x * 1, self.branch(x))


class Prompt(nn.Module):
    """Returns a parameter, which keeps the hooks of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.ones(4))

    def forward(self) -> torch.Tensor:
        return self.tokens


class WithPrompt(nn.Module):
    """Adds a prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = Prompt()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.prompt()


@pytest.mark.usefixtures("any_hooks")
@pytest.mark.parametrize("ends", ["in a step", "after a step", "with a graph"])
def test_a_probe_and_its_model_are_freed(ends: str) -> None:
    model = net(InPlaceBlock(), WithPrompt())
    probe = gradprobe.attach(model, activations=True)
    loss = model(INPUTS).sum()
    if ends != "with a graph":
        loss.backward()
    if ends == "after a step":
        probe.step()
    signals = probe._recorder._signals.observer
    assert signals is not None
    refs = [weakref.ref(one) for one in (model, model[0], model[1].join, probe, signals, signals._buffer)]
    if ends != "with a graph":
        del loss
    del model, probe, signals
    gc.collect()
    if ends == "with a graph":
        loss.backward()
        del loss
        gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)


class WithOwner(Block):
    """Its residual add and its layers know the model that they are in."""

    def __init__(self) -> None:
        super().__init__()
        for child in self.children():
            object.__setattr__(child, "owner", self)


def instrumented() -> nn.Module:
    """Adds in a copy of a function, which knows the model."""
    model = OutsideFunction(4)
    gradprobe.instrument(model, torch.ones(2, 4))
    return model


@pytest.mark.usefixtures("any_hooks")
@pytest.mark.parametrize(
    "model",
    [lambda: nn.Linear(4, 4), WithOwner, instrumented],
    ids=["a model of one layer", "layers that know the model", "a helper's copy that knows the model"],
)
def test_a_model_whose_parts_refer_to_it_is_freed(model: Callable[[], nn.Module]) -> None:
    observed = model()
    probe = gradprobe.attach(observed, activations=True)
    observed(torch.ones(2, 4)).sum().backward()
    probe.step()
    gone = weakref.ref(observed), weakref.ref(probe)
    del observed, probe
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_no_hook_is_added_to_a_leaf_after_the_removal() -> None:
    hooks, leaf = TensorHooks(), torch.ones(2, requires_grad=True)
    hooks.add(leaf, lambda gradient: None)
    hooks.remove()
    hooks.add(leaf, lambda gradient: None)  # by a forward pass that was under way in another thread
    assert not leaf._backward_hooks


def test_a_hook_that_another_thread_removes_meanwhile_does_nothing() -> None:
    model = net()
    probe = gradprobe.attach(model, activations=True)
    (hook,) = model[0]._forward_hooks.values()
    output = model[0](INPUTS)
    probe.detach()
    assert hook(model[0], (INPUTS,), output) is None  # how torch calls it once it is not known to take kwargs
    assert hook(model[0], (INPUTS,), {}, output) is None


@pytest.mark.parametrize("kind", [ResidualAdd, InlineAdd])
def test_a_residual_add_whose_observer_another_thread_removes_meanwhile(kind: type[ResidualAdd]) -> None:
    model = Block()
    with gradprobe.attach(model):
        observers = iter([model.join.observer])

    class Vanishing(kind):  # type: ignore[misc, valid-type]
        """Has an observer only when asked for the first time."""

        observer = property(lambda _: next(observers, None))

    join = Vanishing() if kind is ResidualAdd else Vanishing(shortcut_first=True, written="+")
    assert torch.equal(join(torch.ones(2), torch.ones(2)), torch.full((2,), 2.0))


STRESS = """
import sys, threading, time, warnings
import torch
from torch import nn
from gradprobe.nn import ResidualAdd
from gradprobe.observers.activations import select_modules
from gradprobe.observers.fence import Fence
from gradprobe.observers.junctions import junction_modules
from gradprobe.observers.signals import SignalObserver
from gradprobe.ops import libraries
from gradprobe.snapshot.signals import SignalTable

if sys.argv[1] == "python":
    libraries.native_hooks = lambda: (None, "switched off by a test")
warnings.simplefilter("ignore")
torch.set_num_threads(1)
sys.setswitchinterval(1e-4)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Parameter(torch.ones(8))
        self.branch, self.prompt, self.join = nn.Linear(8, 8), nn.Identity(), ResidualAdd(relu=True)
    def forward(self, x):
        return self.join(x, self.branch(x)) + self.prompt(self.tokens)

model = nn.Sequential(*[Block() for _ in range(6)])
errors, stop = [], threading.Event()

def train():
    x = torch.ones(4, 8)
    while not stop.is_set():
        try:
            model(x).sum().backward()
        except Exception as error:
            errors.append(repr(error))

threads = [threading.Thread(target=train) for _ in range(2)]
for thread in threads:
    thread.start()
end, n = time.monotonic() + float(sys.argv[2]), 0
while time.monotonic() < end:
    joined, _ = junction_modules(model)
    chosen = select_modules(model, ["*"])
    table = SignalTable(tuple(chosen), tuple(joined), ("",) * len(chosen))
    fence = Fence()
    observer = SignalObserver(table, chosen, joined, torch.device("cpu"), "auto", fence)
    rows = torch.empty(table.n_sites, 6, dtype=torch.float64)
    for k in range(3):
        time.sleep(0.001)
        observer.set_enabled(k % 2 == 1)
        observer.close(rows)
    observer.remove()
    errors += fence.failures.items()
    n += 1
stop.set()
for thread in threads:
    thread.join()
left = [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_hooks_with_kwargs)]
leaves = [p for p in model.parameters() if p._backward_hooks]
print(n, "probes;", "errors:", errors[:3], "left:", left, leaves)
sys.exit(bool(errors or left or leaves))
"""


@pytest.mark.parametrize("kind", ["native", "python"])
@pytest.mark.soak
def test_attach_and_detach_while_other_threads_run_the_model(kind: str) -> None:
    command = [sys.executable, "-c", STRESS, kind, "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert result.returncode == 0, result.stdout + result.stderr
