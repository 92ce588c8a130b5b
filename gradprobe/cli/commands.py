"""The command line: reads arguments, calls the library, prints. What a command needs is imported by that command."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar

import typer
from rich.console import Console, ConsoleRenderable, RenderableType
from rich.table import Table

from gradprobe.errors import ArgumentError, GradprobeError
from gradprobe.experiments import DEFAULT_EPOCHS, REMEDY_STEPS, STACK_STEPS

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")

# Columns of what is printed where there is no terminal to ask.
PLAIN_WIDTH = 120

app = typer.Typer(
    help="See what the gradients of deep networks do.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for a program.")]


@app.command()
def sweep(
    data: Annotated[
        str, typer.Option(help="digits, or cifar10:DIR with DIR the folder of the binary files.")
    ] = "digits",
    families: Annotated[str, typer.Option(help="Some of plain, resnet.")] = "plain,resnet",
    depths: Annotated[str, typer.Option(help="6n+2 (CIFAR layout) or 18, 34, 50, 101, 152 (ImageNet).")] = "20,56",
    seeds: Annotated[str, typer.Option(help="Whole numbers.")] = "0",
    epochs: Annotated[
        int, typer.Option(help="Passes over the training set; He et al. train for 164.")
    ] = DEFAULT_EPOCHS,
    batch_size: Annotated[
        int | None, typer.Option(help="Images per step.", show_default="64 for digits, else 128")
    ] = None,
    out: Annotated[Path, typer.Option(help="The SQLite file; one that is there is gone on with.")] = Path("run.sqlite"),
    jobs: Annotated[int | None, typer.Option(help="Nets that train at a time.", show_default="one per CPU")] = None,
    engine: Annotated[str, typer.Option(help="local (processes of this machine) or ray.")] = "local",
    as_json: Json = False,
) -> None:
    """Train every family at every depth with every seed, gradients watched; resumes by itself."""
    from gradprobe.experiments.sweep.run import sweep as run_sweep
    from gradprobe.experiments.sweep.store import open_run
    from gradprobe.report import terminal

    try:
        path = run_sweep(
            out=out,
            data=data,
            families=_listed("--families", families, str),
            depths=_listed("--depths", depths, int),
            seeds=_listed("--seeds", seeds, int),
            epochs=epochs,
            batch_size=batch_size,
            jobs=jobs,
            engine=engine,
            console=Console(stderr=True),
        )
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on where it was: {out}", file=sys.stderr)
        raise typer.Exit(130) from None
    with open_run(path) as run:
        if as_json:
            _print_json(terminal.as_dict(run))
            return
        cells = run.cells()
    done = sum(cell.status == "done" for cell in cells)
    diverged = sum(cell.status == "diverged" for cell in cells)
    more = f", {diverged} diverged" if diverged else ""
    print(f"{path}: {done} of {len(cells)} training runs done{more}; read it with: gradprobe report {path}")


@app.command()
def report(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.sqlite", help="What gradprobe sweep wrote.")],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the page with the charts.")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the tables.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the charts.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a sweep found, finished or not."""
    from gradprobe.experiments.sweep.store import open_run
    from gradprobe.report import terminal

    with open_run(run_file) as run:
        if as_json:
            _print_json(terminal.as_dict(run))
        else:
            _print(terminal.render(run))
        written: list[Path] = []
        if html is not None:
            written.append(_drawing("--html", "gradprobe.report.html").write(run, html))
        if csv is not None:
            written += terminal.write_csv(run, csv)
        if png is not None:
            written += _drawing("--png", "gradprobe.report.charts").write_png(run, png)
    for path in written:
        print(f"wrote {path}", file=sys.stderr)


@app.command()
def identity(
    seed: Annotated[int, typer.Option(help="Of weights, inputs and order of the images.")] = 0,
    depths: Annotated[str, typer.Option(help="A shallow and a deeper net, both 6n+2.")] = "20,56",
    epochs: Annotated[int, typer.Option(help="Passes over the digits; a third more afterwards.")] = DEFAULT_EPOCHS,
    steps: Annotated[int, typer.Option(help="Steps in which a stack learns y = x.")] = STACK_STEPS,
    as_json: Json = False,
) -> None:
    """Build the deep net that is as good as a shallow one, and see whether training finds it."""
    from gradprobe.experiments.identity.run import identity as run_identity

    result = run_identity(
        seed=seed,
        depths=_listed("--depths", depths, int),
        epochs=epochs,
        steps=steps,
        console=Console(stderr=True),
    )
    _show(result, as_json)


@app.command()
def remedies(
    layers: Annotated[str, typer.Option(help="linear, or conv, which takes several times as long.")] = "linear",
    remedies: Annotated[
        str | None,
        typer.Option(
            help="Some of none, clipping, xavier, he, batchnorm, layernorm, groupnorm, residual; together as in "
            "he+residual.",
            show_default="each, and some together",
        ),
    ] = None,
    depths: Annotated[str, typer.Option(help="Weight layers, at least 2.")] = "20,50",
    activations: Annotated[str, typer.Option(help="Some of sigmoid, tanh, relu.")] = "sigmoid,tanh,relu",
    seeds: Annotated[str, typer.Option(help="Whole numbers.")] = "0,1",
    steps: Annotated[int, typer.Option(help="Steps for which each net trains.")] = REMEDY_STEPS,
    chart: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it: a .html, .svg or .png.")] = None,
    as_json: Json = False,
) -> None:
    """Compare remedies for vanishing and exploding gradients, by depth and activation; a minute or two."""
    from gradprobe.experiments.remedies.run import REMEDIES
    from gradprobe.experiments.remedies.run import remedies as run_remedies

    drawing = None if chart is None else _drawing("--chart", "gradprobe.report.remedies")
    if drawing is not None:
        drawing.check_suffix(chart)
    result = run_remedies(
        layers=layers,
        remedies=REMEDIES if remedies is None else _listed("--remedies", remedies, str),
        depths=_listed("--depths", depths, int),
        activations=_listed("--activations", activations, str),
        seeds=_listed("--seeds", seeds, int),
        steps=steps,
        console=Console(stderr=True),
    )
    _show(result, as_json)
    if drawing is not None:
        path = drawing.write_remedies(result.cells, len(result.seeds), result.conclusions, chart)
        print(f"wrote {path}", file=sys.stderr)


@app.command()
def check(
    target: Annotated[
        str, typer.Argument(metavar="MODULE:CALLABLE", help="Or FILE.py:CALLABLE; CALLABLE may have literal arguments.")
    ],
    inputs: Annotated[
        list[str], typer.Option("--input", help="3,32,32 or int64[0:1000]:16; once for each input of the model.")
    ],
    batch: Annotated[int, typer.Option(help="Examples in the batch.")] = 1,
    as_json: Json = False,
) -> None:
    """Send one batch through a model and back: does a gradient arrive at every layer? Exit 1 if something is wrong.

    Example: gradprobe check 'gradprobe.networks:deep_cnn(50)' --input 3,32,32
    """
    from gradprobe.probe.check import check_gradient_flow, parse_input

    specs = [parse_input(text) for text in inputs]
    flow = check_gradient_flow(_model(target), specs, batch_size=batch)
    _show(flow, as_json)
    raise typer.Exit(1 if flow.findings else 0)


@app.command()
def explain(
    topic: Annotated[str | None, typer.Argument(metavar="TOPIC", help="Left out: lists what there is.")] = None,
    as_json: Json = False,
) -> None:
    """Explain a problem of deep networks: its cause, its remedies, and how to see it here."""
    from gradprobe.cli.topics import TOPICS
    from gradprobe.cli.topics import explain as find

    topics = list(TOPICS.values()) if topic is None else [find(topic)]
    if as_json:
        _print_json([one.as_dict() for one in topics] if topic is None else topics[0].as_dict())
        return
    if topic is not None:
        _print(topics[0])
        return
    table = Table("topic", "what happens", title="gradprobe explain TOPIC", title_justify="left")
    for one in topics:
        table.add_row(one.name, one.problem)
    _print(table)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed and works here, and what it costs where something does not."""
    from gradprobe.cli.doctor import doctor as examine

    diagnosis = examine()
    _show(diagnosis, as_json)


def main() -> None:
    """Runs the command line; an error of ours is one line on stderr and exit status 2."""
    try:
        app()
    except GradprobeError as error:
        print(f"gradprobe: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


class _Result(ConsoleRenderable, Protocol):
    def as_dict(self) -> Mapping[str, object]: ...


def _show(result: _Result, as_json: bool) -> None:
    if as_json:
        _print_json(result.as_dict())
    else:
        _print(result)


def _print(renderable: RenderableType) -> None:
    Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(renderable)


def _print_json(value: object) -> None:
    from gradprobe.snapshot.export import strict

    print(json.dumps(strict(value), indent=2, allow_nan=False))


def _drawing(option: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise GradprobeError(f"{option}: {error.name} is not installed; pip install 'gradprobe[report]'") from error


def _listed(option: str, text: str, read: Callable[[str], T]) -> list[T]:
    """Reads ``a,b,c``."""
    kind = "whole numbers" if read is int else "names"
    try:
        values = [read(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ArgumentError(f"{option}: needed {kind} with commas between, got {text!r}") from error
    if not values:
        raise ArgumentError(f"{option}: needed {kind} with commas between, got {text!r}")
    return values


def _model(target: str) -> nn.Module:
    """Makes the model that ``MODULE:CALLABLE`` names, from torch's seed 0, so that a check can be repeated."""
    import torch
    from torch import nn

    place, separator, call = target.partition(":")
    if not (place and separator and call.strip()):
        raise ArgumentError(f"target: needed MODULE:CALLABLE or FILE.py:CALLABLE, got {target!r}")
    names, arguments, keywords = _parse_call(target, call)
    torch.manual_seed(0)
    found: Any = _import(target, place)
    for name in names:
        if not hasattr(found, name):
            raise ArgumentError(f"target: {place} has no {'.'.join(names)}; got {target!r}")
        found = getattr(found, name)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise ArgumentError(f"target: {target} is a {type(found).__name__}; needed a model or what makes one")
        found = _theirs(target, lambda: found(*arguments, **keywords))
    if not isinstance(found, nn.Module):
        raise ArgumentError(f"target: {target} gave a {type(found).__name__}; needed a torch.nn.Module")
    return found


def _parse_call(target: str, call: str) -> tuple[list[str], list[Any], dict[str, Any]]:
    """Takes ``a.b(1, c=2)`` apart without running any of it."""
    try:
        node = ast.parse(call.strip(), mode="eval").body
        arguments: list[Any] = []
        keywords: dict[str, Any] = {}
        if isinstance(node, ast.Call):
            arguments = [ast.literal_eval(argument) for argument in node.args]
            keywords = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords if k.arg is not None}
            if len(keywords) < len(node.keywords):
                raise ValueError("** is no literal")
            node = node.func
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            raise ValueError("no name")
    except (SyntaxError, ValueError) as error:
        raise ArgumentError(
            f"target: needed a name, with literal arguments if any, got {call!r} in {target!r}"
        ) from error
    return [node.id, *names], arguments, keywords


def _import(target: str, place: str) -> ModuleType:
    if not place.endswith(".py"):
        # A console script does not look for modules in the working folder by itself.
        sys.path.insert(0, "")
        return _theirs(target, lambda: importlib.import_module(place))
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise ArgumentError(f"target: there is no file {place}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ArgumentError(f"target: {place} cannot be loaded as a module")
    module = importlib.util.module_from_spec(spec)
    loader = spec.loader
    sys.path.insert(0, str(path.parent))
    sys.modules[path.stem] = module
    _theirs(target, lambda: loader.exec_module(module))
    return module


def _theirs(target: str, run: Callable[[], T]) -> T:
    """Runs code that is not ours; what it raises becomes one line that says so."""
    try:
        return run()
    except GradprobeError:
        raise
    except Exception as error:
        raise ArgumentError(f"target: {target} raised {type(error).__name__}: {error}") from error
