"""Models that add in place to a tensor and then read it through another reference."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from helpers.inline_cases import OneLayer
from torch import Tensor


class InPlaceInput(OneLayer):
    def forward(self, x: Tensor) -> Tensor:
        x += torch.tanh(self.layer(x * 1.0))
        return x


class InPlaceRead(OneLayer):
    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        before = out.view(-1, out.shape[-1])
        out += x
        return out * before.view_as(out)


class InPlaceListed(OneLayer):
    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        out = self.layer(x)
        seen.append(out)
        out += x
        return out * seen[0]


class InPlaceKept(OneLayer):
    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        self.last = out
        out += x
        return out * self.last


class InPlaceKeptByMethod(OneLayer):
    def _note(self, out: Tensor) -> None:
        self.last = out

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        self._note(out)
        out += x
        return out * self.last


class InPlaceFlag(OneLayer):
    """Reads the overwritten tensor only if an attribute, which may change, says so."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.reads = False

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        before = out
        out += x
        if self.reads:
            out = out * before
        return out


class InPlaceClosure(OneLayer):
    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        before = out

        def kept() -> Tensor:
            return before

        out += x
        return out * kept()


class InPlaceAttribute(OneLayer):
    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        setattr(self, "last", out)  # noqa: B010
        out.add_(x)
        return out * self.last


class Keeping(OneLayer):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.layer(x)
        return self.last


class InPlaceKeptByChild(OneLayer):
    """Reads a tensor that a child keeps, as an auxiliary loss does."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.layer = Keeping(width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        out += x
        return out * self.layer.last


class InPlaceEinsum(OneLayer):
    """An einsum of one operand returns a view."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        same = torch.einsum("bld->bld", out)
        same += x
        return same * out


class InPlaceYielded(OneLayer):
    def steps(self, x: Tensor) -> Iterator[Tensor]:
        out = self.layer(x)
        yield out
        out += x
        yield out

    def forward(self, x: Tensor) -> Tensor:
        first, second = list(self.steps(x))
        return first * second


class InPlaceFinally(OneLayer):
    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        try:
            return out
        finally:
            out += x


class InPlaceHooked(OneLayer):
    """Registers a hook on the tensor before the addition."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        out.register_hook(lambda gradient: gradient * 3)
        out += x
        return out


class InPlaceView(OneLayer):
    """Writes to a view and reads the whole tensor."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        view = out.transpose(1, 2)
        view += x.transpose(1, 2)
        return out
