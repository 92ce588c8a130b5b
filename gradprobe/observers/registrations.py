"""Notices that a model may have changed: that a module or a parameter was registered somewhere in the process."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parallel import DistributedDataParallel

from gradprobe.observers.process_hooks import ProcessHooks


@dataclass(slots=True)
class _Seen:
    anything: bool = False
    replicas: weakref.WeakSet[DistributedDataParallel] = field(default_factory=weakref.WeakSet)


class RegistrationWatch:
    """Watches every registration of a module or parameter. Costs nothing while there is none, as in a training loop.

    Attributes:
        replicas: The instances of DistributedDataParallel that were built since.

    Example:
        >>> watch = RegistrationWatch()
        >>> model = nn.Linear(1, 1)
        >>> watch.has_seen
        True
        >>> watch.remove()
    """

    def __init__(self) -> None:
        seen = self._seen = _Seen()
        self.replicas = seen.replicas

        def on_registration(owner: nn.Module, _: str, registered: object) -> None:
            seen.anything = True
            if isinstance(owner, DistributedDataParallel):
                seen.replicas.add(owner)

        handles = [
            register_module_parameter_registration_hook(on_registration),
            register_module_module_registration_hook(on_registration),
        ]
        self._hooks = ProcessHooks(self, handles)

    @property
    def has_seen(self) -> bool:
        """Whether anything was registered since the last `forget`."""
        return self._seen.anything

    def forget(self) -> None:
        """Forgets what was registered."""
        self._seen.anything = False

    def remove(self) -> None:
        """Removes the hooks, for good."""
        self._hooks.remove()
