"""Residual additions as modules that a probe can observe."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from inspect import getattr_static
from types import FunctionType, MethodType
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn

from gradprobe.nn.rewrite import CodeName, Replacement, Span, Unreadable, bare, name_of, read, rewritten
from gradprobe.ops.residual import residual_add, residual_add_

__all__ = ["ResidualAdd"]

# The ways a model can write an addition, as functions; the operands may be anything that Python can add.
_WRITTEN: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "+=": operator.iadd,
    "add": lambda left, right: left.add(right),
    "add_": lambda left, right: left.add_(right),
    "torch.add": torch.add,
}


class ResidualObserver(Protocol):
    """The object that a probe puts into a `ResidualAdd` to observe it; it adds in the module's place."""

    def __call__(self, x: Tensor, f: Tensor, relu: bool) -> Tensor:
        """Adds x and f as `residual_add` does."""

    def in_place(self, x: Tensor, f: Tensor, into_x: bool) -> Tensor:
        """Adds one operand into the other and returns the one written to."""

    def is_waiting(self) -> bool:
        """Returns whether the next call is observed."""


class Watcher(Protocol):
    """Observes models, and is told when `instrument` changes one."""

    def paused(self) -> AbstractContextManager[None]:
        """Returns a context in which nothing is measured: a model is run to find its residual adds."""

    def take_up(self) -> None:
        """Called when residual adds have come or gone."""


watchers: WeakSet[Watcher] = WeakSet()


@contextmanager
def watchers_paused() -> Iterator[None]:
    """Pauses all watchers."""
    with ExitStack() as pauses:
        for watcher in [*watchers]:
            pauses.enter_context(watcher.paused())
        yield


class ResidualAdd(nn.Module):
    """The addition of a residual block as a module, so that it has a name in the model.

    Args:
        relu: Whether to apply a ReLU to the sum.
        inplace: Whether to write the result into the branch's output `f`. That is safe if the branch ends in a
            convolution or batch normalisation, which does not need its output in the backward pass. (The branch's first
            layer usually still needs the shortcut `x` there.) A probe does not observe an in-place residual add.

    Example:
        >>> join = ResidualAdd(relu=True)
        >>> join(torch.tensor([1.0, -3.0]), torch.tensor([1.0, 2.0]))
        tensor([2., 0.])
        >>> join
        ResidualAdd(relu=True)
    """

    # Set while a probe is attached. A class attribute, so that modules pickled by earlier versions still load; typed in
    # a comment, since torch.jit.script takes annotations of a module's class as TorchScript types.
    observer = None  # type: ResidualObserver | None

    def __init__(self, relu: bool = False, inplace: bool = False) -> None:
        super().__init__()
        self.relu = relu
        self.inplace = inplace

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        """Adds the shortcut and the branch.

        Args:
            x: Output of the shortcut, any shape and strided layout.
            f: Output of the branch, of the same shape; overwritten if `inplace`.

        Returns:
            `x + f`, or `torch.relu(x + f)`; `f` itself if `inplace`.

        Raises:
            ArgumentError: As raised by `gradprobe.residual_add` or, if `inplace`, by `gradprobe.residual_add_(f, x)`.

        Example:
            >>> ResidualAdd()(torch.tensor([1.0]), torch.tensor([2.0]))
            tensor([3.])
        """
        if self.inplace:
            return residual_add_(f, x, self.relu)
        observer = self.observer  # read once: another thread may detach the probe
        return residual_add(x, f, self.relu) if observer is None else observer(x, f, self.relu)

    def is_observed(self) -> bool:
        """Returns whether a probe observes the next call, which then needs both operands.

        Example:
            >>> ResidualAdd().is_observed()
            False
        """
        observer = self.observer  # read once: another thread may detach the probe
        return observer is not None and observer.is_waiting()

    def extra_repr(self) -> str:
        """Returns the constructor's arguments for the module's `repr`.

        Example:
            >>> ResidualAdd().extra_repr()
            'relu=False'
        """
        return f"relu={self.relu}" + (", inplace=True" if self.inplace else "")


class InlineAdd(ResidualAdd):
    """Replaces an addition that a model writes inline; created by `instrument`.

    Attributes:
        functions: For functions outside the module that the block calls through `copy_of`, the replacements in them.

    Args:
        shortcut_first: Whether the shortcut is the left operand.
        written: How the model writes it: "+", "+=", "add", "add_" or "torch.add".

    Example:
        >>> InlineAdd(shortcut_first=True, written="+")(torch.ones(2), torch.ones(1))
        tensor([2., 2.])
    """

    def __init__(self, shortcut_first: bool, written: str) -> None:
        super().__init__()
        self.shortcut_first = shortcut_first
        self.written = written
        self.functions: dict[CodeName, dict[Span, Replacement]] = {}
        self._copies: dict[FunctionType, FunctionType] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_copies": {}}  # they add by modules of this block

    @torch.jit.unused
    def copy_of(self, called: Any, block: nn.Module) -> Any:
        """Returns the copy of a function outside the module that adds by modules of the block.

        Args:
            called: What the block calls: a function, a method, or an object with `__call__`.
            block: The module that has this one as a child.

        Returns:
            The copy; `called` itself if it is not one of `functions`.

        Example:
            >>> InlineAdd(True, "+").copy_of(len, nn.Linear(1, 1))
            <built-in function len>
        """
        if isinstance(called, FunctionType):
            return self._copy(called, block)
        if isinstance(called, partial):
            return partial(self.copy_of(called.func, block), *called.args, **called.keywords)
        bound = isinstance(called, MethodType)
        function = called.__func__ if bound else getattr_static(type(called), "__call__", None)
        if not isinstance(function, FunctionType):
            return called
        copied = self._copy(function, block)
        return called if copied is function else MethodType(copied, called.__self__ if bound else called)

    def _copy(self, function: FunctionType, block: nn.Module) -> FunctionType:
        copied = self._copies.get(function)
        if copied is None:
            if torch.compiler.is_compiling():
                return function
            replacements = self.functions.get(name_of(function.__code__))
            copied = function
            if replacements is not None:
                with suppress(Unreadable):  # its source has changed since
                    copied = rewritten(read(bare(function), is_method=False), replacements, block)
            self._copies[function] = copied
        return copied

    @torch.jit.unused  # torch.jit.script compiles the methods of the model's class, which do not call this module
    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        """Adds the way the model did, through the observer if a probe is attached.

        Args:
            x: Output of the shortcut.
            f: Output of the branch.

        Returns:
            The sum, with the strides that torch would give it; the left operand itself if the addition is in place. A
            probe observes it only if both operands are plain tensors of the same shape with at least one dimension.

        Example:
            >>> InlineAdd(shortcut_first=True, written="+")(torch.ones(2), torch.ones(2))
            tensor([2., 2.])
        """
        left, right = (x, f) if self.shortcut_first else (f, x)
        observer = self.observer  # read once: another thread may detach the probe
        if observer is None or not (_is_plain(x) and _is_plain(f) and x.shape == f.shape and x.device == f.device):
            added: Tensor = _WRITTEN[self.written](left, right)
            return added
        if self.written in ("+=", "add_"):
            return observer.in_place(x, f, into_x=self.shortcut_first)
        y = observer(x, f, self.relu)
        return y if self.shortcut_first or x.stride() == f.stride() else _restrided(y, _strides_of_sum(left, right))


def _is_plain(tensor: object) -> bool:
    """Returns whether a tensor is an ordinary strided floating-point tensor with at least one dimension."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and tensor.layout is torch.strided
        and tensor.dim() > 0
    )


def _strides_of_sum(left: Tensor, right: Tensor) -> tuple[int, ...]:
    """Returns the strides of torch's `left + right`, which depend on the order of the operands."""
    empty = [torch.empty_strided(tensor.shape, tensor.stride(), device="meta") for tensor in (left, right)]
    return (empty[0] + empty[1]).stride()


def _restrided(y: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Copies a tensor to these strides if it has others, under which later kernels might round differently."""
    if y.stride() == strides:
        return y
    return torch.empty_strided(y.shape, strides, dtype=y.dtype, device=y.device).copy_(y)
