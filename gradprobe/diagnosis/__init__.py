"""The diagnosis of a run from its snapshots. Needs no torch."""
