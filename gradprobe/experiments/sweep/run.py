"""The degradation sweep: trains every family at every depth with every seed, into one file from which it resumes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn

from gradprobe import networks
from gradprobe.errors import ArgumentError, GradprobeError, StoreError, WorkerTraceback, not_among
from gradprobe.experiments import DEFAULT_EPOCHS, optimizers
from gradprobe.experiments.common import check_seeds, one_thread
from gradprobe.experiments.data import Dataset, load
from gradprobe.experiments.device import DEVICES, PRECISIONS, Precision, resolve
from gradprobe.experiments.models import build, check, is_user_model
from gradprobe.experiments.readers.raw import DataSpec
from gradprobe.experiments.sweep import engines
from gradprobe.experiments.sweep.progress import SweepProgress
from gradprobe.experiments.sweep.ray_engine import Cluster
from gradprobe.experiments.sweep.spec import Settings, to_toml
from gradprobe.experiments.sweep.store import RunWriter, start_run
from gradprobe.experiments.train import EpochProgress, Recipe, is_whole, make_optimizer
from gradprobe.version import VERSION

if TYPE_CHECKING:
    from rich.console import Console
    from typing_extensions import Unpack

T = TypeVar("T")

_PROGRESS_EVERY_S = 1.0  # within an epoch


@dataclass(frozen=True)
class Plan:
    """The cells of a sweep, its data and its recipe.

    Attributes:
        data: The data set.
        recipe: Training settings.
        nets: Number of parameters, and multiply-adds per image, of each family and depth.
        seeds: The seeds.
        spec: The settings in full, as TOML.
    """

    data: Dataset
    recipe: Recipe
    nets: Mapping[tuple[str, int], tuple[int, int]]
    seeds: tuple[int, ...]
    spec: str


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended.

    Attributes:
        path: The file, for `gradprobe.experiments.sweep.store.open_run`.
        is_late: Whether time was over before each cell asked for had been trained or had failed.
    """

    path: Path
    is_late: bool


class CellsFailed(GradprobeError):
    """Cells of a sweep failed; the reasons are recorded, and recorded epochs are kept.

    The cause is a `WorkerTraceback` with the traceback of the first one.
    """

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message)
        self.outcome = outcome


def plan(
    *,
    data: str = "digits",
    image_size: int | None = None,
    per_class: int | None = None,
    augment: bool | None = None,
    families: Sequence[str] | None = None,
    models: Sequence[str] = (),
    depths: Sequence[int] = (20, 56),
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int = DEFAULT_EPOCHS,
    batch_size: int | None = None,
    optimizer: str = "sgd",
    lr: float | None = None,
    norm: str | None = None,
    init: str | None = None,
    precision: str = "float32",
) -> Plan:
    """Loads the data and builds every network once, without training.

    Args:
        data: Data set, for `gradprobe.experiments.data.load`.
        image_size: Height and width to which images are scaled; by default they stay as they are.
        per_class: Largest number of training images of each class, and of test images; by default all.
        augment: Whether training images are cropped and flipped at random; by default only CIFAR's.
        families: One or more of `gradprobe.networks.FAMILIES`; by default ``"plain"`` and ``"resnet"``, or none if
            there are `models`.
        models: Functions that build a network of a depth, as ``MODULE:CALLABLE``; see
            `gradprobe.experiments.models.build`.
        depths: Depths that the families and models support.
        seeds: Whole numbers from 0 to 2^32 - 1.
        epochs: Passes over the training set; He et al. train for about 164.
        batch_size: Images per step, at most the whole training set; by default 64 for digits, else 128 as in the paper.
        optimizer: Class of ``torch.optim``, with options if any, as in ``"adamw(betas=(0.9, 0.95))"``. SGD has the
            momentum and weight decay of the paper by default, any other optimizer its own defaults.
        lr: Initial learning rate, divided by 10 at 50 % and at 75 % of the steps; by default 0.1 for SGD as in the
            paper, else the optimizer's own. Networks of 110 layers or more start at a tenth.
        norm: Normalisation of ``"plain"`` and ``"resnet"``: ``"batch"`` (the default) or ``"none"``.
        init: Initialisation of ``"plain"`` and ``"resnet"``: ``"he"`` (the default), ``"xavier"``, ``"orthogonal"`` or
            ``"default"``.
        precision: ``"float32"``, or ``"bfloat16"`` by autocast: convolutions and linear layers then compute in
            bfloat16, and the weights stay float32.

    Returns:
        The plan.

    Raises:
        ArgumentError: An argument is not one of the values above; the message lists them.

    Source:
        He et al. 2015, section 4.2.
    """
    names = _nets(families, models, norm, init)
    depths, seeds = _unique("depths", depths), _unique("seeds", seeds)
    check_seeds("seeds", seeds)
    dataset = load(DataSpec(data, image_size, per_class, augment))
    asked_size = batch_size if batch_size is not None else _default_batch_size(dataset)
    recipe = _recipe(epochs, min(asked_size, len(dataset.train_x)), optimizer, lr, norm, init, precision)
    built_in = tuple(name for name in names if not is_user_model(name))
    has_options = any(name in networks.NORMALISED_FAMILIES for name in built_in)
    settings: Settings = {
        "data": dataset.spec.source,
        "image_size": image_size,
        "per_class": per_class,
        "augment": dataset.augmented,
        "families": built_in,
        "models": tuple(name for name in names if is_user_model(name)),
        "depths": depths,
        "seeds": seeds,
        "epochs": epochs,
        "batch_size": recipe.batch_size,
        "optimizer": optimizer,
        "lr": recipe.learning_rate,
        "norm": recipe.norm if has_options else None,
        "init": recipe.init if has_options else None,
        "precision": recipe.precision,
    }
    nets = {net: _size(*net, dataset, recipe) for net in product(names, depths)}
    return Plan(dataset, recipe, nets, seeds, to_toml(settings))


def sweep(
    *,
    out: str | Path,
    jobs: int | None = None,
    engine: str = "local",
    device: str = "auto",
    num_gpus: float = 0.0,
    graph: bool = True,
    whole_train_error: bool = False,
    until: float = math.inf,
    console: Console | None = None,
    **settings: Unpack[Settings],
) -> Outcome:
    """Trains the cells that the file does not contain yet; an interrupted sweep resumes where it stopped.

    Each cell trains on one thread, with the same numbers for any number of jobs and interruptions. Those of a GPU
    equal those of the CPU within rounding, so that a file holds numbers of one kind of device only.

    Args:
        out: The SQLite file.
        jobs: Number of cells trained in parallel; by default one per CPU or GPU of this machine, or as Ray's
            cluster has room.
        engine: ``"local"`` (processes on this machine) or ``"ray"``, see `gradprobe.experiments.sweep.ray_engine`.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"`` for a GPU if torch sees one, or Ray reserves one, and otherwise the
            CPU.
        graph: Capture the training step as a CUDA graph, on a GPU.
        num_gpus: GPUs that Ray reserves for each cell.
        whole_train_error: Evaluate the whole training set after every epoch still to be trained, not only before the
            first step and after the last one.
        until: When no further epoch begins, as a value of ``time.time()``; cells that are not trained by then stay
            pending. By default, all are trained.
        console: Console for the progress bar, or for a line per epoch if it is not a terminal; None shows nothing.
        **settings: Data, networks and training, for `plan`; they are stored with the results.

    Returns:
        The file, and whether all cells have ended in time.

    Raises:
        ArgumentError: An argument is not one of the values above; the message lists them.
        StoreError: The file cannot be used; see `gradprobe.experiments.sweep.store.start_run`.
        BackendError: The engine is not installed, or the device is missing.
        CellsFailed: Cells failed. The others are trained, as far as there was time.

    Source:
        He et al. 2015, section 4.2.
    """
    device = check_workers(jobs, engine, device, num_gpus)
    with one_thread():  # OpenMP's threads would not survive the fork
        planned = plan(**settings)
    dataset, recipe = planned.data, planned.recipe
    costs = {net: multiply_adds for net, (_, multiply_adds) in planned.nets.items()}
    asked = [(*net, seed) for net, seed in product(planned.nets, planned.seeds)]
    # Before the file is opened, since forked workers inherit it.
    workers: engines.Workers | Cluster = (
        engines.Workers(min(jobs or engines.default_jobs(device), len(asked)), dataset, device)
        if engine == "local"
        else Cluster(jobs, dataset, num_gpus)
    )
    with workers as started, start_run(out, _config(dataset, recipe, device), _metadata(planned)) as run:
        written_with = run.meta.get("torch_version", "of an unknown version")
        if written_with != torch.__version__:
            raise StoreError(
                f"{run.path}: written with torch {written_with}; torch {torch.__version__} would give different "
                "numbers. Use another --out."
            )
        run.add_cells([(*cell, planned.nets[cell[:2]][0]) for cell in asked])
        run.add_spec(planned.spec)
        cells = [cell for cell in run.cells() if (*cell.net, cell.seed) in set(asked)]
        for cell in cells:
            now = planned.nets[cell.net][0]
            if cell.parameters != now:
                raise StoreError(
                    f"{run.path}: {cell.name} has {cell.parameters:,} parameters in the file and {now:,} now. Use "
                    "another --out."
                )
        job_of = partial(
            engines.Job,
            data_spec=dataset.spec,
            recipe=recipe,
            whole_train_error=whole_train_error,
            device=device,
            graph=graph,
            progress_every_s=_PROGRESS_EVERY_S,
            until=until,
        )
        todo = [job_of(cell) for cell in cells if cell.status == "pending"]
        # The longest first, so that no long job runs alone at the end.
        todo.sort(key=lambda job: -costs[job.cell.net])
        checkpoint = partial(_checkpoint, run)
        results = (
            started.run(todo, checkpoint)
            if isinstance(started, Cluster)
            else engines.run_local(todo, started, checkpoint)
        )
        failures: list[tuple[engines.Job, engines.Failure]] = []
        with SweepProgress(console, run, cells, costs, recipe.epochs, min(len(started), len(todo))) as shown:
            for job, result in results:
                cell = job.cell
                if isinstance(result, engines.Failure):
                    failures.append((job, result))
                    run.record_failure(cell.id, result.message)
                    shown.failure(cell, result.message)
                elif isinstance(result, EpochProgress):
                    run.record_progress(cell.id, result.share)
                    shown.within_epoch(cell, result)
                else:
                    run.save(cell.id, result.epochs, result.layers, result.junctions, result.state, result.status)
                    shown.epoch(cell, result)
        failed = {job.cell.id for job, _ in failures}
        asked_ids = {cell.id for cell in cells}
        untried = [c for c in run.cells() if c.status == "pending" and c.id in asked_ids - failed]
        outcome = Outcome(run.path, is_late=bool(untried) and time.time() >= until)
        if failures:
            more = f" ({len(failures)} of {len(todo)} training runs failed)" if len(failures) > 1 else ""
            job, failure = failures[0]
            raise CellsFailed(f"{job.cell.title}: {failure.message}{more}", outcome) from WorkerTraceback(failure.trace)
        return outcome


def check_workers(jobs: int | None, engine: str, device: str, num_gpus: float = 0.0) -> str:
    """Checks what `sweep` takes besides its settings.

    Returns:
        The kind of device that cells train on, ``"cpu"`` or ``"cuda"``.

    Raises:
        ArgumentError: An argument is not one of the values that `sweep` lists.
        BackendError: The device is missing.
    """
    if jobs is not None and jobs < 1:
        raise ArgumentError(f"jobs: needed at least 1, got {jobs}")
    if engine not in engines.ENGINES:
        raise not_among("engine", engine, engines.ENGINES)
    if device not in DEVICES:
        raise ArgumentError(f"device: needed one of {', '.join(DEVICES)}, got {device!r}")
    if not (0 <= num_gpus <= 1 or (num_gpus > 1 and num_gpus.is_integer())):
        raise ArgumentError(f"num_gpus: needed a number from 0 to 1, or a whole number, got {num_gpus:g}")
    if engine == "local":
        if num_gpus:
            raise ArgumentError(f"num_gpus: needed engine ray, which reserves them, got engine {engine}")
        return resolve(device)
    kind = "cuda" if num_gpus else "cpu"  # of the cluster's machines, whatever is here
    if device not in ("auto", kind):
        raise ArgumentError(f"num_gpus: needed {'none' if num_gpus else 'some'} for device {device}, got {num_gpus:g}")
    return kind


def _checkpoint(run: RunWriter, cell_id: int) -> bytes | None:
    state = run.checkpoint(cell_id)
    if state is not None and not is_whole(state):
        raise StoreError(f"{run.path}: the file is damaged: the checkpoint of cell {cell_id} is not as it was saved")
    return state


def _unique(name: str, values: Sequence[T]) -> tuple[T, ...]:
    if not values:
        raise ArgumentError(f"{name}: needed at least one, got none")
    return tuple(dict.fromkeys(values))


def _nets(families: Sequence[str] | None, models: Sequence[str], norm: str | None, init: str | None) -> tuple[str, ...]:
    if families is None:
        families = () if models else tuple(networks.NORMALISED_FAMILIES)
    elif not models or families:
        families = _unique("families", families)
    for family in families:
        if family not in networks.FAMILIES:
            raise not_among("families", family, networks.FAMILIES, "one or more of")
    for name, value, allowed in (("norm", norm, networks.NORMS), ("init", init, networks.INITS)):
        if value is not None and value not in allowed:
            raise not_among(name, value, allowed)
        if value is not None and not set(families) & set(networks.NORMALISED_FAMILIES):
            raise ArgumentError(
                f"{name}: needed {' or '.join(networks.NORMALISED_FAMILIES)} among the families, got "
                f"{', '.join([*families, *models])} only"
            )
    for model in models:
        if not is_user_model(model):
            raise ArgumentError(f"model: needed MODULE:CALLABLE or FILE.py:CALLABLE, got {model!r}")
    return tuple(dict.fromkeys([*families, *models]))


def _recipe(
    epochs: int,
    batch_size: int,
    optimizer: str,
    lr: float | None,
    norm: str | None,
    init: str | None,
    precision: str,
) -> Recipe:
    if precision not in PRECISIONS:
        raise not_among("precision", precision, PRECISIONS)
    usual = optimizers.defaults(optimizer)
    rate = usual.learning_rate if lr is None else lr
    optimizers.check_learning_rate(rate)
    return Recipe(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=rate,
        momentum=usual.momentum,
        weight_decay=usual.weight_decay,
        warmup_learning_rate=rate / 10,
        optimizer=optimizer,
        norm=cast(networks.Norm, norm or "batch"),
        init=cast(networks.Init, init or "he"),
        precision=cast(Precision, precision),
    )


def _default_batch_size(data: Dataset) -> int:
    return 64 if data.name == "digits" else 128


def _config(data: Dataset, recipe: Recipe, device: str) -> dict[str, object]:
    return {
        "data": data.name,
        "data_sha256": data.sha256,
        "train_images": len(data.train_x),
        "test_images": len(data.test_x),
        "augmented": data.augmented,
        "image_size": data.spec.image_size,
        "per_class": data.spec.per_class,
        **asdict(recipe),
        "device": device,
    }


def _metadata(planned: Plan) -> dict[str, str]:
    return {
        "gradprobe_version": VERSION,
        "torch_version": torch.__version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "data_spec": planned.data.spec.source,
        "spec": planned.spec,
    }


def _size(family: str, depth: int, data: Dataset, recipe: Recipe) -> tuple[int, int]:
    """Returns a network's number of parameters, and its multiply-adds per image as a measure of an epoch's cost."""
    multiply_adds = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal multiply_adds
        multiply_adds += output.numel() * cast(Tensor, module.weight)[0].numel()

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = build(family, depth, data, recipe.norm, recipe.init)
        check(family, depth, model, data)
        make_optimizer(model, recipe)  # raises if it rejects the network's parameters
        for module in model.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
                module.register_forward_hook(count)
        model.eval()(data.train_x[:1])
    parameters = networks.count_parameters(model)
    return parameters, max(multiply_adds, parameters, 1)
