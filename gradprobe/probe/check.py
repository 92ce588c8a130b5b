"""Sends one batch through a model and back, and reports the gradient that reaches each layer."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import nn

from gradprobe.diagnosis.depth import layer_status
from gradprobe.diagnosis.diagnose import Verdict, diagnose, verdict
from gradprobe.diagnosis.finding import Finding
from gradprobe.errors import ArgumentError, GradprobeWarning, printable
from gradprobe.probe.probe import attach
from gradprobe.snapshot.snapshot import Snapshot

SEED = 0
BAR_WIDTH = 24
# Longest name, and longest message with names in it, that the table shows in full.
NAME_WIDTH = 60
MESSAGE_WIDTH = 500
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.complex64,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    )
}
_SPEC = re.compile(r"^(?:(?P<dtype>\w+)(?:\[(?P<low>-?\d+):(?P<high>-?\d+)\])?:)?(?P<shape>\d+(?:,\d+)*)?$")


@dataclass(frozen=True, slots=True)
class InputSpec:
    """A random input of a model.

    Attributes:
        shape: Shape of one example, without the batch.
        dtype: Floating dtypes are drawn from the standard normal distribution, integer ones uniformly.
        low: Smallest integer drawn.
        high: One more than the largest integer drawn.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    low: int = 0
    high: int = 2

    def draw(self, batch_size: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
        """Draws a batch, a tensor of shape [batch_size, *shape]."""
        shape = (batch_size, *self.shape)
        if self.dtype.is_floating_point or self.dtype.is_complex:
            return torch.randn(shape, generator=generator, dtype=self.dtype).to(device)
        return torch.randint(self.low, self.high, shape, generator=generator).to(device, self.dtype)


def parse_input(text: str) -> InputSpec:
    """Parses the description of an input.

    Args:
        text: `3,32,32` for float32 of that shape; `int64[0:1000]:16` for 16 integers from 0 to 999; `float64:3,8,8`.

    Returns:
        The input.

    Raises:
        ArgumentError: The text has another form.

    Example:
        >>> parse_input("int64[0:1000]:16")
        InputSpec(shape=(16,), dtype=torch.int64, low=0, high=1000)
    """
    match = _SPEC.match(text.replace(" ", ""))
    if match is None or not text.strip():
        raise ArgumentError(f"input: needed SHAPE, DTYPE:SHAPE or DTYPE[LOW:HIGH]:SHAPE, e.g. 3,32,32, got {text!r}")
    dtype = DTYPES.get(match["dtype"] or "float32")
    if dtype is None:
        raise ArgumentError(f"input: needed one of the dtypes {', '.join(DTYPES)}, got {match['dtype']!r} in {text!r}")
    shape = tuple(int(size) for size in match["shape"].split(",")) if match["shape"] else ()
    if match["low"] is None:
        return InputSpec(shape, dtype)
    low, high = int(match["low"]), int(match["high"])
    if dtype.is_floating_point or dtype.is_complex or low >= high:
        raise ArgumentError(f"input: [LOW:HIGH] needs an integer dtype and LOW < HIGH, got {text!r}")
    return InputSpec(shape, dtype, low, high)


@dataclass(frozen=True, slots=True)
class LayerFlow:
    """The gradient of one parameter.

    Attributes:
        depth: Position of its module in order of execution.
        name: Name of the parameter.
        norm: Euclidean norm.
        rms: Root of the mean square.
        abs_max: Largest magnitude.
        zero_fraction: Share of exact zeros.
        nonfinite: Number of NaN and infinite elements.
        numel: Number of elements.
        status: Verdict on this layer compared with the last one; "no gradient" if none arrived.
    """

    depth: int
    name: str
    norm: float
    rms: float
    abs_max: float
    zero_fraction: float
    nonfinite: int
    numel: int
    status: str


@dataclass(frozen=True, slots=True)
class FlowReport:
    """The result of `check_gradient_flow`. Prints as a table.

    Attributes:
        model: Class name of the model.
        layers: Parameters in order of execution.
        findings: What is wrong.
        verdict: The most severe rule that fired, such as "vanishing" or "exploding", or "healthy". For an untrained
            model, the verdict at initialisation.
        snapshot: The measurement.
    """

    model: str
    layers: tuple[LayerFlow, ...]
    findings: tuple[Finding, ...]
    verdict: Verdict
    snapshot: Snapshot

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as plain data. NaN and infinity stay Python floats."""
        return {
            "model": self.model,
            "verdict": self.verdict,
            "layers": [asdict(layer) for layer in self.layers],
            "findings": [asdict(finding) for finding in self.findings],
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title = Text(f"Gradient flow through {printable(self.model, NAME_WIDTH)}", style="table.title")
        table = Table(title=title, title_justify="left", caption_justify="left")
        table.add_column("depth", justify="right")
        table.add_column("parameter", overflow="fold")
        table.add_column("norm", justify="right")
        table.add_column("RMS", justify="right")
        table.add_column(f"log10 RMS, {_bar_range(self.layers)}", min_width=BAR_WIDTH, no_wrap=True)
        table.add_column("status")
        for layer in self.layers:
            style = "green" if layer.status == "healthy" else "bold red"
            table.add_row(
                str(layer.depth),
                Text(printable(layer.name, NAME_WIDTH)),
                f"{layer.norm:.2e}",
                f"{layer.rms:.2e}",
                _bar(layer.rms, self.layers),
                Text(layer.status, style=style),
            )
        yield table
        yield f"verdict: {self.verdict}"
        for finding in self.findings:
            yield Text(f"  {printable(finding.message, MESSAGE_WIDTH)} (rule: {finding.source})")

    def __str__(self) -> str:
        console = Console(width=120, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def check_gradient_flow(
    model: nn.Module,
    input_shape: Sequence[int] | str | InputSpec | Sequence[str | InputSpec | Sequence[int]],
    *,
    batch_size: int = 1,
) -> FlowReport:
    """Sends one random batch forward and a random gradient back, and measures the gradient of each parameter.

    The loss is a fixed random projection of the outputs, divided by the root of their number. A plain sum would not do:
    a softmax or a normalisation at the end cancels its gradient. The model is left unchanged: weights, buffers,
    gradients, mode and random numbers.

    Args:
        model: Any module, measured in its present mode (train or eval).
        input_shape: Shape of one example without the batch, e.g. (3, 32, 32); or text for `parse_input`; or an
            `InputSpec`; or a sequence of these for several inputs.
        batch_size: Examples in the batch.

    Returns:
        The report.

    Raises:
        ArgumentError: An argument is invalid, the model cannot take such an input, or its output has no gradient.

    Source:
        Rules of AUTOTRAINER (Zhang et al., ICSE 2021).

    Example:
        >>> from gradprobe import networks
        >>> check_gradient_flow(networks.deep_cnn(50), (3, 32, 32)).verdict
        'vanishing'
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: needed a torch.nn.Module, got {type(model).__name__}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ArgumentError(f"batch_size: needed an integer of at least 1, got {batch_size!r}")
    specs = _specs(input_shape)
    tensor = next(iter((*model.parameters(), *model.buffers())), torch.empty(0))
    generator = torch.Generator().manual_seed(SEED)
    inputs = [spec.draw(batch_size, generator, tensor.device) for spec in specs]
    with _untouched(model), attach(model, activations=True, when="step") as probe, _execution_order(model) as order:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore", GradprobeWarning)  # the report itself lists what has no gradient
            torch.autograd.backward(_projection(_forward(model, inputs, batch_size), generator))
            probe.step()
        snapshot = probe.latest(wait=True)
        silent = probe.coverage().silent
    if snapshot is None:
        raise ArgumentError("model: no parameter received a gradient from the output")
    depths = [_depth(name, order) for name in snapshot.table.names]
    snapshot = snapshot.reordered(sorted(range(len(depths)), key=depths.__getitem__))
    return _report(model, snapshot, silent, order)


def _report(model: nn.Module, snapshot: Snapshot, silent: Sequence[str], order: Mapping[str, int]) -> FlowReport:
    # Weights, biases and scales differ in size and in role: each is compared with the last one of its role.
    last_norms = {_role(name, snapshot): snapshot[name].norm for name in snapshot}
    layers = []
    for name in snapshot.table.names:
        depth = _depth(name, order)
        if name in silent:
            layers.append(LayerFlow(depth, name, 0.0, 0.0, 0.0, 0.0, 0, 0, "no gradient"))
            continue
        site = snapshot[name]
        status = "non-finite" if site.nonfinite else layer_status(site.norm, last_norms[_role(name, snapshot)])
        layers.append(
            LayerFlow(
                depth, name, site.norm, site.rms, site.abs_max, site.zero_fraction, site.nonfinite, site.numel, status
            )
        )
    return FlowReport(type(model).__name__, tuple(layers), tuple(diagnose([snapshot])), verdict([snapshot]), snapshot)


def _specs(input_shape: Any) -> list[InputSpec]:
    if isinstance(input_shape, str):
        return [parse_input(input_shape)]
    if isinstance(input_shape, InputSpec):
        return [input_shape]
    if isinstance(input_shape, Sequence):
        if all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in input_shape):
            return [InputSpec(tuple(input_shape))]
        if not any(isinstance(size, (int, float)) for size in input_shape):
            return [spec for part in input_shape for spec in _specs(part)]
    raise ArgumentError(
        f"input_shape: needed sizes such as (3, 32, 32), text, an InputSpec or a sequence of these, got {input_shape!r}"
    )


def _forward(model: nn.Module, inputs: list[torch.Tensor], batch_size: int) -> Any:
    try:
        return model(*inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(f"{tuple(one.shape)} {str(one.dtype).removeprefix('torch.')}" for one in inputs)
        hint = ""
        if batch_size == 1 and "more than 1 value per channel" in str(error):
            hint = "; batch normalisation needs a batch_size of at least 2 here"
        reason = str(error).splitlines()[0]
        raise ArgumentError(
            f"input_shape: {type(model).__name__} cannot take inputs of shape {shapes}: {reason}{hint}"
        ) from error


def _projection(output: Any, generator: torch.Generator) -> torch.Tensor:
    terms = []
    for tensor in _tensors(output):
        if tensor.requires_grad and (tensor.is_floating_point() or tensor.is_complex()):
            direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor.device)
            values = tensor.real if tensor.is_complex() else tensor
            terms.append((values.float() * direction).sum() / math.sqrt(max(tensor.numel(), 1)))
    if not terms:
        raise ArgumentError("model: needed an output that depends on a trainable parameter; none of its outputs does")
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
    elif is_dataclass(output):
        yield from _tensors(vars(output))


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        for parameter, _ in gradients:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


@contextmanager
def _execution_order(model: nn.Module) -> Iterator[dict[str, int]]:
    order: dict[str, int] = {}

    def note(name: str, _module: nn.Module, _inputs: Any) -> None:
        order.setdefault(name, len(order))

    handles = [
        module.register_forward_pre_hook(partial(note, name))
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    try:
        yield order
    finally:
        for handle in handles:
            handle.remove()


def _role(site: str, snapshot: Snapshot) -> tuple[str, bool]:
    return site.rpartition(".")[2], snapshot.table.ndims[snapshot.table.index[site]] > 1


def _depth(site: str, order: Mapping[str, int]) -> int:
    return order.get(site.rpartition(".")[0], len(order))


def _bar_range(layers: Sequence[LayerFlow]) -> str:
    low, high = _log_range(layers)
    return f"{low} to {high}"


def _log_range(layers: Sequence[LayerFlow]) -> tuple[int, int]:
    logs = [math.log10(layer.rms) for layer in layers if 0 < layer.rms < math.inf]
    return (math.floor(min(logs)), math.floor(max(logs)) + 1) if logs else (0, 1)


def _bar(rms: float, layers: Sequence[LayerFlow]) -> str:
    low, high = _log_range(layers)
    if not 0 < rms < math.inf:
        return "" if rms == 0 else "?"
    return "█" * max(1, round(BAR_WIDTH * (math.log10(rms) - low) / (high - low)))
