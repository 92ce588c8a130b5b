"""Writes lesson.md from lesson.template.md: runs each command and program, and inserts its output below it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent
BLOCK = re.compile(r"```(console|python)\n(.*?)```\n", re.DOTALL)


def run_block(kind: str, source: str) -> str:
    """Runs one block.

    Args:
        kind: "console" or "python".
        source: Lines that start with "$ gradprobe", or a Python program.

    Returns:
        Its standard output.

    Raises:
        SystemExit: A command failed.
    """
    programs = [[sys.executable, "-c", source]]
    if kind == "console":
        commands = [shlex.split(line.removeprefix("$ ")) for line in source.splitlines()]
        programs = [[sys.executable, "-m", "gradprobe.cli", *arguments] for _, *arguments in commands]
    texts = []
    for program in programs:
        environment = {**os.environ, "COLUMNS": "110", "NO_COLOR": "1", "TERM": "dumb"}
        done = subprocess.run(program, cwd=DOCS, env=environment, capture_output=True, text=True)
        found_something = kind == "console" and "check" in program and done.returncode == 1
        if done.returncode != 0 and not found_something:
            raise SystemExit(f"{shlex.join(program)}\n{done.stdout}{done.stderr}exit status {done.returncode}")
        texts.append(done.stdout)
    return "".join(texts)


def with_output(block: re.Match[str]) -> str:
    """Returns a block of the template followed by its output."""
    lines = [line.rstrip() for line in run_block(block[1], block[2]).splitlines()]
    output = "\n".join(lines).strip("\n")
    return f"{block[0]}\n```text\n{output}\n```\n" if output else block[0]


def main() -> None:
    """Writes the lesson."""
    template = (DOCS / "lesson.template.md").read_text()
    try:
        text = BLOCK.sub(with_output, template)
    finally:
        for path in DOCS.glob("run.sqlite*"):
            path.unlink()
    (DOCS / "lesson.md").write_text(text)


if __name__ == "__main__":
    main()
