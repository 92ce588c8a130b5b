"""Runs the command line as `python -m gradprobe.cli`."""

from gradprobe.cli.commands import main

main()
