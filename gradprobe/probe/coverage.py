"""What a probe sees of its model, and loud words where it sees nothing."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gradprobe.errors import warn_blind
from gradprobe.observers.parameters import ObservedParameters, newly_trainable, unstepped_parameters
from gradprobe.observers.signals import SignalObserver
from gradprobe.snapshot.records import Measured


@dataclass(frozen=True, slots=True)
class Coverage:
    """What a probe sees of its model.

    Attributes:
        observed: Sites that had a gradient in at least one measured step.
        silent: Sites that never had one; of the modules whose outputs are observed, those that returned nothing.
        unmeasured: Modules that returned tensors which the kernels do not take, such as a subclass; junctions that work
            in place, or that another probe observes.
        unhooked: Sites with a gradient although no hook of theirs fired, as after a replayed CUDA graph.
        frozen: Parameters that did not require a gradient at attach.
        unstepped: Sites that the optimizer given to attach does not step now; another one may.
        unknown: Parameters that require one now but were frozen or absent at attach; attach again to see them.
        tied: Sites with more than one name, by first name.
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
    """Notes in each measured step what had a gradient, and warns once of each kind of blindness.

    Args:
        found: The K parameters.
        passing: Activations and junctions, None where none are observed.
        unobserved: Names of junctions that cannot be observed.
        optimizer: Closes the steps, or None.
    """

    def __init__(
        self,
        found: ObservedParameters,
        passing: SignalObserver | None,
        unobserved: tuple[str, ...],
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self._sites = found.sites
        self._signal_observer = passing
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
            measured: Which sites had a gradient.
            is_complete: All had one.
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
            unhooked: Which sites. [K]
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
        """Warns of a step that was closed without a gradient.

        Args:
            step: Its number.
        """
        self._warn(
            "no gradient",
            f"step {step}: no parameter has a gradient. Call step() after backward and before zero_grad, "
            "or attach with when='hook' if the optimizer steps inside backward; nothing was recorded",
        )

    def note_capture(self, step: int) -> None:
        """Warns of a step that ends while a CUDA graph is captured: replaying the graph ends none.

        Args:
            step: Its number.
        """
        self._warn(
            "capture",
            f"step {step}: its end is captured in a CUDA graph, and no replay closes a step. Call step() after each "
            "replay; gradients are then measured as they are, what passes between the parameters by the graph itself",
        )

    def note_passing(self, step: int) -> None:
        """Warns of modules that return nothing, after the first step in which they are observed.

        Args:
            step: Its number.
        """
        if self._signal_observer is None or "passing" in self._told:
            return
        silent = self._signal_observer.silent()
        if not silent:
            self._told.add("passing")
            return
        self._warn(
            "passing",
            f"step {step}: {len(silent)} of {self._signal_observer.table.n_modules} observed modules returned nothing: "
            f"{', '.join(silent[:5])}{', …' if len(silent) > 5 else ''}. They are not called as modules, or were "
            "compiled before attach, or took or returned nothing that can be measured",
        )

    def note_unstepped(self, found: ObservedParameters) -> None:
        """Notes what the optimizer does not step now: it may have got groups since.

        Args:
            found: The parameters as they were at attach.
        """
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is not None:
            self._unstepped = unstepped_parameters(optimizer, found)

    def report(self, found: ObservedParameters, model: nn.Module | None) -> Coverage:
        """Tells what was seen so far.

        Args:
            found: The parameters as they were at attach.
            model: The model as it is now, None where it is gone or let go.

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
        return f"{len(names)} of {len(chosen)} sites: {', '.join(names[:5])}" + (", …" if len(names) > 5 else "")

    def _warn(self, topic: str, message: str) -> None:
        if topic not in self._told:
            self._told.add(topic)
            warn_blind(message)
