"""The options of `attach`, and checks of user input. Errors name the argument, what was needed and what was given."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import torch
from torch import nn

from gradprobe.errors import ArgumentError
from gradprobe.observers.activations import Selection
from gradprobe.snapshot.export import strict

if TYPE_CHECKING:
    from gradprobe.diagnosis.finding import Finding
    from gradprobe.observers.agreement import ProcessGroups
    from gradprobe.sinks.sink import Sink

When = Literal["auto", "step", "backward", "hook"]
WHEN_CHOICES: tuple[When, ...] = ("auto", "step", "backward", "hook")


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `attach`, which describes them.

    Raises:
        ArgumentError: An option is invalid.
    """

    optimizer: object
    params: bool
    activations: Selection
    junctions: bool
    updates: bool
    every: int
    activations_every: int
    updates_every: int
    capacity: int
    backend: str
    when: When
    grad_scaler: object
    process_group: ProcessGroups = None
    reduce_activations: bool = False
    strict: bool = False
    log_dir: str | os.PathLike[str] | None = None
    sinks: Sequence[Sink] = ()
    on_finding: Callable[[Finding], object] | None = None
    start_step: int = 0
    magnitudes: bool = False
    magnitudes_every: int = 100

    def __post_init__(self) -> None:
        if self.params is not True:
            raise ArgumentError(
                f"params: needed True, since the gradients of parameters mark the steps, got {self.params!r}"
            )
        for name in ("junctions", "updates", "magnitudes", "reduce_activations", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(f"{name}: needed True or False, got {getattr(self, name)!r}")
        for name in ("every", "activations_every", "updates_every", "magnitudes_every", "capacity"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name}: needed an integer of at least 1, got {value!r}")
        start = self.start_step
        if isinstance(start, bool) or not isinstance(start, int) or start < 0:
            raise ArgumentError(f"start_step: needed an integer of at least 0, got {start!r}")
        self._check_stream()
        if self.when not in WHEN_CHOICES:
            raise ArgumentError(f"when: needed one of {', '.join(WHEN_CHOICES)}, got {self.when!r}")
        self._check_process_group()
        _ = self.optimizers, self.grad_scalers  # raises if one is invalid

    def common(self, signals: Sequence[str]) -> dict[str, object]:
        """Returns what must be the same on all ranks that reduce their numbers together.

        Args:
            signals: Names of the activations and residual adds that are reduced.
        """
        digest = hashlib.sha256(repr(tuple(signals)).encode()).hexdigest()[:16]
        names = ("every", "updates", "updates_every", "magnitudes", "reduce_activations", "start_step")
        common: dict[str, object] = {name: getattr(self, name) for name in names}
        if self.reduce_activations:
            common |= {"activations": digest, "activations_every": self.activations_every}
        if self.updates:  # each step of each optimizer takes part
            common["optimizers"] = len(self.optimizers)
        return common

    @property
    def has_stream(self) -> bool:
        """Whether finished steps are handed on as they come."""
        return self.log_dir is not None or len(self.sinks) > 0 or self.on_finding is not None

    def described(self) -> dict[str, object]:
        """Returns the options as values that JSON can hold, for those who read the log."""
        plain = (str, int, float, bool, type(None))
        found: dict[str, object] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name == "optimizer":
                found[each.name] = [type(optimizer).__name__ for optimizer in self.optimizers]
            elif each.name not in ("log_dir", "sinks", "on_finding", "grad_scaler"):
                is_list = isinstance(value, (list, tuple)) and all(isinstance(item, plain) for item in value)
                found[each.name] = value if isinstance(value, plain) or is_list else type(value).__name__
        return found

    def _check_stream(self) -> None:
        if self.log_dir is not None and not isinstance(self.log_dir, (str, os.PathLike)):
            raise ArgumentError(f"log_dir: needed a path or None, got {self.log_dir!r}")
        methods = ("open", "write", "tell", "close")
        if not isinstance(self.sinks, (list, tuple)):
            raise ArgumentError(f"sinks: needed a list of sinks, got {type(self.sinks).__name__}")
        for sink in self.sinks:
            if isinstance(sink, type) or not all(callable(getattr(sink, method, None)) for method in methods):
                raise ArgumentError(f"sinks: needed sinks such as gradprobe.sinks.CSV(path), got {sink!r}")
        if self.on_finding is not None and not callable(self.on_finding):
            raise ArgumentError(f"on_finding: needed a callable or None, got {type(self.on_finding).__name__}")

    def _check_process_group(self) -> None:
        given = self.process_group
        groups = tuple(given.values()) if isinstance(given, Mapping) else (given,)
        is_mapping = isinstance(given, Mapping) and all(isinstance(pattern, str) for pattern in given)
        if given is None or given == "local":
            return
        if not (
            torch.distributed.is_available()
            and all(isinstance(group, torch.distributed.ProcessGroup) for group in groups)
            and (is_mapping or not isinstance(given, Mapping))
        ):
            shown = {key: type(group).__name__ for key, group in given.items()} if isinstance(given, Mapping) else given
            raise ArgumentError(
                "process_group: needed None, 'local', a torch.distributed.ProcessGroup, or a mapping of name patterns "
                f"to such groups, got {shown!r}"
            )

    @property
    def measured_at(self) -> When:
        """When gradients are measured, "auto" resolved."""
        return "backward" if self.when == "auto" else self.when

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizers given; of a wrapper, itself and those inside it."""
        found: dict[int, torch.optim.Optimizer] = {}
        for one in _listed(self.optimizer):
            inside = _inside(one, torch.optim.Optimizer)
            if not inside:
                raise ArgumentError(
                    f"optimizer: needed a torch.optim.Optimizer, a list of them or None, got {type(one).__name__}"
                )
            found.update({id(optimizer): optimizer for optimizer in inside})
        return tuple(found.values())

    @property
    def grad_scalers(self) -> tuple[torch.amp.GradScaler, ...]:
        """The gradient scalers given, and those that wrappers of the optimizers hold."""
        for one in _listed(self.grad_scaler):
            if not isinstance(one, torch.amp.GradScaler):
                raise ArgumentError(
                    f"grad_scaler: needed a torch.amp.GradScaler, a list of them or None, got {type(one).__name__}"
                )
        everywhere = [*_listed(self.grad_scaler), *_listed(self.optimizer)]
        found = {id(scaler): scaler for one in everywhere for scaler in _inside(one, torch.amp.GradScaler)}
        return tuple(found.values())


def _listed(value: object) -> list[object]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


_Kind = TypeVar("_Kind")
_DEEPEST = 4  # wrappers around each other


def _inside(value: object, kind: type[_Kind], depth: int = 0) -> list[_Kind]:
    """Returns the value itself, if it is of a kind, and what it wraps of that kind."""
    found = [value] if isinstance(value, kind) else []
    if depth < _DEEPEST:
        for name, attribute in getattr(value, "__dict__", {}).items():
            # an optimizer's wrapper holds another optimizer; nothing else leads to one
            if isinstance(attribute, (kind, torch.optim.Optimizer)) and attribute is not value and name != "state":
                found += _inside(attribute, kind, depth + 1)
    return found


def check_model(model: object) -> None:
    """Raises ArgumentError if a model is not a module."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: needed a torch.nn.Module, got {type(model).__name__}")


def check_loss(loss: object) -> None:
    """Raises ArgumentError if a loss is neither a real number nor a tensor with one."""
    if isinstance(loss, torch.Tensor):
        if loss.numel() != 1 or loss.is_complex():
            raise ArgumentError(
                f"loss: needed one real number, got a tensor of shape {tuple(loss.shape)}, {loss.dtype}"
            )
    elif loss is not None and not _is_number(loss):
        raise ArgumentError(f"loss: needed a number or a tensor of one element, got {type(loss).__name__}")


def check_max_norm(max_norm: object) -> None:
    """Raises ArgumentError if `max_norm` is not a number above zero: a negative one would turn the gradients round."""
    if not _is_number(max_norm) or not max_norm > 0:  # type: ignore[operator]
        raise ArgumentError(f"max_norm: needed a number above 0, got {max_norm!r}")


def check_timeout(timeout_s: object) -> None:
    """Raises ArgumentError if a time to wait is not a number above zero."""
    if not _is_number(timeout_s) or not timeout_s > 0:  # type: ignore[operator]
        raise ArgumentError(f"timeout_s: needed a number above 0, got {timeout_s!r}")


def check_n_steps(n_steps: object) -> None:
    """Raises ArgumentError if a number of steps is not an integer above zero."""
    if n_steps is not None and (isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 1):
        raise ArgumentError(f"n_steps: needed an integer of at least 1 or None, got {n_steps!r}")


def checked_json(name: str, value: object) -> object:
    """Returns a value as JSON holds it.

    Args:
        name: Name of the argument.
        value: Its value; tensors and arrays become lists.

    Raises:
        ArgumentError: JSON cannot hold it.
    """
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    try:
        return strict(json.loads(json.dumps(value)))
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{name}: needed a value that JSON can hold, got {value!r}: {error}") from error


def checked_step(state: object) -> int:
    """Returns the step of a probe's state.

    Raises:
        ArgumentError: It is none.
    """
    step = state.get("step") if isinstance(state, Mapping) else None
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ArgumentError(f"state: needed one of Probe.state_dict(), such as {{'step': 100}}, got {state!r}")
    return step


def _is_number(value: object) -> bool:
    """Returns whether a value is a real number of Python or NumPy."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
