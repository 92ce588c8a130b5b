"""Known names: of functions and tensor methods, and of variables that are not part of the residual stream."""

from __future__ import annotations

import functools
import re
import sys

import torch

# Attributes, methods and functions whose result carries no gradient to their argument.
UNRELATED = frozenset(
    re.findall(
        r"\w+",
        """shape size device dtype ndim dim numel itemsize requires_grad training detach item tolist stride
        zeros_like ones_like empty_like full_like rand_like randn_like arange linspace zeros ones empty full tensor rand
        randn new_zeros new_ones new_empty new_full new_tensor len range isinstance hasattr int bool""",
    )
)
# Functions that count as a layer: they mix elements or apply parameters passed to them.
LAYERS = frozenset(
    re.findall(
        r"\w+",
        """linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
        matmul mm mv bmm addmm addmv addbmm baddbmm einsum tensordot scaled_dot_product_attention
        layer_norm rms_norm batch_norm instance_norm group_norm embedding fft fft2 fftn rfft rfft2 rfftn""",
    )
)
# Nonlinear functions: two linear layers without one in between are equivalent to one.
ACTIVATIONS = frozenset(
    re.findall(
        r"\w+",
        """relu relu6 leaky_relu prelu rrelu elu celu selu gelu silu mish softplus softsign softmax log_softmax
        sigmoid logsigmoid tanh hardtanh hardswish hardsigmoid glu""",
    )
)
# Methods that store their argument in the object.
MUTATORS = frozenset(["append", "extend", "insert", "update", "setdefault", "appendleft"])
# Methods whose result is made from the object they are called on.
METHODS = frozenset(name for kind in (torch.Tensor, list, dict) for name in dir(kind))
# Methods that iterate over a module's children.
CHILDREN = frozenset(["children", "named_children", "items", "values"])
# Packages whose functions are known by name and contain no layers of the model.
LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "einops"}
_NO_STREAM = re.compile("(mask|bias|shape|size|dimension|dim|height|width|length|len|id|idx|index|bucket|loss)(es|s)?$")


@functools.cache
def is_no_stream(name: str) -> bool:
    """Returns whether a variable is not part of the residual stream, judging by its name.

    Args:
        name: Name of a variable.

    Returns:
        True for masks and biases, sizes, indices and losses.

    Example:
        >>> is_no_stream("attention_mask"), is_no_stream("hidden_states")
        (True, False)
    """
    return _NO_STREAM.search(name) is not None
