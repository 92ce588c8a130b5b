"""Measures the gradients of one step: one fused pass per device and dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gradprobe import ops
from gradprobe.observers.fence import Fence
from gradprobe.observers.parameters import Layout, is_regular
from gradprobe.ops.reference import FLOAT8_DTYPES
from gradprobe.ops.rows import ABS_MAX
from gradprobe.ops.schemas import CLIP_COEFFICIENT
from gradprobe.snapshot.records import FloatArray, Measured
from gradprobe.text.words import quoted

_MOST_COMPARED = 8  # gradients, to tell clipping from other changes


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that share a device and a dtype. Their rows are contiguous.

    Attributes:
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        positions: Positions of the parameters in model order.
        first_row: Row of the first parameter, among the rows of the device.
    """

    device: torch.device
    dtype: torch.dtype
    positions: tuple[int, ...]
    first_row: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """How the gradients have changed since they were measured.

    Attributes:
        smallest: Smallest factor, 0-d float64 on the device; infinite if no gradient was large enough to tell.
        largest: Largest factor; smaller than `smallest` if no gradient was large enough to tell.
        tolerance: Relative difference of the two that rounding explains.
    """

    smallest: torch.Tensor
    largest: torch.Tensor
    tolerance: float


class GradientMeter:
    """Groups K parameters by device and dtype and measures their gradients. Keeps no parameter alive.

    Attributes:
        layouts: Layouts of the K parameters.
        unmeasured: Positions of the parameters whose gradient could not be measured.
        saw_irregular: The newest measurement met a gradient that was not a plain dense one of its parameter's layout.

    Args:
        layouts: The same, in model order.
        names: Names of the parameters, for messages. Length K.
        backend: Name of the back end, or "auto".
        fence: Takes the errors of single gradients.

    Raises:
        ArgumentError: The back end is unknown.
        BackendError: The back end cannot run on one of the devices.
    """

    def __init__(self, layouts: Sequence[Layout], names: Sequence[str], backend: str, fence: Fence) -> None:
        self.layouts = tuple(layouts)
        self.unmeasured: set[int] = set()
        self.saw_irregular = False
        self._names = names
        self._backend_name = backend
        self._fence = fence
        members: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for k, layout in enumerate(self.layouts):
            members.setdefault((layout.device, layout.dtype), []).append(k)
        self._backends = {device: ops.resolve(backend, device) for device, _ in members}
        self.rows_on: dict[torch.device, int] = {}
        groups = []
        self._row_of = np.zeros(len(self.layouts), dtype=np.int64)  # [K], among the rows of its device
        for (device, dtype), positions in members.items():
            first = self.rows_on.get(device, 0)
            groups.append(Group(device, dtype, tuple(positions), first))
            self._row_of[positions] = np.arange(first, first + len(positions))
            self.rows_on[device] = first + len(positions)
        self.groups = tuple(groups)
        numels = np.asarray([layout.numel for layout in self.layouts], dtype=np.int64)
        self.all_present = Measured(np.ones(len(numels), dtype=np.bool_), numels)
        self.none_present = Measured(np.zeros(len(numels), dtype=np.bool_), np.zeros_like(numels))

    def positions_on(self, device: torch.device) -> npt.NDArray[np.int64]:
        """Returns the positions of the parameters on a device, in the order of their rows."""
        groups = [group.positions for group in self.groups if group.device == device]
        return np.concatenate([np.asarray(positions, dtype=np.int64) for positions in groups])

    def native_rows(self, rows: dict[torch.device, torch.Tensor]) -> torch.Tensor | None:
        """Returns the rows that a single call of the native kernel can write.

        Args:
            rows: As for `measure`.

        Returns:
            The rows in model order [K, 6], or None if there are several groups or the back end is not native.
        """
        if len(self.groups) != 1:
            return None
        device = self.groups[0].device
        return rows[device] if self._backends[device].name == "native" else None

    def measure(
        self, gradients: list[torch.Tensor | None], regular: bool, rows: dict[torch.device, torch.Tensor]
    ) -> Measured:
        """Computes the raw statistics of the gradients.

        Args:
            gradients: The K gradients, None for a parameter without one.
            regular: All are present, dense and of their parameter's dtype and device.
            rows: For each device, float64 rows to write, on that device. [rows_on[device], 6]

        Returns:
            Which parameters had a gradient, and their sizes.
        """
        self.saw_irregular = False
        with torch.no_grad():
            if regular:
                for group in self.groups:
                    whole = len(group.positions) == len(gradients)
                    members = gradients if whole else [gradients[k] for k in group.positions]
                    out = rows[group.device][group.first_row : group.first_row + len(group.positions)]
                    self._backends[group.device].grad_stats_into(members, out)  # type: ignore[arg-type]
                return self.all_present
            return self._measure_irregular(gradients, rows)

    def compare(
        self, gradients: list[torch.Tensor | None], rows: dict[torch.device, torch.Tensor]
    ) -> Comparison | None:
        """Compares some gradients with what was measured of them, without waiting for the device.

        Clipping to a norm multiplies the norm and the largest magnitude of each gradient by the same factor.

        Args:
            gradients: The K gradients as they are now, None for those that do not count.
            rows: Rows that `measure` has written.

        Returns:
            The comparison, of at most `_MOST_COMPARED` gradients in one pass; None if no gradient can be compared.
        """
        for group in self.groups:
            candidates = [
                k
                for k in group.positions
                if (gradient := gradients[k]) is not None
                and is_regular(gradient, self.layouts[k])
                and gradient.numel() > 0
            ]
            if candidates:
                break
        else:
            return None
        spread = np.linspace(0, len(candidates) - 1, min(_MOST_COMPARED, len(candidates))).round().astype(int)
        chosen = [candidates[k] for k in spread]
        with torch.no_grad():
            now = torch.empty(len(chosen), len(ops.STATS), dtype=torch.float64, device=group.device)  # [P, 6]
            self._backends[group.device].grad_stats_into([gradients[k] for k in chosen], now)
            before = torch.stack(self.rows_of(chosen, rows))  # [P, 6]
            sizes = [torch.stack((ops.norms(part), part[:, ABS_MAX])) for part in (before, now)]  # [2, P] each
            ratios = sizes[1] / sizes[0]
            # Scaling rounds small numbers more coarsely at the lower end of the dtype's range.
            info = torch.finfo(group.dtype)
            counts = torch.isfinite(sizes[0]) & (sizes[0] > 0) & ~(sizes[1] < 8 * info.smallest_normal)
            smallest = torch.where(counts, ratios, math.inf).min()
            largest = torch.where(counts, ratios, -math.inf).max()
        return Comparison(smallest, largest, tolerance=4.0 * float(info.eps))

    def clipping(self, rows: dict[torch.device, torch.Tensor], max_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the Euclidean norm of all gradients together and the factor that clips it.

        Args:
            rows: Rows that `measure` has written.
            max_norm: Largest norm allowed.

        Returns:
            The norm and the factor, float64, 0-d, on the device of the first parameter.
        """
        parts = list(rows.values())  # [K, 6] each
        together = parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].device) for part in parts])
        with torch.no_grad():
            total, factor = CLIP_COEFFICIENT(together, max_norm)
        return total, factor

    @property
    def norm_dtype(self) -> torch.dtype:
        """Dtype of a total norm: the widest of the gradients' dtypes, at least float32."""
        wide = any(group.dtype in (torch.float64, torch.complex128) for group in self.groups)
        return torch.float64 if wide else torch.float32

    def scale_(self, gradients: list[torch.Tensor | None], regular: bool, coefficient: torch.Tensor) -> None:
        """Multiplies the gradients in place.

        Args:
            gradients: The K gradients, None for a parameter without one.
            regular: All are present, dense and of their parameter's dtype and device.
            coefficient: Factor, 0-d, on any device.
        """
        with torch.no_grad():
            for group in self.groups:
                factor = coefficient.to(group.device, non_blocking=True)
                members = []
                for k in group.positions:
                    gradient = gradients[k]
                    if gradient is None:
                        continue
                    if gradient.dtype in FLOAT8_DTYPES:  # which no kernel writes
                        gradient.copy_(gradient.float().mul_(factor.to(gradient.device)))
                    elif regular or is_regular(gradient, self.layouts[k]):
                        members.append(gradient)
                    else:
                        gradient.mul_(factor.to(gradient.device, gradient.dtype))
                if members:
                    self._backends[group.device].scale_(members, factor)

    def in_model_order(self, rows: dict[torch.device, FloatArray]) -> FloatArray:
        """Puts the rows of all devices into model order.

        Args:
            rows: For each device, the rows of its parameters. Values of shape [K, 6].

        Returns:
            The rows of the K parameters. [K, 6]
        """
        if len(rows) == 1:
            (only,) = rows.values()
            return only[self._row_of]
        return np.stack([rows[layout.device][row] for layout, row in zip(self.layouts, self._row_of, strict=True)])

    def rows_of(self, positions: Sequence[int], rows: dict[torch.device, torch.Tensor]) -> list[torch.Tensor]:
        """Returns the row of each of P parameters, on its device.

        Args:
            positions: Positions of the parameters in model order. Length P.
            rows: As for `measure`.

        Returns:
            Views of `rows`. P of shape [6]
        """
        return [rows[self.layouts[k].device][int(self._row_of[k])] for k in positions]

    def measure_one(self, k: int, gradient: torch.Tensor, rows: dict[torch.device, torch.Tensor]) -> int:
        """Computes the raw statistics of one gradient.

        Args:
            k: Position of its parameter.
            gradient: Any gradient of parameter k.
            rows: As for `measure`.

        Returns:
            The number of elements measured.
        """
        device = self.layouts[k].device
        row = int(self._row_of[k])
        out = rows[device][row : row + 1]  # [1, 6]
        with torch.no_grad():
            values = gradient
            if not is_regular(gradient, self.layouts[k]):
                values = ops.dense_values(gradient)
            if values.device == device:
                self._backends[device].grad_stats_into([values], out)
            else:  # an offloaded gradient is measured on its own device; only six numbers are copied
                remote_row = torch.empty(1, len(ops.STATS), dtype=torch.float64, device=values.device)  # [1, 6]
                ops.resolve(self._backend_name, values.device).grad_stats_into([values], remote_row)
                out.copy_(remote_row, non_blocking=True)
        return values.numel()

    def _measure_irregular(
        self, gradients: list[torch.Tensor | None], rows: dict[torch.device, torch.Tensor]
    ) -> Measured:
        present = np.array([gradient is not None for gradient in gradients], dtype=np.bool_)
        numels = np.zeros(len(gradients), dtype=np.int64)
        errors: dict[int, Exception] = {}
        for group in self.groups:
            out = rows[group.device][group.first_row : group.first_row + len(group.positions)]
            there = {k: gradient for k in group.positions if (gradient := gradients[k]) is not None}
            regular = {k: gradient for k, gradient in there.items() if is_regular(gradient, self.layouts[k])}
            self.saw_irregular = self.saw_irregular or len(regular) < len(there)
            if group.dtype.is_complex or not regular:
                out.zero_()
            else:
                nothing = torch.empty(0, dtype=group.dtype, device=group.device)
                self._backends[group.device].grad_stats_into([regular.get(k, nothing) for k in group.positions], out)
            for k, gradient in there.items():
                if k in regular:
                    numels[k] = gradient.numel()
                    continue
                try:
                    numels[k] = 0 if k in self.unmeasured else self.measure_one(k, gradient, rows)
                except Exception as error:  # noqa: BLE001
                    errors[k] = error
        if errors:
            self.unmeasured |= errors.keys()
            first = next(iter(errors))
            others = f" and of {len(errors) - 1} other parameters" if len(errors) > 1 else ""
            self._fence.caught(f"the gradient of {quoted(self._names[first])}{others}", errors[first])
        present[list(self.unmeasured)] = False
        return Measured(present, numels)
