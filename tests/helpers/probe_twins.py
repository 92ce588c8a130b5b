"""Two equal trainings, one with probes and one without, and what is known of the gradients from the one without."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import gradprobe
from gradprobe.nn import ResidualAdd

Kind = Literal["plain", "residual", "tied", "conv", "mixed"]
KINDS: tuple[Kind, ...] = ("plain", "residual", "tied", "conv", "mixed")
Gradients = dict[str, torch.Tensor]
Version = tuple[int, int] | None  # identity and version of a gradient

_WIDTH = 4


class Net(nn.Module):
    """A small network with dropout, a list of blocks that may change, and a head that is used now and then."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        if kind == "conv":
            self.stem: nn.Module = nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.ReLU(), nn.Flatten(1))
        else:
            self.stem = nn.Linear(_WIDTH, _WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH) for _ in range(2))
        self.add = ResidualAdd() if kind == "residual" else None
        self.drop = nn.Dropout(0.2)
        self.extra = nn.Linear(_WIDTH, _WIDTH)
        self.gains = nn.ParameterDict()
        if kind == "tied":
            self.blocks[1].weight = self.blocks[0].weight
        if kind == "mixed":
            for dtype in (torch.complex64, torch.float16, torch.bfloat16, torch.float64):
                self.gains[f"of_{str(dtype).removeprefix('torch.')}"] = nn.Parameter(torch.ones(3, dtype=dtype))

    def forward(self, x: torch.Tensor, uses_extra: bool) -> torch.Tensor:
        """Returns a loss of one element."""
        x = x.to(next(iter(self.stem.parameters())).dtype)
        y = self.stem(x.unsqueeze(1) if self.kind == "conv" else x)
        for block in self.blocks:
            z = self.drop(torch.tanh(block(y)))
            y = z if self.add is None else self.add(y, z)
        if uses_extra:
            y = self.extra(y)
            for gain in self.gains.values():
                y = y * gain.abs().sum().to(y.dtype)
        return y.double().square().mean()


class Clamped(nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.clamp(-1.0, 1.0)


class Wrapped:
    """An optimizer inside an object, as trainers hold it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.5),
    "nesterov": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.5, nesterov=True, foreach=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, lr=0.05, max_iter=3),
}


class Twin:
    """One of the two trainings.

    Attributes:
        model: The network.
        optimizers: One, or two that share out the parameters.
        scaler: A gradient scaler, used in some steps.
        rng: The state of the random numbers of this training.
    """

    def __init__(self, kind: Kind, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = Net(kind)
        self.optimizers: list[torch.optim.Optimizer] = []
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        self.saved: dict[str, torch.Tensor] = {}
        self.rng = torch.get_rng_state()

    def run(self, action: Callable[[Twin], Any]) -> tuple[Any, Exception | None]:
        """Returns what an action returns or raises, under this training's random numbers."""
        torch.set_rng_state(self.rng)
        try:
            return action(self), None
        except Exception as error:  # noqa: BLE001
            return None, error
        finally:
            self.rng = torch.get_rng_state()

    def make_optimizers(self, name: str, n: int) -> None:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        cut = len(parameters) // 2 if n == 2 else len(parameters)
        parts = [part for part in (parameters[:cut], parameters[cut:]) if part]
        self.optimizers = [OPTIMIZERS[name](part) for part in parts]

    def replace_by(self, copies: tuple[Net, list[torch.optim.Optimizer], torch.amp.GradScaler]) -> None:
        self.model, self.optimizers, self.scaler = copies

    def state(self) -> dict[str, object]:
        """Everything that a training computes, tensors as bytes."""
        state: dict[str, object] = {"rng": _bits(self.rng), "scaler": self.scaler.state_dict()}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            state[name] = _bits(parameter), parameter.requires_grad
            state[f"gradient of {name}"] = _bits(parameter.grad)
        for name, buffer in self.model.named_buffers():
            state[name] = _bits(buffer)
        for k, optimizer in enumerate(self.optimizers):
            state[f"optimizer {k}"] = _plain(optimizer.state_dict())
        return state


def deep_copied(twin: Twin) -> None:
    twin.replace_by(copy.deepcopy((twin.model, twin.optimizers, twin.scaler)))


def pickled(twin: Twin) -> None:
    twin.replace_by(pickle.loads(pickle.dumps((twin.model, twin.optimizers, twin.scaler))))


def in_thread(action: Callable[[], None]) -> None:
    """Runs an action in another thread, and raises here what it raises there."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def parametrized(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Clamped())


def gradients_of(module: nn.Module) -> Gradients:
    """Copies the gradients of a module, by first name."""
    return {
        name: parameter.grad.detach().clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def versions_of(module: nn.Module) -> list[Version]:
    """Identifies the gradients of a module as they are now."""
    return [None if p.grad is None else (id(p.grad), p.grad._version) for p in module.parameters()]


def named_versions_of(module: nn.Module) -> dict[str, Version]:
    """The same by the parameters' names."""
    return dict(zip((name for name, _ in module.named_parameters()), versions_of(module), strict=True))


def _bits(tensor: torch.Tensor | None) -> object:
    if tensor is None:
        return None
    flat = tensor.detach().contiguous().view(-1)
    if (flat.is_floating_point() or flat.is_complex()) and not bool(torch.isfinite(flat).all()):
        flat = torch.where(flat.isnan(), math.nan, flat).to(flat.dtype)  # the bits of NaN may differ from run to run
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def _plain(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return _bits(value)
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return repr(value) if isinstance(value, float) else value  # NaN differs from itself


def _norm(gradient: torch.Tensor, scale: float) -> float:
    wide = gradient.to(torch.complex128 if gradient.is_complex() else torch.float64).numpy()
    with np.errstate(all="ignore"):
        return float(np.linalg.norm((wide / scale).ravel()))


def _n_nonfinite(gradient: torch.Tensor) -> int:
    return int((~torch.isfinite(gradient)).sum())


def _without(gradients: Gradients | None, names: Collection[str]) -> Gradients | None:
    return None if gradients is None else {name: part for name, part in gradients.items() if name not in names}


def _rounding(gradient: torch.Tensor) -> float:
    return 8.0 * float(torch.finfo(gradient.dtype).eps)


@dataclass(frozen=True)
class Expected:
    """What the bare training knows of one step.

    Attributes:
        at_end: Gradients at the end of the newest backward pass, None if there was none or it failed.
        given: Gradients that the optimizer was given, of the parameters that it steps; None for a skipped step.
        scale: The loss scale that `at_end` carries.
        given_scale: The loss scale that `given` carries.
        is_exact: The probe has no excuse to measure anything but `at_end`.
        is_skipped: The scaler skips the step; None if unknown.
        is_written_unseen: Something wrote to the gradients before `when="step"` measured them; whether it changed them,
            nobody can tell.
    """

    at_end: Gradients | None
    given: Gradients | None
    scale: float
    given_scale: float
    is_exact: bool
    is_skipped: bool | None
    is_written_unseen: bool = False

    def check(self, snapshot: gradprobe.Snapshot) -> None:
        """Compares a snapshot with the truth."""
        if self.is_skipped is not None:
            assert snapshot.skipped is self.is_skipped
        if snapshot.provenance.scale != "unscaled":
            return
        agrees_with_end = self.at_end is not None and self._holds(snapshot, self.at_end, self.scale)
        if self.is_exact:
            assert agrees_with_end, self._difference(snapshot)
        if self.given is None:
            return
        agrees_with_given = self._holds(snapshot, self.given, self.given_scale)
        assert agrees_with_end or agrees_with_given, self._difference(snapshot)
        state, factor = snapshot.provenance.state, snapshot.clip_factor
        is_changed = self._is_changed()
        if state == "raw":
            assert factor == 1.0
            if is_changed != "partly":
                assert self._holds(snapshot, self.given, self.given_scale, rounds=is_changed is not None), (
                    f"called raw, and is not what the optimizer got: {self._difference(snapshot)}"
                )
        elif state == "clipped":
            assert factor is not None
            if is_changed != "partly":
                assert self._holds(snapshot, self.given, self.given_scale * factor, rounds=True), (
                    f"not clipped by {factor}: {self._difference(snapshot)}"
                )
        if is_changed == "not" and not self.is_written_unseen and not self._are_uncountable(self.given):
            assert state == "raw", f"called {state}, and nothing changed the gradients"

    def _are_uncountable(self, gradients: Gradients) -> bool:
        """Returns whether no ratio of norms can tell what was done to the gradients."""
        return all(_n_nonfinite(gradient) > 0 or not bool(gradient.any()) for gradient in gradients.values())

    def _is_changed(self) -> Literal["not", "partly", "wholly"] | None:
        """Returns how many gradients changed between the backward pass and the optimizer; None if unknown."""
        if self.at_end is None or self.given is None:
            return None
        ratio = self.scale / self.given_scale
        changed = [
            name not in self.given
            if ratio != 1.0 or name not in self.given
            else not torch.equal(self.given[name].nan_to_num(7.0), gradient.nan_to_num(7.0))
            for name, gradient in self.at_end.items()
        ]
        if ratio != 1.0:
            return None
        return "wholly" if all(changed) else "partly" if any(changed) else "not"

    def _holds(self, snapshot: gradprobe.Snapshot, gradients: Gradients, scale: float, rounds: bool = False) -> bool:
        sites = snapshot.sites
        if gradients is self.at_end and set(sites) != set(gradients):
            return False
        return all(
            name in sites and self._is_site(sites[name], part, scale, rounds) for name, part in gradients.items()
        )

    def _is_site(self, stats: gradprobe.SiteStats, gradient: torch.Tensor, scale: float, rounds: bool) -> bool:
        n_nonfinite = _n_nonfinite(gradient)
        if n_nonfinite or stats.nonfinite:
            return stats.nonfinite == n_nonfinite or rounds
        tiny = gradient.numel() * torch.finfo(gradient.dtype).smallest_normal / scale if rounds and scale else 0.0
        relative = max(1e-5, _rounding(gradient)) if rounds or scale != 1.0 else 1e-6
        return stats.norm == pytest.approx(_norm(gradient, scale) if scale else math.inf, rel=relative, abs=tiny)

    def _difference(self, snapshot: gradprobe.Snapshot) -> str:
        measured = {name: stats.norm for name, stats in snapshot.sites.items()}
        at_end = None if self.at_end is None else {n: _norm(g, self.scale) for n, g in self.at_end.items()}
        given = None if self.given is None else {n: _norm(g, self.given_scale) for n, g in self.given.items()}
        return f"step {snapshot.step}: measured {measured}, at the end of backward {at_end}, given to step {given}"


@dataclass(eq=False)
class Watch:
    """A probe, and what is known of its steps.

    Attributes:
        probe: The probe.
        path: The observed module of the network, "" for the whole.
        options: Those of `attach`.
        given: Positions of the optimizers given to `attach`.
        at_end: Gradients at the end of the newest backward pass of the open step.
        versions: Their versions, by name.
        scale: The loss scale that these carry.
        n_backwards: Backward passes of the open step.
        n_before: Those of the step before.
        is_scale_unknown: A scaler is in use, and the gradients were not scaled by it.
        is_murky: Something happened in the open step after which its numbers depend on details.
        pauses: Open pauses.
        has_stepped: An optimizer has closed a step.
        n_skipped: Steps that a scaler may have skipped.
        closed_by_user: The user has closed a step.
        has_failed: The newest backward pass has raised, after some gradients had changed.
        is_gone: The training goes on with another module than the observed one.
        expected: What is known of closed steps, by number.
        frozen: Every snapshot that was read, with a copy of its values.
    """

    probe: gradprobe.Probe
    path: str
    options: dict[str, Any]
    given: tuple[int, ...]
    at_end: Gradients | None = None
    versions: dict[str, Version] = field(default_factory=dict)
    scale: float = 1.0
    n_backwards: int = 0
    n_before: int = 1
    is_murky: bool = True
    pauses: list[Any] = field(default_factory=list)
    expected: dict[int, Expected] = field(default_factory=dict)
    frozen: dict[int, tuple[gradprobe.Snapshot, object]] = field(default_factory=dict)
    has_stepped: bool = False
    n_skipped: int = 0
    closed_by_user: bool = False
    is_gone: bool = False
    has_failed: bool = False
    is_scale_unknown: bool = False

    @property
    def number(self) -> int:
        """Number of the open step."""
        return self.probe._recorder.number

    def end_backward(self, module: nn.Module, has_failed: bool, scale: float) -> None:
        """Notes a backward pass that reached the observed module."""
        self.at_end = None if has_failed else gradients_of(module)
        self.versions = named_versions_of(module)
        self.scale = scale
        self.is_murky |= has_failed
        self.has_failed = has_failed
        self.n_backwards += not has_failed

    def start_step(self) -> None:
        self.n_before = max(1, self.n_backwards)
        self.n_backwards, self.at_end, self.scale, self.is_murky = 0, None, 1.0, bool(self.pauses)
        self.is_scale_unknown = self.has_failed = False

    def forget(self) -> None:
        """Gives up the numbers of the open step."""
        self.is_murky, self.at_end = True, None

    def forget_superseded(self) -> None:
        """Gives up the steps that the user has closed: they may turn out to be parts of the optimizer's first."""
        self.expected.clear()
        self.frozen.clear()

    def lose_optimizers(self) -> None:
        """Notes that the optimizers given to `attach` are gone."""
        self.given = (-1,) if self.given else ()

    def close(
        self,
        given: Gradients | None,
        given_scale: float,
        is_skipped: bool | None,
        number: int,
        is_written: bool = False,
    ) -> None:
        """Notes the end of a step; `is_written`: the gradients were written to since the backward pass."""
        frozen = self.probe._recorder._observer.frozen  # these may hold gradients from before, which nobody observes
        self.at_end, given = _without(self.at_end, frozen), _without(given, frozen)
        if number % self.options["every"] == 0 and not self.pauses and not self.is_scale_unknown:
            is_exact = (
                not self.is_murky
                and self.options["when"] in ("auto", "backward")
                and self.n_backwards >= max(1, self.n_before)
            )
            if self.options["when"] == "hook":
                given = None  # nobody looks at the gradients after that
            if self.is_murky or self.at_end is None:
                given, is_exact = (given, False) if not self.is_murky else (None, False)
            is_written_unseen = is_written and self.options["when"] == "step"
            self.expected[number] = Expected(
                self.at_end, given, self.scale, given_scale, is_exact, is_skipped, is_written_unseen
            )
        self.start_step()

    def read(self) -> None:
        """Reads the history, and compares it with the truth and with what was read before."""
        history = self.probe.history()
        steps = [snapshot.step for snapshot in history]
        assert steps == sorted(set(steps)), "step numbers do not increase"
        assert all(step % self.options["every"] == 0 for step in steps)
        assert len(steps) <= self.options["capacity"], "more snapshots than the capacity"
        for snapshot in history:
            expected = self.expected.get(snapshot.step)
            if expected is not None:
                expected.check(snapshot)
        exact = [step for step, expected in self.expected.items() if expected.is_exact]
        if exact:
            assert not steps or steps[-1] >= exact[-1]
            assert steps, f"step {exact[-1]} was measured and is not there"
        for step, (snapshot, values) in self.frozen.items():
            assert _values(snapshot) == values, f"the snapshot of step {step} has changed after it was read"
        newest = steps[-1] if steps else -1
        for snapshot in history:
            values = _values(snapshot)
            _, earlier = self.frozen.get(snapshot.step, (None, values))
            assert values == earlier, f"step {snapshot.step} reads as others than before"
            self.frozen[snapshot.step] = snapshot, values
        latest = self.probe.latest(wait=True)
        assert (-1 if latest is None else latest.step) == newest


def _values(snapshot: gradprobe.Snapshot) -> object:
    """What never changes in a snapshot: the loss, the skip and the update may follow later."""
    junctions = {name: repr(junction) for name, junction in snapshot.junctions.items()}
    activations = {name: repr(activation) for name, activation in snapshot.activations.items()}
    sites = {name: repr(stats) for name, stats in snapshot.sites.items()}  # NaN differs from itself
    return sites, junctions, activations, snapshot.provenance, repr(snapshot.clip_factor), repr(snapshot.scale)
