"""Statistics computed on the host from raw rows."""

import numpy as np
import torch

from gradprobe.ops import grad_stats
from gradprobe.snapshot.stats import finish_rows


def test_one_element_has_a_std_of_exactly_zero() -> None:
    values = torch.rand(200, generator=torch.Generator().manual_seed(0))
    rows = grad_stats(list(values.split(1))).numpy()  # [200, 6]

    assert (finish_rows(rows, np.ones(200, dtype=np.int64), 1.0)["std"] == 0).all()


def test_a_nonfinite_element_has_a_std_of_nan() -> None:
    rows = grad_stats([torch.tensor([torch.nan]), torch.tensor([torch.inf])]).numpy()  # [2, 6]

    assert np.isnan(finish_rows(rows, np.ones(2, dtype=np.int64), 1.0)["std"]).all()
