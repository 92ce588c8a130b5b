"""Where snapshots can be written."""

from gradprobe.sinks.jsonl import write_jsonl

__all__ = ["write_jsonl"]
