"""Writers of snapshots."""

from gradprobe.sinks.jsonl import write_jsonl

__all__ = ["write_jsonl"]
