"""`check_gradient_flow`: what it sends through a model, and the loss that it takes the gradient of."""

from __future__ import annotations

import collections
import random
import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import gradprobe
from gradprobe.probe.check import InputSpec, parse_input


class Seq2Seq(nn.Module):
    """A model that needs keywords, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(
        self, input_ids: torch.Tensor, decoder_input_ids: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor | None]:
        assert decoder_input_ids is not None, "needs decoder_input_ids"
        logits = self.head(self.words(input_ids).mean(1, keepdim=True) + self.words(decoder_input_ids))
        loss = None if labels is None else 3.0 * nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


class Graph(nn.Module):
    """A graph network: its tensors have no common batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        source, target = edges
        return torch.zeros(len(x), 2).index_add(0, target, self.linear(x[source]))


class Encoding(collections.UserDict[str, torch.Tensor]):
    """A mapping that is no dict, as the BatchEncoding of a tokenizer."""


class Data(NamedTuple):
    x: torch.Tensor
    edges: torch.Tensor


class OnObjects(Graph):
    """A model whose only argument is a batch object."""

    def forward(self, data: Any) -> torch.Tensor:  # type: ignore[override]
        return super().forward(data[0], data[1])


IDS = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "decoder_input_ids": torch.tensor([[7], [8]])}
NODES = Data(torch.ones(5, 4), torch.tensor([[0, 1, 2, 0], [1, 1, 1, 3]]))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Seq2Seq, IDS),
        (Seq2Seq, Encoding(IDS)),
        (Seq2Seq, tuple(IDS.values())),
        (Graph, tuple(NODES)),
        (OnObjects, NODES),
        (OnObjects, list(NODES)),
        (lambda: nn.Linear(4, 2), torch.ones(3, 4)),
    ],
    ids=["dict", "mapping", "tuple", "graph", "named tuple", "list", "tensor"],
)
def test_a_batch_of_the_users_own(model: Any, inputs: object) -> None:
    torch.manual_seed(0)
    report = gradprobe.check_gradient_flow(model(), inputs=inputs)
    assert report.verdict == "healthy"
    assert all(layer.norm > 0 for layer in report.layers)
    assert report.layers[-1].name.endswith("bias")


def test_the_gradient_is_that_of_the_given_loss() -> None:
    model, x = nn.Linear(4, 2), torch.randn(6, 4)
    report = gradprobe.check_gradient_flow(model, inputs=x, loss=lambda output: output.square().mean())
    model(x).square().mean().backward()
    assert model.weight.grad is not None
    assert {layer.name: layer.norm for layer in report.layers}["weight"] == pytest.approx(
        float(model.weight.grad.norm())
    )


def test_the_models_own_loss_is_used_and_said() -> None:
    model, labels = Seq2Seq(), torch.tensor([[3], [4]])
    report = gradprobe.check_gradient_flow(model, inputs={**IDS, "labels": labels})
    output = model(**IDS, labels=labels)
    assert output["loss"] is not None
    output["loss"].backward()
    assert model.head.bias.grad is not None
    norms = {layer.name: layer.norm for layer in report.layers}
    assert norms["head.bias"] == pytest.approx(float(model.head.bias.grad.norm()))
    assert "the gradient is that of the loss that the model returns" in str(report)
    assert report.as_dict()["loss"] == "the loss that the model returns"
    given = gradprobe.check_gradient_flow(model, inputs=IDS, loss=lambda output: output["logits"].sum())
    assert given.loss == "the given loss"
    assert gradprobe.check_gradient_flow(model, inputs=IDS).loss == "a random projection of the outputs"


def test_an_error_of_the_model_is_left_as_it_is() -> None:
    with pytest.raises(AssertionError, match="needs decoder_input_ids"):
        gradprobe.check_gradient_flow(Seq2Seq(), inputs=IDS["input_ids"])
    with pytest.raises(ZeroDivisionError):
        gradprobe.check_gradient_flow(Graph(), inputs=tuple(NODES), loss=lambda output: output / 0 + 1 // 0)


def test_random_inputs_that_do_not_fit_point_to_real_ones() -> None:
    with pytest.raises(gradprobe.ArgumentError, match=r"cannot take .*; give real inputs with inputs= .*--batch"):
        gradprobe.check_gradient_flow(Graph(), ["4", "int64[0:3]:7"], batch_size=3)


def test_inputs_and_random_numbers_are_left_as_they_were() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    x.grad = torch.full_like(x, 7.0)

    class Shuffling(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            random.random()
            return super().forward(x) + torch.rand(2)

    model = Shuffling(4, 2)
    torch.manual_seed(3)
    random.seed(3)
    expected = (torch.rand(1), random.random())
    torch.manual_seed(3)
    random.seed(3)
    gradprobe.check_gradient_flow(model, inputs=x)
    assert torch.equal(x.grad, torch.full_like(x, 7.0))
    assert (torch.rand(1), random.random()) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "input_shape: needed sizes such as .*, or inputs= in their place, got neither"),
        ({"input_shape": (4,), "inputs": torch.ones(1, 4)}, "input_shape: needed .* got both"),
        ({"inputs": {0: torch.ones(1, 4)}}, r"inputs: needed names as the keys of a mapping, got \[0\]"),
        ({"input_shape": (4,), "loss": 3}, "loss: needed a function of the model's output, got int"),
        ({"input_shape": (4,), "loss": lambda y: 3.0}, "loss: needed .* a scalar tensor; it returned 3.0"),
        ({"input_shape": (4,), "loss": lambda y: y}, r"loss: needed a scalar .* has shape \(1, 2\)"),
        ({"input_shape": (4,), "loss": lambda y: y.sum().detach()}, "loss: needed a scalar .* has no gradient"),
    ],
    ids=["nothing", "both", "keys", "no function", "float", "vector", "detached"],
)
def test_wrong_inputs_and_losses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(gradprobe.ArgumentError, match=message):
        gradprobe.check_gradient_flow(nn.Linear(4, 2), **arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3,32,32", InputSpec((3, 32, 32))),
        ("7", InputSpec((7,))),
        ("float64:3,8", InputSpec((3, 8), torch.float64)),
        ("int64[0:1000]:16", InputSpec((16,), torch.int64, 0, 1000)),
        ("int32[-5:5]:", InputSpec((), torch.int32, -5, 5)),
    ],
)
def test_inputs_as_text(text: str, expected: InputSpec) -> None:
    assert parse_input(text) == expected
    drawn = expected.draw(2, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert (drawn.shape, drawn.dtype) == ((2, *expected.shape), expected.dtype)


@pytest.mark.parametrize(
    "text",
    ["", "3x32", "int64[5:5]:3", "float32[0:3]:3", "int7:3", "nn:3", "3,-1", ","],
    ids=lambda text: text or "empty",
)
def test_bad_input_text(text: str) -> None:
    with pytest.raises(gradprobe.ArgumentError, match=re.escape(repr(text)) + "|int7|'nn'"):
        parse_input(text)
