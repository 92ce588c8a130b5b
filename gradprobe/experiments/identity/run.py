"""The identity experiment: a deep network as good as a shallow one exists, but does training find it?

A trained plain network is extended by layers that are exact identities. It is compared with a network of the same depth
trained from scratch, and with itself after further training. In addition, stacks of layers learn y = x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from rich.console import Console
from torch import nn

from gradprobe import networks
from gradprobe.errors import ArgumentError, GradprobeError, WorkerTraceback
from gradprobe.experiments import DEFAULT_EPOCHS, STACK_STEPS
from gradprobe.experiments.common import progress_bar
from gradprobe.experiments.data import Dataset, load
from gradprobe.experiments.evaluation import evaluate
from gradprobe.experiments.identity.result import Identity, NetErrors, Paradox
from gradprobe.experiments.identity.stacks import DEPTHS, check_options, train_stacks
from gradprobe.experiments.models import build
from gradprobe.experiments.sweep import engines
from gradprobe.experiments.train import EpochProgress, Recipe, load_state, make_optimizer, save_state
from gradprobe.nn.residual import ResidualAdd
from gradprobe.report.records import Cell, EpochRow

BATCH_SIZE = 64
# For the progress bar: STACK_STEPS steps of one layer of a stack take as long as an epoch of four layers of a network.
_STACK_LAYER_COST = 4.0


def extend(shallow: nn.Module, deep: nn.Module) -> None:
    """Makes a deep plain network compute the same function as a shallow one: its additional layers become identities.

    The additional blocks follow the last block of their stage, where the input is the output of a ReLU: it is not
    negative, so the next ReLU preserves it. Their convolutions copy their input; so do their batch normalisations in
    evaluation mode, until training replaces their running averages.

    Args:
        shallow: Plain network of `gradprobe.networks`.
        deep: A deeper one with the same layout, width, channels and classes; changed in place.

    Raises:
        ArgumentError: The deep network is residual, or is not the shallow one with additional blocks.

    Source:
        He et al. 2015, section 1: "a solution by construction".

    Example:
        >>> shallow, deep = networks.plain(8).eval(), networks.plain(14).eval()
        >>> extend(shallow, deep)
        >>> x = torch.randn(2, 3, 8, 8)
        >>> torch.allclose(shallow(x), deep(x), atol=1e-5)
        True
    """
    if any(isinstance(module, ResidualAdd) for net in (shallow, deep) for module in net.modules()):
        raise ArgumentError("deep: needed plain networks, got a residual one, in which identity layers differ")
    state, wanted = shallow.state_dict(), deep.state_dict()
    for name, value in state.items():
        if name not in wanted or wanted[name].shape != value.shape:
            found = tuple(wanted[name].shape) if name in wanted else "nothing"
            raise ArgumentError(f"deep: needed {name} of {tuple(value.shape)} as in the shallow network, got {found}")
    known = dict(shallow.named_modules())
    added = {name: module for name, module in deep.named_modules() if name not in known}
    for name, module in added.items():
        if isinstance(module, nn.Conv2d):
            square = module.in_channels == module.out_channels and module.stride == (1, 1)
            if not square:
                raise ArgumentError(f"deep: {name} changes the shape of its input, so it cannot be an identity")
    deep.load_state_dict(wanted | state)
    with torch.no_grad():
        for module in added.values():
            if isinstance(module, nn.Conv2d):
                nn.init.dirac_(module.weight)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.weight.fill_(math.sqrt(1 + module.eps))
                module.bias.zero_()


def identity(
    *,
    seed: int = 0,
    depths: Sequence[int] = (20, 56),
    epochs: int = DEFAULT_EPOCHS,
    stack_depths: Sequence[int] = DEPTHS,
    steps: int = STACK_STEPS,
    console: Console | None = None,
) -> Identity:
    """Compares a constructed deep network with one trained from scratch, and trains stacks to learn y = x.

    Args:
        seed: Seed of all weights, of the order of the images, and of the stacks' inputs.
        depths: Depths of the shallow and of the deep network, both in the CIFAR layout.
        epochs: Passes over the training set, at least 3; the constructed network then trains for a third as many.
        stack_depths: Depths of the stacks, in layers.
        steps: Training steps of the stacks.
        console: Console for the progress bar; None, or a console that is not a terminal, draws none.

    Returns:
        The measured errors and losses, with their conditions.

    Raises:
        ArgumentError: An argument is not one of the values above.
        GradprobeError: A training run failed.

    Source:
        He et al. 2015, sections 1 and 4.2.
    """
    check_options(seed, stack_depths, steps)
    if epochs < 3:
        raise ArgumentError(f"epochs: needed at least 3, got {epochs}")
    if len(depths) != 2 or not depths[0] < depths[1]:
        raise ArgumentError(f"depths: needed a smaller and then a larger depth, got {', '.join(map(str, depths))}")
    for depth in depths:
        if networks.default_layout(depth) != "cifar":
            raise ArgumentError(
                f"depths: needed 6n+2 of the CIFAR layout (8, 14, 20, 56, …), got {depth}, which is an ImageNet depth"
            )
    dataset = load("digits")
    recipe = Recipe(epochs, BATCH_SIZE)
    further = epochs // 3
    stack_layer_cost = _STACK_LAYER_COST * steps / STACK_STEPS
    total = epochs * sum(depths) + further * depths[1] + 3 * sum(stack_depths) * stack_layer_cost
    with _progress(console, total) as advance:
        paradox = _paradox(dataset, seed, depths, recipe, further, advance)
        stacks = train_stacks(
            seed=seed,
            depths=stack_depths,
            steps=steps,
            advance=lambda depth: advance(depth * stack_layer_cost, f"y = x: {depth} layers"),
        )
    return Identity(dataset.summary, seed, recipe.batch_size, recipe.learning_rate, paradox, stacks)


Advance = Callable[[float, str], None]


def _paradox(
    data: Dataset, seed: int, depths: Sequence[int], recipe: Recipe, further: int, advance: Advance
) -> Paradox:
    nets = [build("plain", depth, data) for depth in depths]
    parameters = [networks.count_parameters(net) for net in nets]
    cells = [Cell(id, "plain", depths[id], seed, parameters[id], "pending") for id in (0, 1)]
    # The longer run first, so that the two overlap most.
    jobs = [engines.Job(cells[id], data.spec, recipe) for id in (1, 0)]
    ends = _run(jobs, {}, advance)
    shallow, constructed = nets
    load_state(shallow, ends[0][1])
    extend(shallow, constructed)
    shallow.eval()
    constructed.eval()
    with torch.no_grad():
        difference = max(
            (shallow(x) - constructed(x)).abs().max().item()
            for images in (data.train_x, data.test_x)
            for x in torch.split(images, BATCH_SIZE)
        )
    errors = _measure(constructed, data, by_batch=False)
    by_batch = _measure(constructed, data, by_batch=True)
    # Resumes as if its epochs had passed; with at most a third more, all further steps use the last learning rate.
    longer = Recipe(recipe.epochs + further, recipe.batch_size)
    start = save_state(constructed, make_optimizer(constructed, recipe), recipe.epochs, False)
    trained_on = _run([engines.Job(cells[1], data.spec, longer)], {1: start}, advance)
    return Paradox(
        shallow_depth=depths[0],
        deep_depth=depths[1],
        parameters=parameters[1],
        epochs=recipe.epochs,
        further_epochs=further,
        largest_logit_difference=difference,
        shallow=_errors(ends[0][0]),
        constructed=errors,
        by_batch=by_batch,
        trained_on=_errors(trained_on[1][0]),
        scratch=_errors(ends[1][0]),
    )


def _run(jobs: list[engines.Job], states: dict[int, bytes], advance: Advance) -> dict[int, tuple[EpochRow, bytes]]:
    """Trains the cells to the end, and returns the last row and checkpoint of each by its id."""
    ends: dict[int, tuple[EpochRow, bytes]] = {}
    for job, result in engines.run_local(jobs, min(len(jobs), engines.cpus()), states.get):
        if isinstance(result, engines.Failure):
            raise GradprobeError(f"{job.cell.title}: {result.message}") from WorkerTraceback(result.trace)
        if isinstance(result, EpochProgress):
            continue
        row = result.epochs[-1]
        ends[job.cell.id] = row, result.state
        missing = job.recipe.epochs - row.epoch if result.status == "diverged" else 0
        text = f"{job.cell.name}: epoch {row.epoch}/{job.recipe.epochs}, train error {row.any_train_error_pct:.1f} %"
        advance(job.cell.depth * (1 + missing), text)
    return ends


def _measure(model: nn.Module, data: Dataset, *, by_batch: bool) -> NetErrors:
    train_loss, train_error_pct = evaluate(model, data.train_x, data.train_y, by_batch=by_batch)
    _, test_error_pct = evaluate(model, data.test_x, data.test_y, by_batch=by_batch)
    return NetErrors(train_loss, train_error_pct, test_error_pct)


def _errors(row: EpochRow) -> NetErrors:
    return NetErrors(row.train_loss, row.train_error_pct, row.test_error_pct)


@contextmanager
def _progress(console: Console | None, total: float) -> Iterator[Advance]:
    """Shows a progress bar weighted by layers; yields the function that advances it."""
    with progress_bar(console) as progress:
        task = progress.add_task("", total=total)
        yield lambda cost, text: progress.update(task, advance=cost, description=text)
