"""Decides when a step ends: an optimizer steps, the gradient scaler skips its step, or the user closes it."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from gradprobe.observers.fence import Fence
from gradprobe.observers.gradient_observer import GradientObserver
from gradprobe.observers.parameters import stepped_by
from gradprobe.observers.process_hooks import ProcessHooks

_Args = tuple[Any, ...]
_Kwargs = dict[str, Any]
_Arguments = tuple[_Args, _Kwargs]

_RIVAL_SHARE = 0.1  # of the model's size; a temperature or a bias with an optimizer of its own is none

_STEP = Optimizer.profile_hook_step(lambda _: None).__code__  # of every optimizer's step, around the class's own
_SCALER_STEP = GradScaler.step.__code__


class Recorder(Protocol):
    """What is told of the boundaries."""

    @property
    def has_all_losses(self) -> bool:
        """Whether at least one loss per backward pass was given of the step closed last, before it was closed."""

    def settle(self) -> None:
        """Closes what has ended unnoticed."""

    def follow(self) -> None:
        """Follows the model if it has other parameters than before."""

    def stop(self) -> None:
        """Stops measuring, for good."""

    def close(self, optimizer: Optimizer | None, loss: torch.Tensor | float | None = None) -> bool:
        """Closes the open step; returns whether it was closed."""

    def request(self, loss: torch.Tensor | float | None) -> None:
        """Takes a loss of the open step, which an optimizer is expected to close."""

    def add_loss(self, loss: torch.Tensor | float) -> None:
        """Adds a loss to the step that was closed last."""

    def note_stepped(self) -> None:
        """Notes that the step that the user has closed was not skipped."""

    def note_scaler(self, optimizer: Optimizer, scaler: GradScaler | None) -> None:
        """Called before an optimizer closes a step, with the gradient scaler that calls its step, if any does."""

    def note_other_step(self) -> None:
        """Called before and after the step of an optimizer that was not given and steps the model."""

    def end_closure(self, optimizer: Optimizer) -> None:
        """Called each time the closure of an optimizer's step returns."""

    def around(self, optimizer: Optimizer, is_after: bool, is_open: bool) -> None:
        """Called just before and after each step of an optimizer; `is_open`: the probe's step is not closed yet."""


class StepBoundaries:
    """Watches the steps of all optimizers of the process, and picks those that step the model's parameters.

    Args:
        given: The optimizers that close a step; empty for any that steps a parameter of the model.
        observer: Knows the parameters, and whether a backward pass has run.
        recorder: Is told. Not kept alive.
        fence: Takes the errors.
        is_in_backward: An optimizer that is given and steps inside a backward pass closes a step, too.
    """

    def __init__(
        self,
        given: Sequence[Optimizer],
        observer: GradientObserver,
        recorder: Recorder,
        fence: Fence,
        is_in_backward: bool,
    ) -> None:
        self._given = [weakref.ref(optimizer) for optimizer in given]
        self._observer = observer
        self._recorder = weakref.ref(recorder)
        self._fence = fence
        self._is_in_backward = is_in_backward and len(given) > 0
        self._concerned: weakref.WeakKeyDictionary[Optimizer, tuple[int, bool]] = weakref.WeakKeyDictionary()
        self._closed_by: Literal["nobody", "optimizer", "user"] = "nobody"
        self._closer: weakref.ref[Optimizer] | None = None
        self._others: set[str] = set()  # optimizers that step the model and were not given
        self.optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet(given)  # given, or seen to step the model
        self.has_stepped = False  # an optimizer has closed a step
        self.is_contested = False  # an optimizer of other parameters has stepped since the step before

        self._hooks: ProcessHooks | None = None

    def watch(self) -> None:
        """Puts hooks on the steps of all optimizers."""
        me, fence = weakref.ref(self), self._fence

        def before(optimizer: Optimizer, args: _Args, kwargs: _Kwargs) -> _Arguments | None:
            boundaries = me()
            if boundaries is not None:
                with fence.around("a step", boundaries.stop):
                    return boundaries._on_step(optimizer, args, kwargs, is_after=False)
            return None

        def after(optimizer: Optimizer, args: _Args, kwargs: _Kwargs) -> None:
            boundaries = me()
            if boundaries is not None:
                with fence.around("a step", boundaries.stop):
                    boundaries._on_step(optimizer, args, kwargs, is_after=True)

        handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
        self._hooks = ProcessHooks(self, handles)

    def close_by_user(self, loss: torch.Tensor | float | None) -> None:
        """Closes a step that no optimizer closes, and otherwise only adds the loss.

        Args:
            loss: The loss of the step.
        """
        recorder = self._recorder()
        if recorder is None:
            return
        recorder.settle()
        has_fired = self._observer.has_fired()
        will_step = self.has_stepped or any(known() is not None for known in self._given)
        # FSDP2 fires no hook in a micro-batch without synchronisation; a replayed graph has no other end of a step.
        may_be_silent = self._observer.hides_writes
        if self._closed_by == "optimizer" and not has_fired and not (may_be_silent and recorder.has_all_losses):
            self._closed_by = "nobody"
            if loss is not None:
                recorder.add_loss(loss)
        elif will_step and (has_fired or may_be_silent):
            recorder.request(loss)
        elif recorder.close(None, loss):
            self._closed_by = "user"

    def note_skipped(self) -> None:
        """Notes that the step has been closed in place of the optimizer, whose step a scaler has skipped."""
        self._closed_by = "optimizer"

    def stop(self) -> None:
        """Stops measuring, for good."""
        recorder = self._recorder()
        if recorder is not None:
            recorder.stop()

    def forget_parameters(self) -> None:
        """Notes that the model has other parameters than before."""
        self._concerned.clear()

    def why_open(self) -> str:
        """Says why no step has been closed for a long time."""
        given = [type(optimizer).__name__ for known in self._given if (optimizer := known()) is not None]
        if self._given:
            others = f"; the model is stepped by {', '.join(sorted(self._others))}" if self._others else ""
            return f"the optimizer given to attach ({', '.join(given) or 'gone'}) has not stepped{others}"
        return "no optimizer has stepped the model's parameters, and Probe.step() was not called"

    def remove(self) -> None:
        """Removes the hooks, for good."""
        if self._hooks is not None:
            self._hooks.remove()

    def _on_step(self, optimizer: Optimizer, args: _Args, kwargs: _Kwargs, is_after: bool) -> _Arguments | None:
        recorder = self._recorder()
        if recorder is None:
            return None
        with self._fence.around("a step", self.stop):  # the step ends in any case
            recorder.follow()
        if not self._concerns(optimizer):
            self.is_contested = self.is_contested or self._is_rival(optimizer)
            if self._concerned[optimizer][1]:
                recorder.note_other_step()
            return None
        if self._only_initialises(optimizer):
            return None
        is_nested, scaler = self._callers()
        if is_nested or (torch._C._current_graph_task_id() != -1 and not self._is_in_backward):
            return None
        # With a closure, backward runs inside the step: gradients exist only afterwards.
        has_closure = any(callable(value) for value in (*args[1:], *kwargs.values()))
        if has_closure == is_after:
            self._close(recorder, optimizer, scaler)
        recorder.around(optimizer, is_after, has_closure and not is_after)
        if is_after or not has_closure:
            return None
        told = partial(self._with_end, optimizer)
        return (args[0], *(told(value) for value in args[1:])), {key: told(value) for key, value in kwargs.items()}

    def _with_end(self, optimizer: Optimizer, value: Any) -> Any:
        """Returns a closure that tells the recorder when it returns; any other value as it is."""
        if not callable(value):
            return value

        @functools.wraps(value)
        def closure(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)
            recorder = self._recorder()
            if recorder is not None:
                with self._fence.around("a step", self.stop):
                    recorder.end_closure(optimizer)
            return result

        return closure

    def _close(self, recorder: Recorder, optimizer: Optimizer, scaler: GradScaler | None) -> None:
        is_new = self._observer.has_fired()
        if not is_new and self._closed_by == "user":
            recorder.note_stepped()
            self._closed_by, self.has_stepped = "nobody", True
            return
        if not is_new and self.has_stepped and self._closer is not None and self._closer() is not optimizer:
            return  # another optimizer of the same step
        self.is_contested = self.is_contested or (
            is_new and self._closer is not None and self._closer() is not optimizer
        )
        self._closer = weakref.ref(optimizer)
        recorder.note_scaler(optimizer, scaler)
        if recorder.close(optimizer):
            self._closed_by, self.has_stepped = "optimizer", True

    def _concerns(self, optimizer: Optimizer) -> bool:
        if any(known() is optimizer for known in self._given):
            return True
        n_parameters = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._concerned.get(optimizer)
        if known is None or known[0] != n_parameters:
            known = n_parameters, any(stepped_by(optimizer, self._observer.parameters()))
            self._concerned[optimizer] = known
        if known[1] and self._given:
            self._others.add(type(optimizer).__name__)
        elif known[1]:
            self.optimizers.add(optimizer)
        return known[1] and not self._given

    def _is_rival(self, optimizer: Optimizer) -> bool:
        """Returns whether an optimizer steps none of the model's parameters, but many others."""
        known = self._concerned.get(optimizer)
        if known is None or known[1]:
            return False
        others = sum(each.numel() for group in optimizer.param_groups for each in group["params"])
        own = sum(each.numel() for each in self._observer.parameters() if each is not None)
        return bool(others >= _RIVAL_SHARE * own)

    def _only_initialises(self, optimizer: Optimizer) -> bool:
        """Returns whether a step only makes the optimizer's state, as before a checkpoint is loaded into it.

        `torch.distributed.checkpoint` then steps on zero gradients with a learning rate of zero.
        """
        if self._observer.has_fired():
            return False
        rates = [group.get("lr") for group in optimizer.param_groups]
        are_known = all(isinstance(rate, float) or (isinstance(rate, torch.Tensor) and rate.is_cpu) for rate in rates)
        return are_known and not any(bool(rate) for rate in rates)

    def _callers(self) -> tuple[bool, GradScaler | None]:
        """Returns whether the step runs inside another one of the model, and the gradient scaler that calls it.

        The step of a subclass or a wrapper calls that of its parent or of the optimizer inside, with hooks of its own.
        The call stack tells, because a step that raises never reaches its post hook.
        """
        scaler, n_steps = None, 0
        frame = sys._getframe(2)
        while frame.f_back is not None:
            frame = frame.f_back
            if frame.f_code is _STEP:
                n_steps += 1
                if n_steps > 1 and self._concerns(frame.f_locals["self"]):
                    return True, None
            elif frame.f_code is _SCALER_STEP:
                scaler = frame.f_locals["self"]
        return False, scaler
