"""Readers of data sets: one module per kind of ``--data``. `raw` has the parts that they share."""
