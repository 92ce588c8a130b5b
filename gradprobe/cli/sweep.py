"""The command ``gradprobe sweep``: its options, and those that a spec file gives."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console

from gradprobe.cli.exit_status import FAILED, INTERRUPTED, TERMINATED, TIMED_OUT
from gradprobe.cli.options import Json, listed
from gradprobe.cli.output import print_error, print_json, show
from gradprobe.cli.signals import Terminated, raises_on_sigterm
from gradprobe.errors import ArgumentError, printable
from gradprobe.experiments import DEFAULT_EPOCHS

if TYPE_CHECKING:
    from gradprobe.experiments.sweep.estimate import DryRun
    from gradprobe.experiments.sweep.spec import Settings


def sweep(
    context: typer.Context,
    spec: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Take all settings from a TOML file, or from the results of an earlier sweep; options given here "
            "replace the file's, and another optimizer drops the file's lr. The keys are the names of these options "
            "with _ for -, and families, models.",
        ),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="digits, cifar10:DIR, cifar100:DIR (the binary versions), imagefolder:DIR, hf:NAME_OR_PATH, or "
            "npz:FILE."
        ),
    ] = "digits",
    image_size: Annotated[int | None, typer.Option(help="Scale images to this height and width.")] = None,
    per_class: Annotated[
        int | None, typer.Option(help="Use at most this many training images of each class, and test images.")
    ] = None,
    augment: Annotated[
        bool | None,
        typer.Option("--augment/--no-augment", help=r"Crop and flip training images at random. \[default: CIFAR only]"),
    ] = None,
    families: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: plain, resnet; fixup, skipinit, rezero, layerscale (without normalisation); "
            r"transformer-pre, transformer-post, transformer-plain. \[default: plain,resnet, or none with --model]",
        ),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="TARGET",
            help="MODULE:CALLABLE or FILE.py:CALLABLE, a function or class that builds your network of a given depth, "
            "with literal arguments if any, as in my:net(width=32). Repeat it for several networks.",
        ),
    ] = None,
    depths: Annotated[
        str,
        typer.Option(
            help="Comma-separated: 6n+2 (CIFAR layout), of plain and resnet also 18, 34, 50, 101, 152 (ImageNet "
            "layout); of transformers, an even number of sublayers; of --model, any."
        ),
    ] = "20,56",
    seeds: Annotated[str, typer.Option(help="Comma-separated whole numbers; comparisons need at least two.")] = "0,1,2",
    epochs: Annotated[int, typer.Option(help="Passes over the training set (He et al. use 164).")] = DEFAULT_EPOCHS,
    batch_size: Annotated[
        int | None, typer.Option(help=r"Images per step. \[default: 64 for digits, else 128]")
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="A class of torch.optim, with options if any: sgd, adamw, adamw(weight_decay=0.1).")
    ] = "sgd",
    lr: Annotated[
        float | None, typer.Option(help=r"Initial learning rate. \[default: 0.1 for sgd, else the optimizer's own]")
    ] = None,
    norm: Annotated[str | None, typer.Option(help=r"batch or none; for plain and resnet. \[default: batch]")] = None,
    init: Annotated[
        str | None,
        typer.Option(help=r"he, xavier, orthogonal or default; for plain and resnet. \[default: he]"),
    ] = None,
    precision: Annotated[str, typer.Option(help="float32, or bfloat16 by autocast.")] = "float32",
    out: Annotated[
        Path, typer.Option(help="SQLite file for the results; if the file exists, the sweep resumes.")
    ] = Path("run.sqlite"),
    jobs: Annotated[
        int | None, typer.Option(help=r"Networks trained in parallel. \[default: one per CPU or GPU]")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local (processes on this machine), or ray (the cluster of RAY_ADDRESS).")
    ] = "local",
    num_gpus: Annotated[float, typer.Option(help="GPUs that ray reserves for each training run.")] = 0.0,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, or auto for a GPU if there is one; with ray, if --num-gpus reserves one.")
    ] = "auto",
    graph: Annotated[
        bool, typer.Option("--graph/--no-graph", help="Capture the training step as a CUDA graph, on a GPU.")
    ] = True,
    whole_train_error: Annotated[
        bool,
        typer.Option(
            "--whole-train-error", help="Evaluate the whole training set after each epoch, not only the last."
        ),
    ] = False,
    max_hours: Annotated[
        float | None,
        typer.Option(help=r"Begin no epoch after this time; the same command resumes. \[default: no limit]"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list the training runs, with their parameters, time and memory.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train networks of every family, depth and seed while measuring their gradients.

    Example: gradprobe sweep --families plain,resnet --depths 20,56 --seeds 0,1,2 --out run.sqlite

    Example: gradprobe sweep --model my:net --depths 4,8,16 --data npz:f.npz --optimizer adamw --lr 1e-3

    Example: gradprobe sweep --spec sweep.toml --dry-run
    """
    from gradprobe.experiments.sweep.run import CellsFailed, check_workers
    from gradprobe.experiments.sweep.run import sweep as run_sweep
    from gradprobe.experiments.sweep.spec import read_specs, replaced
    from gradprobe.experiments.sweep.store import open_run
    from gradprobe.report import export
    from gradprobe.report.formatting import runs_done

    options: Settings = {
        "data": data,
        "image_size": image_size,
        "per_class": per_class,
        "augment": augment,
        "families": None if families is None else listed("--families", families, str),
        "models": models or (),
        "depths": listed("--depths", depths, int),
        "seeds": listed("--seeds", seeds, int),
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "lr": lr,
        "norm": norm,
        "init": init,
        "precision": precision,
    }
    grids = [options] if spec is None else [replaced(one, _given(context, options)) for one in read_specs(spec)]
    found = check_workers(jobs, engine, device, num_gpus)
    if max_hours is not None and not max_hours > 0:
        raise ArgumentError(f"--max-hours: needed a number above 0, got {max_hours}")
    if dry_run:
        show(_dry_run(grids, jobs, whole_train_error, found if engine == "local" else "cpu"), as_json)
        return
    until = math.inf if max_hours is None else time.time() + 3600 * max_hours
    has_failed = is_late = False
    try:
        with raises_on_sigterm():
            for grid in grids:
                try:
                    outcome = run_sweep(
                        out=out,
                        jobs=jobs,
                        engine=engine,
                        device=device,
                        graph=graph,
                        num_gpus=num_gpus,
                        whole_train_error=whole_train_error,
                        until=until,
                        console=Console(stderr=True),
                        **grid,
                    )
                except CellsFailed as error:
                    has_failed = True
                    outcome = error.outcome
                    print_error(error)
                is_late |= outcome.is_late
    except (KeyboardInterrupt, Terminated) as stop:
        print(f"stopped; run the same command again to resume {printable(str(out))}", file=sys.stderr)
        raise typer.Exit(TERMINATED if isinstance(stop, Terminated) else INTERRUPTED) from None
    with open_run(out) as run:
        cells = run.cells()
        if as_json:
            print_json(export.as_dict(run))
    name = printable(str(out))
    if is_late:
        print(f"stopped by --max-hours; run the same command again to resume {name}", file=sys.stderr)
        raise typer.Exit(TIMED_OUT)
    if has_failed:
        raise typer.Exit(FAILED)
    if as_json:
        return
    print(f"{name}: {runs_done(cells)}; read it with: gradprobe report {name}")


def _given(context: typer.Context, options: Settings) -> Settings:
    """Returns those options that are on the command line."""
    sources = {name: context.get_parameter_source(name) for name in options}
    stated = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
    return cast("Settings", {name: value for name, value in options.items() if name in stated})


def _dry_run(grids: Sequence[Settings], jobs: int | None, whole_train_error: bool, device: str) -> DryRun:
    from gradprobe.experiments.sweep.engines import default_jobs
    from gradprobe.experiments.sweep.estimate import estimate
    from gradprobe.experiments.sweep.run import plan

    return estimate([plan(**grid) for grid in grids], jobs or default_jobs(device), whole_train_error, device)
