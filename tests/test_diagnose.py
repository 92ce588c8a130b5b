"""The rules, on snapshots made by hand."""

import math

import numpy as np
import pytest

from gradprobe.diagnose import Thresholds, diagnose, flow_verdict, verdict
from gradprobe.measured import Measured, Provenance
from gradprobe.snapshot import SiteTable, Snapshot


def snapshot(step: int, norms: list[float], nonfinite: int = 0, ndim: int = 2) -> Snapshot:
    """A snapshot of weights of one element each, whose norms are as given."""
    names = tuple(f"layer{k}.weight" for k in range(len(norms)))
    rows = np.array([[norm, norm, norm**2, norm, 0.0, 0.0] for norm in norms])
    rows[0, 5] = nonfinite
    n_sites = len(norms)
    return Snapshot(
        step=step,
        loss=None,
        provenance=Provenance("unscaled", "local", "pre-clip"),
        skipped=False,
        table=SiteTable(names, ("parameter",) * n_sites, (ndim,) * n_sites, {name: k for k, name in enumerate(names)}),
        rows=rows,
        measured=Measured(np.ones(n_sites, dtype=np.bool_), np.ones(n_sites, dtype=np.int64)),
    )


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ([1.2, 0.56], "healthy"),  # plain-20 with BN
        ([240.0, 0.53], "exploding"),  # plain-56 with BN, at initialisation
        ([6.0e5, 0.47], "exploding"),  # plain-110 with BN
        ([2.5, 1.4], "healthy"),  # ResNet-56 with BN
        ([2.1e-6, 6.0e-3], "vanishing"),  # plain-56 without BN
        ([1.7e-11, 5.5e-3], "vanishing"),  # plain-110 without BN
        ([1e-9, 1e-9], "healthy"),  # small everywhere is a small loss, not a vanishing gradient
        ([0.0, 0.0], "vanishing"),
        ([1e-3, 1e3], "healthy"),  # the ratio alone does not make it vanishing
        ([math.nan, 1.0], "non-finite"),
        ([1.0, math.inf], "non-finite"),
        ([], "healthy"),
    ],
    ids=lambda value: str(value),
)
def test_verdict_on_norms_over_depth(norms: list[float], expected: str) -> None:
    assert flow_verdict(norms) == expected


def test_a_finding_names_sites_steps_evidence_and_source() -> None:
    (finding,) = diagnose([snapshot(step, [1e-9, 2e-7, 1e-2]) for step in (3, 4, 5)])
    assert finding.rule == "vanishing"
    assert finding.sites == ("layer0.weight", "layer1.weight")
    assert finding.steps == (3, 5)
    assert finding.evidence == {"norm_first": 1e-9, "norm_last": 1e-2, "ratio": pytest.approx(1e-7)}
    assert "1.00e-09 at layer0.weight" in finding.message
    assert "AUTOTRAINER" in finding.source


def test_a_passing_dip_is_no_finding_but_one_nan_is() -> None:
    sound = [snapshot(step, [1.0, 1.0]) for step in range(4)]
    assert diagnose([*sound, snapshot(4, [1e-9, 1.0])]) == []
    assert verdict(sound) == "healthy"
    (finding,) = diagnose([*sound, snapshot(4, [math.nan, 1.0], nonfinite=1), *sound[:1]])
    assert (finding.rule, finding.sites, finding.steps) == ("non-finite", ("layer0.weight",), (4, 4))
    assert verdict([*sound, snapshot(4, [math.nan, 1.0], nonfinite=1)]) == "non-finite"


def test_thresholds_can_be_set() -> None:
    norms = [10.0, 1.0]
    assert flow_verdict(norms) == "healthy"
    assert flow_verdict(norms, Thresholds(exploding_ratio=5.0)) == "exploding"


def test_a_model_of_vectors_alone_is_judged_by_them() -> None:
    assert verdict([snapshot(0, [1e-9, 1.0], ndim=1)]) == "vanishing"


def test_an_empty_history_is_healthy() -> None:
    assert diagnose([]) == []
    assert verdict([]) == "healthy"
