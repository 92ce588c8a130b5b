"""The degradation sweep: trains every family at every depth with every seed, into one file from which it resumes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn

from gradprobe import networks
from gradprobe.errors import ArgumentError, StoreError
from gradprobe.experiments import DEFAULT_EPOCHS
from gradprobe.experiments.common import check_seeds, progress_bar
from gradprobe.experiments.data import Dataset, load
from gradprobe.experiments.sweep import engines
from gradprobe.experiments.sweep.store import RunWriter, start_run
from gradprobe.experiments.train import EpochResult, Recipe, build, is_whole
from gradprobe.report.records import Cell

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


def sweep(
    *,
    out: str | Path,
    data: str = "digits",
    families: Sequence[str] = networks.FAMILIES,
    depths: Sequence[int] = (20, 56),
    seeds: Sequence[int] = (0,),
    epochs: int = DEFAULT_EPOCHS,
    batch_size: int | None = None,
    jobs: int | None = None,
    engine: str = "local",
    console: Console | None = None,
) -> Path:
    """Trains the cells that the file does not contain yet; an interrupted sweep resumes where it stopped.

    Each cell trains on one thread, with the same numbers for any number of jobs and interruptions.

    Args:
        out: The SQLite file.
        data: Data set, for `gradprobe.experiments.data.load`.
        families: One or more of ``"plain"`` and ``"resnet"``.
        depths: Depths that `gradprobe.networks` supports.
        seeds: Whole numbers from 0 to 2^32 - 1.
        epochs: Passes over the training set; He et al. train for about 164.
        batch_size: Images per step, at most the whole training set; by default 64 for digits, else 128 as in the paper.
        jobs: Number of cells trained in parallel; by default one per CPU.
        engine: ``"local"`` (processes on this machine) or ``"ray"``.
        console: Console for the progress bar; None, or a console that is not a terminal, draws none.

    Returns:
        The path of the file, for `gradprobe.experiments.sweep.store.open_run`.

    Raises:
        ArgumentError: An argument is not one of the values above; the message lists them.
        StoreError: The file cannot be used; see `gradprobe.experiments.sweep.store.start_run`.
        BackendError: The engine is not installed.
        GradprobeError: A cell failed; recorded epochs are kept.

    Source:
        He et al. 2015, section 4.2.
    """
    families, depths, seeds = _unique("families", families), _unique("depths", depths), _unique("seeds", seeds)
    check_seeds("seeds", seeds)
    if jobs is not None and jobs < 1:
        raise ArgumentError(f"jobs: needed at least 1, got {jobs}")
    if engine not in engines.ENGINES:
        raise ArgumentError(f"engine: needed one of {', '.join(engines.ENGINES)}, got {engine!r}")
    dataset = load(data)
    asked_size = batch_size if batch_size is not None else _default_batch_size(dataset)
    recipe = Recipe(epochs, min(asked_size, len(dataset.train_x)))
    sizes = {net: _size(*net, dataset) for net in product(families, depths)}
    costs = {net: multiply_adds for net, (_, multiply_adds) in sizes.items()}
    asked = list(product(families, depths, seeds))
    with start_run(out, _config(dataset, recipe), _metadata(dataset)) as run:
        written_with = run.meta.get("torch_version", "of an unknown version")
        if written_with != torch.__version__:
            raise StoreError(
                f"{run.path}: written with torch {written_with}; torch {torch.__version__} would give different "
                "numbers. Use another --out."
            )
        run.add_cells([(*cell, sizes[cell[:2]][0]) for cell in asked])
        cells = [cell for cell in run.cells() if (cell.family, cell.depth, cell.seed) in set(asked)]
        todo = [engines.Job(cell, dataset.spec, recipe) for cell in cells if cell.status == "pending"]
        # The longest first, so that no long job runs alone at the end.
        todo.sort(key=lambda job: -costs[job.cell.family, job.cell.depth])
        run_engine: engines.Engine = engines.run_ray if engine == "ray" else engines.run_local
        with _progress(console, run, cells, costs, epochs) as advance:
            for job, result in run_engine(todo, jobs or engines.cpus(), partial(_checkpoint, run)):
                run.save(job.cell.id, result.epochs, result.layers, result.junctions, result.state, result.status)
                advance(job.cell, result)
        return run.path


def _checkpoint(run: RunWriter, cell_id: int) -> bytes | None:
    state = run.checkpoint(cell_id)
    if state is not None and not is_whole(state):
        raise StoreError(f"{run.path}: the file is damaged: the checkpoint of cell {cell_id} is not as it was saved")
    return state


@contextmanager
def _progress(
    console: Console | None, run: RunWriter, cells: Sequence[Cell], costs: dict[tuple[str, int], int], epochs: int
) -> Iterator[Callable[[Cell, EpochResult], None]]:
    """Shows a progress bar over all epochs of all cells, weighted by cost; yields the function that advances it."""

    def cost(cell: Cell) -> int:
        return costs[cell.family, cell.depth]

    # A finished cell counts in full, although a diverged one has fewer epochs.
    done = sum(cost(c) * (epochs if c.status != "pending" else max(len(run.epochs(c.id)) - 1, 0)) for c in cells)
    with progress_bar(console) as progress:
        task = progress.add_task("", total=sum(cost(cell) * epochs for cell in cells), completed=done)

        def advance(cell: Cell, result: EpochResult) -> None:
            last = result.epochs[-1]
            missing = epochs - last.epoch if result.status == "diverged" else 0
            text = (
                f"{cell.name} seed {cell.seed}: epoch {last.epoch}/{epochs}, train error {last.train_error_pct:.1f} %"
            )
            progress.update(task, advance=cost(cell) * (1 + missing), description=text)

        yield advance


def _unique(name: str, values: Sequence[T]) -> tuple[T, ...]:
    if not values:
        raise ArgumentError(f"{name}: needed at least one, got none")
    return tuple(dict.fromkeys(values))


def _default_batch_size(data: Dataset) -> int:
    return 64 if data.name == "digits" else 128


def _config(data: Dataset, recipe: Recipe) -> dict[str, object]:
    return {
        "data": data.name,
        "data_sha256": data.sha256,
        "train_images": len(data.train_x),
        "test_images": len(data.test_x),
        "augmented": data.augmented,
        **asdict(recipe),
    }


def _metadata(data: Dataset) -> dict[str, str]:
    return {
        "gradprobe_version": _version(),
        "torch_version": torch.__version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "data_spec": data.spec,
    }


def _version() -> str:
    try:
        return metadata.version("gradprobe")
    except metadata.PackageNotFoundError:
        return "not installed"


def _size(family: str, depth: int, data: Dataset) -> tuple[int, int]:
    """Returns a network's number of parameters, and its multiply-adds per image as a measure of an epoch's cost."""
    multiply_adds = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal multiply_adds
        multiply_adds += output.numel() * cast(Tensor, module.weight)[0].numel()

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = build(family, depth, data.in_channels, data.num_classes)
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(count)
        model.eval()(data.train_x[:1])
    return networks.count_parameters(model), multiply_adds
