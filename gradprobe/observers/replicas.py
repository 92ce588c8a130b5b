"""Tells whether gradients are averaged over the processes of a DistributedDataParallel."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradprobe.observers.registrations import RegistrationWatch


class Replicas:
    """The instances of DistributedDataParallel that may average the gradients of a model.

    Such a module can be the model, be inside it, or wrap it, as trainers do.

    Args:
        model: The observed model.
        watch: Notices the ones that are built later.
    """

    def __init__(self, model: nn.Module, watch: RegistrationWatch) -> None:
        self._watch = watch
        self._known = weakref.WeakSet(
            module for module in model.modules() if isinstance(module, DistributedDataParallel)
        )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._known.update(each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel))
        self._covering: dict[frozenset[int], bool] = {}  # by the instances

    def forget(self) -> None:
        """Notes that the parameters may have changed."""
        self._covering.clear()

    def are_known(self) -> bool:
        """Returns whether there is one."""
        return bool(self._known) or bool(self._watch.replicas)

    def average(self, parameters: Callable[[], Sequence[torch.Tensor | None]]) -> bool:
        """Returns whether the backward pass that has just ended has averaged the gradients of some parameters.

        Args:
            parameters: Returns the parameters.
        """
        # `require_forward_param_sync` is set by the forward pass: False inside no_sync()
        syncing = [each for each in (*self._known, *self._watch.replicas) if each.require_forward_param_sync]
        key = frozenset(id(each) for each in syncing)
        if key not in self._covering:
            averaged = {id(parameter) for each in syncing for parameter in each._module_parameters}
            self._covering[key] = bool(syncing) and all(
                id(parameter) in averaged for parameter in parameters() if parameter is not None
            )
        return self._covering[key]
