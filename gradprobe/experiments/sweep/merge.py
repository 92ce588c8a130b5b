"""Joins the files of sweeps that trained parts of the same grid, as on several machines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

from gradprobe.errors import StoreError
from gradprobe.experiments.sweep.store import Run, RunWriter, open_run, start_run
from gradprobe.report.records import Cell, measured_by_both


def merge(out: str | Path, parts: Sequence[str | Path]) -> Path:
    """Copies the training runs of several sweeps into one file, which a sweep can resume.

    A training run that two files have must have the same numbers up to the shorter one's end, and is taken from the one
    that is further.

    Args:
        out: The file; if it exists, the training runs are added to it. It may be one of the parts.
        parts: Files of sweeps with the same data and training settings.

    Returns:
        The path of the file.

    Raises:
        StoreError: A file cannot be used, or was written with other settings, another version of torch, or a network of
            another size, or has other numbers of a training run than another file.
    """
    out = Path(out)
    for part in parts:
        with open_run(part) as run:
            if out.exists() and out.samefile(part):
                continue
            kept = {key: value for key, value in run.meta.items() if key not in ("schema_version", "config")}
            with start_run(out, run.config, kept) as target:
                _check(run, target)
                for spec in run.specs():
                    target.add_spec(spec)
                _copy(run, target)
    return out


def _check(run: Run, target: RunWriter) -> None:
    """Checks that both files can be of one sweep."""
    if target.meta.get("torch_version") != run.meta.get("torch_version"):
        raise StoreError(
            f"{run.path}: written with torch {run.meta.get('torch_version')}, and {target.path} with "
            f"{target.meta.get('torch_version')}; the numbers would not be those of one sweep"
        )
    there = _by_key(target)
    for key, cell in _by_key(run).items():
        if key not in there:
            continue
        other = there[key]
        if other.parameters != cell.parameters:
            raise StoreError(
                f"{run.path}: {cell.name} has {cell.parameters:,} parameters, and {other.parameters:,} in {target.path}"
            )
        epoch = _first_difference(run, cell.id, target, other.id)
        if epoch is not None:
            raise StoreError(
                f"{run.path}: {cell.title} has other numbers at epoch {epoch} than in {target.path}; "
                "the files are not of the same training"
            )


def _copy(run: Run, target: RunWriter) -> None:
    target.add_cells([(*cell.net, cell.seed, cell.parameters) for cell in run.cells()])
    there = _by_key(target)
    for key, cell in _by_key(run).items():
        own = there[key]
        known = {row.epoch for row in target.epochs(own.id)}
        epochs = [row for row in run.epochs(cell.id) if row.epoch not in known]
        if epochs:
            layers = [layer for row in epochs for layer in run.layers(cell.id, row.epoch)]
            # The residual adds of an epoch's first step are stored with the number of epochs before it.
            before = [row.epoch - 1 for row in epochs if row.epoch]
            junctions = [junction for epoch in before for junction in run.junctions(cell.id, epoch)]
            target.save(own.id, epochs, layers, junctions, run.checkpoint(cell.id) or b"", cell.status)
        if cell.failure and (epochs or not known) and cell.status == "pending":
            target.record_failure(own.id, cell.failure)


def _by_key(run: Run) -> dict[tuple[str, int, int], Cell]:
    return {(*cell.net, cell.seed): cell for cell in run.cells()}


def _first_difference(one: Run, cell_id: int, other: Run, other_id: int) -> int | None:
    """Returns the first epoch of a cell for which both files have numbers and these differ."""
    others = {row.epoch: row for row in other.epochs(other_id)}
    for row in one.epochs(cell_id):
        if row.epoch not in others:
            continue
        pairs: list[tuple[object, object]] = [*measured_by_both(row, others[row.epoch])]
        layers, other_layers = one.layers(cell_id, row.epoch), other.layers(other_id, row.epoch)
        pairs.append((len(layers), len(other_layers)))
        for layer, other_layer in zip(layers, other_layers, strict=False):
            pairs += zip(astuple(layer), astuple(other_layer), strict=True)
        if not all(_is_same(*pair) for pair in pairs):
            return row.epoch
    return None


def _is_same(one: object, other: object) -> bool:
    """Whether two numbers or names are equal; sums of the same values may be of another order."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9) or (math.isnan(one) and math.isnan(other))
    return one == other
