"""Exit statuses of the commands; docs/command_line.md says what they mean for each command."""

from __future__ import annotations

import signal

FOUND = 1  # something is wrong with what was checked, or two runs differ
FAILED = 2  # bad arguments, or any other `GradprobeError`
CRASHED = 3
TIMED_OUT = 124  # as `timeout` has it
# What a shell reports of a program that a signal ended.
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
