"""What a snapshot shows in a notebook. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradprobe.text.markup import BROKEN, HEALTHY, Cells, folded, form, grid, log_bars, paragraph
from gradprobe.text.words import counted, number

if TYPE_CHECKING:
    from gradprobe.snapshot.snapshot import Snapshot


def snapshot_form(snapshot: Snapshot) -> str:
    """Returns a snapshot as HTML: the step in one line, its gradients over depth, and the rest to open."""
    origin = snapshot.first_nonfinite()
    loss = "" if snapshot.loss is None else f"loss {number(snapshot.loss)}, "
    headline = f"Step {snapshot.step}: {loss}total norm {number(snapshot.total_norm)}"
    parts = [paragraph(_facts(snapshot))]
    if origin is not None:
        parts.append(paragraph(f"{origin}.", "Not finite:"))
    parts += [_gradients(snapshot), _outputs(snapshot), _adds(snapshot)]
    return form(headline, parts, HEALTHY if origin is None else BROKEN)


def _facts(snapshot: Snapshot) -> str:
    n_known, n_parameters = len(snapshot), len(snapshot.table.names)
    facts = [f"Gradients of {n_known} of {counted(n_parameters, 'parameter')}, {', '.join(snapshot.provenance)}"]
    if snapshot.clip_factor is not None and snapshot.clip_factor != 1.0:
        facts.append(f"clipped to {number(snapshot.clip_factor)} times their size")
    if snapshot.skipped:
        facts.append("the gradient scaler skipped the optimizer's step")
    if snapshot.is_accumulated:
        facts.append("added to gradients that an optimizer had already used")
    return "; ".join(facts) + "."


def _gradients(snapshot: Snapshot) -> str:
    sites, updates = list(snapshot.sites.values()), snapshot.updates
    columns = ["gradient of", "norm", "log scale", "rms", "largest", "zero", "not finite"]
    bars = log_bars([one.norm for one in sites])
    rows: list[Cells] = [
        [one.name, one.norm, bar, one.rms, one.abs_max, f"{one.zero_fraction:.0%}", one.nonfinite]
        for one, bar in zip(sites, bars, strict=True)
    ]
    if updates:
        columns.append("update / weight")
        for row in rows:
            update = updates.get(str(row[0]))
            row.append("" if update is None else update.ratio)
    return grid(columns, rows) if rows else ""


def _outputs(snapshot: Snapshot) -> str:
    found = list(snapshot.activations.values())
    if not found:
        return ""
    bars = log_bars([one.output.rms for one in found])
    rows: list[Cells] = [
        [one.name, one.module_type, one.output.rms, bar, one.output.abs_max, f"{one.output.zero_fraction:.0%}"]
        for one, bar in zip(found, bars, strict=True)
    ]
    table = grid(["output of", "class", "rms", "log scale", "largest", "zero"], rows)
    return folded(f"Outputs of {counted(len(found), 'module')}", [table])


def _adds(snapshot: Snapshot) -> str:
    found = list(snapshot.junctions.values())
    if not found:
        return ""
    rows: list[Cells] = [[one.name, one.shortcut_share, one.x.rms, one.f.rms, one.y.rms] for one in found]
    table = grid(["residual add", "shortcut's share", "rms of x", "rms of F(x)", "rms of the sum"], rows)
    return folded(counted(len(found), "residual add"), [table])
