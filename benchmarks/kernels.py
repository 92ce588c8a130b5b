"""Times the GPU kernels against a pure copy of the same bytes and against torch's own multi-tensor functions.

    python benchmarks/kernels.py [--rounds 31] [--backend native|triton] [--json] [--check]

The contenders take turns in one run, in rotating order. A call is timed between two CUDA events, after a write that
flushes the L2 cache, so that its inputs come from memory.

Columns: the set of tensors (dtype, number and size), the contender, the time per call in µs (median over the rounds,
with quartiles) and GB/s. GB/s counts the bytes that the operation has to move: each element once for the statistics,
twice for the scaling, three times for clipping. The copy moves as many bytes as the statistics (half read, half
written) and shows what the memory can do. Transformer Engine takes part where it is installed, with its types.

--check exits with 1 unless, for sets of at least 64 MiB that are not float64, the statistics and the scaling reach
80 % of the copy's GB/s, as docs/kernels.md predicts. Without a CUDA device the script says so and exits with 0, or with
2 under --check.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from gradprobe import networks, ops
from gradprobe.errors import BackendError

MIB = 2**20
CACHE_BYTES = 256 * MIB  # more than the L2 cache of any current GPU

Contender = Callable[[], object]


@dataclass(frozen=True)
class Result:
    """Time of one contender on one set of tensors.

    Attributes:
        tensors: Name of the set.
        contender: Name of the contender.
        n_bytes: Bytes that it has to move.
        time_us: Median time over the rounds, in microseconds.
        low_us: Lower quartile.
        high_us: Upper quartile.
    """

    tensors: str
    contender: str
    n_bytes: int
    time_us: float
    low_us: float
    high_us: float

    @property
    def gb_per_s(self) -> float:
        """Throughput in 1e9 bytes per second."""
        return self.n_bytes / self.time_us / 1e3


def sets_of_tensors(device: torch.device) -> dict[str, list[torch.Tensor]]:
    """Returns sets of one to thousands of tensors by name: dtype, number and size."""

    def random(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, device=device).mul_(1e-3).to(dtype)

    sets = {
        f"{str(dtype).removeprefix('torch.')}, 1 of {n_bytes // MIB} MiB": [random((n_bytes // dtype.itemsize,), dtype)]
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        for n_bytes in (64 * MIB, 1024 * MIB)
    }
    sets["float32, 1 of 1024 MiB, all 1e-25"] = [torch.full((256 * MIB,), 1e-25, device=device)]
    for name, network in (("ResNet-56", networks.resnet(56)), ("ResNet-50", networks.resnet(50))):
        shapes = [p.shape for p in network.parameters()]
        sets[f"float32, {name}'s {len(shapes)}"] = [random(shape, torch.float32) for shape in shapes]
    sets["float32, 1000 of 1 KiB"] = [random((256,), torch.float32) for _ in range(1000)]
    sets["bfloat16, 500 of 1 MiB"] = [random((MIB // 2,), torch.bfloat16) for _ in range(500)]
    return sets


def contenders_for(tensors: list[torch.Tensor], backend: ops.Backend) -> dict[str, tuple[Contender, int]]:
    """Returns the contenders, each with the number of bytes that it has to move."""
    n_bytes = sum(t.numel() * t.element_size() for t in tensors)
    out = torch.empty(len(tensors), len(ops.STATS), dtype=torch.float64, device=tensors[0].device)
    # A factor of 1 would skip the work; the reciprocal restores the values.
    factors = [torch.tensor(value, device=tensors[0].device) for value in (2.0, 0.5)]
    turn = [0]

    def factor() -> torch.Tensor:
        turn[0] ^= 1
        return factors[turn[0]]

    half = torch.empty(n_bytes // 2, dtype=torch.uint8, device=tensors[0].device)
    target = torch.empty_like(half)
    parameters = [torch.nn.Parameter(t) for t in tensors]
    for parameter, tensor in zip(parameters, tensors, strict=True):
        parameter.grad = tensor
    return {
        "copy": (lambda: target.copy_(half), n_bytes),
        "grad_stats_into": (lambda: backend.grad_stats_into(tensors, out), n_bytes),
        "torch._foreach_norm": (lambda: torch._foreach_norm(tensors), n_bytes),
        "scale_": (lambda: backend.scale_(tensors, factor()), 2 * n_bytes),
        "torch._foreach_mul_": (lambda: torch._foreach_mul_(tensors, factor()), 2 * n_bytes),
        "clip: statistics + scale_": (
            lambda: (backend.grad_stats_into(tensors, out), backend.scale_(tensors, factor())),
            3 * n_bytes,
        ),
        # Scales by 1 if nothing is to be clipped, which costs as much.
        "torch clip_grad_norm_": (lambda: torch.nn.utils.clip_grad_norm_(parameters, torch.inf), 3 * n_bytes),
        **transformer_engine_for(tensors, n_bytes),
    }


def transformer_engine_for(tensors: list[torch.Tensor], n_bytes: int) -> dict[str, tuple[Contender, int]]:
    """Returns Transformer Engine's norm and scaling; nothing if it is not installed or has no kernels for the type."""
    if tensors[0].dtype == torch.float64 or importlib.util.find_spec("transformer_engine") is None:
        return {}
    fused = importlib.import_module("transformer_engine.pytorch.optimizers")
    overflow = torch.zeros(1, dtype=torch.int32, device=tensors[0].device)

    def norm() -> object:
        return fused.multi_tensor_applier(fused.multi_tensor_l2norm, overflow, [tensors], False)

    def scale() -> object:
        return fused.multi_tensor_applier(fused.multi_tensor_scale, overflow, [tensors, tensors], 1.0)

    return {
        "Transformer Engine norm": (norm, n_bytes),
        "Transformer Engine clip": (lambda: (norm(), scale()), 3 * n_bytes),
    }


def take_turns(name: str, tensors: list[torch.Tensor], backend: ops.Backend, rounds: int) -> list[Result]:
    contenders = contenders_for(tensors, backend)
    over_cache = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=tensors[0].device)
    for call, _ in contenders.values():
        call()
    times_us: dict[str, list[float]] = {each: [] for each in contenders}
    names = list(contenders)
    for turn in range(rounds):
        for k in range(len(names)):
            each = names[(k + turn) % len(names)]
            over_cache.zero_()
            # Delays the device until the call is enqueued, so that Python is not timed.
            torch.cuda._sleep(2_000_000)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            contenders[each][0]()
            end.record()
            end.synchronize()
            times_us[each].append(start.elapsed_time(end) * 1e3)
    results = []
    for each, times in times_us.items():
        low, median, high = statistics.quantiles(times, n=4)
        results.append(Result(name, each, contenders[each][1], median, low, high))
    return results


def missed(results: list[Result]) -> list[str]:
    """Returns one line for each result that falls short of docs/kernels.md."""
    lines = []
    for result in results:
        large = result.n_bytes >= 64 * MIB and not result.tensors.startswith("float64")
        if result.contender not in ("grad_stats_into", "scale_") or not large:
            continue
        copy = next(r for r in results if r.tensors == result.tensors and r.contender == "copy")
        if result.gb_per_s < 0.8 * copy.gb_per_s:
            lines.append(
                f"{result.contender} on {result.tensors}: {result.gb_per_s:.0f} GB/s, copy {copy.gb_per_s:.0f} GB/s"
            )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--backend", default="native", choices=("native", "triton"))
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a prediction of docs/kernels.md fails")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device", file=sys.stderr)
        return 2 if arguments.check else 0
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        backend = ops.resolve(arguments.backend, device)
    except BackendError as error:
        print(error, file=sys.stderr)
        return 2
    if not arguments.json:
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, backend {backend.name}")
    results = []
    for name, tensors in sets_of_tensors(device).items():
        for result in take_turns(name, tensors, backend, arguments.rounds):
            results.append(result)
            if arguments.json:
                print(json.dumps({**asdict(result), "gb_per_s": result.gb_per_s}))
            else:
                spread = f"{result.low_us:.1f}..{result.high_us:.1f}"
                print(
                    f"{name:40} {result.contender:28} {result.time_us:10.1f} us ({spread}) {result.gb_per_s:8.0f} GB/s"
                )
    failures = missed(results) if arguments.check else []
    for line in failures:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
