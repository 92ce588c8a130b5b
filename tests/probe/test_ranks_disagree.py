"""Ranks that do not do the same: nobody hangs, and whoever can tell says so. Collectives are counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from helpers import collectives, rank_changes, rank_faults
from helpers.ranks import Case, Outcome, run_ranks

pytestmark = pytest.mark.soak  # ranks wait for each other
_SHARDED = ("fsdp2", "tensor parallel beside plain", "sequence parallel", "hand-made", "fsdp1 flat")
_HEALTHY = ("fsdp1", "fsdp2 uneven", "tensor parallel beside plain", "pipeline")
_IN_HOOKS = ("fsdp2", "fsdp1 flat", "sequence parallel", "distribute_module")
_LATE = ("fsdp2", "fsdp2 nested", "fsdp1", "fsdp1 flat", "tensor parallel")
_CONVERTED = ("tensor parallel", "hand-made")
_WHOLE_ON_ONE = {"4.weight", "4.bias"}  # of the hand-made layout, on the first rank
_FREE: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "local numbers of fsdp2": ("fsdp2", {"process_group": "local"}),
    "local numbers of tensor parallel": ("tensor parallel", {"process_group": "local"}),
}
_COUNTED: dict[str, tuple[str, dict[str, Any], bool, list[int]]] = {
    "ddp": ("ddp", {}, False, [0] * 5),
    "ddp, clipped": ("ddp", {}, True, [0] * 5),
    "fsdp2": ("fsdp2", {}, False, [2] * 5),
    "fsdp2, clipped": ("fsdp2", {}, True, [4] * 5),
    "fsdp2, every second step": ("fsdp2", {"every": 2}, False, [2, 0, 2, 0, 2]),
    "fsdp2, local": ("fsdp2", {"process_group": "local"}, False, [0] * 5),
    "fsdp1 flat": ("fsdp1 flat", {}, False, [2] * 5),
    "tensor parallel beside plain": ("tensor parallel beside plain", {}, False, [2] * 5),
    "sequence parallel": ("sequence parallel", {}, False, [3] * 5),
}
_MANY = (10, 2000)

CASES: dict[str, Case] = {
    **{f"alone {each}": partial(rank_faults.attached_alone, each) for each in _SHARDED},
    **{f"on one: {name}": partial(rank_faults.attached_on_one, *each) for name, each in _FREE.items()},
    **{f"options {each}": partial(rank_faults.other_options, each) for each in _SHARDED},
    **{f"magnitudes {each}": partial(rank_faults.magnitudes, each) for each in _SHARDED},
    "models": rank_faults.other_models,
    **{
        f"failing {each} {at}": partial(rank_faults.failing, each, at, "measuring")
        for each in _SHARDED
        for at in (0, 2)
    },
    **{f"failing while {place}": partial(rank_faults.failing, "fsdp2", 2, place) for place in rank_faults.PLACES},
    **{f"frozen {keeps}": partial(rank_changes.frozen_unit, keeps) for keeps in (True, False)},
    "unfrozen": rank_changes.unfrozen,
    "reader": rank_changes.read_by_a_thread,
    "activations": rank_changes.reduced_activations,
    **{f"paused {each}": partial(rank_faults.paused, each) for each in _SHARDED},
    **{f"read {each}": partial(rank_faults.read_on_one, each) for each in _SHARDED},
    **{f"counts {name}": partial(collectives.collectives, *each[:3]) for name, each in _COUNTED.items()},
    **{f"many {n}": partial(collectives.collectives_of_many, n) for n in _MANY},
    "skipped": collectives.collectives_of_skipped,
    "differing": rank_faults.differing_replicas,
    **{f"healthy {each}": partial(rank_faults.healthy, each) for each in _HEALTHY},
    **{f"in hooks {each}": partial(rank_faults.in_hooks, each) for each in _IN_HOOKS},
    **{
        f"{when} {each}": partial(rank_faults.attached_late, each, when)
        for each in _LATE
        for when in ("after", "between")
    },
    **{f"converted {each}": partial(rank_faults.converted, each) for each in _CONVERTED},
    "experts": rank_faults.other_experts,
    **{
        f"clipping {how} {each}": partial(rank_faults.clipping, each, how)
        for each in _SHARDED
        for how in ("paused", "failing", "nonfinite")
    },
    "two models": rank_faults.two_models,
    "killed": partial(rank_faults.killed, "hand-made"),
}
Found = Callable[[str], list[Any]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    folder = tmp_path_factory.mktemp("ranks")
    file_store = {"file store": partial(rank_faults.over_a_file_store, str(folder))}
    experts = run_ranks(4, {"experts on 4": rank_faults.other_experts}, folder / "4")
    return experts | run_ranks(2, CASES | file_store, folder / "2")


@pytest.fixture
def found(outcomes: dict[str, list[Outcome]]) -> Found:
    def values(name: str) -> list[Any]:
        errors = [outcome.error for outcome in outcomes[name] if outcome.error is not None]
        assert not errors, "\n".join(errors)
        return [outcome.value for outcome in outcomes[name]]

    return values


@pytest.mark.parametrize("layout", _SHARDED)
def test_attaching_on_one_rank_names_the_missing(layout: str, found: Found) -> None:
    first, second = found(f"alone {layout}")
    assert "1 did not attach: 1" in first["message"]
    assert 0.9 < first["waited"] < 5.0
    for rank in (first, second):
        assert rank["later"]["same"] == [True] * 5
        assert list(rank["later"]["steps"]) == list(range(5))


@pytest.mark.parametrize("name", _FREE)
def test_where_nothing_is_reduced_one_rank_may_attach_alone(name: str, found: Found) -> None:
    first, second = found(f"on one: {name}")
    assert list(first["steps"]) == list(range(5))
    assert first["same"] == second["same"] == [True] * 5
    assert first["warned"] == []


@pytest.mark.parametrize("layout", _SHARDED)
def test_other_options_are_refused_on_every_rank(layout: str, found: Found) -> None:
    assert all("every" in message and "rank" in message for message in found(f"options {layout}"))


@pytest.mark.parametrize("layout", _SHARDED)
def test_magnitudes_are_those_of_parts_or_refused_on_every_rank(layout: str, found: Found) -> None:
    for rank in found(f"magnitudes {layout}"):
        assert "magnitudes: needed gradients that each rank holds whole" in rank["message"]
        assert len(rank["numels"]) == rank["n"] > 0
        assert all(counted == measured for counted, measured in rank["numels"].values())


def test_other_models_are_refused_on_every_rank(found: Found) -> None:
    assert all(
        "weight" in message and "[6, 4]" in message.replace("(", "[").replace(")", "]") for message in found("models")
    )


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("layout", _SHARDED)
def test_a_failure_on_one_rank_hangs_nobody(layout: str, at: int, found: Found) -> None:
    first, second = found(f"failing {layout} {at}")
    assert first["same"] == second["same"] == [True] * 5
    assert first["steps"].keys() >= set(range(at))
    assert all(not math.isnan(norm) for norms in first["steps"].values() for norm in norms.values())
    for step in range(at, 5):
        assert first["steps"].get(step, {}).keys() <= _WHOLE_ON_ONE, "a part of the gradient stands for the whole"
    assert any("planted" in warning for warning in second["warned"] + first["warned"])


@pytest.mark.parametrize("place", rank_faults.PLACES)
def test_a_failure_anywhere_on_one_rank_hangs_nobody(place: str, found: Found) -> None:
    first, second = found(f"failing while {place}")
    assert first["same"] == second["same"] == [True] * 5
    assert list(first["steps"]) == list(range(5))
    assert any("planted" in warning for warning in second["warned"])


@pytest.mark.parametrize("keeps_names", [True, False])
def test_a_frozen_unit_of_fsdp1(keeps_names: bool, found: Found) -> None:
    for rank in found(f"frozen {keeps_names}"):
        assert rank["norm"] == pytest.approx(rank["truth"], rel=1e-6)
        assert rank["n_observed"] == (4 if keeps_names else 2)


def test_a_sharded_model_is_not_followed_and_says_so(found: Found) -> None:
    first, second = found("unfrozen")
    assert first["observed"] == second["observed"] == [["2.bias", "2.weight", "4.bias", "4.weight"]] * 4
    assert first["unknown"] == ("0.weight", "0.bias")
    assert first["failures"] == second["failures"] == {}
    (told,) = first["told"]
    assert "new: 0.weight, 0.bias" in told
    assert "attach again on all ranks" in told
    assert second["told"] == []


def test_reduced_activations_are_those_of_all_ranks(found: Found) -> None:
    for rank in found("activations"):
        assert rank["seen"] == pytest.approx(rank["truth"], rel=1e-6)
        assert rank["reduction"] == "global"


def test_another_thread_may_read(found: Found) -> None:
    for rank in found("reader"):
        assert rank["errors"] == []
        assert rank["steps"] == [(step, float(step), 6) for step in range(6)]


@pytest.mark.parametrize("layout", _SHARDED)
def test_a_paused_rank_hangs_nobody(layout: str, found: Found) -> None:
    first, second = found(f"paused {layout}")
    assert first["same"] == second["same"] == [True] * 5
    assert first["steps"].get(2, {}).keys() <= _WHOLE_ON_ONE, "a part of the gradient stands for the whole"
    for step in (0, 1, 3, 4):
        assert first["steps"][step] == second["steps"][step] != {}


@pytest.mark.parametrize("layout", _SHARDED)
def test_one_rank_may_read_alone(layout: str, found: Found) -> None:
    first, second = found(f"read {layout}")
    assert first["steps"] == second["steps"]
    assert first["same"] == second["same"] == [True] * 5


@pytest.mark.parametrize("name", _COUNTED)
def test_collectives_per_step(name: str, found: Found) -> None:
    for rank in found(f"counts {name}"):
        assert rank["counts"] == _COUNTED[name][3], rank["names"]


def test_collectives_do_not_grow_with_the_parameters(found: Found) -> None:
    for n in _MANY:
        for rank in found(f"many {n}"):
            assert rank["counts"] == [2] * 3, rank["names"]
            assert all(n_bytes <= 72 * n + 1024 for n_bytes in rank["n_bytes"])


def test_a_step_that_the_scaler_skips_needs_no_collective(found: Found) -> None:
    assert [rank["counts"] for rank in found("skipped")] == [[2, 0, 2]] * 2


def test_replicas_that_differ_are_a_finding(found: Found) -> None:
    for findings in found("differing"):
        assert any("replicas differ" in each.lower() and "4.bias" in each for each in findings), findings


@pytest.mark.parametrize("layout", _HEALTHY)
def test_a_healthy_training_is_found_healthy_on_every_rank(layout: str, found: Found) -> None:
    assert found(f"healthy {layout}") == [{"findings": [], "silent": []}] * 2


@pytest.mark.parametrize("layout", _IN_HOOKS)
def test_gradients_in_hooks_are_whole_or_refused(layout: str, found: Found) -> None:
    for rank in found(f"in hooks {layout}"):
        if rank["refused"] is not None:
            assert "when" in rank["refused"]
        else:
            assert rank["found"] == pytest.approx(rank["truth"], rel=1e-6)


@pytest.mark.parametrize("when", ["after", "between"])
@pytest.mark.parametrize("layout", _LATE)
def test_attaching_late_sees_the_sharded_parameters(layout: str, when: str, found: Found) -> None:
    for rank in found(f"{when} {layout}"):
        assert rank["found"] == pytest.approx(rank["truth"], rel=1e-6)


@pytest.mark.parametrize("layout", _CONVERTED)
def test_a_model_of_another_dtype_is_measured_or_said_not_to_be(layout: str, found: Found) -> None:
    first, second = found(f"converted {layout}")
    for rank in (first, second):
        assert rank["found"] in ({}, pytest.approx(rank["truth"], rel=1e-6))
    assert first["found"] or first["warned"]


def test_ranks_meet_through_a_store_in_a_file(found: Found) -> None:
    assert [len(names) for names in found("file store")] == [6, 6]


@pytest.mark.parametrize("name", ["experts", "experts on 4"])
def test_other_experts_of_one_name_are_no_copies(name: str, found: Found) -> None:
    for rank in found(name):
        if rank["refused"] is not None:
            assert "weight" in rank["refused"]
        else:
            assert rank["norm"] == pytest.approx(rank["truth"], rel=1e-6)


@pytest.mark.parametrize("how", ["paused", "failing", "nonfinite"])
@pytest.mark.parametrize("layout", _SHARDED)
def test_all_ranks_clip_alike_whatever_happens_to_one(layout: str, how: str, found: Found) -> None:
    first, second = found(f"clipping {how} {layout}")
    assert first == second
    for step, each in enumerate(first):
        if how == "nonfinite" and step == 2:
            assert "finite" in each
        else:
            assert each == (pytest.approx(1.0, rel=1e-6), pytest.approx(0.05, rel=1e-4))


def test_two_models_in_turn(found: Found) -> None:
    assert found("two models") == [[True] * 6] * 2


def test_a_killed_rank_ends_in_an_error_of_torch(outcomes: dict[str, list[Outcome]]) -> None:
    first, second = outcomes["killed"]
    assert second.error is not None
    assert first.error is None
    assert first.value["error"] != "gradprobe.errors"
    assert first.value["step"] <= 3
    assert first.value["waited"] < 5.0
