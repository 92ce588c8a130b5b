"""The script of the continuous integration: it runs `make test`, or only says what it is."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "run"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="not in a source distribution")


@pytest.fixture
def run(tmp_path):
    """Runs the script with a `make` that only prints its arguments."""
    make = tmp_path / "make"
    make.write_text('#!/bin/sh\necho "CI=$CI: make $*"\n')
    make.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CI": ""}

    def run(*arguments):
        return subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False)

    return run


def test_without_arguments_it_runs_everything(run):
    done = run()
    assert (done.returncode, done.stdout, done.stderr) == (0, "CI=true: make test\n", "")


def test_help_is_two_lines_and_runs_nothing(run):
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    usage, what = done.stdout.splitlines()
    assert usage == "usage: .ci/run [--help]"
    assert "`make test`" in what


@pytest.mark.parametrize("arguments", [["-h"], ["fast"], [""], ["--help", "fast"]])
def test_an_unknown_argument_is_an_error(run, arguments):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f".ci/run: needed no argument or --help, got: {' '.join(arguments)}\n"
