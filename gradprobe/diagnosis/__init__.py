"""Verdicts from snapshots. Needs no torch."""
