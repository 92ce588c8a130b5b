"""Trains plain and residual stacks of ReLU layers to learn y = x at several depths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradprobe.errors import ArgumentError
from gradprobe.experiments import STACK_STEPS
from gradprobe.experiments.common import check_seeds, one_thread

DEPTHS = (1, 2, 4, 8, 16, 32)
WIDTH = 16
BATCH_SIZE = 128
TEST_INPUTS = 4096
LEARNING_RATE = 1e-3


@dataclass(frozen=True, slots=True)
class Stack:
    """One stack, before and after learning y = x.

    Attributes:
        depth: Number of layers.
        kind: ``"plain"``, y = relu(Wx + b), or ``"residual"``, y = relu(x + Wx + b).
        init: Initialisation of W, ``"he"`` or ``"zero"``; b starts at 0.
        start_loss: Mean squared error over the test inputs before the first step.
        final_loss: The same after the last step.
        start_distance: Initial distance of a layer from the identity, mean over the layers: ||W - I||_F / sqrt(width)
            for a plain layer and ||W||_F / sqrt(width) for a residual one.
        distance: The same after the last step.
    """

    depth: int
    kind: str
    init: str
    start_loss: float
    final_loss: float
    start_distance: float
    distance: float


@dataclass(frozen=True, slots=True)
class Stacks:
    """All stacks, and the conditions under which they learned.

    Attributes:
        steps: Steps of Adam at a learning rate of 1e-3, each on a fresh batch of 128 inputs |N(0, 1)|.
        width: Width of every layer.
        constant_loss: Error of the best constant output, the mean input.
        stacks: For each depth the plain stack, the residual one, and the residual one that starts at 0.
    """

    steps: int
    width: int
    constant_loss: float
    stacks: tuple[Stack, ...]

    def as_dict(self) -> dict[str, object]:
        """Converts the result to plain data."""
        return {**asdict(self), "conclusions": list(self.conclusions)}

    def of(self, kind: str, init: str) -> tuple[Stack, ...]:
        """Returns the stacks of one kind and initialisation, by depth."""
        return tuple(stack for stack in self.stacks if (stack.kind, stack.init) == (kind, init))

    @property
    def conclusions(self) -> tuple[str, ...]:
        """The conclusions from the numbers, in sentences."""
        plain, residual, zero = self.of("plain", "he"), self.of("residual", "he")[-1], self.of("residual", "zero")[-1]
        depth, deepest = plain[-1].depth, plain[-1]
        lost = [stack.depth for stack in plain if not stack.final_loss < self.constant_loss]
        if lost:
            named = ", ".join(map(str, lost))
            text = f"Plain stacks of {named} layers end no better than a constant output ({self.constant_loss:.2g})."
        else:
            text = f"Every plain stack ends better than a constant output ({self.constant_loss:.2g})."
        text += (
            f" At {depth} layers the loss is {deepest.final_loss:.2g}, and the distance of a layer from the identity "
            f"is {deepest.distance:.2g} ({deepest.start_distance:.2g} at the start)."
        )
        better = "less" if residual.final_loss < deepest.final_loss else "no less"
        other = (
            f"The residual stack of {depth} layers, from the same He weights, has a loss of {residual.start_loss:.2g} "
            f"at the start and {residual.final_loss:.2g} at the end, {better} than the plain one; from W = 0, its "
            f"natural start, {zero.start_loss:.2g} and {zero.final_loss:.2g}"
        )
        other += ", since it starts as the identity." if zero.start_loss == 0 else "."
        return (text, other)


def train_stacks(
    *,
    seed: int = 0,
    depths: Sequence[int] = DEPTHS,
    steps: int = STACK_STEPS,
    advance: Callable[[int], None] = lambda depth: None,
) -> Stacks:
    """Trains plain and residual stacks of ReLU layers to return their own non-negative input.

    Plain and residual stacks of one depth start from the same He weights and see the same inputs. Residual stacks are
    also trained from W = 0, their natural start; a plain stack that starts at 0 has no gradient.

    Args:
        seed: Seed of the weights and inputs, a whole number from 0 to 2^32 - 1.
        depths: Depths of the stacks, in layers, at least 1 and in rising order.
        steps: Training steps, at least 1.
        advance: Called with the depth of each stack when it is trained.

    Returns:
        The losses, and the distances of the layers from the identity.

    Raises:
        ArgumentError: An argument is not one of the values above.

    Example:
        >>> zero = train_stacks(depths=[2], steps=1).of("residual", "zero")[0]
        >>> zero.start_loss, zero.final_loss
        (0.0, 0.0)
    """
    check_options(seed, depths, steps)
    # A separate random stream: the training inputs come from the seed itself.
    test = _inputs(TEST_INPUTS, torch.Generator().manual_seed(seed + 2**32))  # [N, width]
    constant_loss = F.mse_loss(test.mean(dim=0).expand_as(test), test).item()
    stacks = []
    with one_thread():
        for depth in depths:
            for kind, init in (("plain", "he"), ("residual", "he"), ("residual", "zero")):
                stacks.append(_train(depth, kind, init, seed, steps, test))
                advance(depth)
    return Stacks(steps, WIDTH, constant_loss, tuple(stacks))


def check_options(seed: int, depths: Sequence[int], steps: int) -> None:
    """Checks the arguments of `train_stacks`, before anything is trained.

    Raises:
        ArgumentError: An argument is invalid.
    """
    if not depths or min(depths) < 1 or sorted(set(depths)) != list(depths):
        raise ArgumentError(f"stack depths: needed whole numbers of at least 1 in rising order, got {list(depths)}")
    if steps < 1:
        raise ArgumentError(f"steps: needed at least 1, got {steps}")
    check_seeds("seed", [seed])


def _inputs(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, WIDTH, generator=generator).abs()


def _train(depth: int, kind: str, init: str, seed: int, steps: int, test: Tensor) -> Stack:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.zeros(WIDTH, WIDTH) for _ in range(depth)]
    biases = [torch.zeros(WIDTH, requires_grad=True) for _ in range(depth)]
    for weight in weights:
        # Drawn for a start at zero too, so that every stack sees the same inputs.
        drawn = nn.init.kaiming_normal_(torch.empty_like(weight), nonlinearity="relu", generator=generator)
        weight.copy_(drawn if init == "he" else weight).requires_grad_()

    def forward(x: Tensor) -> Tensor:
        for weight, bias in zip(weights, biases, strict=True):
            f = F.linear(x, weight, bias)
            x = torch.relu(x + f if kind == "residual" else f)
        return x

    def measure() -> tuple[float, float]:
        identity = torch.eye(WIDTH) if kind == "plain" else torch.zeros(WIDTH, WIDTH)
        with torch.no_grad():
            norms = [torch.linalg.norm(weight - identity).item() for weight in weights]
            return F.mse_loss(forward(test), test).item(), sum(norms) / depth / math.sqrt(WIDTH)

    start_loss, start_distance = measure()
    optimizer = torch.optim.Adam([*weights, *biases], lr=LEARNING_RATE)
    for _ in range(steps):
        x = _inputs(BATCH_SIZE, generator)
        loss = F.mse_loss(forward(x), x)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
    final_loss, distance = measure()
    return Stack(depth, kind, init, start_loss, final_loss, start_distance, distance)
