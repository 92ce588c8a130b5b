"""The first of scikit-learn's digits: enough for a small network to learn something in seconds."""

from __future__ import annotations

from dataclasses import replace

from gradprobe.experiments.data import Dataset, load


def few_digits(n_train: int, n_test: int) -> Dataset:
    """Returns the data set with its first images only."""
    digits = load("digits")
    return replace(
        digits,
        train_x=digits.train_x[:n_train],
        train_y=digits.train_y[:n_train],
        test_x=digits.test_x[:n_test],
        test_y=digits.test_y[:n_test],
    )
