"""A probe draws its own run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.report_cases import Page
from torch import nn

import gradprobe
from gradprobe.errors import ArgumentError


def trained(**options: bool) -> gradprobe.Probe:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = gradprobe.attach(model, optimizer=optimizer, **options)  # type: ignore[arg-type]
    for _ in range(4):
        loss = model(torch.randn(16, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        probe.step(loss)
    return probe


def test_report_writes_the_page_of_the_history(tmp_path: Path) -> None:
    probe = trained(activations=True, updates=True)
    probe.report(tmp_path / "new" / "run.html")
    page = Page((tmp_path / "new" / "run.html").read_text(encoding="utf-8"))
    assert str(probe.findings()).splitlines()[0] in page.text
    assert page.row("2.weight")[1] == "16"
    assert page.loads == []


@pytest.mark.parametrize("kind", ["loss", "heatmap", "update_ratio", "magnitude", "dead_units"])
def test_plot_returns_a_chart_that_saves_itself(kind: str, tmp_path: Path) -> None:
    chart = trained(activations=True, updates=True).plot(kind)
    for suffix, start in (("png", b"\x89PNG"), ("svg", b"<svg"), ("pdf", b"%PDF")):
        chart.save(str(tmp_path / f"chart.{suffix}"))
        assert (tmp_path / f"chart.{suffix}").read_bytes().startswith(start)


def test_the_heatmap_has_every_weight_and_step() -> None:
    probe = trained()
    rows = [row for rows in probe.plot().to_dict()["datasets"].values() for row in rows if "value" in row]
    norms = {(one.step, name): stats.norm for one in probe.history() for name, stats in one.sites.items()}
    found = {(row["first"], row["name"]): 10.0 ** row["value"] for row in rows}
    assert found == pytest.approx({key: norm for key, norm in norms.items() if key[1].endswith("weight")})


def test_plot_refuses_what_was_not_recorded() -> None:
    with pytest.raises(ArgumentError, match=r"kind: needed attach\(activations=True\)"):
        trained().plot("dead_units")
