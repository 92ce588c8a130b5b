"""The diagnosis on real training: healthy runs, and runs with a fault planted (benchmarks/diagnosis.py)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from _run import IMAGES, LABELS, Run
from _runs import RUNS
from diagnosis import HELD_OUT, found_in, scores

import gradprobe
from gradprobe.diagnosis.diagnose import verdict


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only get slower with a second thread."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.mark.parametrize(
    "run", [pytest.param(run, marks=[pytest.mark.soak] * run.is_slow, id=run.name) for run in RUNS]
)
def test_finds_the_planted_fault_and_no_other(run: Run) -> None:
    found = found_in(run, seed=7)
    assert found - (set(run.follows) - {run.fault}) == ({run.fault} if run.fault else set())


@pytest.mark.parametrize(
    ("family", "depth", "norm", "expected"),
    [
        ("plain", 20, "batch", []),
        ("plain", 56, "batch", ["exploding (backward)"]),  # Yang et al. 2019; not vanishing, He et al. 2015, sect. 4.1
        ("plain", 110, "batch", ["exploding (backward)"]),
        ("plain", 110, "none", ["vanishing (backward)"]),
        ("resnet", 20, "batch", []),
        ("resnet", 56, "batch", []),
        ("resnet", 110, "batch", []),
        ("resnet", 110, "none", ["exploding (forward)"]),  # each residual add doubles the variance
    ],
)
@pytest.mark.parametrize("activations", [False, True], ids=["", "activations"])
def test_verdict_at_initialisation_follows_the_papers(
    family: str, depth: int, norm: str, expected: list[str], activations: bool
) -> None:
    torch.manual_seed(0)
    model = getattr(gradprobe.networks, family)(depth, in_channels=1, norm=norm)
    with gradprobe.attach(model, activations=activations) as probe:
        loss = torch.nn.functional.cross_entropy(model(IMAGES[:128]), LABELS[:128])
        loss.backward()
        probe.step(loss=loss)
        findings = probe.findings()
    assert [finding.title for finding in findings if not finding.follows] == expected
    assert verdict(probe.history()) == (findings[0].rule if findings else "healthy")


def test_without_observed_residual_adds_the_loss_shows_the_fault() -> None:
    torch.manual_seed(0)
    model = gradprobe.networks.resnet(110, in_channels=1, norm="none")
    with gradprobe.attach(model, junctions=False) as probe:
        loss = torch.nn.functional.cross_entropy(model(IMAGES[:128]), LABELS[:128])
        loss.backward()
        probe.step(loss=loss)
        (finding,) = probe.findings()
    assert finding.title == "loss blow-up"
    assert finding.message.endswith("attach(activations=True) tells which")


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_precision_and_recall_on_held_out_seeds() -> None:
    for rule, score in scores(HELD_OUT).items():
        assert score.hits + score.misses >= 4, rule
        assert score.precision >= 0.95, (rule, score.wrong)
        assert score.recall >= 0.95, (rule, score.wrong)
