"""What a check sends through a model: random tensors of given shapes, or the user's own batch; and the loss."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import nn

from gradprobe.errors import ArgumentError

Loss = Callable[[Any], torch.Tensor]
MODELS_LOSS = "the loss that the model returns"

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.complex64,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    )
}
_SPEC = re.compile(r"^(?:(?P<dtype>\w+)(?:\[(?P<low>-?\d+):(?P<high>-?\d+)\])?:)?(?P<shape>\d+(?:,\d+)*)?$")


@dataclass(frozen=True, slots=True)
class InputSpec:
    """A random input of a model.

    Attributes:
        shape: Shape of one example, without the batch.
        dtype: Floating dtypes are drawn from the standard normal distribution, integer ones uniformly.
        low: Smallest integer drawn.
        high: One more than the largest integer drawn.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    low: int = 0
    high: int = 2

    def draw(self, batch_size: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
        """Draws a batch, a tensor of shape [batch_size, *shape]."""
        shape = (batch_size, *self.shape)
        if self.dtype.is_floating_point or self.dtype.is_complex:
            return torch.randn(shape, generator=generator, dtype=self.dtype).to(device)
        return torch.randint(self.low, self.high, shape, generator=generator).to(device, self.dtype)


def parse_input(text: str) -> InputSpec:
    """Parses the description of an input.

    Args:
        text: `3,32,32` for float32 of that shape; `int64[0:1000]:16` for 16 integers from 0 to 999; `float64:3,8,8`.

    Returns:
        The input.

    Raises:
        ArgumentError: The text has another form.

    Example:
        >>> parse_input("int64[0:1000]:16")
        InputSpec(shape=(16,), dtype=torch.int64, low=0, high=1000)
    """
    match = _SPEC.match(text.replace(" ", ""))
    if match is None or not text.strip():
        raise ArgumentError(f"input: needed SHAPE, DTYPE:SHAPE or DTYPE[LOW:HIGH]:SHAPE, e.g. 3,32,32, got {text!r}")
    dtype = DTYPES.get(match["dtype"] or "float32")
    if dtype is None:
        raise ArgumentError(f"input: needed one of the dtypes {', '.join(DTYPES)}, got {match['dtype']!r} in {text!r}")
    shape = tuple(int(size) for size in match["shape"].split(",")) if match["shape"] else ()
    if match["low"] is None:
        return InputSpec(shape, dtype)
    low, high = int(match["low"]), int(match["high"])
    if dtype.is_floating_point or dtype.is_complex or low >= high:
        raise ArgumentError(f"input: [LOW:HIGH] needs an integer dtype and LOW < HIGH, got {text!r}")
    return InputSpec(shape, dtype, low, high)


@dataclass(frozen=True, slots=True)
class Batch:
    """The arguments of one forward pass.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        is_random: They were drawn at random, so an error of the model may be due to their shapes.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    is_random: bool = False

    def run(self, model: nn.Module) -> Any:
        """Calls the model.

        Raises:
            ArgumentError: The inputs are random and the model cannot take them. An error of a model that was given the
                user's own inputs is left as it is.
        """
        if not self.is_random:
            return model(*self.args, **self.kwargs)
        try:
            return model(*self.args)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            shapes = ", ".join(f"{tuple(one.shape)} {str(one.dtype).removeprefix('torch.')}" for one in self.args)
            hint = "; give real inputs with inputs= (command line: --batch) if shapes are not enough"
            if len(self.args[0]) == 1 and "more than 1 value per channel" in str(error):
                hint = "; batch normalisation needs a batch_size of at least 2 here"
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ArgumentError(
                f"input_shape: {type(model).__name__} cannot take inputs of shape {shapes}: {reason}{hint}"
            ) from error

    def leaves(self) -> list[torch.Tensor]:
        """Returns the tensors in which a backward pass would accumulate a gradient."""
        return [tensor for tensor in tensors_of((self.args, self.kwargs)) if tensor.requires_grad and tensor.is_leaf]


def random_batch(input_shape: Any, batch_size: int, generator: torch.Generator, device: torch.device) -> Batch:
    """Draws a batch of the shapes that a user has given.

    Args:
        input_shape: As in `check_gradient_flow`.
        batch_size: Examples in the batch.
        generator: Source of the numbers.
        device: Where the model is.

    Returns:
        The batch.

    Raises:
        ArgumentError: The shapes or the size are invalid.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ArgumentError(f"batch_size: needed an integer of at least 1, got {batch_size!r}")
    specs = _specs(input_shape)
    return Batch(tuple(spec.draw(batch_size, generator, device) for spec in specs), is_random=True)


def given_batch(inputs: Any) -> Batch:
    """Reads the inputs that a user has given.

    Args:
        inputs: A tuple holds positional arguments, a mapping keyword arguments; anything else is the one argument.

    Returns:
        The batch.

    Raises:
        ArgumentError: The keys of a mapping are not names.

    Example:
        >>> given_batch({"input_ids": [3, 4]}).kwargs
        {'input_ids': [3, 4]}
    """
    if isinstance(inputs, Mapping):
        if not all(isinstance(key, str) for key in inputs):
            raise ArgumentError(f"inputs: needed names as the keys of a mapping, got {list(inputs)[:3]}")
        return Batch(kwargs=dict(inputs))
    if isinstance(inputs, tuple) and not hasattr(inputs, "_fields"):  # a named tuple is one object
        return Batch(inputs)
    return Batch((inputs,))


def scalar_loss(output: Any, loss: Loss | None, generator: torch.Generator) -> tuple[torch.Tensor, str]:
    """Computes the scalar whose gradient is checked.

    Args:
        output: What the model returned.
        loss: The user's function of the output, or None: then the output's own `.loss` if it is a scalar with a
            gradient, else a random projection of all outputs.
        generator: Source of the projection.

    Returns:
        A 0-d tensor, and in words what it is.

    Raises:
        ArgumentError: There is no such scalar.
    """
    if loss is not None:
        value = loss(output)
        if not isinstance(value, torch.Tensor):
            raise ArgumentError(f"loss: needed a function that returns a scalar tensor; it returned {value!r:.80}")
        if value.numel() != 1 or not value.requires_grad:
            problem = f"shape {tuple(value.shape)}" if value.numel() != 1 else "no gradient"
            raise ArgumentError(
                f"loss: needed a scalar that depends on a trainable parameter; the tensor it returned has {problem}"
            )
        return value.reshape(()), "the given loss"
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, torch.Tensor) and own.numel() == 1 and own.requires_grad:
        return own.reshape(()), MODELS_LOSS
    return _projection(output, generator), "a random projection of the outputs"


def _projection(output: Any, generator: torch.Generator) -> torch.Tensor:
    terms = []
    for tensor in tensors_of(output):
        if tensor.requires_grad and (tensor.is_floating_point() or tensor.is_complex()):
            direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor.device)
            values = tensor.real if tensor.is_complex() else tensor
            terms.append((values.float() * direction).sum() / math.sqrt(max(tensor.numel(), 1)))
    if not terms:
        raise ArgumentError("model: needed an output that depends on a trainable parameter; none of its outputs does")
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def tensors_of(output: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors in nested sequences, mappings and dataclass instances."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors_of(value)
    elif is_dataclass(output) and not isinstance(output, type):
        yield from tensors_of(vars(output))


def _specs(input_shape: Any) -> list[InputSpec]:
    if isinstance(input_shape, str):
        return [parse_input(input_shape)]
    if isinstance(input_shape, InputSpec):
        return [input_shape]
    if isinstance(input_shape, Sequence):
        if all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in input_shape):
            return [InputSpec(tuple(input_shape))]
        if not any(isinstance(size, (int, float)) for size in input_shape):
            return [spec for part in input_shape for spec in _specs(part)]
    raise ArgumentError(
        f"input_shape: needed sizes such as (3, 32, 32), text, an InputSpec or a sequence of these, got {input_shape!r}"
    )
