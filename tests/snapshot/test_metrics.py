"""A step as one flat dictionary of numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.diagnose_cases import snapshot
from torch import nn

import gradprobe


@pytest.fixture(scope="module")
def step() -> gradprobe.Snapshot:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch, self.add = nn.Linear(4, 4), gradprobe.nn.ResidualAdd()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.add(x, self.branch(x))

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradprobe.attach(model, optimizer=optimizer, activations=True, updates=True) as probe:
        loss = model(torch.randn(3, 4, requires_grad=True)).square().mean()
        loss.backward()
        probe.clip_grad_norm_(0.5)
        optimizer.step()
        probe.step(loss)
    found = probe.latest(wait=True)
    assert found is not None
    return found


def test_a_summary_holds_totals_quantiles_and_the_extremes(step: gradprobe.Snapshot) -> None:
    found = step.metrics()
    assert found["gradprobe/total_norm"] == step.total_norm
    assert found["gradprobe/loss"] == step.loss
    assert found["gradprobe/clip_factor"] == pytest.approx(0.5 / step.total_norm)
    norms = [step[name].norm for name in ("0.branch.weight", "1.branch.weight", "2.weight")]
    assert found["gradprobe/grad_norm_median"] == pytest.approx(np.median(norms))
    assert (found["gradprobe/grad_norm_min"], found["gradprobe/grad_norm_max"]) == (min(norms), max(norms))
    ratios = [step.updates[name].ratio for name in ("0.branch.weight", "1.branch.weight", "2.weight")]
    assert found["gradprobe/update_ratio_max"] == pytest.approx(max(ratios))
    assert found["gradprobe/shortcut_share_q25"] == pytest.approx(
        np.quantile([junction.shortcut_share for junction in step.junctions.values()], 0.25)
    )
    assert {name for name in found if name.startswith("gradprobe/grad_norm/")} == {
        f"gradprobe/grad_norm/{name}" for name in ("0.branch.weight", "1.branch.weight", "2.weight")
    }


def test_all_names_each_place(step: gradprobe.Snapshot) -> None:
    found = step.metrics(detail="all")
    assert found["gradprobe/act_rms/2"] == step.activations["2"].output.rms
    assert found["gradprobe/update_ratio/2.weight"] == step.updates["2.weight"].ratio
    assert found["gradprobe/shortcut_share/1.add"] == step.junctions["1.add"].shortcut_share
    assert "gradprobe/grad_norm_median" not in found
    assert json.dumps(found)


def test_the_extremes_are_the_ten_furthest_from_the_median() -> None:
    norms = [1.0] * 20 + [1e-3 * 2**k for k in range(4)] + [1e3 * 2**k for k in range(4)] + [0.0, float("nan")]
    named = [name for name in snapshot(0, norms).metrics() if name.startswith("gradprobe/grad_norm/")]
    assert named == [f"gradprobe/grad_norm/layer{k}.weight" for k in range(20, 30)]


def test_what_was_not_measured_is_not_there() -> None:
    found = snapshot(0, [1.0]).metrics()
    assert not any(name.startswith(("gradprobe/loss", "gradprobe/act", "gradprobe/update")) for name in found)


def test_an_unknown_detail_is_refused() -> None:
    with pytest.raises(gradprobe.ArgumentError, match="detail: needed 'summary' or 'all', got 'some'"):
        snapshot(0, [1.0]).metrics(detail="some")  # type: ignore[arg-type]
