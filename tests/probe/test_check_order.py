"""`check_gradient_flow` lists parameters in the order in which the forward pass uses them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradprobe


def order(model: nn.Module, x: torch.Tensor) -> list[str]:
    """Returns the names of the parameters as a check lists them."""
    layers = gradprobe.check_gradient_flow(model, inputs=x).layers
    assert all(after.depth - before.depth in (0, 1) for before, after in pairwise(layers))
    return [layer.name for layer in layers]


class Encoder(nn.Module):
    """torch's attention never calls its out_proj."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 3)  # registered first, used last
        self.proj = nn.Linear(8, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.proj(x)))  # type: ignore[no-any-return]


def test_the_head_stands_behind_the_projections_of_attention() -> None:
    names = order(Encoder(), torch.randn(2, 6, 8))
    assert names[:2] == ["proj.weight", "proj.bias"]
    assert names[-2:] == ["head.weight", "head.bias"]
    for k in range(2):
        attention = f"encoder.layers.{k}.self_attn"
        middle = [f"{attention}.in_proj_weight", f"{attention}.out_proj.weight", f"encoder.layers.{k}.norm1.weight"]
        assert sorted(middle, key=names.index) == middle


class Readers(nn.Module):
    """Parameters that are used without a call of their module: read by `.weight`, or held directly."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.queries = nn.Embedding(3, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.conv = nn.Conv1d(4, 4, 1)
        self.first = nn.Linear(4, 4)
        self.shift = nn.Parameter(torch.zeros(1, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.scale.shape == (4,)
        assert self.head.weight.dtype == x.dtype
        x = self.shift.expand(len(x), 4) + self.first(x)
        x = x + x @ self.conv.weight.squeeze(-1).t()
        x = x[:, None] + self.queries.weight
        return self.head(x * self.scale)  # type: ignore[no-any-return]


def test_parameters_that_are_read_have_a_place() -> None:
    assert order(Readers(), torch.randn(5, 4)) == [
        "shift",
        "first.weight",
        "first.bias",
        "conv.weight",
        "queries.weight",
        "scale",
        "head.weight",
        "head.bias",
        "conv.bias",  # not used
    ]


class Checkpointed(nn.Module):
    """A model whose middle is computed again in the backward pass."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.head, self.middle, self.first = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.head(checkpoint(self.middle, x, use_reentrant=self.use_reentrant))  # type: ignore[no-any-return]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_keeps_the_order(use_reentrant: bool) -> None:
    names = order(Checkpointed(use_reentrant), torch.randn(5, 4))
    assert names == [f"{layer}.{role}" for layer in ("first", "middle", "head") for role in ("weight", "bias")]


def test_a_tied_weight_stands_at_its_first_use() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.middle, self.head, self.words = nn.Linear(4, 4), nn.Linear(4, 9), nn.Embedding(9, 4)
            self.head.weight = self.words.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.middle(self.words(ids)))  # type: ignore[no-any-return]

    assert order(Tied(), torch.tensor([[1, 2]])) == ["head.weight", "middle.weight", "middle.bias", "head.bias"]


def test_a_compiled_model_is_checked_as_written() -> None:
    model = Encoder()
    expected = gradprobe.check_gradient_flow(model, "6,8", batch_size=2)
    compiled: Any = torch.compile(model, backend="eager")
    report = gradprobe.check_gradient_flow(compiled, "6,8", batch_size=2)
    assert [layer.norm for layer in report.layers] == [layer.norm for layer in expected.layers]
    assert report.layers[-1].name.endswith("head.bias")
