"""What a probe observes of its model, and warnings about what it cannot observe."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gradprobe.errors import warn_user
from gradprobe.observers.parameters import ObservedParameters, newly_trainable, unstepped_parameters
from gradprobe.observers.signals import SignalObserver
from gradprobe.snapshot.records import Measured


@dataclass(frozen=True, slots=True)
class Coverage:
    """What a probe observes of its model.

    Attributes:
        observed: Parameters that had a gradient in at least one measured step.
        silent: Parameters that never had one, and observed modules that returned nothing.
        unhooked: Parameters with a gradient whose hook did not fire, as after a replayed CUDA graph.
        unmeasured: Modules that returned tensors the kernels cannot read, such as subclasses; residual adds that work
            in place or that another probe observes.
        frozen: Parameters that did not require a gradient at attach.
        unstepped: Parameters that the optimizer given to attach does not step; another optimizer may.
        unknown: Parameters that require a gradient but were frozen or absent at attach; attach again to observe them.
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
    tied: dict[str, tuple[str, ...]]
    steps: int


class CoverageLog:
    """Notes which parameters have a gradient in each measured step, and warns once about each kind of gap.

    Args:
        found: The K parameters.
        signals: The observer of activations and residual adds, None if none are observed.
        unobserved: Names of residual adds that cannot be observed.
        optimizer: The optimizer that closes the steps, or None.
    """

    def __init__(
        self,
        found: ObservedParameters,
        signals: SignalObserver | None,
        unobserved: tuple[str, ...],
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self._sites = found.sites
        self._signal_observer = signals
        self._unobserved = unobserved
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self._unstepped: tuple[str, ...] = ()
        self._observed = np.zeros(len(found.sites), dtype=np.bool_)  # [K]
        self._unhooked = np.zeros(len(found.sites), dtype=np.bool_)  # [K]
        self._all_observed = False
        self._told: set[str] = set()
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
        self._observed |= measured.present
        self._all_observed = bool(self._observed.all())
        if not self._all_observed:
            self._warn("silent", f"step {step}: no gradient for {self._listed(~self._observed)}")

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
            f"{', '.join(silent[:5])}{', …' if len(silent) > 5 else ''}. They were not called as modules, were "
            "compiled before attach, or took or returned nothing that can be measured",
        )

    def note_unstepped(self, found: ObservedParameters) -> None:
        """Notes which parameters the optimizer does not step; it may have got new groups since attach.

        Args:
            found: The parameters as they were at attach.
        """
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is not None:
            self._unstepped = unstepped_parameters(optimizer, found)

    def report(self, found: ObservedParameters, model: nn.Module | None) -> Coverage:
        """Returns what was observed so far.

        Args:
            found: The parameters as they were at attach.
            model: The model in its present state, None if it is gone or the probe is detached.

        Returns:
            The coverage.
        """
        if found.parameters:
            self.note_unstepped(found)
        names = np.asarray([site.name for site in self._sites], dtype=object)
        silent, unmeasured = (
            ((), ())
            if self._signal_observer is None
            else (self._signal_observer.silent(), self._signal_observer.unmeasured())
        )
        return Coverage(
            observed=tuple(names[self._observed]),
            silent=(*names[~self._observed], *silent),
            unhooked=tuple(names[self._unhooked]),
            unmeasured=(*unmeasured, *self._unobserved),
            frozen=found.frozen,
            unstepped=self._unstepped,
            unknown=() if model is None else newly_trainable(model, found),
            tied={site.name: site.names for site in self._sites if len(site.names) > 1},
            steps=self.n_measured,
        )

    def _listed(self, chosen: npt.NDArray[np.bool_]) -> str:
        names = [site.name for site, is_chosen in zip(self._sites, chosen, strict=True) if is_chosen]
        return f"{len(names)} of {len(chosen)} parameters: {', '.join(names[:5])}" + (", …" if len(names) > 5 else "")

    def _warn(self, topic: str, message: str) -> None:
        if topic not in self._told:
            self._told.add(topic)
            warn_user(message)
