"""Remedies with shortcuts: their definitions at initialisation, and the growth of the signal as theory says."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from gradprobe.cli.commands import app
from gradprobe.diagnosis.trend import fit_trend
from gradprobe.errors import ArgumentError
from gradprobe.experiments.data import load
from gradprobe.experiments.remedies.networks import network, parse_remedy
from gradprobe.experiments.remedies.result import BATCH_SIZE, Remedies
from gradprobe.experiments.remedies.run import remedies
from gradprobe.experiments.remedies.theory import residual_theory
from gradprobe.report.records import RemedyCell
from gradprobe.text.words import number


def measure(
    remedy: str, activation: str, depth: int, seeds: tuple[int, ...] = (0,), layers: str = "linear"
) -> RemedyCell:
    (cell,) = remedies(
        layers=layers, remedies=[remedy], activations=[activation], depths=[depth], seeds=seeds, steps=1
    ).cells
    return cell


def build(remedy: str, layers: str = "linear", depth: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return network(remedy, "tanh", depth, (1, 8, 8), 10, layers).double()


def an_input(layers: str) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn((3, 32, 4, 4) if layers == "conv" else (3, 64), dtype=torch.float64)


@pytest.mark.parametrize("layers", ["linear", "conv"])
@pytest.mark.parametrize("remedy", ["he+fixup", "skipinit", "rezero", "batchnorm+rezero"])
def test_a_residual_layer_starts_as_the_identity(remedy: str, layers: str) -> None:
    x = an_input(layers)
    model = build(remedy, layers)
    hidden = model[1:5] if layers == "conv" else model[2:6]
    assert len(hidden) == 4
    for layer in hidden:
        assert torch.equal(layer(x), x)


@pytest.mark.parametrize("layers", ["linear", "conv"])
def test_a_residual_layer_is_its_formula(layers: str) -> None:
    x = an_input(layers)
    for remedy in ("residual", "fixup", "skipinit", "rezero", "layerscale"):
        layer = build(f"he+{remedy}", layers)[3]
        for place, parameter in enumerate(layer.parameters()):
            if parameter.ndim == 1:
                nn.init.constant_(parameter, 0.1 * (place + 1))
            elif remedy == "fixup":
                nn.init.normal_(parameter)
        w, factor = layer.weighted, layer.factor
        if remedy == "fixup":
            before, _, behind = layer.activation
            expected = factor * w(torch.tanh(x + before.bias) + behind.bias)
        elif remedy == "rezero":
            expected = factor * torch.tanh(w(x))
        elif remedy == "residual":
            expected = w(torch.tanh(x))
        else:
            expected = factor[0] * w(torch.tanh(x))
        assert torch.allclose(layer(x), x + expected)


def test_layerscale_starts_at_the_factors_of_its_paper() -> None:
    for depth, factor in ((20, 0.1), (21, 1e-5), (26, 1e-5), (27, 1e-6)):
        layer = network("layerscale", "relu", depth, (64,), 10)[3]
        assert layer.factor.tolist() == pytest.approx([factor] * 64)
        assert parse_remedy("layerscale").branch_factor(depth) == factor


def test_hidden_weights_of_orthogonal_are_orthogonal_and_its_biases_zero() -> None:
    for layer in build("orthogonal")[2:6]:
        weight = layer.weighted.weight
        assert torch.allclose(weight @ weight.T, 2 * torch.eye(64).double(), atol=1e-5)
        assert not layer.weighted.bias.any()


def test_orthogonal_weights_give_the_factor_of_hes() -> None:
    cell = measure("orthogonal", "relu", 20)
    assert cell.theory == pytest.approx(1.0, abs=0.02)
    assert cell.factor == pytest.approx(1.0, abs=0.03)


def test_the_variances_are_those_of_the_forward_pass() -> None:
    cell = measure("he+layernorm+residual", "tanh", 6, seeds=(3,))
    torch.manual_seed(3)
    model = network("he+layernorm+residual", "tanh", 6, (1, 8, 8), 10).double()
    data = load("digits")
    order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(3))
    x, squares = data.train_x[order[:BATCH_SIZE]].double(), []
    with torch.no_grad():
        for layer in model[:-1]:
            x = layer(x)
            squares.append(x.square().mean().item())
    assert cell.variances == pytest.approx(squares[1:], rel=1e-9)
    assert cell.growth == pytest.approx(squares[-1] / squares[1])


def test_without_normalisation_the_variance_doubles_with_every_layer() -> None:
    """He et al. 2015 with De and Smith 2020: a branch of ReLU and He's weights has the variance of its input."""
    cell = measure("he+residual", "relu", 20, seeds=(0, 1, 2))
    # The first layers start from an output of one sign, and grow faster.
    factors, expected = (
        np.divide(variances[7:], variances[6:-1]) for variances in (cell.variances, cell.expected_variances)
    )
    assert len(factors) == 12
    assert np.exp(np.log(factors).mean()) == pytest.approx(2.0, rel=0.06)
    assert np.all((factors > 1.5) & (factors < 2.5))
    assert expected == pytest.approx(np.full(12, 2.0), rel=0.04)


@pytest.mark.parametrize(("remedy", "added"), [("he+layernorm+residual", 1.0), ("layernorm+residual", 1 / 6 + 1 / 192)])
def test_with_normalisation_each_layer_adds_the_same_variance(remedy: str, added: float) -> None:
    cell = measure(remedy, "relu", 20, seeds=(0, 1, 2))
    variances = np.array(cell.variances)
    line = np.polyfit(np.arange(19), variances, 1)
    assert line[0] == pytest.approx(added, rel=0.2)
    assert np.abs(variances - np.polyval(line, np.arange(19))).max() < 0.07 * variances[-1]
    assert np.diff(cell.expected_variances)[4:] == pytest.approx(np.full(14, added), rel=0.08)


@pytest.mark.parametrize("remedy", ["he+residual", "residual", "he+batchnorm+residual"])
@pytest.mark.parametrize("activation", ["relu", pytest.param("tanh", marks=pytest.mark.soak)])
def test_measured_growth_and_factor_agree_with_theory(remedy: str, activation: str) -> None:
    cell = measure(remedy, activation, 20, seeds=(0, 1))
    assert cell.growth is not None
    assert cell.expected_growth is not None
    assert cell.growth == pytest.approx(cell.expected_growth, rel=0.4)
    assert cell.theory is not None
    assert cell.factor == pytest.approx(cell.theory, abs=0.05)


@pytest.mark.parametrize(
    "activation", ["relu", *(pytest.param(name, marks=pytest.mark.soak) for name in ("tanh", "sigmoid"))]
)
@pytest.mark.parametrize(
    ("norm", "shortcut"), [("none", "residual"), ("batch", "residual"), ("layer", "residual"), ("none", "layerscale")]
)
def test_theory_agrees_with_a_wide_residual_network(
    activation: str, norm: str, shortcut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradprobe.experiments.remedies.networks.WIDTH", 384)
    remedy = f"he+{shortcut}" if norm == "none" else f"he+{norm}norm+{shortcut}"
    depth, squares, norms = 10, [], []
    for seed in range(3):
        torch.manual_seed(seed)
        model = network(remedy, activation, depth, (64,), 10)
        for layer in model[1:-1]:
            layer.register_forward_hook(lambda module, inputs, output: squares.append(output.square().mean().item()))
        torch.autograd.backward((model(torch.randn(256, 64)) * torch.randn(256, 10)).sum())
        norms += [parameter.grad.norm().item() for parameter in model.parameters() if parameter.ndim > 1][1:-1]
    seen, gradients = (np.log(values).reshape(3, -1).mean(axis=0) for values in (squares, norms))
    theory = residual_theory(
        activation, norm, 2.0, 0.0, 1.0, depth - 2, branch_factor=parse_remedy(remedy).branch_factor(depth)
    )
    # Where the signal doubles with every layer, its logarithm is the sum of many random numbers.
    tolerance = 0.25 if (activation, norm, shortcut) == ("relu", "none", "residual") else 0.1
    assert np.exp(seen) == pytest.approx(theory.variances, rel=tolerance)
    assert fit_trend(list(gradients)).factor == pytest.approx(theory.factor, abs=0.02)


def test_theory_adds_the_variance_of_the_biases() -> None:
    theory = residual_theory("tanh", "layer", 0.0, 0.3, 1.0, 4, branch_factor=0.5)
    assert np.diff(theory.variances) == pytest.approx([0.075] * 4)
    assert math.isnan(theory.factor)


@pytest.mark.parametrize("remedy", ["he+skipinit", "he+rezero", "he+fixup"])
def test_what_a_zero_at_the_start_stops(remedy: str) -> None:
    cell = measure(remedy, "relu", 12)
    assert cell.variances == pytest.approx([cell.variances[0]] * 11, rel=1e-12)
    assert cell.growth == cell.expected_growth == 1.0
    moved = [norm > 0 for norm in cell.norms]
    assert moved == ([False] * 11 if remedy == "he+fixup" else [True, *[False] * 10]) + [True]
    assert math.isnan(cell.factor)
    assert cell.theory is None


def test_a_residual_network_that_diverges_trains_with_a_factor_of_zero() -> None:
    result = remedies(
        remedies=["he+residual", "he+fixup", "he+skipinit", "he+rezero", "he+layerscale"],
        activations=["relu"],
        depths=[20],
        seeds=(0,),
        steps=30,
    )
    assert [cell.n_fell for cell in result.cells] == [0, 1, 1, 1, 1]
    assert math.isnan(result.cells[0].final_loss)


def test_convolutions_have_measured_variances_and_no_theory() -> None:
    cell = measure("he+layerscale", "relu", 6, layers="conv")
    assert len(cell.variances) == 5
    assert (cell.expected_variances, cell.expected_growth, cell.theory) == ((), None, None)
    assert measure("he", "relu", 6).growth is None


@pytest.mark.parametrize("remedy", ["residual+fixup", "skipinit+rezero", "he+orthogonal", "none+layerscale"])
def test_two_parts_of_one_kind_are_rejected(remedy: str) -> None:
    with pytest.raises(
        ArgumentError, match=r"^remedies: .* and one of residual, fixup, skipinit, rezero, layerscale, got"
    ):
        parse_remedy(remedy)


@pytest.fixture(scope="module")
def few() -> Remedies:
    return remedies(remedies=["he", "he+residual", "he+skipinit"], activations=["relu"], depths=[2, 5, 6], steps=1)


def test_the_growth_is_printed_beside_theory(few: Remedies) -> None:
    page = io.StringIO()
    Console(file=page, width=120).print(few)
    text = page.getvalue().partition("Growth of the variance")[2]
    rows = {row.split()[1]: row.split()[3::2] for row in text.splitlines() if row.startswith("│ he")}
    assert rows["he+skipinit"] == ["–", "–", "1.00", "1.00", "1.00", "1.00"]
    cells = [few.of("he+residual", "relu", depth) for depth in (5, 6)]
    shown = [number(value or 0.0) for cell in cells if cell for value in (cell.growth, cell.expected_growth)]
    assert rows["he+residual"] == ["–", "–", *shown]
    assert "he" not in rows
    assert few.conclusions[-1].startswith("The growth of the variance differs from theory by a factor of 1.")


def test_a_signal_beyond_float64_has_an_infinite_variance_and_no_conclusion(monkeypatch: pytest.MonkeyPatch) -> None:
    def steep(*arguments: Any) -> nn.Module:
        model = network(*arguments).double()
        with torch.no_grad():
            [parameter for parameter in model.parameters() if parameter.ndim > 1][1].mul_(1e160)
        return model

    monkeypatch.setattr("gradprobe.experiments.remedies.run.network", steep)
    result = remedies(remedies=["he+residual"], activations=["relu"], depths=[6], seeds=(0,), steps=1)
    assert result.cells[0].growth == math.inf
    assert "variance" not in " ".join(result.conclusions)


@pytest.mark.filterwarnings("error")
def test_theory_beyond_float64_is_infinite() -> None:
    theory = residual_theory("relu", "none", 2.0, 0.0, 1.0, 1030)
    assert theory.variances[1000] / theory.variances[999] == pytest.approx(2.0, rel=0.01)
    assert theory.variances[1030] == math.inf
    assert math.isnan(theory.factor)


def test_json_has_the_profile() -> None:
    options = ["--remedies", "he+residual", "--activations", "relu", "--depths", "5", "--steps", "1", "--json"]
    (cell,) = json.loads(CliRunner().invoke(app, ["remedies", *options]).stdout)["cells"]
    assert len(cell["variances"]) == len(cell["expected_variances"]) == 4
    assert cell["growth"] == pytest.approx(cell["variances"][-1] / cell["variances"][0])
    assert cell["expected_growth"] == pytest.approx(cell["expected_variances"][-1] / cell["expected_variances"][0])
