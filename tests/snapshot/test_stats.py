"""Statistics finished on the host from raw rows."""

import numpy as np
import torch

from gradprobe.ops import grad_stats
from gradprobe.snapshot.stats import finish_rows


def test_one_element_has_no_spread_whatever_rounding_does_to_its_square() -> None:
    values = torch.rand(200, generator=torch.Generator().manual_seed(0))
    rows = grad_stats(list(values.split(1))).numpy()  # [200, 6]

    assert (finish_rows(rows, np.ones(200, dtype=np.int64), 1.0)["std"] == 0).all()


def test_an_element_that_is_not_finite_has_no_number_for_its_spread() -> None:
    rows = grad_stats([torch.tensor([torch.nan]), torch.tensor([torch.inf])]).numpy()  # [2, 6]

    assert np.isnan(finish_rows(rows, np.ones(2, dtype=np.int64), 1.0)["std"]).all()
