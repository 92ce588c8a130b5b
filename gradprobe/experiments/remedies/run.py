"""Compares remedies for vanishing and exploding gradients over depths and activations.

Every network is a stack of layers of one width, trained on scikit-learn's digits: linear layers, of which hundreds of
networks train in minutes, or convolutions, which take several times as long. The probe measures the gradient at
initialisation in float64, so that norms that float32 would round to zero are seen; training is in float32.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from gradprobe.diagnosis.diagnose import most_severe, verdict
from gradprobe.diagnosis.trend import fit_trend
from gradprobe.errors import ArgumentError, not_among
from gradprobe.experiments import REMEDY_STEPS
from gradprobe.experiments.common import check_seeds, one_thread, progress_bar
from gradprobe.experiments.data import Dataset, load
from gradprobe.experiments.evaluation import evaluate
from gradprobe.experiments.remedies.networks import LAYERS, network, parse_remedy
from gradprobe.experiments.remedies.result import BATCH_SIZE, FELL_SHARE, MAX_NORM, Remedies
from gradprobe.experiments.remedies.theory import ACTIVATIONS, factor_per_layer, residual_theory
from gradprobe.experiments.train import Recipe, make_optimizer
from gradprobe.probe.probe import attach
from gradprobe.report.records import RemedyCell
from gradprobe.snapshot.snapshot import Snapshot

RECIPE = Recipe(epochs=1, batch_size=BATCH_SIZE, learning_rate=0.01)
DEPTHS = (20, 50)
SEEDS = (0, 1)

# No logarithm of a float64 is larger.
_LOG_MAX = math.log(sys.float_info.max)

REMEDIES = (
    "none",
    "clipping",
    "xavier",
    "he",
    "batchnorm",
    "layernorm",
    "groupnorm",
    "residual",
    "he+batchnorm",
    "he+residual",
    "he+residual+clipping",
    "batchnorm+residual",
    "layernorm+residual",
    "groupnorm+residual",
    "orthogonal",
    "he+fixup",
    "he+skipinit",
    "he+rezero",
    "he+layerscale",
)


def _check(
    layers: str, remedies: Sequence[str], activations: Sequence[str], depths: Sequence[int], seeds: Sequence[int]
) -> None:
    if layers not in LAYERS:
        raise not_among("layers", layers, LAYERS)
    for remedy in remedies:
        parse_remedy(remedy)
    for activation in activations:
        if activation not in ACTIVATIONS:
            raise not_among("activations", activation, ACTIVATIONS, "one or more of")
    for depth in depths:
        if depth < 2:
            raise ArgumentError(f"depths: needed whole numbers of at least 2, got {depth}")
    check_seeds("seeds", seeds)
    options = (("remedies", remedies), ("activations", activations), ("depths", depths), ("seeds", seeds))
    for name, values in options:
        if not values or len(set(values)) < len(values):
            raise ArgumentError(f"{name}: needed at least one, without duplicates, got {', '.join(map(str, values))}")


def remedies(
    *,
    layers: str = "linear",
    remedies: Sequence[str] = REMEDIES,
    depths: Sequence[int] = DEPTHS,
    activations: Sequence[str] = ACTIVATIONS,
    seeds: Sequence[int] = SEEDS,
    steps: int = REMEDY_STEPS,
    console: Console | None = None,
) -> Remedies:
    """Measures the gradient of every network with every remedy at initialisation, and trains each for some steps.

    Args:
        layers: Kind of layers: ``"linear"`` or ``"conv"`` (3x3 convolutions).
        remedies: Remedies, each one or more parts of `gradprobe.experiments.remedies.networks.PARTS` joined by +.
        depths: Numbers of weight layers, each at least 2.
        activations: One or more of ``"sigmoid"``, ``"tanh"``, ``"relu"``.
        seeds: Whole numbers from 0 to 2^32 - 1.
        steps: Training steps, at least 1.
        console: Console for the progress bar; None, or a console that is not a terminal, draws none.

    Returns:
        The measurements, with their conditions.

    Raises:
        ArgumentError: An argument is not one of the values above; the message lists them.

    Source:
        He et al. 2015, arXiv 1502.01852; Glorot and Bengio 2010 (AISTATS); Pascanu et al. 2013 (ICML); He et al. 2016,
        arXiv 1603.05027; Yang et al. 2019, arXiv 1902.08129; without normalisation Schoenholz et al. 2017, arXiv
        1611.01232. The normalisations: `gradprobe.experiments.remedies.networks.network`.
    """
    _check(layers, remedies, activations, depths, seeds)
    if steps < 1:
        raise ArgumentError(f"steps: needed at least 1, got {steps}")
    data = load("digits")
    shares = torch.bincount(data.train_y).double() / len(data.train_y)
    constant_loss = float(-(shares * shares.log()).sum())
    cells = []
    with one_thread(), progress_bar(console) as progress:
        task = progress.add_task("", total=len(activations) * sum(depths) * len(remedies) * len(seeds))
        for activation, depth, remedy in product(activations, depths, remedies):
            runs = []
            for seed in seeds:
                runs.append(_run(layers, remedy, activation, depth, seed, steps, data))
                progress.update(task, advance=depth, description=f"{remedy}, {activation}, {depth} layers: seed {seed}")
            cells.append(_cell(layers, remedy, activation, depth, runs, constant_loss, data))
    return Remedies(
        data=data.summary,
        layers=layers,
        seeds=tuple(seeds),
        steps=steps,
        learning_rate=RECIPE.learning_rate,
        momentum=RECIPE.momentum,
        weight_decay=RECIPE.weight_decay,
        constant_loss=constant_loss,
        cells=tuple(cells),
    )


@dataclass(frozen=True, slots=True)
class _Run:
    snapshot: Snapshot
    norms: tuple[float, ...]
    start_loss: float
    final_loss: float
    nan_after: int | None


def _run(layers: str, remedy: str, activation: str, depth: int, seed: int, steps: int, data: Dataset) -> _Run:
    clipped = parse_remedy(remedy).clipped
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(remedy, activation, depth, data.train_x.shape[1:], data.num_classes, layers).double()
    chosen = torch.randperm(len(data.train_x), generator=generator)[:BATCH_SIZE]
    snapshot = _measure(model, data.train_x[chosen].double(), data.train_y[chosen], clipped)
    weights = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    norms = tuple(snapshot[name].norm for name in weights)

    model.float()
    optimizer = make_optimizer(model, RECIPE)
    # Normalised by batch statistics here and at the end: running averages lag behind in such a short training.
    start_loss, _ = evaluate(model, data.train_x, data.train_y, by_batch=True)
    nan_after = None
    # Numbers below the smallest normal float32 move no weight, but are a hundred times slower on many CPUs.
    torch.set_flush_denormal(True)
    try:
        order = torch.empty(0, dtype=torch.int64)
        for step in range(steps):
            if len(order) < BATCH_SIZE:
                order = torch.randperm(len(data.train_x), generator=generator)
            chosen, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
            loss = F.cross_entropy(model(data.train_x[chosen]), data.train_y[chosen])
            if not bool(torch.isfinite(loss)):
                nan_after = step
                break
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            if clipped:
                nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
        final_loss, _ = evaluate(model, data.train_x, data.train_y, by_batch=True)
    finally:
        torch.set_flush_denormal(False)
    if nan_after is None and not math.isfinite(final_loss):
        nan_after = steps
    return _Run(snapshot, norms, start_loss, final_loss, nan_after)


def _measure(model: nn.Module, images: Tensor, labels: Tensor, clipped: bool) -> Snapshot:
    """Measures the gradients of one batch as the optimizer gets them: at the step, and so after clipping.

    The verdict needs residual adds and loss: the forward pass of a residual network can explode although its gradients
    are healthy.
    """
    with attach(model, when="step") as probe:
        loss = F.cross_entropy(model(images), labels)
        torch.autograd.backward(loss)
        if clipped:
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        probe.step(loss=loss)
        return probe.history()[-1]


def _cell(
    layers: str,
    remedy: str,
    activation: str,
    depth: int,
    runs: Sequence[_Run],
    constant_loss: float,
    data: Dataset,
) -> RemedyCell:
    logs = [_mean_log(norms) for norms in zip(*(run.norms for run in runs), strict=True)]
    # Without the first and last layer, which have other shapes and neighbours.
    line = fit_trend(logs[1:-1])
    theory, expected = _theory(remedy, activation, depth, data) if layers == "linear" and depth > 3 else (None, ())
    adds = [tuple(run.snapshot.junctions.values()) for run in runs]
    measured = [[junctions[0].x.rms, *(one.y.rms for one in junctions)] for junctions in adds if junctions]
    return RemedyCell(
        remedy=remedy,
        activation=activation,
        depth=depth,
        norms=tuple(math.exp(value) for value in logs),
        total_norm=math.exp(_mean_log([run.snapshot.total_norm for run in runs])),
        factor=line.factor,
        std_error=line.std_error,
        theory=theory,
        verdict=most_severe([verdict([run.snapshot]) for run in runs]),
        start_loss=sum(run.start_loss for run in runs) / len(runs),
        final_loss=sum(run.final_loss for run in runs) / len(runs),
        n_fell=sum(run.final_loss < FELL_SHARE * min(run.start_loss, constant_loss) for run in runs),
        nan_after=tuple(run.nan_after for run in runs if run.nan_after is not None),
        variances=tuple(_exp(2 * _mean_log(rms)) for rms in zip(*measured, strict=True)),
        expected_variances=expected,
    )


def _theory(remedy: str, activation: str, depth: int, data: Dataset) -> tuple[float | None, tuple[float, ...]]:
    """Predicts the factor per layer, if there is one, and of a residual network the variances.

    The theory is for linear layers: it does not cover the zero padding of convolutions.
    """
    parts = parse_remedy(remedy)
    mean_square = float(data.train_x.square().mean())
    start = (activation, parts.norm, parts.weight_gain, parts.bias_variance, mean_square, depth - 2)
    if parts.shortcut == "none":
        return factor_per_layer(*start), ()
    residual = residual_theory(*start, branch_factor=parts.branch_factor(depth))
    return None if math.isnan(residual.factor) else residual.factor, residual.variances


def _mean_log(norms: Sequence[float]) -> float:
    """Computes the mean of the logarithms; minus infinity if one norm is zero."""
    return sum(-math.inf if norm == 0 else math.log(norm) for norm in norms) / len(norms)


def _exp(value: float) -> float:
    """Computes the exponential; infinity if float64 ends before."""
    return math.exp(value) if value < _LOG_MAX else math.inf
