"""Finds the interpreter of the environment that gradprobe goes into, where uv hides it from an isolated build."""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path


def find_uv_target() -> str | None:
    """Asks uv for the target where this process is a build that uv runs, on systems with /proc.

    uv builds in an environment of its own and overwrites ``VIRTUAL_ENV``. It is this process's parent, though: its
    arguments, folder and variables say what it was asked to install into, and ``uv python find`` reads them as it does.

    Returns:
        The path of the interpreter; None where another frontend builds, where there is no target yet, or no /proc.
    """
    parent = Path(f"/proc/{os.getppid()}")
    try:
        uv = (parent / "exe").readlink()
        if uv.name != "uv":
            return None
        arguments = os.fsdecode((parent / "cmdline").read_bytes()).split("\0")[1:-1]
        variables = os.fsdecode((parent / "environ").read_bytes()).split("\0")[:-1]
        folder = (parent / "cwd").readlink()
    except OSError:
        return None
    environment = dict(variable.split("=", 1) for variable in variables if "=" in variable)
    if "pip" not in arguments:
        environment.pop("VIRTUAL_ENV", None)  # uv's commands for projects do not look at it
    answer = subprocess.run(
        [uv, "python", "find", *_choice_of_python(arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or None


def _choice_of_python(arguments: list[str]) -> list[str]:
    """Picks from a command line of uv what decides on the interpreter.

    Example:
        >>> _choice_of_python(["pip", "install", "-q", "-e", ".", "--python=3.12"])
        ['3.12']
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-p", "--python")
    parser.add_argument("--project")
    parser.add_argument("--system", action="store_true")
    chosen, _ = parser.parse_known_args(arguments)
    options = ["--system"] if chosen.system else []
    options += ["--project", chosen.project] if chosen.project else []
    return [*options, chosen.python] if chosen.python else options
