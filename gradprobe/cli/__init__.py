"""The command line: `commands` has the commands, `target` reads MODULE:CALLABLE, `output` prints, `watch` follows."""
