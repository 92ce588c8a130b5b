"""The commands: each reads its arguments, calls the library and prints. Imports inside commands keep start-up fast."""

from __future__ import annotations

import contextlib
import io
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.table import Table

from gradprobe.cli.exit_status import CRASHED, FAILED, FOUND
from gradprobe.cli.groups import Commands
from gradprobe.cli.options import Json, listed
from gradprobe.cli.output import drawing_module, print_error, print_json, print_table, show
from gradprobe.cli.sweep import sweep
from gradprobe.cli.target import load_model
from gradprobe.errors import ArgumentError, GradprobeError, printable
from gradprobe.experiments import DEFAULT_EPOCHS, REMEDY_STEPS, STACK_STEPS
from gradprobe.version import VERSION

# Where the default in code is None, the help names the real one, as \[default: 1]: `show_default` adds parentheses.
app = typer.Typer(
    cls=Commands,
    help="Measure and diagnose the gradients of deep networks.\n\nExample: gradprobe sweep --depths 8,14 --epochs 2",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",  # not the default of older versions of typer
)
app.command()(sweep)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"gradprobe {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Takes the options in front of a command."""


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write; if it exists, runs are added to it.")],
    parts: Annotated[list[Path], typer.Argument(metavar="PART...", help="Files written by gradprobe sweep.")],
) -> None:
    """Join the files of sweeps that trained parts of the same grid, as on several machines.

    Example: gradprobe merge run.sqlite part-0.sqlite part-1.sqlite
    """
    from gradprobe.experiments.sweep.merge import merge as merge_files
    from gradprobe.experiments.sweep.store import open_run
    from gradprobe.report.formatting import runs_done

    with open_run(merge_files(out, parts)) as run:
        print(f"{printable(str(out))}: {runs_done(run.cells())}")


@app.command()
def report(
    run_file: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A file written by gradprobe sweep, or the log_dir of a probe."),
    ],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write an HTML page with the charts.")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the tables as CSV files.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the charts as PNG files.")] = None,
    as_json: Json = False,
) -> None:
    """Show the results of a sweep, or what a probe has logged of a training, finished or not.

    Example: gradprobe report run.sqlite --html report.html
    """
    from gradprobe.cli.logged import needed_kind

    if needed_kind(run_file) == "training":
        _report_training(run_file, html, csv, png, as_json)
        return
    from gradprobe.experiments.sweep.store import open_run
    from gradprobe.report import export, terminal

    with open_run(run_file) as run:
        if as_json:
            print_json(export.as_dict(run))
        else:
            print_table(terminal.render(run))
        written: list[Path] = []
        if html is not None:
            written.append(drawing_module("--html", "gradprobe.report.html").write(run, html))
        if csv is not None:
            written += export.write_csv(run, csv)
        if png is not None:
            written += drawing_module("--png", "gradprobe.report.sweep_charts").write_png(run, png)
    for path in written:
        print(f"wrote {printable(str(path))}", file=sys.stderr)


def _report_training(folder: Path, html: Path | None, csv: Path | None, png: Path | None, as_json: bool) -> None:
    from gradprobe.cli.logged import LoggedRun

    logged = LoggedRun.read(folder)
    if csv is not None:
        raise ArgumentError(f"--csv: {folder} holds tables already; docs/run_folder.md lists them")
    if as_json:
        print_json(logged.diagnosis.to_dict())
    else:
        print_table(logged.diagnosis)
    written: list[Path] = []
    if html is not None:
        page = drawing_module("--html", "gradprobe.report.run_page")
        written.append(page.write(logged.snapshots, logged.diagnosis, html))
    if png is not None:
        charts = drawing_module("--png", "gradprobe.report.run_charts")
        written += charts.write_images(logged.snapshots, logged.diagnosis, png)
    for path in written:
        print(f"wrote {printable(str(path))}", file=sys.stderr)


@app.command()
def diagnose(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The log_dir of a probe; it may still be written.")],
    as_json: Json = False,
) -> None:
    """Diagnose a training from what a probe has logged of it.

    The exit status is 0 if nothing is wrong, 1 if there are findings, 2 for bad arguments, 3 for a crash.

    Example: gradprobe diagnose runs/a
    """
    from gradprobe.cli.logged import LoggedRun

    diagnosis = LoggedRun.read(run).diagnosis
    if as_json:
        print_json(diagnosis.to_dict())
    else:
        print_table(diagnosis)
    raise typer.Exit(FOUND if diagnosis else 0)


@app.command()
def watch(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="The log_dir of a probe, or the file of a sweep; it need not exist yet."),
    ],
    once: Annotated[bool, typer.Option("--once", help="Print the present state and end.")] = False,
    every: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help=r"Time between two looks. \[default: 1, or 10 if there is no terminal]"),
    ] = None,
) -> None:
    """Follow a training or a sweep until it ends: a screen in a terminal, lines elsewhere.

    The exit status is 0, also after Ctrl-C, 2 for bad arguments, 3 for a crash.

    Example: gradprobe watch runs/a
    """
    from gradprobe.cli.watch import watch as follow

    follow(run, once, every)


@app.command()
def compare(
    a: Annotated[
        Path, typer.Argument(metavar="A", help="The log_dir of a probe, which may still be written, or a sweep's file.")
    ],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one of the same kind.")],
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write an HTML page with the charts of two trainings.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Name the first step at which two runs differ, bit for bit and by more than rounding, and what differs there.

    The exit status is 0 if all that both runs recorded is equal, 1 if not, 2 for bad arguments, 3 for a crash.

    Example: gradprobe compare runs/a runs/b --html compare.html
    """
    from gradprobe.cli.logged import compare_paths
    from gradprobe.report.comparison.output import ComparisonView

    found = compare_paths(a, b)
    if html is not None and not isinstance(found, ComparisonView):
        raise ArgumentError("--html: needed two run folders, got the files of two sweeps")
    show(found, as_json)
    if html is not None:
        path = drawing_module("--html", "gradprobe.report.comparison.page").write(found, html)
        print(f"wrote {printable(str(path))}", file=sys.stderr)
    raise typer.Exit(0 if found.equal else FOUND)


@app.command()
def identity(
    seed: Annotated[int, typer.Option(help="Seed of the weights, the inputs and the order of the images.")] = 0,
    depths: Annotated[str, typer.Option(help="A shallow and a deeper network, comma-separated, both 6n+2.")] = "20,56",
    epochs: Annotated[
        int, typer.Option(help="Passes over the digits; the constructed network gets a third more.")
    ] = DEFAULT_EPOCHS,
    steps: Annotated[int, typer.Option(help="Training steps in which a stack of layers learns y = x.")] = STACK_STEPS,
    as_json: Json = False,
) -> None:
    """Build a deep network equivalent to a shallow one, and test whether training can match it.

    Example: gradprobe identity --depths 20,56 --epochs 20
    """
    from gradprobe.experiments.identity.run import identity as run_identity

    result = run_identity(
        seed=seed,
        depths=listed("--depths", depths, int),
        epochs=epochs,
        steps=steps,
        console=Console(stderr=True),
    )
    show(result, as_json)


@app.command()
def remedies(
    layers: Annotated[str, typer.Option(help="linear, or conv, which is several times slower.")] = "linear",
    remedies: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: none, clipping, xavier, he, orthogonal, batchnorm, layernorm, groupnorm, residual, "
            "fixup, skipinit, rezero, layerscale; combine them with +, as in he+residual. "
            r"\[default: each alone, and some combinations]",
        ),
    ] = None,
    depths: Annotated[str, typer.Option(help="Comma-separated numbers of weight layers, each at least 2.")] = "20,50",
    activations: Annotated[str, typer.Option(help="Comma-separated: sigmoid, tanh, relu.")] = "sigmoid,tanh,relu",
    seeds: Annotated[str, typer.Option(help="Comma-separated whole numbers.")] = "0,1",
    steps: Annotated[int, typer.Option(help="Training steps per network.")] = REMEDY_STEPS,
    chart: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw a chart to a .html, .svg or .png file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare remedies for vanishing and exploding gradients by depth and activation; takes a minute or two.

    Example: gradprobe remedies --remedies none,he,residual,he+residual --depths 20,50
    """
    from gradprobe.experiments.remedies.run import REMEDIES
    from gradprobe.experiments.remedies.run import remedies as run_remedies

    drawing = None if chart is None else drawing_module("--chart", "gradprobe.report.remedies_chart")
    if drawing is not None:
        drawing.check_suffix(chart)
    result = run_remedies(
        layers=layers,
        remedies=REMEDIES if remedies is None else listed("--remedies", remedies, str),
        depths=listed("--depths", depths, int),
        activations=listed("--activations", activations, str),
        seeds=listed("--seeds", seeds, int),
        steps=steps,
        console=Console(stderr=True),
    )
    show(result, as_json)
    if drawing is not None:
        path = drawing.write_remedies(result.cells, len(result.seeds), result.conclusions, chart)
        print(f"wrote {printable(str(path))}", file=sys.stderr)


@app.command()
def check(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:CALLABLE",
            help="The model, or a function or class that returns it, with literal arguments if any; also "
            "FILE.py:CALLABLE.",
        ),
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="SHAPE",
            help="Random input: shape of one example, as 3,32,32, or int64[0:1000]:16 for 16 integers below 1000. "
            "Repeat it for each input of the model.",
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:CALLABLE",
            help="Instead: a function that returns a real batch. A tuple holds positional arguments, a dict keyword "
            "arguments; or it returns (batch, loss), where loss is a function of the model's output.",
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help=r"Examples in a random batch. \[default: 1]")] = None,
    as_json: Json = False,
) -> None:
    """Check the gradient at every layer of a model with one batch.

    The exit status is 0 if the model is healthy, 1 if it is not, 2 for bad arguments, 3 for a crash.

    Example: gradprobe check 'gradprobe.networks:deep_cnn(50)' --input 3,32,32

    Example: gradprobe check train.py:model --batch train.py:batch
    """
    from gradprobe.cli.target import load_batch
    from gradprobe.probe.check import check_gradient_flow, parse_input

    if batch is not None and batch.strip().lstrip("+-").isdigit():
        raise ArgumentError(
            f"--batch: needed MODULE:CALLABLE, got {batch!r}; for the number of examples use --batch-size {batch}"
        )
    if bool(inputs) == (batch is not None):
        raise ArgumentError(f"--input: needed --input or --batch, got {'both' if inputs else 'neither'}")
    if batch is not None and batch_size is not None:
        raise ArgumentError("--batch-size: needed --input, whose batch is random; --batch brings its own examples")
    with contextlib.redirect_stdout(sys.stderr):  # what the model prints is no part of the result
        if batch is None:
            specs = [parse_input(text) for text in inputs or ()]
            size = 1 if batch_size is None else batch_size
            flow = check_gradient_flow(load_model(target), specs, batch_size=size)
        else:
            model = load_model(target)
            given, loss = load_batch(batch)
            flow = check_gradient_flow(model, inputs=given, loss=loss)
    show(flow, as_json)
    raise typer.Exit(FOUND if flow.findings else 0)


@app.command()
def explain(
    topic: Annotated[
        str | None, typer.Argument(metavar="TOPIC", help="A topic, e.g. dead-relu; leave it out to list all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Explain a problem of deep networks: its cause, its remedies, and how gradprobe shows it.

    Example: gradprobe explain vanishing
    """
    from gradprobe.cli.topics import TOPICS
    from gradprobe.cli.topics import explain as find

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DeprecationWarning)
        topics = tuple(TOPICS.values()) if topic is None else find(topic)
    for warning in caught:
        print(f"gradprobe: {warning.message}", file=sys.stderr)
    if as_json:
        found = [one.as_dict() for one in topics]
        print_json(found if topic is None or len(found) > 1 else found[0])
    elif topic is not None:
        print_table(Group(*topics))
    else:
        table = Table("topic", "what happens", title="gradprobe explain TOPIC", title_justify="left")
        for one in topics:
            table.add_row(one.name, one.summary)
        print_table(table)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show which parts of gradprobe work on this machine, and what you lose without the others.

    Example: gradprobe doctor --json
    """
    from gradprobe.cli.doctor import doctor as examine

    show(examine(), as_json)


def main() -> None:
    """Runs the command line; a `GradprobeError` becomes one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may not know the characters of a table
    try:
        app()
    except GradprobeError as error:
        print_error(error)
        sys.exit(FAILED)
    except Exception as error:  # noqa: BLE001
        traceback.print_exception(error)
        is_ours = Path(__file__).parents[1] in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parents
        what = printable(f"{type(error).__name__}: {' '.join(str(error).split())}")
        print(
            f"gradprobe: {'crashed, which is a fault of gradprobe' if is_ours else 'raised'}: {what}", file=sys.stderr
        )
        sys.exit(CRASHED)
