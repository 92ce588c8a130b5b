"""What a probe observes of its model, and warnings about what it cannot observe."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gradprobe.errors import warn_user
from gradprobe.observers.fence import Fence
from gradprobe.observers.gradient_observer import GradientObserver
from gradprobe.observers.parameters import stepped_by
from gradprobe.observers.signals import SignalObserver
from gradprobe.snapshot.records import Measured
from gradprobe.text.markup import Cells, form, grid, points
from gradprobe.text.words import counted, listed


@dataclass(frozen=True, slots=True)
class Coverage:
    """What a probe observes of its model.

    Attributes:
        observed: Parameters that had a gradient in at least one measured step; of sharded ones all ranks together.
        silent: Parameters that never had one, and observed modules that returned nothing.
        unhooked: Parameters with a gradient whose hook did not fire, as after a replayed CUDA graph.
        unmeasured: Parameters whose gradients the kernels cannot read, such as those of float8_e4m3fnuz; modules that
            returned such tensors; residual adds that work in place or that another probe observes; any of these whose
            measuring has failed.
        frozen: Parameters that do not require a gradient.
        unstepped: Parameters that no optimizer steps, of those given to attach or seen so far.
        unknown: Parameters that require a gradient but are not observed yet; they are from the next measured step on.
        failures: What is no longer measured because an error occurred, and the error.
        tied: All names of each parameter that has more than one, by its first name.
        steps: Number of measured steps.
    """

    observed: tuple[str, ...]
    silent: tuple[str, ...]
    unhooked: tuple[str, ...]
    unmeasured: tuple[str, ...]
    frozen: tuple[str, ...]
    unstepped: tuple[str, ...]
    unknown: tuple[str, ...]
    failures: dict[str, str]
    tied: dict[str, tuple[str, ...]]
    steps: int

    @property
    def gaps(self) -> dict[str, tuple[str, ...]]:
        """What is not observed, by the field that lists it; without empty ones."""
        fields = ("silent", "unhooked", "unmeasured", "frozen", "unstepped", "unknown")
        return {field: names for field in fields if (names := getattr(self, field))} | (
            {"failures": tuple(self.failures)} if self.failures else {}
        )

    def __repr__(self) -> str:
        gaps = "".join(f", {len(names)} {field}" for field, names in self.gaps.items())
        return f"Coverage({len(self.observed)} observed{gaps}, {counted(self.steps, 'step')})"

    def _repr_html_(self) -> str:
        rows: list[Cells] = [["observed", len(self.observed), listed(self.observed)]]
        rows += [[field, len(names), listed(names)] for field, names in self.gaps.items()]
        if self.tied:
            rows.append(["tied", len(self.tied), listed([" = ".join(names) for names in self.tied.values()])])
        headline = f"{counted(len(self.observed), 'parameter')} observed in {counted(self.steps, 'step')}"
        errors = [f"{part}: {error}" for part, error in self.failures.items()]
        return form(headline, [grid(("parameters and modules", "number", "names"), rows), points(errors)])


class CoverageLog:
    """Notes which parameters have a gradient in each measured step, and warns once about each kind of gap.

    Args:
        observer: Knows the K parameters.
        fence: Knows what has failed.
    """

    def __init__(self, observer: GradientObserver, fence: Fence) -> None:
        self._fence = fence
        self._observer = observer
        self._signal_observer: SignalObserver | None = None
        self._unobserved: tuple[str, ...] = ()
        self._observed = np.zeros(len(observer.sites), dtype=np.bool_)  # [K]
        self._unhooked = np.zeros(len(observer.sites), dtype=np.bool_)  # [K]
        self._names = tuple(site.name for site in observer.sites)
        self._all_observed = False
        self._told: set[str] = set()
        self._final: Coverage | None = None
        self.n_measured = 0

    def note(self, step: int, measured: Measured, is_complete: bool) -> None:
        """Notes a measured step.

        Args:
            step: Its number.
            measured: Which parameters had a gradient.
            is_complete: All of them had one.
        """
        self.n_measured += 1
        if is_complete and self._all_observed:
            return
        self._observed |= measured.present | self._observer.are_elsewhere()
        self._all_observed = bool(self._observed.all())
        if not self._all_observed:
            self._warn("silent", f"step {step}: no gradient for {self._listed(~self._observed)}")

    def are_new(self, unhooked: npt.NDArray[np.bool_]) -> bool:
        """Returns whether the hook of one of these parameters, [K], has always fired so far."""
        return bool((unhooked & ~self._unhooked).any())

    def note_unhooked(self, step: int, unhooked: npt.NDArray[np.bool_]) -> None:
        """Notes gradients whose hooks did not fire.

        Args:
            step: Number of the step.
            unhooked: Which parameters. [K]
        """
        if unhooked.any():
            self._unhooked |= unhooked
            if "capture" not in self._told:
                self._warn(
                    "unhooked",
                    f"step {step}: no hook fired for {self._listed(unhooked)}. Their gradients are from an earlier "
                    "backward, torch.autograd.grad or a replayed CUDA graph; they are measured as they are now",
                )

    def note_no_gradient(self, step: int) -> None:
        """Warns about a step that was closed without any gradient.

        Args:
            step: Its number.
        """
        self._warn(
            "no gradient",
            f"step {step}: no parameter has a gradient. Call step() after backward and before zero_grad, "
            "or attach with when='hook' if the optimizer steps inside backward; nothing was recorded",
        )

    def note_capture(self, step: int) -> None:
        """Warns about a step that ends during the capture of a CUDA graph: replaying the graph does not end a step.

        Args:
            step: Its number.
        """
        self._warn(
            "capture",
            f"step {step}: its end is captured in a CUDA graph, and replaying the graph does not close a step. Call "
            "step() after each replay: gradients are measured there, activations and residual adds inside the graph",
        )

    def note_silent_modules(self, step: int) -> None:
        """Warns about modules that returned nothing, after the first step in which they are observed.

        Args:
            step: Its number.
        """
        if self._signal_observer is None or "silent modules" in self._told:
            return
        silent = self._signal_observer.silent()
        if not silent:
            self._told.add("silent modules")
            return
        self._warn(
            "silent modules",
            f"step {step}: {len(silent)} of {self._signal_observer.table.n_modules} observed modules returned nothing: "
            f"{listed(silent)}. They were not called as modules, were "
            "compiled before attach, or took or returned nothing that can be measured",
        )

    def note_changed(self, step: int, change: str) -> None:
        """Follows the model's parameters, which are others than before, and says so.

        Args:
            step: Number of the open step.
            change: What has changed; empty if the parameters have the same names.
        """
        observed = dict(zip(self._names, self._observed, strict=True))
        unhooked = dict(zip(self._names, self._unhooked, strict=True))
        self._names = tuple(site.name for site in self._observer.sites)
        self._observed = np.array([observed.get(name, False) for name in self._names], dtype=np.bool_)
        self._unhooked = np.array([unhooked.get(name, False) for name in self._names], dtype=np.bool_)
        self._all_observed = False
        if change:
            self._warn(f"changed: {change}", f"step {step}: the parameters of the model are others now: {change}")

    def note_unfollowed(self, step: int, change: str) -> None:
        """Warns about other parameters of a sharded model, on which the ranks would have to agree anew.

        Args:
            step: Number of the open step.
            change: What has changed.
        """
        self._warn(
            f"unfollowed: {change}",
            f"step {step}: the parameters of the model are others now: {change}. The probe of a sharded model does not "
            "follow; to observe the new ones, detach and attach again on all ranks",
        )

    def follow_signals(self, signals: SignalObserver | None, unobserved: tuple[str, ...]) -> None:
        """Takes the observer of signals, None if there are none, and the names of residual adds it cannot observe."""
        self._signal_observer, self._unobserved = signals, unobserved

    def note_never_closed(self, step: int, n_backwards: int, reason: str) -> None:
        """Warns about backward passes that no step has closed.

        Args:
            step: Number of the open step.
            n_backwards: How many there were.
            reason: Why no step was closed.
        """
        self._warn(
            "never closed",
            f"step {step}: {n_backwards} backward passes and no end of the step: {reason}. Nothing is recorded until "
            "an optimizer of the model steps; give attach the optimizer in use, or call Probe.step() in each step",
        )

    def note_unknown_scaler(self, step: int) -> None:
        """Warns about a gradient scaler that the probe was not given.

        Args:
            step: Number of the step.
        """
        self._warn(
            "unknown scaler",
            f"step {step}: a gradient scaler is in use that may have scaled these gradients; give it to attach as "
            "grad_scaler. Until then provenance.scale is 'unknown'",
        )

    def release(self, optimizers: Collection[torch.optim.Optimizer]) -> None:
        """Keeps what is known of the model, which is let go."""
        self._final = self.report(optimizers)

    def report(self, optimizers: Collection[torch.optim.Optimizer]) -> Coverage:
        """Returns what was observed so far.

        Args:
            optimizers: Those that step the model.
        """
        if self._final is not None:
            return self._final
        observer = self._observer
        names, is_observed = np.asarray(self._names, dtype=object), self._observed
        if observer.whole is not None:
            names, is_observed = np.asarray(observer.whole.names, dtype=object), observer.whole.seen.cpu().numpy()
        mine = np.asarray(self._names, dtype=object)
        silent, unmeasured = (
            ((), ())
            if self._signal_observer is None
            else (self._signal_observer.silent(), self._signal_observer.unmeasured())
        )
        parameters = observer.parameters()
        is_stepped = np.zeros(len(parameters), dtype=np.bool_)
        for optimizer in optimizers:
            is_stepped |= stepped_by(optimizer, parameters)
        return Coverage(
            observed=tuple(names[is_observed]),
            silent=(*names[~is_observed], *silent),
            unhooked=tuple(mine[self._unhooked]),
            unmeasured=(*observer.unmeasured(), *unmeasured, *self._unobserved),
            frozen=observer.frozen,
            unstepped=tuple(mine[~is_stepped]) if optimizers else (),
            unknown=observer.newly_trainable(),
            failures=dict(self._fence.failures),
            tied={site.name: site.names for site in observer.sites if len(site.names) > 1},
            steps=self.n_measured,
        )

    def _listed(self, chosen: npt.NDArray[np.bool_]) -> str:
        names = [name for name, is_chosen in zip(self._names, chosen, strict=True) if is_chosen]
        return f"{len(names)} of {len(chosen)} parameters: {listed(names)}"

    def _warn(self, topic: str, message: str) -> None:
        if topic not in self._told:
            self._told.add(topic)
            if self._observer.speaks():
                warn_user(message)
