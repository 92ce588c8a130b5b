"""Counts what a probe adds to a training step, without a clock: the same on every run and under any load.

`python tests/helpers/step_counts.py` counts and rewrites tests/probe/step_counts.json.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import gradprobe
from gradprobe.ops import libraries

PACKAGE = str(Path(gradprobe.__file__).parent)
RECORDED = Path(__file__).resolve().parents[1] / "probe" / "step_counts.json"
WARM_UP, COUNTED = 4, 16  # steps; finished steps are searched for NaN in batches of sixteen

Counts = dict[str, int]  # by quantity, over COUNTED steps
Counter = Callable[[Callable[[], None]], Counts]

WORKLOADS: dict[str, dict[str, bool]] = {
    "parameters only": {"junctions": False},
    "all signals": {"activations": True, "updates": True},
    "with clipping": {"junctions": False},
}


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.add = gradprobe.nn.ResidualAdd(relu=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.add(x, self.branch(x))
        return y


@contextmanager
def training(options: Mapping[str, bool] | None, clips: bool = False) -> Iterator[Callable[[], None]]:
    """Makes a small network of 52 parameters.

    Args:
        options: Those of `attach`; None for no probe.
        clips: Clip by the probe.

    Yields:
        A function that takes COUNTED steps.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), *(_Block() for _ in range(12)), nn.Linear(8, 2))
    x = torch.randn(4, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = None if options is None else gradprobe.attach(model, optimizer=optimizer, strict=True, **options)

    def steps(n: int = COUNTED) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if probe is not None and clips:
                probe.clip_grad_norm_(0.1)
            optimizer.step()

    steps(WARM_UP)
    yield steps
    if probe is not None:
        probe.detach()


class _Launches(TorchDispatchMode):
    """Counts the operators that would launch a kernel on a GPU: all but views and empty tensors."""

    n = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.n += not (func.is_view or func.overloadpacket._qualified_op_name.startswith("aten::empty"))
        return func(*args, **kwargs or {})


def launches(steps: Callable[[], None]) -> Counts:
    """Counts operators that launch a kernel."""
    with _Launches() as mode:
        steps()
    return {"launches": mode.n}


def operators_and_allocations(steps: Callable[[], None]) -> Counts:
    """Counts calls of operators, nested ones included, and allocations of tensor memory."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        steps()
    events = profiler.profiler.kineto_results.events()  # those of profiler.events() lack most allocations
    return {
        "operators": sum(event.name().startswith(("aten::", "gradprobe::")) for event in events),
        "allocations": sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events),
    }


def python_calls(steps: Callable[[], None]) -> Counts:
    """Counts calls of Python functions, and of built-in ones, by gradprobe and of gradprobe."""
    n = 0
    ours: dict[CodeType, bool] = {}

    def is_ours(frame: FrameType | None) -> bool:
        if frame is None:
            return False
        if frame.f_code not in ours:
            ours[frame.f_code] = frame.f_code.co_filename.startswith(PACKAGE)
        return ours[frame.f_code]

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal n
        if event == "call":
            n += is_ours(frame) or is_ours(frame.f_back)
        elif event == "c_call":
            n += is_ours(frame)

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        steps()
    finally:
        sys.setprofile(before)
    return {"Python calls": n}


def count_all() -> dict[str, dict[str, Counts]]:
    """Counts what a probe adds over COUNTED steps.

    Returns:
        Counts by workload and hooks: "C++ hooks" if they are built, and "Python hooks", which GPUs have.
    """
    switched_off = mock.patch.object(libraries, "native_hooks", return_value=(None, "switched off"))
    ways: dict[str, tuple[AbstractContextManager[object], list[Counter]]] = {
        "C++ hooks": (nullcontext(), [operators_and_allocations, python_calls]),
        "Python hooks": (switched_off, [launches, python_calls]),
    }
    if libraries.native_hooks()[0] is None:
        del ways["C++ hooks"]
    counted: dict[str, dict[str, Counts]] = {workload: {} for workload in WORKLOADS}
    gc.collect()
    gc.disable()
    try:
        for way, (hooks, counters) in ways.items():
            with hooks:
                bare = _count(counters, None)
                for workload, options in WORKLOADS.items():
                    total = _count(counters, options, clips=workload == "with clipping")
                    counted[workload][way] = {name: n - bare[name] for name, n in total.items()}
    finally:
        gc.enable()
    return counted


def _count(counters: Sequence[Counter], options: Mapping[str, bool] | None, clips: bool = False) -> Counts:
    counts: Counts = {}
    for counter in counters:
        with training(options, clips) as steps:
            counts |= counter(steps)
    return counts


def main() -> None:
    """Rewrites the recorded counts."""
    RECORDED.write_text(json.dumps(count_all(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
