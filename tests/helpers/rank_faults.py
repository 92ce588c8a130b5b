"""Cases in which the ranks of a training do not do the same."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from helpers.layout_parts import Part
from helpers.layouts import LAYOUTS
from helpers.sharded_trainings import local_of, weights_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gradprobe
from gradprobe.observers.gradient_observer import GradientObserver
from gradprobe.observers.sharding import WholeGradients
from gradprobe.probe.coverage import CoverageLog
from gradprobe.probe.step_gradients import StepGradients

N_STEPS = 5
_FAULT_AT = 2

Summary = dict[str, Any]


def build(layout: str, rank: int, n_ranks: int) -> tuple[Part, torch.optim.SGD]:
    torch.manual_seed(0)
    one = LAYOUTS[layout]
    part = one.build(one.model(), rank, n_ranks, False)
    return part, torch.optim.SGD(part.model.parameters(), lr=0.1)


def backward(layout: str, part: Part, step: int) -> None:
    batch = LAYOUTS[layout].batch(torch.Generator().manual_seed(step))
    part.backward(batch, lambda y: y.square().mean(), True)


def bare(layout: str, rank: int, n_ranks: int) -> list[dict[str, bytes]]:
    """Trains without a probe and returns the weights after each step."""
    part, optimizer = build(layout, rank, n_ranks)
    found = []
    for step in range(N_STEPS):
        optimizer.zero_grad()
        backward(layout, part, step)
        optimizer.step()
        found.append(weights_of(part.model)[0])
    return found


def train(
    layout: str,
    rank: int,
    n_ranks: int,
    attaches: bool = True,
    around: Callable[[gradprobe.Probe | None, int], contextlib.AbstractContextManager[object]] | None = None,
    **options: Any,
) -> Summary:
    """Trains, and tells whether the weights are those without a probe and what the probe recorded."""
    expected = bare(layout, rank, n_ranks)
    part, optimizer = build(layout, rank, n_ranks)
    options = {"process_group": part.process_group, **options}
    summary: Summary = {"same": [], "steps": {}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        probe = gradprobe.attach(part.model, optimizer=optimizer, **options) if attaches else None
        for step in range(N_STEPS):
            with around(probe, step) if around is not None else contextlib.nullcontext():
                optimizer.zero_grad()
                backward(layout, part, step)
                optimizer.step()
            summary["same"].append(weights_of(part.model)[0] == expected[step])
        if probe is not None:
            summary["steps"] = {s.step: {name: each.norm for name, each in s.sites.items()} for s in probe.history()}
            summary["reduction"] = [s.provenance.reduction for s in probe.history()]
            probe.detach()
    summary["warned"] = [str(w.message) for w in caught if issubclass(w.category, gradprobe.GradprobeWarning)]
    return summary


def attached_alone(layout: str, rank: int, n_ranks: int) -> Summary:
    """Attaches on the first rank only, where this is an error, then trains, then attaches on all."""
    os.environ["GRADPROBE_MEET_TIMEOUT_S"] = "1"
    part, _ = build(layout, rank, n_ranks)
    message, waited = "", 0.0
    if rank == 0:
        start = time.monotonic()
        try:
            gradprobe.attach(part.model, process_group=part.process_group)
        except gradprobe.ArgumentError as error:
            message = str(error)
        waited = time.monotonic() - start
    dist.barrier()
    os.environ["GRADPROBE_MEET_TIMEOUT_S"] = "10"
    return {"message": message, "waited": waited, "later": train(layout, rank, n_ranks)}


def attached_on_one(layout: str, options: dict[str, Any], rank: int, n_ranks: int) -> Summary:
    """Trains with a probe on the first rank only."""
    return train(layout, rank, n_ranks, attaches=rank == 0, **options)


def other_options(layout: str, rank: int, n_ranks: int) -> str:
    """Attaches with other options on each rank."""
    part, _ = build(layout, rank, n_ranks)
    try:
        gradprobe.attach(part.model, process_group=part.process_group, every=1 + rank)
    except gradprobe.ArgumentError as error:
        return str(error)
    return ""


def magnitudes(layout: str, rank: int, n_ranks: int) -> Summary:
    """Asks for magnitudes, of whole gradients and of this rank's parts."""
    part, optimizer = build(layout, rank, n_ranks)
    message, options = "", {"magnitudes": True, "magnitudes_every": 1, "strict": True}
    try:
        gradprobe.attach(part.model, process_group=part.process_group, **options)
    except gradprobe.ArgumentError as error:
        message = str(error)
    with gradprobe.attach(part.model, optimizer=optimizer, process_group="local", **options) as probe:
        backward(layout, part, 0)
        optimizer.step()
        (snapshot,) = probe.history()
    numels = {name: (one.numel, snapshot[name].numel) for name, one in snapshot.magnitudes.items()}
    return {"message": message, "numels": numels, "n": len(snapshot)}


def other_models(rank: int, n_ranks: int) -> str:
    """Attaches to models of other sizes on each rank."""
    model = nn.Linear(4, 4 + 2 * rank)
    fully_shard(model, mesh=init_device_mesh("cpu", (n_ranks,)))
    try:
        gradprobe.attach(model)
    except gradprobe.ArgumentError as error:
        return str(error)
    return ""


PLACES: dict[str, tuple[type, str]] = {
    "measuring": (GradientObserver, "measure"),
    "following": (StepGradients, "follow"),
    "comparing": (StepGradients, "compare"),
    "noting": (CoverageLog, "note"),
    "collecting": (WholeGradients, "_collect_signals"),
}


def failing(layout: str, at: int, place: str, rank: int, n_ranks: int) -> Summary:
    """Something fails on the second rank in one step, once."""
    owner, name = PLACES[place]

    @contextlib.contextmanager
    def around(probe: gradprobe.Probe | None, step: int) -> Iterator[None]:
        original = getattr(owner, name)
        has_failed = False

        def fail(*args: Any, **kwargs: Any) -> Any:
            nonlocal has_failed
            if has_failed:
                return original(*args, **kwargs)
            has_failed = True
            raise RuntimeError("planted")

        if rank == 1 and step == at:
            setattr(owner, name, fail)
        try:
            yield
        finally:
            setattr(owner, name, original)

    return train(layout, rank, n_ranks, around=around)


def paused(layout: str, rank: int, n_ranks: int) -> Summary:
    """The second rank pauses for a step."""

    def around(probe: gradprobe.Probe | None, step: int) -> contextlib.AbstractContextManager[object]:
        assert probe is not None
        return probe.paused() if rank == 1 and step == _FAULT_AT else contextlib.nullcontext()

    return train(layout, rank, n_ranks, around=around)


def in_hooks(layout: str, rank: int, n_ranks: int) -> Summary:
    """Measures each gradient in its hook, if `attach` does not refuse that."""
    part, _ = build(layout, rank, n_ranks)
    try:
        probe = gradprobe.attach(part.model, process_group=part.process_group, when="hook", strict=True)
    except gradprobe.ArgumentError as error:
        return {"refused": str(error)}
    backward(layout, part, 0)
    probe.step()
    snapshot = probe.latest(wait=True)
    probe.detach()
    truth = {name: float(gradient.norm()) for name, gradient in part.gradients().items()}
    found = {} if snapshot is None else {name: each.norm for name, each in snapshot.sites.items()}
    return {"refused": None, "truth": truth, "found": found}


def read_on_one(layout: str, rank: int, n_ranks: int) -> Summary:
    """The first rank reads what the probe has, after every step."""

    @contextlib.contextmanager
    def around(probe: gradprobe.Probe | None, step: int) -> Iterator[None]:
        assert probe is not None
        yield
        if rank == 0:
            for read in (probe.latest, probe.history, probe.findings, probe.coverage, probe.first_nonfinite):
                read()
            probe.latest(wait=True)

    return train(layout, rank, n_ranks, around=around)


def killed(layout: str, rank: int, n_ranks: int) -> Summary:
    """A rank dies between its backward pass and its step."""
    part, optimizer = build(layout, rank, n_ranks)
    gradprobe.attach(part.model, optimizer=optimizer, process_group=part.process_group)
    start = time.monotonic()
    for step in range(N_STEPS):
        start = time.monotonic()
        try:
            optimizer.zero_grad()
            backward(layout, part, step)
            if rank == 1 and step == _FAULT_AT:
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.step()
        except Exception as error:  # noqa: BLE001
            return {"step": step, "error": type(error).__module__, "waited": time.monotonic() - start}
    return {}


def differing_replicas(rank: int, n_ranks: int) -> list[str]:
    """One rank's copy of a gradient is another."""
    layout = "tensor parallel beside plain"
    part, optimizer = build(layout, rank, n_ranks)
    with torch.no_grad():
        part.model.get_parameter("4.bias").add_(0.5 * rank)
    with gradprobe.attach(part.model, optimizer=optimizer) as probe:
        for step in range(N_STEPS):
            optimizer.zero_grad()
            backward(layout, part, step)
            optimizer.step()
        return [f"{finding.rule}: {', '.join(finding.sites)}" for finding in probe.findings()]


def healthy(layout: str, rank: int, n_ranks: int) -> Summary:
    """Trains for a while, and tells what the probe has found and not seen."""
    part, optimizer = build(layout, rank, n_ranks)
    with gradprobe.attach(part.model, optimizer=optimizer, process_group=part.process_group) as probe:
        for step in range(12):
            optimizer.zero_grad()
            backward(layout, part, step)
            optimizer.step()
        return {"findings": [str(each) for each in probe.findings()], "silent": list(probe.coverage().silent)}


def other_experts(rank: int, n_ranks: int) -> Summary:
    """Each half of the ranks shards another expert under the same name, which the mesh does not tell."""
    mesh = init_device_mesh("cpu", (2, n_ranks // 2), mesh_dim_names=("experts", "shards"))
    torch.manual_seed(rank // (n_ranks // 2))
    expert = nn.Linear(8, 4)
    fully_shard(expert, mesh=mesh["shards"])
    optimizer = torch.optim.SGD(expert.parameters(), lr=0.1)
    try:
        probe = gradprobe.attach(expert, optimizer=optimizer)
    except gradprobe.ArgumentError as error:
        return {"refused": str(error)}
    expert(torch.ones(2, 8)).square().mean().backward()
    optimizer.step()
    snapshot = probe.latest(wait=True)
    probe.detach()
    assert snapshot is not None
    norm = torch.tensor(float(expert.weight.grad.full_tensor().norm()) ** 2)  # type: ignore[union-attr, operator]
    dist.all_reduce(norm)
    return {"refused": None, "norm": snapshot["weight"].norm, "truth": math.sqrt(norm.item() / (n_ranks // 2))}


def attached_late(layout: str, when: str, rank: int, n_ranks: int) -> Summary:
    """Attaches after a step, or between a forward and a backward pass, when FSDP holds whole parameters."""
    part, optimizer = build(layout, rank, n_ranks)
    backward(layout, part, 0)
    optimizer.step()
    optimizer.zero_grad()
    if when == "between":
        batch = LAYOUTS[layout].batch(torch.Generator().manual_seed(1))[part.share[0] :: part.share[1]]
        loss = part.call(batch).square().mean()
        probe = gradprobe.attach(part.model, optimizer=optimizer, strict=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    else:
        probe = gradprobe.attach(part.model, optimizer=optimizer, strict=True)
    backward(layout, part, 2)
    truth = {name: float(gradient.norm()) for name, gradient in part.gradients().items()}
    optimizer.step()
    snapshot = probe.latest(wait=True)
    probe.detach()
    assert snapshot is not None
    return {"truth": truth, "found": {name: each.norm for name, each in snapshot.sites.items()}}


def converted(layout: str, rank: int, n_ranks: int) -> Summary:
    """Moves the model to float64 between two steps, of which the ranks know nothing when they meet."""
    part, optimizer = build(layout, rank, n_ranks)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        probe = gradprobe.attach(part.model, optimizer=optimizer, process_group=part.process_group)
        backward(layout, part, 0)
        optimizer.step()
        optimizer.zero_grad()
        part.model.double()
        batch = LAYOUTS[layout].batch(torch.Generator().manual_seed(1)).double()
        part.backward(batch, lambda y: y.square().mean(), True)
        truth = {name: float(gradient.norm()) for name, gradient in part.gradients().items()}
        optimizer.step()
        steps = {s.step: {name: each.norm for name, each in s.sites.items()} for s in probe.history()}
        probe.detach()
    warned = [str(w.message) for w in caught if issubclass(w.category, gradprobe.GradprobeWarning)]
    return {"truth": truth, "found": steps.get(1, {}), "warned": warned}


def over_a_file_store(folder: str, rank: int, n_ranks: int) -> list[str]:
    """Meets through a store in a file."""
    dist.destroy_process_group()
    store = dist.FileStore(f"{folder}/store", n_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n_ranks)
    part, optimizer = build("fsdp2", rank, n_ranks)
    with gradprobe.attach(part.model, optimizer=optimizer, strict=True) as probe:
        backward("fsdp2", part, 0)
        optimizer.step()
        snapshot = probe.latest(wait=True)
    assert snapshot is not None
    return list(snapshot.sites)


def clipping(layout: str, how: str, rank: int, n_ranks: int) -> list[Any]:
    """Clips with the probe while one rank is paused, fails to measure, or has a gradient that is not finite.

    Returns:
        For each step, the returned norm over the true one and the true norm after clipping, or the error.
    """
    part, optimizer = build(layout, rank, n_ranks)
    found: list[Any] = []
    original = GradientObserver.measure

    def measure(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("planted")

    with (
        warnings.catch_warnings(),
        gradprobe.attach(part.model, optimizer=optimizer, process_group=part.process_group) as probe,
    ):
        warnings.simplefilter("ignore")
        for step in range(N_STEPS):
            is_at = rank == 1 and step == _FAULT_AT
            with probe.paused() if is_at and how == "paused" else contextlib.nullcontext():
                if is_at and how == "failing":
                    GradientObserver.measure = measure  # type: ignore[method-assign]
                optimizer.zero_grad()
                backward(layout, part, step)
                if is_at and how == "nonfinite":
                    local_of(next(each.grad for each in part.model.parameters() if each.grad is not None)).fill_(
                        math.nan
                    )
                before = _total(part)
                try:
                    total = float(probe.clip_grad_norm_(0.05, error_if_nonfinite=True))
                    found.append((total / before, _total(part)))
                except RuntimeError as error:
                    found.append(str(error))
                    optimizer.zero_grad()
                optimizer.step()
                GradientObserver.measure = original  # type: ignore[method-assign]
    return found


def _total(part: Part) -> float:
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in part.gradients().values()))


def two_models(rank: int, n_ranks: int) -> list[bool]:
    """Trains two models in turn, each with a probe, and tells whether the numbers are those of its gradients."""
    layouts = ("fsdp2", "tensor parallel beside plain")
    found = []
    with contextlib.ExitStack() as stack:
        trainings = []
        for layout in layouts:
            part, optimizer = build(layout, rank, n_ranks)
            trainings.append((part, optimizer, stack.enter_context(gradprobe.attach(part.model, strict=True))))
        for step in range(3):
            for layout, (part, optimizer, probe) in zip(layouts, trainings, strict=True):
                optimizer.zero_grad()
                backward(layout, part, step)
                truth = _total(part)
                optimizer.step()
                snapshot = probe.latest(wait=True)
                assert snapshot is not None
                found.append(math.isclose(snapshot.total_norm, truth, rel_tol=1e-6))
    return found
