"""Sends one batch through a model and back, and reports the gradient that reaches each layer."""

from __future__ import annotations

import math
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradprobe.diagnosis.causes import causes_first
from gradprobe.diagnosis.depth import Flow, flow_verdict, weight_norms
from gradprobe.diagnosis.diagnose import diagnose, most_severe
from gradprobe.diagnosis.finding import Finding
from gradprobe.diagnosis.rules import RULES
from gradprobe.errors import ArgumentError, GradprobeWarning
from gradprobe.probe.flow.gates import Gate, blocked_by, find_gates, opened
from gradprobe.probe.flow.graph import LossGraph
from gradprobe.probe.flow.inputs import (
    MODELS_LOSS,
    Batch,
    InputSpec,
    Loss,
    given_batch,
    parse_input,
    random_batch,
    scalar_loss,
)
from gradprobe.probe.flow.report import FlowReport, LayerFlow
from gradprobe.probe.flow.trunk import Outputs, TrunkPoint, trunks
from gradprobe.probe.flow.verdict import flow_along, flow_finding, layer_statuses
from gradprobe.probe.probe import attach
from gradprobe.snapshot.snapshot import Snapshot
from gradprobe.text.words import quoted

__all__ = ["FlowReport", "InputSpec", "LayerFlow", "check_gradient_flow", "parse_input"]

SEED = 0
# A bias whose gradient is this much smaller than that of its layer's output cancels in the sum over the batch.
_CANCELS = 1e-4


def check_gradient_flow(
    model: nn.Module,
    input_shape: Sequence[int] | str | InputSpec | Sequence[str | InputSpec | Sequence[int]] | None = None,
    *,
    inputs: Any = None,
    loss: Loss | None = None,
    batch_size: int = 1,
) -> FlowReport:
    """Sends one batch forward and its gradient back, and judges whether the gradient reaches the first layers.

    The verdict compares how much the loss depends on the first and on the last output of a module along the trunk: the
    outputs that all of the gradient has to pass. docs/check.md describes it. The parameters are listed in the order in
    which the forward pass uses them. The model is left unchanged: weights, buffers, gradients, mode and random numbers.
    A compiled model runs without its compiled code.

    Args:
        model: Any module, measured in its present mode (train or eval).
        input_shape: For random inputs: shape of one example without the batch, e.g. (3, 32, 32); or text for
            `parse_input`; or an `InputSpec`; or a sequence of these for several inputs.
        inputs: Instead, a batch of your own. A tuple holds positional arguments, a mapping keyword arguments (such as
            the BatchEncoding of a tokenizer); anything else, such as a tensor, a list or a batch of graphs, is the only
            argument. It has to be on the model's device.
        loss: Function of the model's output that returns a scalar tensor. Without it, the output's own `.loss` is used
            if there is one (transformers computes it if the batch has labels); or else a fixed random projection of
            all outputs, divided by the root of their number. A plain sum would not do: a softmax or a normalisation at
            the end cancels its gradient.
        batch_size: Examples in a random batch.

    Returns:
        The report.

    Raises:
        ArgumentError: An argument is invalid, the model is scripted, it cannot take such a random input, or its output
            has no gradient. An error that the model or the loss raises with your own inputs is left as it is.

    Source:
        The verdict on the flow is ours. Other faults: the rules of `gradprobe.diagnosis` that one step is enough for.

    Example:
        >>> from gradprobe import networks
        >>> check_gradient_flow(networks.deep_cnn(50), (3, 32, 32)).verdict
        'vanishing'
        >>> check_gradient_flow(nn.Linear(3, 1), inputs=torch.ones(8, 3), loss=lambda y: y.square().mean()).verdict
        'healthy'
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: needed a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ArgumentError("model: needed a model in Python, got a scripted one; check it before torch.jit.script")
    if (input_shape is None) == (inputs is None):
        which = "neither" if inputs is None else "both"
        raise ArgumentError(f"input_shape: needed sizes such as (3, 32, 32), or inputs= in their place, got {which}")
    if loss is not None and not callable(loss):
        raise ArgumentError(f"loss: needed a function of the model's output, got {type(loss).__name__}")
    tensor = next(iter((*model.parameters(), *model.buffers())), torch.empty(0))
    generator = torch.Generator().manual_seed(SEED)
    batch = random_batch(input_shape, batch_size, generator, tensor.device) if inputs is None else given_batch(inputs)
    run = _Run(model, batch, loss, generator.get_state())
    with _untouched(model, batch), torch.enable_grad(), _without_compiled_code():
        with attach(model, activations=True, when="step") as probe, warnings.catch_warnings():
            warnings.simplefilter("ignore", GradprobeWarning)  # the report itself lists what has no gradient
            seen = run.backward()
            probe.step()
            snapshot, silent = probe.latest(wait=True), probe.coverage().silent
        if snapshot is None:
            raise ArgumentError("model: no parameter received a gradient from the output")
        zeros = [name for name in snapshot if snapshot[name].abs_max == 0.0]
        gates, found, note = find_gates(model, seen.graph, zeros), seen.trunks(), ""
        if gates and any(flow_along(trunk) != "healthy" for trunk in found):
            with opened(gates):
                found = run.backward().trunks()
            note = f" (measured on a copy in which {_listed([gate.name for gate in gates])} had ordinary values)"
    uses = _first_uses(model, snapshot, seen)
    snapshot = snapshot.reordered(sorted(range(len(uses)), key=uses.__getitem__))
    return _report(model, snapshot, silent, seen, _Flow(found, gates, note))


@dataclass(frozen=True)
class _Seen:
    """One forward and backward pass."""

    outputs: Outputs
    graph: LossGraph
    loss: str

    def trunks(self) -> list[list[TrunkPoint]]:
        return trunks(self.outputs.found, self.graph)


@dataclass(frozen=True)
class _Run:
    """The passes of one model with one batch, which can be repeated."""

    model: nn.Module
    batch: Batch
    loss: Loss | None
    state: torch.Tensor  # of the generator of the random projection

    def backward(self) -> _Seen:
        torch.manual_seed(SEED)
        random.seed(SEED)
        generator, outputs = torch.Generator(), Outputs()
        generator.set_state(self.state)
        for parameter in self.model.parameters():
            parameter.grad = None
        with outputs.recording(self.model):
            output = self.batch.run(self.model)
        value, description = scalar_loss(output, self.loss, generator)
        graph = LossGraph(value)
        torch.autograd.backward(value)
        return _Seen(outputs, graph, description)


@dataclass(frozen=True)
class _Flow:
    """What the verdict on the flow rests on."""

    trunks: Sequence[Sequence[TrunkPoint]]
    gates: Sequence[Gate]
    note: str  # how the trunks were measured


def _report(
    model: nn.Module, snapshot: Snapshot, without_gradient: Sequence[str], seen: _Seen, measured: _Flow
) -> FlowReport:
    flows: list[Flow] = [flow_along(trunk) for trunk in measured.trunks]
    flow: Flow = next((one for one in ("exploding", "vanishing") if one in flows), "healthy")
    is_judged = bool(flows or measured.gates)  # otherwise the weights have to tell
    if not is_judged:
        flow = flow_verdict(weight_norms(snapshot))
    statuses: dict[str, str] = dict(layer_statuses(snapshot, flow))
    findings = [one for one in diagnose([snapshot]) if not is_judged or not _is_flow(one)]
    if flows and flow != "healthy":
        concerned = [name for name, status in statuses.items() if status == flow]
        findings.append(flow_finding(flow, measured.trunks[flows.index(flow)], concerned, measured.note))
    titles = [rule.title for rule in RULES]
    ordered = causes_first(sorted(findings, key=lambda one: titles.index(one.title)))
    notes = list(_explain(model, snapshot, seen, measured.gates, statuses, flow))
    if measured.note and not (flows and flow != "healthy"):
        notes.append(f"the verdict is that of{measured.note.strip(' ()').removeprefix('measured on')}")
    layers: list[LayerFlow] = []
    depth, owner = -1, None
    for name in snapshot.table.names:
        if name.rpartition(".")[0] != owner:
            depth, owner = depth + 1, name.rpartition(".")[0]
        if name in without_gradient or name not in snapshot:
            layers.append(LayerFlow(depth, name, 0.0, 0.0, 0.0, 0.0, 0, 0, "no gradient"))
            continue
        site = snapshot[name]
        numbers = (site.norm, site.rms, site.abs_max, site.zero_fraction, site.nonfinite, site.numel)
        layers.append(LayerFlow(depth, name, *numbers, statuses[name]))
    return FlowReport(
        model=type(model).__name__,
        layers=tuple(layers),
        findings=ordered,
        verdict=most_severe({finding.rule for finding in ordered if not finding.follows}),
        snapshot=snapshot,
        loss=seen.loss,
        trunks=tuple(map(tuple, measured.trunks)),
        notes=tuple(notes),
    )


def _is_flow(finding: Finding) -> bool:
    return finding.where == "backward" and finding.rule in ("vanishing", "exploding")


def _explain(
    model: nn.Module, snapshot: Snapshot, seen: _Seen, gates: Sequence[Gate], statuses: dict[str, str], flow: Flow
) -> Iterator[str]:
    """Yields notes on gradients that are zero or small for a reason, and corrects their statuses."""
    if seen.loss == MODELS_LOSS:
        yield f"the gradient is that of {seen.loss}"
    zeros = [name for name in snapshot if snapshot[name].abs_max == 0.0]
    blocked = blocked_by(gates, zeros, model, seen.graph)
    statuses.update(dict.fromkeys(blocked, "starts at 0"))
    closed = list(dict.fromkeys(blocked.values()))
    if len(closed) == 1:
        layer = closed[0].rpartition(".")[0] or closed[0]
        which = "all gradients" if len(blocked) > 1 else f"the gradient of {quoted(next(iter(blocked)))}"
        is_ = "are" if len(blocked) > 1 else "is"
        yield f"{which} behind {quoted(layer)} {is_} 0, because {quoted(closed[0])} is 0; the first step changes that"
    elif closed:
        yield f"{len(blocked)} gradients are 0, because they are behind {_listed(closed)}, which start at 0"
    for value in sorted({gate.value for gate in gates} - {0.0}):
        names = [gate.name for gate in gates if gate.value == value]
        yield f"{_listed(names)} start{'s' * (len(names) == 1)} at {value:g}: the gradients in these branches are small"
    cancelling = [name for name in snapshot if _cancels(name, snapshot, seen)]
    statuses.update(dict.fromkeys(cancelling, "cancels"))
    if cancelling:
        yield (
            f"the gradient of {_listed(cancelling)} is 0 up to rounding: a softmax or a normalisation behind removes "
            "what a bias adds"
        )
    others = [name for name in zeros if name not in blocked and name not in cancelling]
    if others and flow == "healthy":
        statuses.update(dict.fromkeys(others, "zero"))
        yield f"the gradient of {_listed(others)} is exactly 0 with this batch"
    missing = [name for name in snapshot.table.names if name not in snapshot]
    if missing:
        yield f"no gradient reaches {_listed(missing)}: not used by this batch, or detached"


def _cancels(name: str, snapshot: Snapshot, seen: _Seen) -> bool:
    module, _, role = name.rpartition(".")
    return role == "bias" and snapshot[name].norm < _CANCELS * seen.outputs.gradient_norm(module)


def _listed(names: Sequence[str]) -> str:
    if len(names) <= 2:
        return " and ".join(map(quoted, names))
    return f"{quoted(names[0])} and {len(names) - 1} others"


@contextmanager
def _untouched(model: nn.Module, batch: Batch) -> Iterator[None]:
    gradients = [(tensor, tensor.grad) for tensor in (*model.parameters(), *batch.leaves())]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    python_state = random.getstate()
    with torch.random.fork_rng():
        try:
            for tensor, _ in gradients:
                tensor.grad = None
            yield
        finally:
            random.setstate(python_state)
            for tensor, gradient in gradients:
                tensor.grad = gradient
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


@contextmanager
def _without_compiled_code() -> Iterator[None]:
    """Runs compiled models as they were written: in a compiled graph, modules and parameters cannot be told apart."""
    if "torch._dynamo" not in sys.modules:  # nothing can be compiled then, and the import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _first_uses(model: nn.Module, snapshot: Snapshot, seen: _Seen) -> list[float]:
    """Returns a number for each parameter that grows with the time of its first use.

    A parameter that the graph does not show counts as used when its module was called, or the one around it if it has a
    gradient; if nothing says that it was used, it is the last.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    uses = []
    for name in snapshot.table.names:
        use: float | None = seen.graph.first_use(parameters[name]) if name in parameters else None
        place = name
        while use is None:
            place = place.rpartition(".")[0]
            use = seen.outputs.called.get(place)
            if not place or name not in snapshot:
                break
        uses.append(math.inf if use is None else use)
    return uses
