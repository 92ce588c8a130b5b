"""Chooses the activations and residual adds of a model that a probe observes."""

from __future__ import annotations

import weakref
from weakref import WeakValueDictionary

import torch
from torch import nn

from gradprobe.nn.residual import ResidualAdd
from gradprobe.observers.activations import select_modules
from gradprobe.observers.fence import Fence
from gradprobe.observers.junctions import junction_modules
from gradprobe.observers.magnitudes import MagnitudeObserver
from gradprobe.observers.signals import SignalObserver
from gradprobe.probe.options import Options
from gradprobe.snapshot.signals import SignalTable


class SignalChoice:
    """The activations and residual adds that are observed, chosen anew when the model gets other residual adds.

    Attributes:
        table: Their sites, None if nothing is observed.
        unobserved: Names of residual adds that cannot be observed.

    Args:
        model: The model.
        options: Those of `attach`.

    Raises:
        ArgumentError: The selection of modules is invalid.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        self._model = weakref.ref(model)
        self._selection, self._has_junctions = options.activations, options.junctions
        self._backend = options.backend
        # statistics that are reduced over ranks are of more elements than are counted here
        counts = options.magnitudes and self._selection is not False and not options.reduce_activations
        self._magnitudes = MagnitudeObserver(options.magnitudes_every, options.backend) if counts else None
        # a module may refer to the model, or be the model, which must not keep itself alive through its probe
        self._activations: WeakValueDictionary[str, nn.Module] = WeakValueDictionary()
        self._junctions: WeakValueDictionary[str, ResidualAdd] = WeakValueDictionary()
        self._seen: dict[str, weakref.ref[ResidualAdd]] = {}  # when the model was last looked at
        self.table: SignalTable | None = None
        self.unobserved: tuple[str, ...] = ()
        self.choose()

    def is_outdated(self) -> bool:
        """Returns whether the model has other residual adds than when it was last looked at."""
        model = self._model()
        if model is None or not self._has_junctions:
            return False
        found = _residual_adds(model)
        return found.keys() != self._seen.keys() or any(self._seen[name]() is not one for name, one in found.items())

    def choose(self) -> None:
        """Looks at the model, which nothing of this probe observes now."""
        model = self._model()
        if model is None:
            return
        self._seen = {name: weakref.ref(one) for name, one in _residual_adds(model).items()}
        junctions, self.unobserved = junction_modules(model) if self._has_junctions else ({}, ())
        self._junctions = WeakValueDictionary(junctions)
        if self._selection is not False:
            self._activations = WeakValueDictionary(select_modules(model, self._selection, elsewhere=junctions))
        types = tuple(type(module).__name__ for module in self._activations.values())
        is_any = self._activations or self._junctions
        self.table = SignalTable(tuple(self._activations), tuple(self._junctions), types) if is_any else None

    def observe(self, device: torch.device, fence: Fence) -> SignalObserver | None:
        """Puts hooks on what was chosen.

        Args:
            device: Where the rows lie.
            fence: Takes the errors of measuring.

        Raises:
            BackendError: The back end cannot run on the device.
        """
        if self.table is None:
            return None
        return SignalObserver(
            self.table, self._activations, self._junctions, device, self._backend, fence, self._magnitudes
        )


def _residual_adds(model: nn.Module) -> dict[str, ResidualAdd]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ResidualAdd)}
