"""The C++ hooks on gradients: calls that run while hooks come and go, and backward passes that end with an error."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from helpers.probe_cases import loss_of, mlp, norms_of, true_norms

import gradprobe
from gradprobe.ops import libraries

NATIVE = libraries.native_hooks()[0]

pytestmark = pytest.mark.skipif(NATIVE is None, reason="needs the C++ hooks")


def hooks_on(parameter: torch.Tensor, on_gradient: Any = None) -> Any:
    assert NATIVE is not None
    return NATIVE.GradientHooks([parameter], [], None, on_gradient)


@pytest.mark.parametrize("outer_first", [True, False])
def test_users_hook_runs_although_all_around_it_are_removed_meanwhile(outer_first: bool) -> None:
    parameter = torch.ones(3, requires_grad=True)
    calls = []
    parameter.register_post_accumulate_grad_hook(lambda _: calls.append(1))
    inner = hooks_on(parameter)
    middle = hooks_on(parameter)

    def remove(k: int, gradient: torch.Tensor) -> None:
        for each in (outer, middle, inner) if outer_first else (inner, middle, outer):
            each.remove()

    outer = hooks_on(parameter, remove)
    for _ in range(2):
        parameter.sum().backward()
    assert calls == [1, 1]
    assert not inner.has_fired()


def test_users_first_hook_is_put_on_while_ours_runs() -> None:
    """Torch frees the hook that was there before, in the middle of its call."""
    parameter = torch.ones(3, requires_grad=True)
    calls: list[str] = []

    def register(k: int, gradient: torch.Tensor) -> None:
        if not calls:
            parameter.register_post_accumulate_grad_hook(lambda _: calls.append("user's"))
        calls.append("ours")

    hooks = hooks_on(parameter, register)
    for _ in range(2):
        parameter.sum().backward()
    assert calls[-2:] == ["ours", "user's"]
    hooks.remove()


@pytest.mark.soak
def test_no_call_of_a_users_hook_is_lost_beside_hooks_that_come_and_go() -> None:
    program = """
    import sys, threading, time, torch
    from gradprobe.ops import libraries
    native = libraries.native_hooks()[0]
    sys.setswitchinterval(1e-4)
    parameters = [torch.ones(2, requires_grad=True) for _ in range(100)]
    calls, passes, stop = [0], 0, threading.Event()

    def count(parameter):
        calls[0] += 1

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(count)

    def come_and_go():
        while not stop.is_set():
            hooks = [native.GradientHooks(parameters, [], None, None) for _ in range(2)]
            time.sleep(1e-4)
            for each in hooks:
                each.remove()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    end = time.monotonic() + 2
    while time.monotonic() < end:
        sum(parameter.sum() for parameter in parameters).backward()
        passes += 1
    stop.set()
    thread.join()
    native.free_removed_hooks()
    sys.exit(calls[0] != 100 * passes)
    """
    done = run(program)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("when", ["auto", "backward", "hook"])
@pytest.mark.parametrize("fails_in", ["hook", "user's hook", "function"])
def test_a_backward_pass_that_fails(when: Any, fails_in: str) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError("planted")

    def fail(_: torch.Tensor) -> None:
        raise ArithmeticError("planted")

    model = mlp()
    with gradprobe.attach(model, when=when, activations=True, strict=True) as probe:
        for _ in range(3):
            if fails_in == "function":
                loss = model[2:](Fails.apply(model[:2](torch.ones(2, 6)))).sum()
                handle = None
            else:
                weight = model[0].weight
                add = weight.register_hook if fails_in == "hook" else weight.register_post_accumulate_grad_hook
                handle = add(fail)
                loss = loss_of(model)
            with pytest.raises(ArithmeticError, match="planted"):
                loss.backward()
            if handle is not None:
                handle.remove()
            del loss
            model.zero_grad()
            loss_of(model).backward()
            truth = true_norms(model)
            probe.step()
            assert norms_of(probe.latest()) == pytest.approx(truth, rel=1e-6)
            model.zero_grad()
        assert len(probe.history()) == 3


def test_a_probe_is_removed_by_a_backward_pass_that_fails() -> None:
    model = mlp()
    probe = gradprobe.attach(model, activations=True, strict=True)

    def fail(_: torch.Tensor) -> None:
        probe.detach()
        raise ArithmeticError("planted")

    handle = model[2].weight.register_post_accumulate_grad_hook(fail)
    with pytest.raises(ArithmeticError, match="planted"):
        loss_of(model).backward()
    handle.remove()
    loss_of(model).backward()
    assert probe.history() == []


@pytest.mark.soak
def test_models_that_two_threads_share_and_drop() -> None:
    program = """
    import sys, threading, time, torch, gradprobe
    from torch import nn
    from gradprobe.nn import ResidualAdd
    from gradprobe.ops import libraries
    torch.set_num_threads(1)
    errors = []

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch, self.join = nn.Linear(8, 8), ResidualAdd()

        def forward(self, x):
            return self.join(x, self.branch(x))

    def train(model):
        try:
            for k in range(4):
                loss = model(torch.ones(4, 8)).sum()
                loss.backward(retain_graph=k % 2 == 1)
                if k % 2 == 1:
                    loss.backward()
        except BaseException as error:
            errors.append(error)

    end = time.monotonic() + 2
    while time.monotonic() < end:
        model = nn.Sequential(*[Block() for _ in range(4)])
        probes = [gradprobe.attach(model, activations=True), gradprobe.attach(model[1], when="hook")]
        threads = [threading.Thread(target=train, args=(model,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.002)
        probes[0].detach()
        del model, probes, thread
        for k in range(2):
            threads[k].join()
        del threads
        libraries.native_hooks()[0].free_removed_hooks()
    print(errors[:3], file=sys.stderr)
    sys.exit(bool(errors))
    """
    done = run(program)
    assert done.returncode == 0, done.stderr


@pytest.mark.soak
def test_the_interpreter_ends_while_a_thread_is_in_a_backward_pass() -> None:
    """Torch itself may end with an abort then: its own guard takes the GIL while it unwinds."""
    program = """
    import sys, threading, time, torch, gradprobe
    from torch import nn
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(30)])
    started = threading.Event()
    model[0].weight.register_hook(lambda _: started.set())
    probe = gradprobe.attach(model, activations=True, when=sys.argv[1])
    detached = sys.argv[2] == "detached"

    def train():
        while True:
            model(torch.ones(4, 8)).sum().backward()

    threading.Thread(target=train, daemon=True).start()
    started.wait()
    if detached:
        probe.detach()
    """
    for when, state in (("auto", "attached"), ("hook", "attached"), ("auto", "detached")):
        done = run(program, when, state)
        assert done.returncode in (0, -6), done.stderr  # not a segmentation fault


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
