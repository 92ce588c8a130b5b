"""Estimates the time of a sweep from two steps of each network, and its memory from the tensors that they hold."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor

from gradprobe.errors import printable
from gradprobe.experiments.common import one_thread
from gradprobe.experiments.data import Dataset, draw_batches
from gradprobe.experiments.device import training
from gradprobe.experiments.evaluation import EVALUATION_BATCH, evaluate
from gradprobe.experiments.models import build
from gradprobe.experiments.step import TrainingStep
from gradprobe.experiments.sweep.run import Plan
from gradprobe.experiments.train import Recipe, make_optimizer
from gradprobe.report.formatting import duration


@dataclass(frozen=True)
class NetEstimate:
    """Time and memory that a network of the sweep needs.

    Attributes:
        net: Family and depth.
        seeds: The seeds asked for.
        parameters: Number of trainable parameters.
        seconds: Time of one training run on one CPU.
        megabytes: Memory of one training run: the data, the network, the optimizer's state, and what autograd saves for
            the backward pass.
    """

    net: str
    seeds: tuple[int, ...]
    parameters: int
    seconds: float
    megabytes: float


@dataclass(frozen=True)
class DryRun:
    """The networks of a sweep, with the time and the memory that they need; prints as a table.

    Attributes:
        data: The data set in one line.
        nets: Its networks.
        jobs: Number of runs in parallel.
    """

    data: str
    nets: tuple[NetEstimate, ...]
    jobs: int

    @property
    def runs(self) -> int:
        """Number of training runs."""
        return sum(len(net.seeds) for net in self.nets)

    @property
    def seconds(self) -> float:
        """Time of the whole sweep: no less than its longest run."""
        shared = sum(net.seconds * len(net.seeds) for net in self.nets) / self.jobs
        return max(shared, *(net.seconds for net in self.nets))

    @property
    def megabytes(self) -> float:
        """Memory of the largest runs together."""
        each = sorted((net.megabytes for net in self.nets for _ in net.seeds), reverse=True)
        return sum(each[: self.jobs])

    def as_dict(self) -> dict[str, object]:
        """Returns the estimate as plain data."""
        totals = {"runs": self.runs, "jobs": self.jobs, "seconds": self.seconds, "megabytes": self.megabytes}
        return {"data": self.data, **totals, "nets": [asdict(net) for net in self.nets]}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(printable(self.data))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("network", "seeds", "parameters", "time of a run", "memory"):
            table.add_column(column, justify="left" if column in ("network", "seeds") else "right")
        for net in self.nets:
            seeds = ",".join(map(str, net.seeds))
            row = (f"{net.parameters:,}", duration(net.seconds), _memory(net.megabytes))
            table.add_row(Text(printable(net.net)), seeds, *row)
        yield table
        yield Text(
            f"{self.runs} training runs, {self.jobs} in parallel: about {duration(self.seconds)} on this machine, "
            f"as busy as it is now, and {_memory(self.megabytes)} besides Python and torch. Nothing was trained."
        )


def estimate(plans: Sequence[Plan], jobs: int, whole_train_error: bool = False, device: str = "cpu") -> DryRun:
    """Takes two steps with each network, and estimates the time and memory of the sweeps.

    Args:
        plans: The sweeps.
        jobs: Number of runs in parallel.
        whole_train_error: The sweeps evaluate the whole training set after each epoch.
        device: ``"cpu"`` or ``"cuda"``. On a GPU the time is that of steps that no CUDA graph holds, an upper limit.

    Returns:
        The estimate.
    """
    on = torch.device(device)
    nets = tuple(
        NetEstimate(
            f"{family}-{depth}",
            one.seeds,
            parameters,
            *_measure(family, depth, one.data, one.recipe, whole_train_error, on),
        )
        for one in plans
        for (family, depth), (parameters, _) in one.nets.items()
    )
    runs = sum(len(net.seeds) for net in nets)
    return DryRun(plans[0].data.summary, nets, min(jobs, runs))


def _measure(
    family: str, depth: int, data: Dataset, recipe: Recipe, whole_train_error: bool, device: torch.device
) -> tuple[float, float]:
    """Returns the seconds and megabytes of a run."""
    with one_thread(), training(device, None, seed=0):
        model = build(family, depth, data, recipe.norm, recipe.init)
        data = data.to(device)
        model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.train()
        optimizer = make_optimizer(model, recipe)
        step = TrainingStep(model, optimizer, data, recipe.precision)
        batch, *_ = draw_batches(data, recipe.batch_size, torch.Generator().manual_seed(0))
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        held: dict[int, int] = {}  # what autograd keeps for the backward pass

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            step(batch).tolist()  # waits for the device
        began = time.perf_counter()
        step(batch).tolist()
        step_s = time.perf_counter() - began
        images, labels = data.train_x[:EVALUATION_BATCH], data.train_y[:EVALUATION_BATCH]
        began = time.perf_counter()
        evaluate(model, images, labels, precision=recipe.precision)
        evaluation_s = (time.perf_counter() - began) / len(images)
    steps = len(data.train_x) // recipe.batch_size
    evaluations = recipe.epochs + 1
    evaluated = (evaluations if whole_train_error else 2) * len(data.train_x) + evaluations * len(data.test_x)
    seconds = recipe.epochs * steps * step_s + evaluated * evaluation_s
    kept: list[Tensor] = [*model.parameters(), *model.parameters(), *model.buffers()]  # the gradients' size, too
    kept += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    kept += [data.train_x, data.train_y, data.test_x, data.test_y]
    return seconds, (sum(tensor.nbytes for tensor in kept) + sum(held.values())) / 1e6


def _memory(megabytes: float) -> str:
    return f"{megabytes:,.0f} MB" if megabytes < 1e4 else f"{megabytes / 1e3:,.1f} GB"
