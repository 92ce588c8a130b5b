"""Comparisons of synthetic runs: what counts as equal, as rounding and as a difference, and how it is shown."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
from helpers.names import NAMES
from helpers.report_cases import Page
from helpers.run_cases import rows_of, run
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from gradprobe.errors import ArgumentError
from gradprobe.ops.rows import N_NONFINITE, SUM, SUM_SQ
from gradprobe.report.chart_parts import svg
from gradprobe.report.comparison import page as pages
from gradprobe.report.comparison.charts import both_chart, difference_chart
from gradprobe.report.comparison.compare import Comparison, compare
from gradprobe.report.comparison.output import ComparisonView
from gradprobe.report.comparison.sentences import details, headline, notes
from gradprobe.report.run_charts import WIDE_RUN
from gradprobe.snapshot import SiteTable, Snapshot
from gradprobe.snapshot.records import Measured, Provenance


def gradients(
    norms: Sequence[float],
    step: int = 0,
    names: Sequence[str] = ("a.weight", "a.bias", "b.weight"),
    loss: float | None = None,
    scale: float = 1.0,
) -> Snapshot:
    """A step with float32 gradients of these norms."""
    table = SiteTable(tuple(names), ("parameter",) * len(names), (2,) * len(names), {n: k for k, n in enumerate(names)})
    rows = rows_of(np.array(norms, dtype=np.float64)).astype(np.float32).astype(np.float64)
    measured = Measured(np.ones(len(names), dtype=np.bool_), np.full(len(names), 100))
    return Snapshot(step, loss, Provenance("unscaled", "local", "raw"), False, table, rows, measured, scale)


def history(n_steps: int = 12, loss: float | None = None) -> list[Snapshot]:
    """Steps with gradients that scatter, so that their format shows."""
    norms = np.random.default_rng(0).uniform(0.5, 2.0, (n_steps, 3))
    return [gradients(one, step, loss=loss) for step, one in enumerate(norms.tolist())]


def changed(run: Sequence[Snapshot], step: int, factors: Sequence[float]) -> list[Snapshot]:
    """The run with the gradients of one step multiplied."""
    found = list(run)
    rows = found[step].rows.copy()
    rows[:, :4] *= np.array(factors)[:, None] ** np.array([1, 1, 2, 1])
    found[step] = replace(found[step], rows=rows)
    return found


def steps(found: Comparison) -> tuple[int | None, int | None]:
    return tuple(None if one is None else one.step for one in (found.first, found.first_beyond))  # type: ignore[return-value]


VALUES = st.sampled_from([0.0, 1.0, 1.0 + 2.0**-52, 2.0, math.nan, math.inf])
ROWS = st.tuples(VALUES, VALUES, VALUES, VALUES, st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 2.0]))
CELLS = st.tuples(st.booleans(), ROWS, st.sampled_from([3, 4]))
STEP = st.tuples(st.sampled_from([None, 1.0, 2.0, math.nan]), st.lists(CELLS, min_size=2, max_size=2))


@settings(max_examples=60)
@given(st.dictionaries(st.integers(0, 6), st.tuples(STEP, st.none() | STEP), min_size=1))
def test_the_first_difference_is_that_of_a_search_by_hand(table: dict[int, tuple[object, object]]) -> None:
    def build(step: int, drawn: object) -> Snapshot:
        loss, cells = drawn  # type: ignore[misc]
        present, rows, numels = (np.array(part) for part in zip(*cells, strict=True))
        measured = Measured(present.astype(np.bool_), numels.astype(np.int64))
        return replace(
            gradients([1.0, 1.0], step, names=("x", "y"), loss=loss), rows=rows.astype(np.float64), measured=measured
        )

    def same(x: object, y: object) -> bool:
        return x == y or (x != x and y != y)

    a = [build(step, table[step][0]) for step in sorted(table)]
    b = [build(step, table[step][1] or table[step][0]) for step in sorted(table)]
    expected: tuple[int, set[str]] | None = None
    for x, y in zip(a, b, strict=True):
        names = set()
        for k, name in enumerate("xy"):
            there = bool(x.measured.present[k]), bool(y.measured.present[k])
            values = [same(u, v) for u, v in zip(x.rows[k].tolist(), y.rows[k].tolist(), strict=True)]
            if there[0] != there[1] or (
                there[0] and not (all(values) and x.measured.numels[k] == y.measured.numels[k])
            ):
                names.add(name)
        has_losses = x.loss is not None and y.loss is not None
        if names or (has_losses and not same(x.loss, y.loss)):
            expected = (x.step, names)
            break
    found = compare(a, b)
    actual = None if found.first is None else (found.first.step, {one.name for one in found.first.differences})
    assert actual == expected
    assert found.equal == (expected is None)
    assert compare(b, a).equal == found.equal


def test_nan_equals_nan() -> None:
    a = history()
    for one in a:
        one.rows[1] = [math.nan, math.nan, math.nan, math.nan, 0, 3]
    a = [replace(one, loss=math.nan) for one in a]
    assert compare(a, [replace(one, rows=one.rows.copy()) for one in a]).equal


def test_the_norm_of_all_gradients_is_that_of_each_step() -> None:
    a = [gradients(norms, step) for step, norms in enumerate([(1.0,) * 3, (3.0, math.nan, 4.0), (1.0,) * 3])]
    a[0].rows[:] = rows_of(np.array([3e100, 4e100, 0.0]))
    a[2].measured.present[:] = False
    b = [gradients([1.0, 2.0, 2.0], step) for step in range(3)]
    found = compare(a, b)
    np.testing.assert_allclose(found.total_norms, [[5e100, math.nan, math.nan], [3.0, 3.0, 3.0]])
    assert found.total_norms.tolist()[1] == [one.total_norm for one in b]
    assert found.first is not None
    assert found.first.total_norms == (pytest.approx(5e100), 3.0)


def test_loss_scaling_makes_no_difference() -> None:
    a = history()
    scaled = [replace(one, rows=one.rows * 2.0 ** (10 * np.array([1, 1, 2, 1, 0, 0])), scale=2.0**-10) for one in a]
    assert compare(a, scaled).equal


@pytest.mark.parametrize(("factor", "beyond"), [(1 + 2.0**-30, None), (1 + 1e-6, None), (1 + 1e-5, 5), (1.01, 5)])
def test_the_first_difference_is_judged_by_one_steps_rounding(factor: float, beyond: int | None) -> None:
    a = history()
    found = compare(a, changed(a, 5, [factor] * 3))
    assert found.rounding.bits == 24
    assert steps(found) == (5, beyond)


@pytest.mark.parametrize(("factor", "beyond"), [(1 + 1e-4, None), (1 + 1e-3, 8)])
def test_later_differences_may_be_larger(factor: float, beyond: int | None) -> None:
    a = history()
    assert steps(compare(a, changed(changed(a, 5, [1 + 1e-7] * 3), 8, [factor] * 3))) == (5, beyond)


def test_one_gradient_may_differ_more_than_all_together() -> None:
    a = history()
    assert steps(compare(a, changed(a, 5, [1, 1.0001, 1]))) == (5, None)
    assert steps(compare(a, changed(a, 5, [1, 1.1, 1]))) == (5, 5)


def test_a_gradient_that_is_all_rounding_is_not_judged() -> None:
    a = [
        replace(one, rows=one.rows * np.array([[1], [1e-7], [1]]) ** np.array([1, 1, 2, 1, 1, 1])) for one in history()
    ]
    found = compare(a, changed(a, 5, [1, 3, 1]))
    assert steps(found) == (5, None)
    assert found.first is not None
    assert [(one.name, one.is_negligible) for one in found.first.differences] == [("a.bias", True)]
    alone = [replace(one, table=gradients([1.0] * 3, names=("a.weight", "c.bias", "b.weight")).table) for one in a]
    assert steps(compare(alone, changed(alone, 5, [1, 3, 1]))) == (5, 5)


def test_the_loss_of_the_first_step_that_differs_is_judged_strictly() -> None:
    a = history(loss=2.0)
    b = [replace(one, loss=2.0 * (1 + 1e-5)) if one.step >= 5 else one for one in a]
    assert steps(compare(a, b)) == (5, 5)
    assert steps(compare(a, [replace(one, loss=2.0 * (1 + 1e-6)) if one.step >= 5 else one for one in a])) == (5, None)
    # nothing is known of the steps between, which may have amplified a smaller difference
    assert steps(compare(a[::5], b[::5])) == (5, None)


def test_losses_that_cross_zero_are_compared_by_their_usual_size() -> None:
    a = [replace(one, loss=one.step - 5.0) for one in history()]
    b = [replace(one, loss=one.loss + 1e-6 * (one.step > 2)) for one in a if one.loss is not None]
    assert steps(compare(a, b)) == (3, None)


def test_counts_presence_and_size_are_no_rounding() -> None:
    a = history()
    odd, absent, smaller = list(a), list(a), list(a)
    rows = a[4].rows.copy()
    rows[0, N_NONFINITE] = 1
    odd[4] = replace(a[4], rows=rows)
    absent[4] = replace(a[4], measured=Measured(np.array([True, False, True]), a[4].measured.numels))
    smaller[4] = replace(a[4], measured=Measured(a[4].measured.present, np.array([100, 50, 100])))
    for b, name in ((odd, "a.weight"), (absent, "a.bias"), (smaller, "a.bias")):
        found = compare(a, b)
        assert steps(found) == (4, 4)
        assert found.first is not None
        assert [(one.name, one.is_beyond) for one in found.first.differences] == [(name, True)]


def test_a_mean_alone_is_found() -> None:
    a = history()
    b = list(a)
    rows = a[4].rows.copy()
    rows[2, SUM] += 1e-3
    b[4] = replace(a[4], rows=rows)
    found = compare(a, b)
    assert found.first is not None
    assert (found.first.step, found.first.differences[0].size) == (4, 0.0)
    assert "mean" in found.first.differences[0].statistics


def test_a_longer_run_and_one_with_fewer_steps_are_compared_in_the_steps_that_both_have() -> None:
    a = history()
    found = compare(a, a[:6])
    assert (found.equal, headline(found)) == (
        True,
        "The runs are equal: all that both recorded is the same, bit for bit, in 6 steps (0 to 5).",
    )
    assert "A has 12 steps (0 to 11)." in list(notes(found))
    sparse = changed(a, 6, [1.5] * 3)[::3]
    assert steps(compare(a, sparse)) == (6, 6)


def test_parameters_modules_and_kinds_of_one_run_are_listed() -> None:
    a, b = run(4, n_weights=3, n_adds=1), run(4, n_weights=3, n_adds=0, name=lambda k: f"layer{2 * k}")
    found = compare(a, [replace(one, loss=None) for one in b])
    told = " ".join(notes(found))
    assert "Only A has 2 parameters layer1.weight, layer2.weight." not in told  # layer2 is in both
    assert "Only A has 1 parameter layer1.weight." in told
    assert "Only B has 1 parameter layer4.weight." in told
    assert "Only A has the loss, residual adds." in told
    assert not found.equal


def test_parameters_are_matched_by_name() -> None:
    a = history()
    assert compare(a, [one.reordered([2, 0, 1]) for one in a]).equal
    fewer = [gradients([1.0, 2.0], step, names=("a.weight", "b.weight")) for step in range(3)]
    more = [gradients([1.0, 3.0, 2.0], step) for step in range(3)]
    found = compare(fewer, more)
    assert (found.first, found.equal) == (None, False)
    assert headline(found) == (
        "The runs have different parameters; all that both recorded is the same, bit for bit, in 3 steps (0 to 2)."
    )


def test_outputs_of_modules_are_compared() -> None:
    a, b = run(6), run(6)
    signals = b[3].signals
    assert signals is not None
    signals.rows[4, SUM_SQ] *= 2
    found = compare(a, b)
    assert found.first is not None
    assert [(one.name, one.kind) for one in found.first.differences] == [("layer2", "activation")]
    assert steps(found) == (3, 3)


def test_a_model_that_changes_on_the_way_is_compared_as_a_whole() -> None:
    a = [*run(4, n_weights=3), *(replace(one, step=one.step + 4) for one in run(4, n_weights=5))]
    assert compare(a, list(a)).equal
    found = compare(a, run(8, n_weights=3))
    assert found.course.names == ("layer0.weight", "layer1.weight", "layer2.weight")


def test_runs_without_a_common_step_or_parameter_are_refused() -> None:
    a = history(3)
    with pytest.raises(ArgumentError, match="a step in common, got A steps 0 to 2, B steps 7 to 9"):
        compare(a, [replace(one, step=one.step + 7) for one in a])
    with pytest.raises(ArgumentError, match="B no steps"):
        compare(a, [])
    with pytest.raises(ArgumentError, match="a parameter or a loss in common"):
        compare(a, [gradients([1.0], step, names=("z",)) for step in range(3)])


def test_names_that_are_numbers_are_in_quotation_marks() -> None:
    a = [replace(one, table=gradients([1.0] * 3, names=("0", "1", "b.weight")).table) for one in history()]
    (told,) = [line for line in details(compare(a, changed(a, 5, [1.25, 1.0, 1.0]))) if line.startswith("Step 5")]
    assert told.endswith("most that of '0', 0.200.")
    b = [gradients([1.0], one.step, names=("0",)) for one in a]
    assert "Only A has 2 parameters '1', b.weight." in notes(compare(a, b))


def test_many_names_are_counted_and_the_first_ones_listed() -> None:
    names = tuple(f"layers.{k}.weight" for k in range(1200))
    a = [gradients([1.0] * len(names), step, names=names) for step in range(3)]
    b = [gradients([1.0], step, names=names[-1:]) for step in range(3)]
    told = next(note for note in notes(compare(a, b)) if note.startswith("Only A"))
    assert told.startswith("Only A has 1,199 parameters layers.0.weight, layers.1.weight, ")
    assert told.endswith("layers.4.weight, ….")


def test_other_provenance_is_noted_once() -> None:
    a = history()
    b = [replace(one, provenance=Provenance("unscaled", "averaged", "raw")) if one.step > 3 else one for one in a]
    told = [note for note in notes(compare(a, b)) if "averaged" in note]
    assert told == ["From step 4 on, gradients are local in A and averaged in B (over ranks)."]


def test_the_page_shows_partings_and_numbers() -> None:
    pytest.importorskip("altair")
    a = [replace(one, loss=2.0 - 0.01 * one.step) for one in history()]
    text = pages.page(ComparisonView(compare(a, changed(a, 5, [1.0, 1.25, 1.0])), ("runs/a", "runs/b")))
    shown = Page(text)
    assert "The runs first differ at step 5, by more than rounding." in shown.text
    assert shown.row("a.bias")[3] == "0.200"
    assert shown.loads == []


def test_the_page_names_the_steps_above_their_lines_and_keeps_limits_clear_of_the_lines() -> None:
    a = history()
    b = changed(changed(a, 3, [1.0, 1.0 + 1e-6, 1.0]), 5, [1.0, 1.25, 1.0])
    found = compare(a, b)
    assert steps(found) == (3, 5)
    for chart in (both_chart(found), difference_chart(found)):
        assert chart is not None
        drawn = svg(chart)
        assert drawn.count(">step 3<") == drawn.count(">step 5<") >= 1
    limits = re.findall(r"translate\(([\d.]+),[^>]*>limit, (?:one|all)<", drawn)
    assert {float(x) for x in limits} == {WIDE_RUN.width + 6.0}


@pytest.mark.parametrize("width", [120, 80, 40, 30])
def test_a_narrow_terminal_leaves_columns_out_and_cuts_no_number(width: int) -> None:
    a = history()
    found = compare(a, changed(a, 5, [1.0, 1.25, 1.0]))
    console = Console(width=width, file=StringIO())
    console.print(ComparisonView(found, ("runs/a", "runs/b")))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    (row,) = [line for line in lines if "a.bias " in line and "0.200" in line and "most" not in line]
    assert "…" not in "".join(lines)
    assert ("largest magnitude" in row, any("wider terminal" in line for line in lines)) == (width > 40, width <= 40)


def test_long_names_are_wrapped_in_tables_and_short_ones_are_not() -> None:
    long = "encoder." * 6 + "weight"
    a = [gradients([1.0, 2.0], names=("weight", long))]
    text = pages.page(ComparisonView(compare(a, changed(a, 0, [1.5, 1.5])), ("runs/a", "runs/b")))
    heads = dict(re.findall(r'<th scope="row" class="(\w+)" data-value="\d">([^<]*)<', text))
    assert heads == {"short": "weight", "long": long}


def test_hostile_names_are_inert() -> None:
    pytest.importorskip("altair")
    names = list(NAMES.values())
    a = run(3, n_weights=len(names), n_adds=0, name=lambda k: f"{names[k]}{k}")
    b = [replace(one, rows=1.5 * one.rows) for one in a]
    text = pages.page(ComparisonView(compare(a, b), (NAMES["script"], NAMES["escape"])))
    assert Page(text).loads == []
    assert "<script>alert" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
