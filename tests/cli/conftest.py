"""The command line, run in this process."""

import sys

import pytest

from gradprobe.cli import commands as cli


@pytest.fixture
def gradprobe(monkeypatch, capsys):
    """Runs a command as the installed script does; returns its exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gradprobe", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return run
