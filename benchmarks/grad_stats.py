"""Times the statistics on one CPU thread against a pure read of the same bytes and against torch._foreach_norm.

    python benchmarks/grad_stats.py [--rounds 31] [--check]

The contenders take turns in one run, in rotating order, and each ratio is taken within a round, so that other load on
the machine affects all of them alike. Times are CPU times of the thread and include the call from Python. The pure read
is a C++ loop, compiled for this processor, that only ORs the bytes together in registers, in one stream or in four; the
faster of the two counts.

Columns: time per call in ms and throughput in GB/s, each as the median over the rounds with quartiles.

--check exits with 1 unless, for float32, statistics from memory take at most 1.15 times the pure read, throughput in
cache is at least 1.5 times that of torch._foreach_norm (six statistics against its one), and 1,000 small tensors take
less than 0.4 ms. "In cache" means one tensor of 16 KiB to 1 MiB, or 4 MiB (a small model's gradient) in 1 to 256
tensors.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _machine import processor

from gradprobe import networks, ops

KIB, MIB = 2**10, 2**20

READER = r"""
#include <cstdint>
#include <cstring>
typedef uint64_t Word __attribute__((vector_size(64)));
static inline Word load(const char* at) { Word word; std::memcpy(&word, at, sizeof word); return word; }
template <int kStreams> static uint64_t read(const char* data, int64_t bytes) {
  Word a{}, b{}, c{}, d{};
  const int64_t part = bytes / kStreams / 256 * 256;
  for (int64_t i = 0; i < part; i += 256) {
    for (int s = 0; s < kStreams; ++s) {
      const char* at = data + s * part + i;
      a |= load(at); b |= load(at + 64); c |= load(at + 128); d |= load(at + 192);
    }
  }
  a |= b | c | d;
  uint64_t all = 0;
  for (int i = 0; i < 8; ++i) all |= a[i];
  return all;
}
extern "C" uint64_t read_one_stream(const char* data, int64_t bytes) { return read<1>(data, bytes); }
extern "C" uint64_t read_four_streams(const char* data, int64_t bytes) { return read<4>(data, bytes); }
"""

Contender = Callable[[], object]


def compile_readers(folder: Path) -> ctypes.CDLL:
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler is None:
        raise SystemExit("the pure read needs a C++ compiler: none of c++, g++, clang++ is on the path")
    source, library = folder / "reader.cpp", folder / "reader.so"
    source.write_text(READER)
    flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-std=c++20", "-shared", "-fPIC"]
    if platform.machine() != "x86_64":
        flags.remove("-mprefer-vector-width=512")
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    readers = ctypes.CDLL(str(library))
    for name in ("read_one_stream", "read_four_streams"):
        reader = getattr(readers, name)
        reader.restype, reader.argtypes = ctypes.c_uint64, (ctypes.c_void_p, ctypes.c_int64)
    return readers


def readers_of(readers: ctypes.CDLL, tensor: torch.Tensor) -> dict[str, Contender]:
    pointer, n_bytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    return {
        "pure read, 1 stream": lambda: readers.read_one_stream(pointer, n_bytes),
        "pure read, 4 streams": lambda: readers.read_four_streams(pointer, n_bytes),
    }


def stats_of(tensors: list[torch.Tensor]) -> Contender:
    out = torch.empty(len(tensors), len(ops.STATS), dtype=torch.float64)
    backend = ops.resolve("native", torch.device("cpu"))
    return lambda: backend.grad_stats_into(tensors, out)


def take_turns(contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Returns each contender's CPU seconds per call, one entry per round."""
    repeats = {}
    for name, call in contenders.items():
        call()
        start = time.thread_time()
        call()
        repeats[name] = max(1, round(4e-3 / max(time.thread_time() - start, 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        for k in range(len(names)):
            name = names[(k + turn) % len(names)]
            call, n = contenders[name], repeats[name]
            start = time.thread_time()
            for _ in range(n):
                call()
            seconds[name].append((time.thread_time() - start) / n)
    return seconds


def spread(values: list[float], digits: int = 2) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f}..{high:.{digits}f})"


def report(title: str, seconds: dict[str, list[float]], n_bytes: int) -> None:
    print(f"\n{title}")
    for name, values in seconds.items():
        rate = spread([n_bytes / value / 1e9 for value in values], 1)
        print(f"  {name:24s} {spread([value * 1e3 for value in values], 3):28s} ms   {rate} GB/s")


def ratios(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def from_memory(readers: ctypes.CDLL, dtype: torch.dtype, rounds: int) -> float:
    """Returns the time of the statistics of 256 MiB over that of the faster pure read."""
    x = torch.randn(256 * MIB // dtype.itemsize).to(dtype)
    contenders = readers_of(readers, x) | {"gradprobe, 6 statistics": stats_of([x])}
    if dtype == torch.float32:
        contenders["torch._foreach_norm"] = lambda: torch._foreach_norm([x])
    seconds = take_turns(contenders, rounds)
    report(f"from memory: one tensor of 256 MiB, {str(dtype).removeprefix('torch.')}", seconds, 256 * MIB)
    fastest = [min(pair) for pair in zip(*(seconds[name] for name in readers_of(readers, x)), strict=True)]
    over = ratios(seconds["gradprobe, 6 statistics"], fastest)
    print(f"  time over that of the faster pure read: {spread(over)}")
    return statistics.median(over)


def against_foreach_norm(title: str, tensors: list[torch.Tensor], rounds: int) -> tuple[float, float]:
    """Returns the throughput over that of torch._foreach_norm, and the milliseconds per call."""
    contenders: dict[str, Contender] = {
        "gradprobe, 6 statistics": stats_of(tensors),
        "torch._foreach_norm": lambda: torch._foreach_norm(tensors),
    }
    seconds = take_turns(contenders, rounds)
    report(title, seconds, sum(t.numel() * t.element_size() for t in tensors))
    ours = seconds["gradprobe, 6 statistics"]
    times = ratios(seconds["torch._foreach_norm"], ours)
    print(f"  throughput over that of torch._foreach_norm: {spread(times)}")
    return statistics.median(times), statistics.median(ours) * 1e3


def gradients(depth: int) -> list[torch.Tensor]:
    """Returns the gradients of a residual network on random images."""
    torch.manual_seed(0)
    network = networks.resnet(depth)
    torch.nn.functional.cross_entropy(network(torch.randn(32, 3, 32, 32)), torch.randint(0, 10, (32,))).backward()
    return [p.grad for p in network.parameters() if p.grad is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = f"{os.getloadavg()[0]:.1f}"
    print(
        f"{processor()}, {os.cpu_count()} cores, load {load}; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
    print(f"backends: {ops.backends()}; median (quartiles) of {arguments.rounds} rounds, CPU time of one thread")

    with tempfile.TemporaryDirectory() as folder:
        readers = compile_readers(Path(folder))
        over_read = {dtype: from_memory(readers, dtype, arguments.rounds) for dtype in ops.FLOAT_DTYPES[::-1]}
    torch.manual_seed(0)
    in_cache = []
    for n_bytes in (16 * KIB, 64 * KIB, 256 * KIB, 1 * MIB):
        title = f"in cache: one tensor of {n_bytes // KIB} KiB, float32"
        in_cache.append(against_foreach_norm(title, [torch.randn(n_bytes // 4)], arguments.rounds)[0])
    for count in (1, 16, 256):
        title = f"in cache: 4 MiB in {count} tensors, float32"
        tensors = [torch.randn(4 * MIB // 4 // count) for _ in range(count)]
        in_cache.append(against_foreach_norm(title, tensors, arguments.rounds)[0])
    sizes = torch.randint(16, 257, (1000,)).tolist()
    _, small_ms = against_foreach_norm(
        "1,000 tensors of 16 to 256 elements, float32", [torch.randn(n) for n in sizes], arguments.rounds
    )
    against_foreach_norm("the gradient of resnet(56), 0.85 M elements", gradients(56), arguments.rounds)

    targets = {
        f"from memory, float32: {over_read[torch.float32]:.2f} times a pure read (at most 1.15)": over_read[
            torch.float32
        ]
        <= 1.15,
        f"in cache: {min(in_cache):.2f} times torch._foreach_norm or more (at least 1.5)": min(in_cache) >= 1.5,
        f"1,000 small tensors: {small_ms:.3f} ms (less than 0.4)": small_ms < 0.4,
    }
    print()
    for text, met in targets.items():
        print(f"{'met   ' if met else 'MISSED'}  {text}")
    if arguments.check and not all(targets.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
