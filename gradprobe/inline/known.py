"""What names say: functions and methods of tensors, and variables that hold no part of the residual stream."""

from __future__ import annotations

import re

# What a tensor, or a function of that name, gives without any gradient for its argument.
UNRELATED = frozenset(
    re.findall(
        r"\w+",
        """shape size device dtype ndim dim numel itemsize requires_grad training detach item tolist stride
        zeros_like ones_like empty_like full_like rand_like randn_like arange linspace zeros ones empty full tensor rand
        randn new_zeros new_ones new_empty new_full new_tensor len range isinstance hasattr int bool""",
    )
)
# Names of what is added to scores, broadcast, and of sizes, which come along with tensors.
NO_STREAM = re.compile("(mask|bias|shape|size|dimension|dim|height|width|length|len)(es|s)?$")
# Methods by which something else comes to refer to their argument.
MUTATORS = frozenset(["append", "extend", "insert", "update", "setdefault", "appendleft"])
