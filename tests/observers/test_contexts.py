"""Signals are observed, rightly or not at all, whatever context attaches a probe or runs the model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from helpers.modes import SeesFunctions, SeesOperators, default_dtype, deterministic
from helpers.observed_signals import Observed, same_weights, step
from helpers.signal_cases import net
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from gradprobe.snapshot.signals import Activation, Junction, Signals

pytestmark = pytest.mark.usefixtures("any_rows")


CREATION: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "default device": lambda: torch.device("meta"),
    "half": lambda: default_dtype(torch.float16),
    "double": lambda: default_dtype(torch.float64),
    "deterministic": deterministic,
    "function mode": SeesFunctions,
    "dispatch mode": SeesOperators,
}
RUNNING = CREATION | {
    "flop counter": lambda: FlopCounterMode(display=False),
    "profiler": torch.profiler.profile,
    "anomaly": lambda: torch.autograd.detect_anomaly(check_nan=False),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "saved on the host": torch.autograd.graph.save_on_cpu,
}
del RUNNING["inference mode"], RUNNING["no grad"]
BATCH = torch.randn(5, 3, generator=torch.Generator().manual_seed(3))


def numbers(signals: Signals | None) -> tuple[list[Activation], list[Junction]]:
    assert signals is not None
    assert signals.activations
    assert signals.junctions
    return list(signals.activations.values()), list(signals.junctions.values())


@pytest.fixture(scope="module")
def expected() -> tuple[list[Activation], list[Junction]]:
    step(net(), 0)  # the first matrix products of a process may round otherwise
    model = net()
    observed = Observed(model, strict=True)
    step(model, 0, BATCH)
    return numbers(observed.close())


@pytest.mark.parametrize("name", CREATION)
@pytest.mark.parametrize("n_calls", [1, 40], ids=["", "growing"])
def test_attached_inside(name: str, n_calls: int, expected: tuple[list[Activation], list[Junction]]) -> None:
    model = net()
    with CREATION[name]():
        observed = Observed(model, strict=True)
    for _ in range(n_calls - 1):
        model(BATCH)
    if n_calls > 1:
        observed.close()
    step(model, 0, BATCH)
    assert numbers(observed.close()) == expected


@pytest.mark.parametrize("name", RUNNING)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_run_inside(name: str, expected: tuple[list[Activation], list[Junction]]) -> None:
    bare, model = net(), net()
    observed = Observed(model, strict=True)
    for one in (bare, model):
        with RUNNING[name]():
            loss = one(BATCH).square().sum()
            loss.backward()
    if name == "autocast":  # its layers compute in another dtype
        numbers(observed.close())
    else:
        with RUNNING[name]() if name != "default device" else nullcontext():
            closed = observed.close()
        assert numbers(closed) == expected
    for parameter, other in zip(bare.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


def test_operations_counted_are_those_of_the_model() -> None:
    counts = []
    for probed in (False, True):
        model = net()
        observed = Observed(model, strict=True) if probed else None
        with FlopCounterMode(display=False) as counter:
            step(model, 0)
        counts.append(counter.get_total_flops())
        if observed is not None:
            observed.observer.remove()
    assert counts[0] == counts[1] > 0


TRANSFORMS: dict[str, Callable[[nn.Module, torch.Tensor], object]] = {
    "grad": lambda model, x: grad(lambda p: functional_call(model, p, (x,)).sum())(dict(model.named_parameters())),
    "vmap": lambda model, x: vmap(model)(x),
    "vmap of grad": lambda model, x: vmap(grad(lambda one: model(one).sum()))(x),
    "jvp": lambda model, x: jvp(model, (x,), (x,)),
    "jacrev": lambda model, x: jacrev(model)(x),
    "hessian": lambda model, x: hessian(lambda one: model(one).square().sum())(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_function_transforms_are_not_observed(name: str, expected: tuple[list[Activation], list[Junction]]) -> None:
    model = net()
    observed = Observed(model, strict=True)
    result = TRANSFORMS[name](model, BATCH)
    assert observed.observer._buffer.n_events == 0
    bare = TRANSFORMS[name](net(), BATCH)
    flat, flat_bare = torch.utils._pytree.tree_leaves(result), torch.utils._pytree.tree_leaves(bare)
    assert all(torch.equal(a, b) for a, b in zip(flat, flat_bare, strict=True))
    step(model, 0, BATCH)
    assert numbers(observed.close()) == expected


@pytest.mark.parametrize("by", ["parameter", "output", "accumulated"])
def test_attached_in_a_hook(by: str, expected: tuple[list[Activation], list[Junction]]) -> None:
    bare, model = net(), net()
    made: list[Observed] = []

    def attach(*_: object) -> None:
        if not made:
            made.append(Observed(model, strict=True))

    if by == "parameter":
        model[1].branch.weight.register_hook(attach)
    elif by == "accumulated":
        model[1].branch.weight.register_post_accumulate_grad_hook(attach)
    out = model(BATCH)
    if by == "output":
        out.register_hook(attach)
    out.square().sum().backward()
    bare(BATCH).square().sum().backward()
    assert made[0].close() is None  # the forward pass was over
    for parameter, other in zip(bare.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)
        parameter.grad = other.grad = None
    step(model, 0, BATCH)
    step(bare, 0, BATCH)
    assert numbers(made[0].close()) == expected
    assert same_weights(model, bare)
