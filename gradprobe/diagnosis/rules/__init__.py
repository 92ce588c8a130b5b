"""The rules of the diagnosis, each a pure function from snapshots to findings. None needs torch."""
