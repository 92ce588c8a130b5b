"""`python -m gradprobe.cli`, the same as the installed command."""

from gradprobe.cli.commands import main

main()
