"""SGD as `torch.optim.SGD` computes it, without importing Dynamo.

Some methods of torch's optimizers import Dynamo when they are first called, so that it leaves them out of its graphs. A
process that compiles nothing waits a second for that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch


class Sgd(torch.optim.SGD):
    """`torch.optim.SGD` with the same state; its steps must not be compiled."""

    step: Callable[..., Any] = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))
    zero_grad = inspect.unwrap(torch.optim.SGD.zero_grad)
    add_param_group = inspect.unwrap(torch.optim.SGD.add_param_group)
    state_dict = inspect.unwrap(torch.optim.SGD.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.SGD.load_state_dict)
