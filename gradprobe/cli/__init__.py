"""The command line: `commands` defines the commands, `target` reads MODULE:CALLABLE, `output` prints."""
