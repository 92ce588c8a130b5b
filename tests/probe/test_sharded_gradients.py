"""Gradients of models on several processes: the numbers are those of the whole gradient, whatever the layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
from helpers.layout_parts import plain_name
from helpers.layouts import LAYOUTS
from helpers.ranks import Outcome, run_ranks
from helpers.sharded_trainings import MAX_NORM, Statistics, Trained, Truth, train_case

CASES = [(layout, variant) for layout, one in LAYOUTS.items() for variant in one.variants]
# The others take minutes.
QUICK = {
    "ddp": ("plain", "accumulated"),
    "ddp bucket view": ("plain",),
    "fsdp2": ("plain", "accumulated", "torch clip", "probe clip", "activations"),
    "fsdp2 uneven": ("plain", "torch clip", "updates"),
    "fsdp1": ("plain", "probe clip"),
    "fsdp1 flat": ("plain",),
    "tensor parallel": ("plain", "probe clip"),
    "tensor parallel beside plain": ("plain", "probe clip"),
    "sequence parallel": ("plain", "probe clip"),
    "hand-made": ("plain", "updates"),
    "pipeline": ("plain",),
}
Ranks = Callable[[str, str], list[Trained]]


def cases_of(*variants: str) -> pytest.MarkDecorator:
    """Parametrizes a test by the layouts with one of the variants, or by all cases."""
    cases = [
        pytest.param(
            layout,
            variant,
            id=f"{layout} - {variant}",
            marks=() if variant in QUICK.get(layout, ()) else (pytest.mark.soak,),
        )
        for layout, variant in CASES
        if variant in variants or not variants
    ]
    return pytest.mark.parametrize(("layout", "variant"), cases)


every_case = cases_of()


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Trains the selected cases, all those on as many ranks in the same processes."""
    parameters = [
        item.callspec.params for item in request.session.items if "ranks" in getattr(item, "fixturenames", ())
    ]
    selected = dict.fromkeys((each["layout"], each["variant"]) for each in parameters if "variant" in each)
    outcomes: dict[str, list[Outcome]] = {}

    def trained(layout: str, variant: str) -> list[Trained]:
        n_ranks = LAYOUTS[layout].n_ranks
        name = f"{layout} - {variant}"
        if name not in outcomes:
            cases = {
                " - ".join(case): partial(train_case, *case) for case in selected if LAYOUTS[case[0]].n_ranks == n_ranks
            }
            outcomes.update(run_ranks(n_ranks, cases, tmp_path_factory.mktemp(f"on{n_ranks}")))
        errors = [outcome.error for outcome in outcomes[name] if outcome.error is not None]
        assert not errors, "\n".join(errors)
        return [outcome.value for outcome in outcomes[name]]

    return trained


@every_case
def test_the_layout_trains_as_one_process_does(layout: str, variant: str, ranks: Ranks) -> None:
    one = LAYOUTS[layout]
    found = ranks(layout, variant)
    if one.is_same:
        assert len({repr([step.sites for step in rank.bare]) for rank in found}) == 1
    if one.is_exact and variant != "bfloat16":
        for rank in found:
            for step, alone in zip(rank.bare, rank.alone, strict=True):
                _assert_close_to_one_process(step.sites, alone, rank.parts)


@every_case
def test_statistics_are_those_of_the_whole_gradient(layout: str, variant: str, ranks: Ranks) -> None:
    one = LAYOUTS[layout]
    found = _without_errors(ranks(layout, variant))
    for rank in found:
        assert [seen.step for seen in rank.snapshots] == list(range(len(rank.bare)))
        for seen, truth in zip(rank.snapshots, rank.bare, strict=True):
            if seen.skipped and one.reduction == "global":  # without a step of the optimizer, nothing is reduced
                assert seen.sites == {}
                continue
            assert seen.sites.keys() == truth.sites.keys()
            for name, stats in seen.sites.items():
                _assert_close(name, stats, truth.sites[name], 1e-6)
            assert seen.total_norm == pytest.approx(truth.total, rel=1e-6, nan_ok=True)
        if one.is_exact and variant not in ("bfloat16", "scaler"):
            for seen, alone in zip(rank.snapshots, rank.alone, strict=True):
                _assert_close_to_one_process(seen.sites, alone, rank.parts)
    if one.is_same:
        assert len({repr([seen.sites for seen in rank.snapshots]) for rank in found}) == 1


@every_case
def test_snapshots_say_what_they_are_of(layout: str, variant: str, ranks: Ranks) -> None:
    one = LAYOUTS[layout]
    for rank in _without_errors(ranks(layout, variant)):
        assert [seen.reduction for seen in rank.snapshots] == [one.reduction] * len(rank.bare)
        assert [seen.scale for seen in rank.snapshots] == ["unscaled"] * len(rank.bare)
        assert [seen.skipped for seen in rank.snapshots] == [False, variant == "scaler", False]
        if "clip" not in variant:
            assert [(seen.state, seen.clip_factor) for seen in rank.snapshots] == [("raw", 1.0)] * len(rank.bare)
            continue
        for seen, truth in zip(rank.snapshots, rank.bare, strict=True):
            assert truth.total > 2 * MAX_NORM
            assert seen.state == "clipped"
            assert seen.clip_factor == pytest.approx(MAX_NORM / truth.total, rel=1e-4)


@every_case
def test_the_training_goes_on_as_without_a_probe(layout: str, variant: str, ranks: Ranks) -> None:
    expected = LAYOUTS[layout].warning
    for k, rank in enumerate(_without_errors(ranks(layout, variant))):
        assert len(rank.warned) == (k == 0 and expected is not None), rank.warned
        assert all(str(expected) in warned for warned in rank.warned)
        if variant == "probe clip":
            continue
        for step, (weights, truth) in enumerate(zip(rank.weights, rank.bare, strict=True)):
            assert weights.keys() == truth.weights.keys()
            assert [name for name in weights if weights[name] != truth.weights[name]] == [], f"step {step}"


@cases_of("updates")
def test_updates_are_those_of_the_whole_parameter(layout: str, variant: str, ranks: Ranks) -> None:
    found = _without_errors(ranks(layout, variant))
    for rank in found:
        for seen, truth in zip(rank.snapshots, rank.bare, strict=True):
            expected = {name: 0.1 * site["norm"] for name, site in truth.sites.items()}
            assert seen.updates == pytest.approx(expected, rel=1e-4)
        expected = {
            name: math.hypot(*(rank.initial[each] for each in rank.parts.get(name, (plain_name(name),))))
            for name in rank.bare[0].sites
        }
        assert rank.snapshots[0].weights == pytest.approx(expected, rel=1e-6)
    assert all(
        [seen.updates for seen in rank.snapshots] == [seen.updates for seen in found[0].snapshots] for rank in found
    )


@cases_of("probe clip")
def test_clipping_is_that_of_the_whole_gradient(layout: str, variant: str, ranks: Ranks) -> None:
    found = _without_errors(ranks(layout, variant))
    for rank in found:
        first = rank.bare[0]
        if first.returned is not None:  # torch's own
            assert rank.returned[0] == pytest.approx(first.returned, rel=1e-6)
        for returned, truth, values in zip(rank.returned, rank.bare, rank.values, strict=True):
            assert returned == pytest.approx(truth.total, rel=1e-6)
            for name, expected in truth.values.items():
                assert values[name] == pytest.approx(expected, rel=1e-5, abs=1e-7), name
    assert all(rank.returned == found[0].returned for rank in found)
    assert all([s.clip_factor for s in rank.snapshots] == [s.clip_factor for s in found[0].snapshots] for rank in found)


def _without_errors(found: list[Trained]) -> list[Trained]:
    errors = [f"rank {k}: {rank.error}" for k, rank in enumerate(found) if rank.error is not None]
    assert not errors, "\n".join(errors)
    return found


def _assert_close(name: str, stats: Statistics, truth: Statistics, tolerance: float) -> None:
    for count in ("numel", "nonfinite"):
        assert stats[count] == truth[count], f"{count} of {name}"
    assert stats["zero_fraction"] == pytest.approx(truth["zero_fraction"], rel=1e-12), f"zero_fraction of {name}"
    for key in ("norm", "rms", "abs_max", "abs_mean"):
        assert stats[key] == pytest.approx(truth[key], rel=tolerance, nan_ok=True), f"{key} of {name}"
    # differences of numbers of the size of the largest terms
    size = truth["rms"] if math.isfinite(truth["rms"]) else 0.0
    for key, wider in (("mean", 1.0), ("std", 10.0)):
        assert stats[key] == pytest.approx(truth[key], abs=tolerance * wider * size, rel=0.0, nan_ok=True), (
            f"{key} of {name}"
        )


def _assert_close_to_one_process(sites: dict[str, Statistics], alone: Truth, parts: dict[str, tuple[str, ...]]) -> None:
    for name, stats in sites.items():
        members = [alone.sites[each] for each in parts.get(name, (plain_name(name),))]
        if len(members) == 1:
            _assert_close(name, stats, members[0], 1e-5)
        else:
            norm = math.sqrt(sum(each["norm"] ** 2 for each in members))
            assert stats["norm"] == pytest.approx(norm, rel=1e-5, nan_ok=True)
            assert stats["nonfinite"] == sum(each["nonfinite"] for each in members)
            assert stats["numel"] == sum(each["numel"] for each in members)
