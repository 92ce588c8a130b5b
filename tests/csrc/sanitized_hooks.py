"""Builds gradprobe._hooks with sanitizers and runs tests of gradprobe with it in a child process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from emulation.building import compiler, sanitizer_environment

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "build_backend"))

import native  # noqa: E402

_SANITIZED = [
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
]


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{done.args}\n{done.stdout}{done.stderr}")


def build(folder: Path, csrc: Path = ROOT / "csrc", only: Sequence[str] = (), others: Path | None = None) -> Path:
    """Builds the library with the build's own flags and the sanitizers, beside a copy of the package's other files.

    Args:
        folder: Where everything goes.
        csrc: The sources.
        only: The sources to compile, relative to the repository; none stands for all.
        others: The folder of an earlier build, from which the other objects are taken.

    Returns:
        The folder to import `gradprobe` from.
    """
    (module,) = (each for each in native.make_plan().modules if each.name == "gradprobe._hooks")
    cxx = compiler()
    assert cxx is not None
    linked: list[Path] = []
    jobs: list[list[str | Path]] = []
    for objects in module.objects:
        for source in objects.sources:
            name = source.replace("/", "-") + ".o"
            if only and source not in only:
                assert others is not None
                linked.append(others / name)
                continue
            linked.append(folder / name)
            flags = [f"-I{csrc}" if flag == "-Icsrc" else flag for flag in objects.cxx_flags]
            path = csrc / Path(source).relative_to("csrc")
            jobs.append([cxx, *flags, *_SANITIZED, "-c", path, "-o", linked[-1]])
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(_run, jobs))
    package = folder / "gradprobe"
    shutil.copytree(ROOT / "gradprobe", package, ignore=shutil.ignore_patterns("_hooks*", "__pycache__"))
    _run([cxx, "-shared", *linked, "-o", package / module.file_name, *_SANITIZED, *module.link_flags])
    return folder


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs tests with the package in `folder`, also in the processes that they start."""
    environment = sanitizer_environment("address")
    # Python's own allocator would hide frees from the sanitizer.
    environment |= {"PYTHONPATH": str(folder), "PYTHONMALLOC": "malloc"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--capture=no", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, env=environment, timeout=600
    )
