"""`gradprobe remedies`: measured norms equal those of autograd and agree with theory if there is one."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn import functional as F
from typer.testing import CliRunner

from gradprobe.cli import commands as cli
from gradprobe.cli.commands import app
from gradprobe.diagnosis.trend import fit_trend
from gradprobe.errors import ArgumentError
from gradprobe.experiments import REMEDY_STEPS
from gradprobe.experiments.data import load
from gradprobe.experiments.remedies.networks import network
from gradprobe.experiments.remedies.result import BATCH_SIZE, Remedies
from gradprobe.experiments.remedies.run import REMEDIES, remedies
from gradprobe.experiments.remedies.theory import factor_per_layer
from gradprobe.report.records import RemedyCell


def measured(
    remedy: str, activation: str, depth: int, seeds: tuple[int, ...] = (0,), steps: int = 1, layers: str = "linear"
) -> RemedyCell:
    result = remedies(
        layers=layers, remedies=[remedy], activations=[activation], depths=[depth], seeds=seeds, steps=steps
    )
    (cell,) = result.cells
    return cell


def first_batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    data = load("digits")
    order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(seed))
    return data.train_x[order[:BATCH_SIZE]].double(), data.train_y[order[:BATCH_SIZE]]


def by_autograd(remedy: str, activation: str, depth: int, seed: int, layers: str = "linear") -> list[float]:
    """Computes the weights' gradient norms without gradprobe."""
    torch.manual_seed(seed)
    model = network(remedy, activation, depth, (1, 8, 8), 10, layers).double()
    images, labels = first_batch(seed)
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), weights)
    return [float(gradient.square().sum().sqrt()) for gradient in gradients]


@pytest.mark.parametrize(
    ("remedy", "variance", "uniform"), [("he", 2 / 64, False), ("xavier", 1 / 64, True), ("none", 1 / 192, True)]
)
def test_initial_weights_have_the_variance_of_the_published_scheme(remedy: str, variance: float, uniform: bool) -> None:
    torch.manual_seed(0)
    hidden = network(remedy, "tanh", 12, (64,), 10)[2:-1]
    weights = torch.stack([layer.weighted.weight for layer in hidden])
    biases = torch.stack([layer.weighted.bias for layer in hidden])
    assert weights.var().item() == pytest.approx(variance, rel=0.02)
    assert (weights.abs().max().item() <= math.sqrt(3 * variance)) == uniform
    assert bool((biases == 0).all()) == (remedy != "none")


@pytest.mark.parametrize("layers", ["linear", "conv"])
@pytest.mark.parametrize(
    ("remedy", "groups", "per"), [("batchnorm", 1, "feature"), ("layernorm", 1, "group"), ("groupnorm", 4, "group")]
)
def test_a_normalisation_is_over_the_dimensions_of_its_name(remedy: str, groups: int, per: str, layers: str) -> None:
    torch.manual_seed(0)
    layer = network(remedy, "relu", 3, (1, 8, 8), 10, layers).double()[1 if layers == "conv" else 2]
    shape = (32, 32, 4, 4) if layers == "conv" else (32, 64)
    seen = []
    layer.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    offsets = torch.arange(shape[1]).view(-1, *[1] * (len(shape) - 2))  # features of unequal means
    layer(torch.randn(shape).double() + offsets)
    normal = seen[0].unflatten(1, (groups, -1))  # [N, G, C/G] or [N, G, C/G, H, W]
    over = [0, *range(3, normal.ndim)] if per == "feature" else [*range(2, normal.ndim)]
    assert normal.mean(dim=over).abs().max().item() < 1e-5
    assert normal.var(dim=over, correction=0).sub(1).abs().max().item() < 1e-3


def test_convolutions_start_and_end_as_the_options_say() -> None:
    torch.manual_seed(0)
    model = network("he", "relu", 12, (3, 8, 8), 7, "conv")
    hidden = [layer.weighted for layer in model[1:11]]
    assert torch.stack([conv.weight for conv in hidden]).var().item() == pytest.approx(2 / (9 * 32), rel=0.02)
    assert all(bool((parameter == 0).all()) for name, parameter in model.named_parameters() if name.endswith("bias"))
    assert len([parameter for parameter in model.parameters() if parameter.ndim > 1]) == 12
    assert model[:11](torch.zeros(2, 3, 8, 8)).shape == (2, 32, 4, 4)
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize("remedy", ["xavier", "groupnorm", "he+residual"])
def test_the_norms_of_convolutions_equal_those_of_autograd_and_have_no_theory(remedy: str) -> None:
    cell = measured(remedy, "relu", 6, seeds=(3,), layers="conv")
    assert cell.norms == pytest.approx(by_autograd(remedy, "relu", 6, 3, "conv"), rel=1e-9)
    assert math.isfinite(cell.factor)
    assert cell.theory is None


def test_convolutions_with_group_normalisation_learn() -> None:
    cell = measured("groupnorm", "tanh", 8, steps=40, layers="conv")
    assert cell.n_fell == 1
    assert cell.final_loss < 1 < cell.start_loss


@pytest.mark.parametrize("remedy", ["none", "batchnorm", "groupnorm", "he+residual"])
@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
def test_the_norms_equal_those_of_autograd(remedy: str, activation: str) -> None:
    cell = measured(remedy, activation, 12, seeds=(3,))
    assert cell.norms == pytest.approx(by_autograd(remedy, activation, 12, 3), rel=1e-9)
    assert cell.ratio == cell.norms[0] / cell.norms[-1]


def test_several_seeds_give_the_geometric_mean() -> None:
    each = np.log([by_autograd("none", "tanh", 6, seed) for seed in (0, 1)])  # [2, L]
    assert measured("none", "tanh", 6, seeds=(0, 1)).norms == pytest.approx(np.exp(each.mean(axis=0)), rel=1e-9)


def test_a_sigmoid_network_by_hand_vanishes_as_measured() -> None:
    """Forward and backward written out for sigmoid layers, without autograd."""
    depth, seed = 20, 0
    cell = measured("none", "sigmoid", depth)
    torch.manual_seed(seed)
    linears = [torch.nn.Linear(64, 64 if k < depth - 1 else 10).double() for k in range(depth)]
    images, labels = first_batch(seed)
    inputs = [images.flatten(1)]
    with torch.no_grad():
        for linear in linears[:-1]:
            inputs.append(torch.sigmoid(linear(inputs[-1])))
        delta = (torch.softmax(linears[-1](inputs[-1]), dim=1) - F.one_hot(labels, 10)) / BATCH_SIZE
        norms = []
        for k in reversed(range(depth)):
            norms.insert(0, float((delta.T @ inputs[k]).norm()))
            delta = (delta @ linears[k].weight) * inputs[k] * (1 - inputs[k])
    assert cell.norms == pytest.approx(norms, rel=1e-9)
    slope = np.polyfit(np.arange(depth - 2), np.log(norms[1:-1]), 1)[0]
    assert cell.factor == pytest.approx(math.exp(-slope), rel=1e-6)
    assert cell.verdict == "vanishing"
    assert cell.ratio < 0.5**20
    assert cell.factor == pytest.approx(0.14, abs=0.01)


@pytest.mark.parametrize("depth", [20, pytest.param(50, marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    ("remedy", "activation", "factor", "tolerance"),
    [
        ("he", "relu", 1.0, 0.05),  # He et al. 2015
        ("batchnorm", "relu", math.sqrt(math.pi / (math.pi - 1)), 0.03),  # Yang et al. 2019
        ("he+batchnorm", "relu", math.sqrt(math.pi / (math.pi - 1)), 0.03),
        ("groupnorm", "relu", 1.0, 0.05),  # for wide groups the same as layer normalisation
        ("none", "relu", math.sqrt(1 / 6), 0.02),
        ("none", "tanh", math.sqrt(1 / 3), 0.02),
        ("xavier", "tanh", 1.0, 0.05),
        ("xavier", "sigmoid", 0.25, 0.02),  # the derivative at 0, its maximum
    ],
)
def test_the_factor_per_layer_is_the_published_one(
    remedy: str, activation: str, factor: float, tolerance: float, depth: int
) -> None:
    cell = measured(remedy, activation, depth, seeds=(0, 1))
    assert cell.factor == pytest.approx(factor, abs=tolerance)
    assert cell.theory == pytest.approx(factor, abs=0.02)
    assert 0 < cell.std_error < 0.01


def test_a_deep_plain_network_with_batch_normalisation_explodes_and_a_residual_one_does_not() -> None:
    plain, residual = measured("batchnorm", "relu", 50), measured("batchnorm+residual", "relu", 50)
    assert plain.verdict == "exploding"
    assert plain.ratio > 1e3
    assert residual.verdict == "healthy"
    assert residual.ratio < 10


def test_a_residual_network_whose_forward_pass_explodes_is_not_healthy_despite_its_gradients() -> None:
    cell = measured("he+residual", "relu", 50)
    assert 0.1 < cell.factor < 70 ** (1 / 48)
    assert cell.start_loss > 1e5
    assert cell.verdict == "exploding"
    assert measured("groupnorm+residual", "relu", 50).verdict == "healthy"


@pytest.mark.parametrize("verdicts", [("healthy", "spike", "exploding"), ("exploding", "healthy", "healthy")])
def test_the_most_severe_verdict_of_seeds_counts(verdicts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = iter(verdicts)
    monkeypatch.setattr("gradprobe.experiments.remedies.run.verdict", lambda snapshots: next(verdict))
    assert measured("he", "relu", 3, seeds=(0, 1, 2)).verdict == "exploding"


def test_gradients_far_below_the_smallest_float32_still_have_a_factor() -> None:
    cell = measured("none", "sigmoid", 60)
    assert 0 < cell.norms[0] < 1e-46
    assert cell.factor == pytest.approx(0.14, abs=0.01)


@pytest.mark.parametrize("base", ["none", "he+residual"])
def test_clipping_changes_the_norm_and_not_the_ratio(base: str) -> None:
    remedy = "clipping" if base == "none" else f"{base}+clipping"
    result = remedies(remedies=[base, remedy], activations=["relu"], depths=[20], seeds=(0,), steps=1)
    free, clipped = result.cells
    assert clipped.ratio == pytest.approx(free.ratio, rel=1e-9)
    assert clipped.factor == pytest.approx(free.factor, rel=1e-9)
    assert clipped.total_norm == pytest.approx(min(free.total_norm, 1.0), rel=1e-5)
    assert clipped.norms[0] == pytest.approx(free.norms[0] * min(1.0, 1.0 / free.total_norm), rel=1e-5)
    assert "not the ratio over depth" in " ".join(result.conclusions)


def test_clipping_prevents_nan() -> None:
    free, clipped = (
        measured("he+residual", "relu", 20, steps=40),
        measured("he+residual+clipping", "relu", 20, steps=40),
    )
    assert free.n_fell == 0
    assert math.isnan(free.final_loss)
    assert len(free.nan_after) == 1
    assert 1 <= free.nan_after[0] < 40
    assert measured("he+residual", "relu", 20, steps=free.nan_after[0]).nan_after == free.nan_after
    assert measured("he+residual", "relu", 20, steps=max(free.nan_after[0] - 1, 1)).nan_after == ()
    assert clipped.nan_after == ()
    assert clipped.final_loss < clipped.start_loss


def test_a_healthy_network_learns_and_a_vanishing_one_only_the_constant_output() -> None:
    good, bad = (
        measured("batchnorm", "relu", 10, steps=REMEDY_STEPS),
        measured("none", "sigmoid", 10, steps=REMEDY_STEPS),
    )
    assert (good.n_fell, bad.n_fell) == (1, 0)
    assert good.final_loss < 1 < bad.final_loss
    assert bad.final_loss == pytest.approx(math.log(10), abs=0.1)


def test_a_run_is_reproducible_and_leaves_torchs_state_unchanged() -> None:
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    assert measured("he", "relu", 5, steps=3) == measured("he", "relu", 5, steps=3)
    assert measured("he", "relu", 5, seeds=(1,)).norms != measured("he", "relu", 5).norms
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    assert torch.tensor(1e-40) * 1 > 0  # denormals are not flushed


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_with_too_few_layers_there_is_no_factor(depth: int) -> None:
    cell = measured("he", "relu", depth)
    assert len(cell.norms) == depth
    assert math.isnan(cell.factor) == (depth < 4)
    assert math.isnan(cell.std_error)
    assert (cell.theory is None) == (depth < 4)


@pytest.mark.parametrize(
    ("log_norms", "factor", "std_error"),
    [
        ([math.log(2.0) * k for k in range(5, 0, -1)], 2.0, 0.0),
        ([0.0, 0.0], 1.0, math.nan),
        ([0.0], math.nan, math.nan),
        ([0.0, -math.inf, 1.0], math.nan, math.nan),
    ],
    ids=["line", "two", "one", "zero-norm"],
)
def test_the_line(log_norms: list[float], factor: float, std_error: float) -> None:
    line = fit_trend(log_norms)
    assert line.factor == pytest.approx(factor, nan_ok=True)
    assert line.std_error == pytest.approx(std_error, abs=1e-12, nan_ok=True)


def test_the_standard_error_is_that_of_least_squares() -> None:
    y = np.random.default_rng(0).normal(size=30).cumsum()
    (slope, _), covariance = np.polyfit(np.arange(30), y, 1, cov=True)
    line = fit_trend(list(y))
    assert line.factor == pytest.approx(math.exp(-slope))
    assert line.std_error == pytest.approx(math.exp(-slope) * math.sqrt(covariance[0, 0]))


@pytest.mark.parametrize(
    ("activation", "norm"),
    [
        ("tanh", "batch"),
        ("sigmoid", "layer"),
        ("tanh", "layer"),
        ("sigmoid", "group"),
        ("tanh", "group"),
        ("sigmoid", "none"),
    ],
)
def test_theory_agrees_with_a_wide_network(activation: str, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    depth, width = 12, 512
    monkeypatch.setattr("gradprobe.experiments.remedies.networks.WIDTH", width)
    torch.manual_seed(0)
    model = network("he" if norm == "none" else f"he+{norm}norm", activation, depth, (64,), 10).double()
    images = torch.randn(512, 64, dtype=torch.float64)
    torch.autograd.backward((model(images) * torch.randn(512, 10)).sum())
    norms = [parameter.grad.norm().item() for parameter in model.parameters() if parameter.ndim > 1]
    line = fit_trend(list(np.log(norms[1:-1])))
    theory = factor_per_layer(activation, norm, 2.0, 0.0, 1.0, depth - 2)
    assert line.factor == pytest.approx(theory, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "pool"}, "layers: needed one of linear, conv, got 'pool'"),
        ({"remedies": ["magic"]}, "remedies: needed one or more of none, clipping, xavier, he, .* got 'magic'"),
        ({"remedies": ["he+xavier"]}, "remedies: .* with at most one of .*, got 'he.xavier'"),
        ({"remedies": ["none+he"]}, "remedies: .* got 'none.he'"),
        ({"remedies": ["he+he"]}, "remedies: .* got 'he.he'"),
        ({"remedies": []}, "remedies: needed at least one"),
        ({"remedies": ["he", "he"]}, "remedies: needed at least one, without duplicates, got he, he"),
        ({"activations": ["gelu"]}, "activations: needed one or more of sigmoid, tanh, relu, got 'gelu'"),
        ({"depths": [20, 1]}, "depths: needed whole numbers of at least 2, got 1"),
        ({"depths": [20, 20]}, "depths: needed at least one, without duplicates"),
        ({"seeds": [-1]}, "seeds: needed a whole number from 0"),
        ({"seeds": [2**32]}, "seeds: needed a whole number from 0"),
        ({"seeds": [0.5]}, "seeds: needed a whole number from 0"),
        ({"seeds": []}, "seeds: needed at least one, without duplicates, got "),
        ({"seeds": [1, 1]}, "seeds: needed at least one, without duplicates, got 1, 1"),
        ({"steps": 0}, "steps: needed at least 1, got 0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{message}"):
        remedies(**options)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--layers", "x"],
        ["--remedies", "magic"],
        ["--activations", "gelu"],
        ["--depths", "1"],
        ["--depths", "x"],
        ["--chart", "a.pdf"],
    ],
    ids=" ".join,
)
def test_bad_usage_is_one_line_and_exit_status_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--chart" in arguments:
        pytest.importorskip("altair", reason="needs altair, which gradprobe[report] installs")
        pytest.importorskip("vl_convert", reason="needs vl-convert, which gradprobe[report] installs")
    monkeypatch.setattr(sys, "argv", ["gradprobe", "remedies", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (2, "")
    assert printed.err.startswith("gradprobe: ")
    assert printed.err.count("\n") == 1


@pytest.fixture(scope="module")
def few() -> Remedies:
    return remedies(remedies=["none", "clipping", "he"], activations=["sigmoid", "relu"], depths=[5], steps=2)


def test_the_table_has_the_measurements_and_conditions(few: Remedies) -> None:
    page = io.StringIO()
    Console(file=page, width=120).print(few)
    text = page.getvalue()
    words = " ".join(text.split())
    assert "…" not in text
    assert re.search(r"│ he +│ \w+ +│", text)
    for part in (
        "sigmoid, 5 layers",
        "relu, 5 layers",
        "digits: 1,347 training",
        "fully connected, width 64",
        "2 steps of SGD 0.01 with momentum 0.9, weight decay 0.0001",
        *few.conclusions,
    ):
        assert " ".join(part.split()) in words
    for cell in few.cells:
        assert f"{cell.factor:.3f} ± {cell.std_error:.3f}" in text
        assert f"{cell.theory:.3f}" in text
    assert "0.5^20 = 9.5e-07" in words
    assert "2^20 = 1,048,576" in words
    assert "2^20" not in " ".join(few.conclusions)


def test_the_conclusions_follow_from_the_numbers(few: Remedies) -> None:
    none = replace(few, cells=tuple(replace(cell, n_fell=0) for cell in few.cells))
    assert "No remedy made the loss fall for all 2 networks" in none.conclusions[0]
    he = replace(few, cells=tuple(replace(cell, n_fell=2 if cell.remedy == "he" else 1) for cell in few.cells))
    assert he.conclusions[0].endswith("and every seed with: he.")
    first, clipped, *rest = few.cells
    changed = replace(few, cells=(first, replace(clipped, norms=(1.0, *clipped.norms[1:])), *rest))
    assert "not the ratio" not in changed.conclusions[1]
    assert "Clipping" not in " ".join(replace(few, cells=few.cells[2:3]).conclusions)


def test_the_command_takes_convolutions() -> None:
    options = ["--layers", "conv", "--remedies", "groupnorm", "--activations", "relu", "--depths", "4", "--steps", "1"]
    values = json.loads(CliRunner().invoke(app, ["remedies", *options, "--json"]).stdout)
    assert (values["layers"], values["cells"][0]["theory"]) == ("conv", None)
    assert "3x3 convolutions, 32 channels" in CliRunner().invoke(app, ["remedies", *options]).stdout


def test_the_command_gives_json(few: Remedies) -> None:
    options = ["--remedies", "none,clipping,he", "--activations", "sigmoid,relu", "--depths", "5", "--steps", "2"]
    result = CliRunner().invoke(app, ["remedies", *options, "--json"])
    assert result.exit_code == 0
    values = json.loads(result.stdout)
    assert [cell["ratio"] for cell in values["cells"]] == [cell.ratio for cell in few.cells]
    assert values["conclusions"] == list(few.conclusions)
    assert values["seeds"] == [0, 1]


def test_progress_is_shown_on_a_terminal_only() -> None:
    for terminal in (True, False):
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=terminal, width=140)
        remedies(remedies=["he"], activations=["relu"], depths=[3], seeds=(0,), steps=1, console=console)
        assert ("100%" in screen.getvalue()) == terminal
        assert ("he, relu, 3 layers: seed 0" in screen.getvalue()) == terminal


@pytest.mark.parametrize("suffix", [".html", ".svg", ".png"])
def test_the_chart(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("altair", reason="needs altair, which gradprobe[report] installs")
    pytest.importorskip("vl_convert", reason="needs vl-convert, which gradprobe[report] installs")
    path = tmp_path / "new" / f"remedies{suffix}"
    options = ["--remedies", "none,he", "--activations", "sigmoid,relu", "--depths", "4,5", "--steps", "1"]
    result = CliRunner().invoke(app, ["remedies", *options, "--chart", str(path)])
    assert result.exit_code == 0
    assert f"wrote {path}" in result.stderr
    if suffix == ".png":
        assert path.read_bytes().startswith(b"\x89PNG")
        return
    text = path.read_text(encoding="utf-8")
    for part in ("sigmoid", "relu", "he, relu, 5 layers: ", "none, sigmoid, 4 layers: "):
        assert part in text
    assert ("<figcaption>" in text) == (suffix == ".html")


@pytest.mark.parametrize("layers", ["linear", "conv"])
def test_the_chart_mentions_theory_only_if_there_is_one(layers: str, tmp_path: Path) -> None:
    charts = pytest.importorskip("gradprobe.report.remedies_chart", exc_type=ImportError)
    cells = [measured("groupnorm", "tanh", 5, layers=layers)]
    text = charts.write_remedies(cells, 1, [], tmp_path / "a.svg").read_text(encoding="utf-8")
    assert ("tick: theory" in text) == (layers == "linear")


def test_an_empty_chart_is_rejected(tmp_path: Path) -> None:
    charts = pytest.importorskip("gradprobe.report.remedies_chart", exc_type=ImportError)
    with pytest.raises(ArgumentError, match=r"^--chart: needed at least one network"):
        charts.write_remedies([measured("he", "relu", 2)], 1, [], tmp_path / "a.svg")
    assert list(tmp_path.iterdir()) == []


def test_every_default_remedy_can_be_built() -> None:
    for remedy in REMEDIES:
        assert network(remedy, "tanh", 3, (64,), 10)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
