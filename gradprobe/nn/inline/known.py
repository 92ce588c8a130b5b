"""What names say: functions and methods of tensors, and variables that hold no part of the residual stream."""

from __future__ import annotations

import functools
import re
import sys

import torch

# What a tensor, or a function of that name, gives without any gradient for its argument.
UNRELATED = frozenset(
    re.findall(
        r"\w+",
        """shape size device dtype ndim dim numel itemsize requires_grad training detach item tolist stride
        zeros_like ones_like empty_like full_like rand_like randn_like arange linspace zeros ones empty full tensor rand
        randn new_zeros new_ones new_empty new_full new_tensor len range isinstance hasattr int bool""",
    )
)
# Functions that mix what they are given, or apply parameters that they are handed.
LAYERS = frozenset(
    re.findall(
        r"\w+",
        """linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
        matmul mm mv bmm addmm addmv addbmm baddbmm einsum tensordot scaled_dot_product_attention
        layer_norm rms_norm batch_norm instance_norm group_norm embedding fft fft2 fftn rfft rfft2 rfftn""",
    )
)
# Functions that bend what they are given: without one in between, two layers are as good as one.
ACTIVATIONS = frozenset(
    re.findall(
        r"\w+",
        """relu relu6 leaky_relu prelu rrelu elu celu selu gelu silu mish softplus softsign softmax log_softmax
        sigmoid logsigmoid tanh hardtanh hardswish hardsigmoid glu""",
    )
)
# Methods by which something else comes to refer to their argument.
MUTATORS = frozenset(["append", "extend", "insert", "update", "setdefault", "appendleft"])
# Methods that give what they were called on, or what it holds.
METHODS = frozenset(name for kind in (torch.Tensor, list, dict) for name in dir(kind))
# Methods by which a module's children are gone over.
CHILDREN = frozenset(["children", "named_children", "items", "values"])
# Packages whose functions are known by their names, and hold no layers of the model.
LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "einops"}
_NO_STREAM = re.compile("(mask|bias|shape|size|dimension|dim|height|width|length|len|id|idx|index|bucket|loss)(es|s)?$")


@functools.cache
def is_no_stream(name: str) -> bool:
    """Tells whether a variable of a name has no part of the residual stream.

    Args:
        name: Of a variable.

    Returns:
        True for what is added to scores, for sizes and indices, which come along with tensors, and for losses.

    Example:
        >>> is_no_stream("attention_mask"), is_no_stream("hidden_states")
        (True, False)
    """
    return _NO_STREAM.search(name) is not None
