"""Errors of measuring activations and residual adds stay away from the training and switch off what they concern."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from helpers.modes import SeesOperators
from helpers.observed_signals import Observed, names_of, same_weights, step
from helpers.signal_cases import Block, net
from torch import nn

import gradprobe
from gradprobe.observers import junction_call, junctions
from gradprobe.observers.event_rows import PythonEventRows
from gradprobe.observers.signal_buffer import SignalBuffer
from gradprobe.ops.libraries import native_hooks

needs_native = pytest.mark.skipif(native_hooks()[0] is None, reason=f"C++ hooks: {native_hooks()[1]}")


def backward_with(change: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Copies a tensor, and changes the gradient on its way back."""

    class Function(torch.autograd.Function):
        """The identity."""

        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            return change(gradient)

    return Function.apply(x)  # type: ignore[no-any-return]


def fail(*_: object, **__: object) -> None:
    raise MemoryError("no memory for 123 bytes")


@dataclass
class Fault:
    """A planted error, and the signals that are still measured."""

    plant: Callable[[pytest.MonkeyPatch], None]
    activations: list[str]
    junctions: list[str]
    parts: list[str]


def in_write(kind: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Fails while the output of module 0 (site 0) or its gradient (site 1) is measured."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        write = SignalBuffer.write

        def failing(buffer: SignalBuffer, site: int, tensor: torch.Tensor) -> None:
            write(buffer, site, tensor)
            if site == ("output", "gradient").index(kind):
                fail()

        monkeypatch.setattr(SignalBuffer, "write", failing)

    return plant


def of_module(target: object, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(target, name, fail)


JOIN = "the residual add 1.join"
FAULTS = {
    "output": Fault(in_write("output"), ["1.branch", "2"], ["1.join"], ["the output of '0'"]),
    "gradient": Fault(in_write("gradient"), ["0", "1.branch", "2"], ["1.join"], ["the gradient at the output of '0'"]),
    "sum": Fault(of_module(junctions, "RESIDUAL_ADD_STATS"), ["0", "1.branch", "2"], [], [JOIN]),
    "gradient of the sum": Fault(
        of_module(junctions, "RESIDUAL_ADD_BACKWARD_STATS"), ["0", "1.branch", "2"], [], [JOIN]
    ),
    "branch": Fault(of_module(junctions, "RESIDUAL_BRANCH_STATS"), ["0", "1.branch", "2"], [], [JOIN]),
    "edges": Fault(of_module(junction_call, "edges_into"), ["0", "1.branch", "2"], [], [JOIN]),
    "row of the sum": Fault(of_module(SignalBuffer, "put"), ["0", "1.branch", "2"], [], [JOIN]),
}


@pytest.mark.usefixtures("python_hooks")
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_python_switches_off_one_part(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    bare, model, sound = net(nn.Linear(4, 1)), net(nn.Linear(4, 1)), net(nn.Linear(4, 1))
    expected = Observed(sound)
    step(sound, 0)
    reference = expected.close()
    assert reference is not None
    step(sound, 1)
    fault.plant(monkeypatch)
    observed = Observed(model)
    step(bare, 0), step(model, 0)
    signals = observed.close()
    assert names_of(signals) == (fault.activations, fault.junctions)
    assert signals is not None
    for activation in signals.activations.values():
        other = reference.activations[activation.name]
        assert activation.output == other.output
        assert activation.gradient == (None if name == "gradient" and activation.name == "0" else other.gradient)
    for k in range(1, 3):
        step(bare, k), step(model, k)
        assert names_of(observed.close()) == (fault.activations, fault.junctions)
    assert same_weights(model, bare)
    assert list(observed.fence.failures) == fault.parts
    assert len(observed.messages) == 1
    assert "MemoryError: no memory for 123 bytes" in observed.messages[0]
    assert observed.observer.unmeasured() == (("1.join",) if fault.parts == [JOIN] else ("0",))
    assert observed.observer.silent() == ()


@pytest.mark.usefixtures("python_hooks")
@pytest.mark.parametrize("name", FAULTS)
def test_strict_lets_the_error_through(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[name].plant(monkeypatch)
    model = net(nn.Linear(4, 1))
    observed = Observed(model, strict=True)
    with pytest.raises(MemoryError, match="no memory for 123 bytes"):
        step(model, 0)
    observed.observer.remove()


class TooLarge(nn.Module):
    """Returns one value expanded to 2**62 elements, more than any kernel has memory for the partial sums of."""

    class Function(torch.autograd.Function):
        """Passes the gradient's first element back."""

        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x.sum().expand(2**62)

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            return gradient[:1].expand(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return TooLarge.Function.apply(x)  # type: ignore[no-any-return]


class First(nn.Module):
    """Returns the first element; its gradient is expanded."""

    class Function(torch.autograd.Function):
        """As described there."""

        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x[:1].clone()

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            return gradient.expand(2**62)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return First.Function.apply(x)  # type: ignore[no-any-return]


@pytest.mark.usefixtures("any_hooks")
def test_a_tensor_that_the_kernels_have_no_memory_for() -> None:
    bare, model = net(TooLarge(), First()), net(TooLarge(), First())
    observed = Observed(model)
    for k in range(3):
        step(bare, k), step(model, k)
        assert names_of(observed.close()) == (["0", "1.branch", "3"], ["1.join"])
    assert same_weights(model, bare)
    assert observed.observer.unmeasured() == ("2",)
    assert list(observed.fence.failures) == ["the output of '2', the gradient at the output of '2'"]
    assert len(observed.messages) == 1


@pytest.mark.usefixtures("any_hooks")
def test_strict_lets_an_error_in_either_language_through() -> None:
    model = net(TooLarge(), First())
    observed = Observed(model, strict=True)
    with pytest.raises((RuntimeError, MemoryError)):
        step(model, 0)
    observed.observer.remove()


@needs_native
def test_a_fault_in_the_python_part_of_a_native_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dense(nn.Module):
        """The identity, whose gradient may be sparse."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return backward_with(torch.Tensor.to_dense, x)

    class Sparse(nn.Module):
        """The identity, with a sparse gradient, which C++ leaves to Python."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return backward_with(torch.Tensor.to_sparse, x)

    bare, model = net(Dense(), Sparse()), net(Dense(), Sparse())
    monkeypatch.setattr(SignalBuffer, "write", fail)
    observed = Observed(model)
    for k in range(2):
        step(bare, k), step(model, k)
        observed.close()
    assert same_weights(model, bare)
    assert list(observed.fence.failures) == ["the gradient at the output of '2'"]


@needs_native
@pytest.mark.filterwarnings("ignore:.*[Oo]verriding a previously registered kernel")
def test_a_fault_in_a_native_residual_add(monkeypatch: pytest.MonkeyPatch) -> None:
    class Transposed(nn.Module):
        """Its gradient has another memory order, so that C++ calls an operator to compare it with the shortcut's."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return backward_with(lambda gradient: gradient.t().contiguous().t(), x)

    bare, model = nn.Sequential(net(), Block(branch=Transposed())), nn.Sequential(net(), Block(branch=Transposed()))
    observed = Observed(model)
    step(bare, 0), step(model, 0)
    assert names_of(observed.close())[1] == ["0.1.join", "1.join"]
    library = torch.library.Library("gradprobe", "IMPL")
    library.impl("residual_branch_stats", fail, "CPU", allow_override=True)
    try:
        for k in range(1, 3):
            step(bare, k), step(model, k)
            assert names_of(observed.close())[1] == ["0.1.join"]
    finally:
        library._destroy()
    assert same_weights(model, bare)
    assert observed.observer.unmeasured() == ("1.join",)
    assert list(observed.fence.failures) == [JOIN]
    assert "no memory for 123 bytes" in observed.messages[0]


@pytest.mark.usefixtures("python_hooks")
def test_a_hundred_modules_that_fail_alike_are_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(buffer: SignalBuffer, site: int, tensor: torch.Tensor) -> None:
        raise MemoryError(f"no memory for {site + 100} bytes")

    monkeypatch.setattr(SignalBuffer, "write", failing)

    class Sometimes(nn.Module):
        """Calls its layer from the second step on."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if observed.fence.failures == {} else self.layer(x)

    model = nn.Sequential(nn.Linear(3, 4), *(nn.ReLU() for _ in range(98)), Sometimes())
    observed = Observed(model)
    for k in range(2):
        step(model, k)
        assert names_of(observed.close()) == ([], [])
        assert len(observed.observer.unmeasured()) == 99 + k
    assert len(observed.messages) == 1
    assert "the output of '0'" in observed.messages[0]
    assert "more failed" in observed.messages[0]
    assert any("99.layer" in part for part in observed.fence.failures)


@pytest.mark.usefixtures("python_hooks")
def test_the_first_calls_of_a_module_are_not_shown_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Module):
        """Calls its layer twice."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x))

    model = Twice()
    observed = Observed(model)
    step(model, 0)
    signals = observed.close()
    assert signals is not None
    assert signals.activations["layer"].output.numel == 30
    next_row, calls = PythonEventRows.next, []

    def failing(rows: PythonEventRows, site: int, numel: int, smallest_normal: float) -> torch.Tensor:
        row = next_row(rows, site, numel, smallest_normal)
        calls.append(site)
        if calls.count(0) == 2:
            fail()
        return row

    monkeypatch.setattr(PythonEventRows, "next", failing)
    step(model, 1)
    signals = observed.close()
    assert signals is not None
    assert signals.activations == {}
    assert signals.columns["norm"][0] == 0


@pytest.mark.usefixtures("python_hooks")
def test_rows_stay_consistent_if_there_is_no_memory_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = PythonEventRows(torch.device("cpu"), n_rows=2)
    rows.next(0, 1, 0.0).fill_(1.0)
    monkeypatch.setattr(PythonEventRows, "_grow", fail)
    with pytest.raises(MemoryError):
        rows.next(1, 1, 0.0)
    sites, numels, smallest_normals, pool = rows.events()
    assert (len(sites), len(numels), len(smallest_normals)) == (1, 1, 1)
    assert len(pool) >= 2


@pytest.mark.usefixtures("any_hooks")
def test_a_fault_at_the_end_of_a_step_switches_everything_off(monkeypatch: pytest.MonkeyPatch) -> None:
    bare, model = net(), net()
    observed = Observed(model)
    monkeypatch.setattr(SignalBuffer, "_plan_of", fail)
    for k in range(2):
        step(bare, k), step(model, k)
        assert observed.close() is None
        observed.observer.set_enabled(True)
    assert same_weights(model, bare)
    assert observed.observer.unmeasured() == ("0", "1.branch", "1.join")
    assert len(observed.messages) == 1
    assert not any(module._forward_hooks for module in model.modules())
    assert model[1].join.observer is None


@pytest.mark.usefixtures("python_hooks")
def test_an_interruption_by_the_user_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model = net()
    observed = Observed(model)
    monkeypatch.setattr(SignalBuffer, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        step(model, 0)
    observed.close()
    assert observed.fence.failures == {}


@pytest.mark.usefixtures("any_hooks")
def test_an_error_of_the_users_own_is_raised() -> None:
    """A checkpoint ends its recomputation with an error out of the hooks on saved tensors."""

    class Stop(Exception):
        """Raised on purpose."""

    def stop(_: object) -> None:
        raise Stop

    model = net()
    observed = Observed(model)
    x = torch.ones(2, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(stop, lambda saved: saved), pytest.raises(Stop):
        model[1].join(x, x * 1)
    assert observed.fence.failures == {}
    observed.observer.remove()


@pytest.mark.usefixtures("any_hooks")
def test_an_output_that_cannot_be_looked_into() -> None:
    class Lazy(dict):  # type: ignore[type-arg]
        """Computes its values on access, which fails."""

        def values(self):  # type: ignore[no-untyped-def]
            raise RuntimeError("not computed yet")

    class Odd(nn.Module):
        """Returns such a mapping beside its result."""

        def forward(self, x: torch.Tensor) -> tuple[Lazy, torch.Tensor]:
            return Lazy(), x * 2

    class Model(nn.Module):
        """Uses only the result."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.odd = nn.Linear(3, 3), Odd()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.odd(self.layer(x))[1]

    bare, model = Model(), Model()
    observed = Observed(model)
    for k in range(2):
        step(bare, k), step(model, k)
        assert names_of(observed.close())[0] == ["layer"]
    assert same_weights(model, bare)
    assert observed.observer.unmeasured() == ("odd",)


@pytest.mark.usefixtures("any_hooks")
@pytest.mark.parametrize("dtype", [torch.complex32, torch.float8_e5m2fnuz, torch.complex64, torch.float64])
def test_an_output_of_an_unusual_dtype(dtype: torch.dtype) -> None:
    class Cast(nn.Module):
        """Returns its input in another dtype."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(dtype)

    class Back(nn.Module):
        """Uses the first column."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (torch.view_as_real(x)[..., 0] if x.is_complex() else x).float()

    bare, model = net(Cast(), Back()), net(Cast(), Back())
    observed = Observed(model)
    for k in range(2):
        step(bare, k), step(model, k)
        names = names_of(observed.close())[0]
        is_measured = "2" in names
        assert names == [name for name in ("0", "1.branch", "2", "3") if name != "2" or is_measured]
    assert same_weights(model, bare)
    assert observed.observer.unmeasured() == (() if is_measured else ("2",))


class Strange(SeesOperators):
    """A dispatch mode that refuses the operators of gradprobe that measure."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "gradprobe" and "stats" in str(func):
            raise NotImplementedError(f"{func} is not known here")
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("any_hooks")
def test_a_mode_that_refuses_the_operators() -> None:
    bare, model = net(), net()
    observed = Observed(model)
    for k in range(2):
        step(bare, k)
        with Strange():
            step(model, k)
        assert names_of(observed.close())[1] == []
    assert same_weights(model, bare)
    assert "1.join" in observed.observer.unmeasured()


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_fault_in_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    bare, model = net(), net()
    observed = Observed(model)
    compiled, plain = torch.compile(model, backend="aot_eager"), torch.compile(bare, backend="aot_eager")
    monkeypatch.setattr(SignalBuffer, "write_uncached", fail)
    for k in range(2):
        step(plain, k), step(compiled, k)
        assert names_of(observed.close()) == ([], [])
    assert same_weights(model, bare)
    assert observed.observer.unmeasured() == ("0", "1.branch", "1.join")
    assert len(observed.messages) == 1


@pytest.mark.usefixtures("any_hooks")
def test_a_part_stays_off_when_the_rows_move() -> None:
    buffer = SignalBuffer(9, torch.device("cpu"), "auto", first_junction_site=2)
    buffer.fail(0, MemoryError())
    buffer.fail(5, MemoryError())
    buffer._move_to(torch.device("cpu"), 4)
    assert sorted(buffer.off_sites()) == [0, *range(2, 9)]
    assert [site for site, _ in buffer.take_errors()] == [0, 2]


@pytest.fixture(autouse=True)
def no_other_warning() -> Iterator[None]:
    """The messages of a fence are collected by `Observed.close`; nothing else is reported."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", gradprobe.GradprobeWarning)
        yield


@pytest.fixture(autouse=True, scope="module")
def first_products() -> None:
    """The first matrix products of a process may round otherwise than later ones, with or without a probe."""
    step(net(nn.Linear(4, 1)), 0)
