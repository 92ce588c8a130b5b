"""Runs a quick part of the tests with each Python and the oldest and newest dependencies: `make test-matrix`.

Each environment has gradprobe as plain Python, without the native libraries, installed from a copy of the sources.
Everything lies under build/matrix and is made anew. "oldest" are the lowest versions that pyproject.toml and setup.py
allow and that have a wheel for this Python. Interpreters are those that uv finds, installs, or that pyenv has.

    python tests/matrix.py [--pythons 3.10 3.14] [--sides oldest newest]

Prints a Markdown table. Exits with 1 if an environment cannot be made or a test fails; a Python that is not available
is only named.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MATRIX = ROOT / "build" / "matrix"
SOURCE = MATRIX / "source"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
RESOLUTIONS = {"oldest": "lowest-direct", "newest": "highest"}
SHOWN = ("numpy", "scipy", "typer", "rich")
EXTRAS = "sweep,report,pandas,log"
# The command line, numbers, files and pages: what depends on the versions of Python, NumPy, typer and rich.
TESTS = (
    *("tests/snapshot/test_snapshot.py", "tests/snapshot/test_stats.py", "tests/sinks/test_jsonl.py"),
    *("tests/log/test_run_folder.py", "tests/probe/test_values.py"),
    *("tests/cli/test_check_command.py", "tests/cli/test_topics.py::test_a_topic_is_complete"),
    "tests/cli/test_topics.py::test_commands_have_the_options_that_are_shown",
    "tests/cli/test_commands.py::test_bad_usage_ends_with_2_and_no_traceback",
    "tests/cli/test_wrong_input.py::test_help_has_an_example_and_fits_80_columns",
    "tests/cli/test_commands.py::test_report_writes_the_requested_files",
)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a command in the copy of the sources; returns its output, errors included."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "UV_PYTHON")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"GRADPROBE_WITHOUT": "cuda,hooks,native"}
    return subprocess.run(
        command, cwd=SOURCE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


def copy_sources() -> None:
    """Copies what git tracks or would add: an install there leaves the libraries of this checkout alone."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (SOURCE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, SOURCE / name)


def find_interpreter(uv: str, python: str) -> str | None:
    """Returns the path of an interpreter, or None if there is none and none can be installed."""
    in_pyenv = Path.home().glob(f".pyenv/versions/{python}.*/bin/python")
    if found := sorted(map(str, in_pyenv)):
        return found[-1]
    for prepare in ((), ("python", "install", python)):
        if prepare:
            run(uv, *prepare)
        done = run(uv, "python", "find", "--no-project", "--system", python)
        if done.returncode == 0:
            return done.stdout.splitlines()[-1]
    return None


def test(uv: str, interpreter: str, name: str, side: str) -> tuple[list[str], str, bool]:
    """Makes an environment and tests in it.

    Args:
        uv: The program.
        interpreter: The Python of the environment.
        name: The environment's folder in build/matrix, which also gets a log.
        side: "oldest" or "newest".

    Returns:
        The versions of the packages shown, the outcome in words, and whether it is good.
    """
    environment, log = MATRIX / name, MATRIX / f"{name}.log"
    python = environment / "bin" / "python"
    install = (uv, "pip", "install", "--python", environment)
    steps = [
        (uv, "venv", "--clear", "--python", interpreter, environment),
        (
            *install,
            "--resolution",
            RESOLUTIONS[side],
            "--only-binary",
            ":all:",
            "--no-binary",
            "gradprobe",
            "-e",
            f"{SOURCE}[{EXTRAS}]",
        ),
        (*install, *test_tools()),
    ]
    with log.open("w") as file:
        for step in steps:
            done = run(*step)
            file.write(done.stdout)
            if done.returncode != 0:
                return ["–"] * len(SHOWN), f"not installed, see {log.relative_to(ROOT)}", False
        code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
        versions = run(python, "-c", code, *SHOWN).stdout.split()
        done = run(python, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *TESTS)
        file.write(done.stdout)
    return versions, done.stdout.rstrip().splitlines()[-1].strip("= "), done.returncode == 0


def test_tools() -> list[str]:
    """Returns the requirements of the tests themselves."""
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'^  ["\']((?:pytest|pytest-timeout|hypothesis)==.*)["\'],$', declared, flags=re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, metavar="VERSION")
    parser.add_argument("--sides", nargs="+", default=[*RESOLUTIONS], choices=RESOLUTIONS)
    arguments = parser.parse_args()
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if uv is None:
        sys.exit("uv is needed: pip install uv")
    shutil.rmtree(MATRIX, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    copy_sources()
    print(f"{time.strftime('%Y-%m-%d')}: make test-matrix\n")
    print(f"| Python | dependencies | {' | '.join(SHOWN)} | tests |\n|---|---|{'---|' * len(SHOWN)}---|")
    is_good = True
    for python in arguments.pythons:
        interpreter = find_interpreter(uv, python)
        for side in arguments.sides:
            versions, outcome = ["–"] * len(SHOWN), "no such interpreter here"
            if interpreter is not None:
                versions, outcome, passed = test(uv, interpreter, f"{python}-{side}", side)
                is_good = is_good and passed
            print(f"| {python} | {side} | {' | '.join(versions)} | {outcome} |", flush=True)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
