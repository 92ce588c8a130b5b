"""A sweep of the built-in families: what is recorded of each, resuming, and options that a family lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.sweep_commands import trained_here

from gradprobe import networks
from gradprobe.errors import ArgumentError
from gradprobe.experiments.sweep.run import sweep
from gradprobe.experiments.sweep.store import open_run

OPTIONS: dict[str, Any] = {
    "families": networks.FAMILIES,
    "depths": (8,),
    "seeds": (0,),
    "epochs": 2,
    "per_class": 13,
    "lr": 0.01,
}


def losses(path: Path) -> dict[str, list[tuple[float, float]]]:
    with open_run(path) as run:
        return {
            cell.family: [(row.running_loss, row.test_error_pct) for row in run.epochs(cell.id)] for cell in run.cells()
        }


@pytest.mark.soak
def test_every_family_can_be_swept_and_resumed(tmp_path: Path) -> None:
    with trained_here():
        whole = sweep(**OPTIONS, out=tmp_path / "whole.sqlite").path
    with open_run(whole) as run:
        cells = {cell.family: cell for cell in run.cells()}
        assert tuple(cells) == networks.FAMILIES
        assert {cell.status for cell in cells.values()} == {"done"}
        joins = {family: len(run.junctions(cell.id, 0)) for family, cell in cells.items()}
        norms = {family: [row.norm_l2 for row in run.layers(cell.id, 0)] for family, cell in cells.items()}
        (spec,) = run.specs()
    without_norm = dict.fromkeys(("resnet", "fixup", "skipinit", "rezero", "layerscale"), 3)
    transformers = {"transformer-pre": 8, "transformer-post": 8, "transformer-plain": 0}
    assert joins == {"plain": 0, **without_norm, **transformers}
    # Fixup's classifier starts at zero, so nothing before it has a gradient; behind a factor of zero there is none.
    assert [norm > 0 for norm in norms["fixup"]] == [False] * 7 + [True]
    assert [norm > 0 for norm in norms["skipinit"]] == [True] + [False] * 6 + [True]
    assert all(norm > 0 for family in transformers for norm in norms[family])
    assert 'families = ["plain", "resnet", "fixup", "skipinit"' in spec

    parts, some = tmp_path / "parts.sqlite", {**OPTIONS, "families": ("rezero", "transformer-pre")}
    for count in (1, 2):
        with trained_here(stop_after=count), pytest.raises(KeyboardInterrupt):
            sweep(**some, out=parts)
    with trained_here():
        sweep(**some, out=parts)
    expected = losses(whole)
    assert losses(parts) == {family: expected[family] for family in some["families"]}


def test_options_that_a_family_lacks_are_named(tmp_path: Path) -> None:
    options = {**OPTIONS, "out": tmp_path / "run.sqlite"}
    with pytest.raises(ArgumentError, match=r"^init: needed plain or resnet among the families, got fixup only$"):
        sweep(**{**options, "families": ["fixup"]}, init="xavier")
    with pytest.raises(ArgumentError, match=r"^families: needed one or more of plain, resnet, fixup, .* got 'vgg'$"):
        sweep(**{**options, "families": ["vgg"]})
    with pytest.raises(ArgumentError, match=r"^depth: a transformer needs an even number of sublayers"):
        sweep(**{**options, "depths": (9,), "families": ["transformer-pre"]})
    assert list(tmp_path.iterdir()) == []
