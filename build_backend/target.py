"""Finds the interpreter of the target environment of an isolated build by uv, which hides it from the build."""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path


def find_uv_target() -> str | None:
    """Asks uv for the target environment, if uv runs this build.

    uv builds in a separate environment and overwrites ``VIRTUAL_ENV``. But uv is this process's parent: its arguments,
    folder and variables determine the target, and ``uv python find`` evaluates them in the same way.

    Returns:
        The path of the interpreter; None if another frontend runs the build, if there is no target yet, or without
        /proc.
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
        environment.pop("VIRTUAL_ENV", None)  # uv's project commands ignore it
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
    """Returns those of uv's arguments that choose the interpreter.

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
