"""Follows the parameters of a model: which there are, which gradients are ready, and what they are."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gradprobe.errors import ArgumentError
from gradprobe.observers import cuda_graphs, gradient_hooks
from gradprobe.observers.fence import Fence
from gradprobe.observers.gradients import GradientMeter
from gradprobe.observers.parameters import Layout, ModelParameters, find_parameters, stepped_by
from gradprobe.observers.registrations import RegistrationWatch
from gradprobe.observers.replicas import Replicas
from gradprobe.observers.unsupported import refuse_unsupported
from gradprobe.ops.rows import STATS
from gradprobe.snapshot.records import Measured
from gradprobe.snapshot.snapshot import SiteTable
from gradprobe.text.words import listed

if TYPE_CHECKING:
    from gradprobe.observers.agreement import ProcessGroups
    from gradprobe.observers.sharding import PartialGradient, WholeGradients

_LOOK_EVERY = 64  # measured steps; some changes, such as a direct write to `_parameters`, give no sign


class GradientObserver:
    """Owns the hooks on the parameters of a model and measures their gradients. Keeps no parameter alive.

    Attributes:
        hooks: The hooks.
        meter: Computes the statistics.
        sites: The K parameters.
        hides_writes: Writes may not be counted: those of `torch._foreach` operators to DTensors are not.
        frozen: Names of the parameters that do not require a gradient.
        table: The same for snapshots; of all ranks, if their parts are reduced.
        whole: Reduces the rows of this rank's parts to rows of whole gradients, None if there is nothing to reduce.
        unfollowed: How the parameters of a sharded model, which is not followed, differ from those observed.
        partials: Gradients, as the newest measurement found them, that still have to be added up over ranks.

    Args:
        model: The model.
        backend: Name of the back end, or "auto".
        on_backward_end: Called at the end of each backward pass.
        on_gradient: Called with k and gradient k as soon as it is ready, or None.
        fence: Takes the errors of single gradients.

    Raises:
        ArgumentError: The model has no parameter that can be observed.
        BackendError: The back end cannot run on the model's device.
    """

    def __init__(
        self,
        model: nn.Module,
        backend: str,
        on_backward_end: Callable[[], None],
        on_gradient: Callable[[int, torch.Tensor], None] | None,
        fence: Fence,
    ) -> None:
        self._model = weakref.ref(model)
        self._backend = backend
        self._callbacks = on_backward_end, on_gradient
        self._fence = fence
        self._n_measured = 0
        self._fired_before = False  # a hook that has been replaced in this step
        self.whole: WholeGradients | None = None
        self.unfollowed = ""
        self.partials: list[PartialGradient] = []
        found = find_parameters(model)
        if on_gradient is not None and {id(each) for each in found.triggers} & {id(each) for each in found.parameters}:
            raise ArgumentError(
                "when: needed 'auto', 'backward' or 'step' for flat parameters of FSDP1, whose gradients are reduced "
                "after their hooks; got 'hook'"
            )
        self._take(found)
        self._watch = RegistrationWatch()
        self._replicas = Replicas(model, self._watch)
        # the very last: a backward pass may be running in another thread
        self.hooks = gradient_hooks.install(found, *self._callbacks)

    def meet(self, process_group: ProcessGroups, options: dict[str, Any], n_signals: int = 0) -> bool:
        """Agrees with the other ranks on what to reduce together, if the gradients are to be reduced.

        Args:
            process_group: As for `attach`.
            options: Options of `attach` that must be the same on all ranks.
            n_signals: Number of sites of activations and residual adds to reduce as well.

        Returns:
            Whether they are reduced: `table` and `whole` are new.

        Raises:
            ArgumentError: The ranks do not agree, or some are missing.
        """
        is_sharded = any(site.piece.ranks for site in self.sites)
        if process_group is None and not is_sharded and n_signals == 0:
            return False
        from gradprobe.observers.agreement import agree, participants
        from gradprobe.observers.sharding import WholeGradients

        found = participants(self.sites, process_group, n_signals > 0)
        if found is None:
            return False
        ranks, group_sizes = found
        agreed = agree(self.sites, self.parameters(), group_sizes, ranks, options)
        self.whole = WholeGradients(agreed, self.sites, self.meter, n_signals)
        self._make_table()
        return True

    def reduction(self, is_averaged: bool) -> Literal["local", "averaged", "global", "shard"]:
        """Returns over what the numbers are reduced, as `Provenance` describes it.

        Args:
            is_averaged: Replicas have averaged the gradients.
        """
        if self.whole is not None and not self.whole.are_copies:
            return "global"
        if is_averaged:
            return "averaged"
        if self.whole is not None:
            return "global"
        return "shard" if self._are_parts else "local"

    def are_elsewhere(self) -> npt.NDArray[np.bool_]:
        """Returns which parameters have elements, but none on this rank, [K]."""
        sizes = zip(self.sites, self.meter.layouts, strict=True)
        return np.array([layout.numel == 0 < math.prod(site.shape) for site, layout in sizes], dtype=np.bool_)

    def speaks(self) -> bool:
        """Returns whether this rank warns: of those that train one model together, only the first does."""
        if self.whole is not None:
            return self.whole.is_first
        distributed = torch.distributed
        return not (self._replicas.are_known() and distributed.is_initialized() and distributed.get_rank() > 0)

    def parameters(self) -> list[torch.Tensor | None]:
        """Returns the K parameters, None for one that is gone."""
        return self.hooks.parameters()

    def start_step(self) -> None:
        """Begins a step."""
        self._fired_before = False
        self.hooks.start_step()

    def has_fired(self) -> bool:
        """Returns whether a gradient became ready in this step."""
        return self._fired_before or self.hooks.has_fired()

    def all_parameters(self) -> list[nn.Parameter]:
        """Returns all parameters of the model, also those that are not observed."""
        model = self._model()
        return [] if model is None else list(model.parameters())

    def has_other_gradients(self) -> bool:
        """Returns whether a parameter that is not observed, because it was frozen, still has a gradient."""
        frozen = (place.parameter() for place in self._frozen_places)
        return any(parameter is not None and parameter.grad is not None for parameter in frozen)

    def unmeasured(self) -> tuple[str, ...]:
        """Lists the parameters whose gradients cannot be measured."""
        return (*self._without_kernel, *(self.sites[k].name for k in sorted(self.meter.unmeasured)))

    def is_capturing(self) -> bool:
        """Returns whether a CUDA graph is being captured on a device of the parameters."""
        return any(cuda_graphs.is_capturing(device) for device in self.meter.rows_on)

    def are_averaged(self) -> bool:
        """Returns whether the backward pass that has just ended has averaged the gradients over processes."""
        return self._replicas.average(self.parameters)

    def may_have_changed(self) -> bool:
        """Returns whether there is a sign that the model has other parameters than before."""
        return self._watch.has_seen or self.hooks.is_outdated()

    def look(self, is_suspect: bool = False) -> str | None:
        """Looks, if there is a reason to, whether the model has other parameters than before, and follows them.

        Args:
            is_suspect: There is a reason.

        Returns:
            What has changed, empty if the parameters are the same but perhaps of another layout: `sites`, `table` and
            `meter` are new. None if nothing has changed.
        """
        self._n_measured += 1
        if self._n_measured % _LOOK_EVERY == 0:
            is_suspect = is_suspect or [id(place.parameter()) for place in self._places] != self._ids
        if not (is_suspect or self.may_have_changed()):
            return None
        self._watch.forget()
        model = self._model()
        if model is None:
            return None
        refuse_unsupported(model)  # it may have been sharded since
        found = find_parameters(model, self._known())
        self._replicas.forget()
        if self._is_same(found) and found.frozen_names == self.frozen and not self.hooks.is_outdated():
            return None
        if self.whole is not None and [site.names for site in found.sites] != [site.names for site in self.sites]:
            self.unfollowed = self._describe(found)
            return None
        return self._follow(found)  # tensors that were swapped into the same parameters have no hook

    def regroup_if_moved(self) -> str | None:
        """Groups the parameters anew if one has changed its device, dtype or shape; returns what `look` does."""
        if not self.meter.saw_irregular:
            return None
        model = self._model()
        current = [
            known if parameter is None else Layout.of(parameter)
            for parameter, known in zip(self.hooks.parameters(), self.meter.layouts, strict=True)
        ]
        if model is None or tuple(current) == self.meter.layouts:
            return None
        return self._follow(find_parameters(model, self._known()))

    def measure(self, rows: dict[torch.device, torch.Tensor]) -> tuple[Measured, int, int]:
        """Computes the statistics of the gradients as they are now.

        Args:
            rows: For each device, float64 rows to write. [rows_on[device], 6]

        Returns:
            Which parameters had a gradient; how often one was written to after the backward pass, at most; and how many
            gradients became ready in this step.
        """
        done, n_writes, n_fired = self.hooks.measure(self.meter.native_rows(rows))
        if done:
            self.meter.saw_irregular = False
        measured = self.meter.all_present if done else self.meter.measure(*self.hooks.gradients(), rows)
        self.find_partials()
        return measured, n_writes, n_fired

    def clip_(
        self, max_norm: float, error_if_nonfinite: bool, rows: dict[torch.device, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales the gradients so that their total norm is at most `max_norm`.

        Args:
            max_norm: Largest total norm allowed.
            error_if_nonfinite: Raise if the total norm is NaN or infinite. This waits for the device.
            rows: What `measure` wrote of the gradients as they are now; None measures them.

        Returns:
            The total norm before clipping, 0-d, in the widest dtype of the gradients but at least float32; and the
            factor, 0-d float64.

        Raises:
            RuntimeError: The total norm is not finite and `error_if_nonfinite` is set.
        """
        gradients, regular = self.hooks.gradients()
        measured = self.meter.all_present
        if rows is None or self.whole is not None:
            rows = {
                device: torch.empty(n_rows, len(STATS), dtype=torch.float64, device=device)
                for device, n_rows in self.meter.rows_on.items()
            }
            try:
                measured = self.meter.measure(gradients, regular, rows)
            except BaseException:
                if self.whole is not None:
                    self._reduced(None, None)  # the other ranks are waiting
                raise
        if self.whole is not None:
            rows = self._reduced(rows, measured)
        total, factor = self.meter.clipping(rows, max_norm)
        if error_if_nonfinite and not bool(torch.isfinite(total)):
            raise RuntimeError(f"clip_grad_norm_: needed a finite total norm, got {total.item()}")
        self.meter.scale_(gradients, regular, factor)
        return total.to(self.meter.norm_dtype), factor

    def gradients_stepped_by(self, optimizer: torch.optim.Optimizer | None) -> list[torch.Tensor | None]:
        """Returns the K gradients; None for those of parameters that the optimizer, if any, does not step."""
        gradients, _ = self.hooks.gradients()
        if optimizer is None:
            return gradients
        is_stepped = stepped_by(optimizer, self.parameters())
        return [gradient if stepped else None for gradient, stepped in zip(gradients, is_stepped, strict=True)]

    def newly_trainable(self) -> tuple[str, ...]:
        """Lists the parameters that require a gradient now and are not observed."""
        model = self._model()
        if model is None:
            return ()
        known = self._known()
        return tuple(
            name
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if parameter.requires_grad and id(parameter) not in known and name not in self._without_kernel
        )

    def note_ready(self, k: int) -> None:
        """Notes that gradient k has been measured by itself; it may still have to be added up over ranks."""
        if self.whole is not None:
            from gradprobe.observers.sharding import partial_gradient

            self.partials += partial_gradient(k, self._places[k].parameter())

    def find_partials(self) -> None:
        """Copies the gradients that still have to be added up over ranks."""
        if self.whole is not None:
            from gradprobe.observers.sharding import partial_gradients

            self.partials = partial_gradients(self.parameters())

    def release(self) -> None:
        """Removes every hook, for good."""
        self.hooks.remove()
        self._watch.remove()

    def _reduced(
        self, rows: dict[torch.device, torch.Tensor] | None, measured: Measured | None
    ) -> dict[torch.device, torch.Tensor]:
        """Reduces the rows of this rank's parts, and waits for the other ranks."""
        from gradprobe.observers.sharding import partial_gradients

        assert self.whole is not None
        out = torch.empty(self.whole.n_rows, len(STATS), dtype=torch.float64, device=self.whole.device)
        self.whole.start(0, rows, measured, partial_gradients(self.parameters()))
        self.whole.finish(out, keeps_incomplete=True)
        return {self.whole.device: out[: len(self.whole.names)]}

    def _is_same(self, found: ModelParameters) -> bool:
        """Returns whether a model's parameters are those observed, under the same names."""
        has_same_names = [site.names for site in found.sites] == [site.names for site in self.sites]
        return has_same_names and [id(parameter) for parameter in found.parameters] == self._ids

    def _follow(self, found: ModelParameters) -> str:
        """Observes other parameters, or the same in another layout, from now on; returns what `look` does."""
        change = "" if self._is_same(found) else self._describe(found)
        self._take(found)
        self._rehook(found)
        return change

    def _take(self, found: ModelParameters) -> None:
        meter = GradientMeter(
            [Layout.of(parameter) for parameter in found.parameters],
            [site.name for site in found.sites],
            self._backend,
            self._fence,
        )
        if self.whole is not None:
            self.whole.regroup(found.sites, meter)
        self.meter = meter
        self._ids, self._places = [id(parameter) for parameter in found.parameters], found.places
        self.sites, self.frozen, self._without_kernel = found.sites, found.frozen_names, found.unmeasured
        self._frozen_places = found.frozen_places
        self.hides_writes = found.are_sharded
        sizes = zip(found.sites, meter.layouts, strict=True)
        self._are_parts = found.are_sharded and any(layout.numel != math.prod(site.shape) for site, layout in sizes)
        self._make_table()

    def _make_table(self) -> None:
        names = tuple(site.name for site in self.sites)
        ndims = tuple(len(site.shape) for site in self.sites)
        if self.whole is not None:
            names, ndims = self.whole.names, self.whole.ndims
        index = {name: k for k, name in enumerate(names)}
        index |= {other: index[site.name] for site in self.sites for other in site.names}
        self.table = SiteTable(names, ("parameter",) * len(names), ndims, index)

    def _known(self) -> dict[int, str]:
        """Returns the names of the observed parameters that are alive, by id."""
        parameters = zip(self.sites, self.hooks.parameters(), strict=True)
        return {id(parameter): site.name for site, parameter in parameters if parameter is not None}

    def _rehook(self, found: ModelParameters) -> None:
        # new hooks cannot tell whether a backward pass has run
        self._fired_before = self.has_fired() or any(parameter.grad is not None for parameter in found.parameters)
        self.hooks.remove()
        self.hooks = gradient_hooks.install(found, *self._callbacks)

    def _describe(self, now: ModelParameters) -> str:
        """Says what differs from the parameters so far, by kind."""
        known = {site.name: key for site, key in zip(self.sites, self._ids, strict=True)}
        found = {site.name: id(parameter) for site, parameter in zip(now.sites, now.parameters, strict=True)}
        kinds = {
            "replaced": [name for name in found if name in known and found[name] != known[name]],
            "new": [name for name in found if name not in known],
            "no longer there or frozen": [name for name in known if name not in found],
        }
        return "; ".join(f"{kind}: {listed(names)}" for kind, names in kinds.items() if names)
