"""The parameters that a probe observes: order, ties, frozen ones, and errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradprobe.errors import ArgumentError
from gradprobe.observers.parameters import find_parameters, newly_trainable, unstepped_parameters


def test_many_parameters_keep_the_models_order_and_ties_come_once() -> None:
    model = nn.ModuleList(nn.Linear(2, 1) for _ in range(1000))
    for layer in model[::2]:
        layer.bias.requires_grad_(False)
    model[999].weight = model[1].weight

    found = find_parameters(model)

    names = [name for k in range(1000) for name in ([f"{k}.weight"] if k % 2 == 0 else [f"{k}.weight", f"{k}.bias"])]
    names.remove("999.weight")
    assert [site.name for site in found.sites] == names
    assert found.frozen == tuple(f"{k}.bias" for k in range(0, 1000, 2))
    tied = [site for site in found.sites if len(site.names) > 1]
    assert [(site.names, site.shape) for site in tied] == [(("1.weight", "999.weight"), (1, 2))]
    assert all(tensor is model.get_parameter(name) for name, tensor in zip(names, found.parameters, strict=True))


def test_frozen_parameters_have_all_their_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[0].weight.requires_grad_(False)
    assert find_parameters(model).frozen == ("0.weight", "1.weight")


def test_parameters_outside_the_optimizer_and_later_ones() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].bias.requires_grad_(False)
    found = find_parameters(model)
    optimizer = torch.optim.SGD([model[0].weight, model[1].bias], lr=0.1)
    assert unstepped_parameters(optimizer, found) == ("0.bias", "1.weight")
    assert newly_trainable(model, found) == ()
    model[1].bias.requires_grad_()
    model.append(nn.Linear(2, 1, bias=False))
    assert newly_trainable(model, found) == ("1.bias", "2.weight")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.ReLU(), "model: needed at least one parameter; ReLU has none"),
        (nn.Linear(2, 2).requires_grad_(False), "requires_grad=True; all 2 of Linear are frozen"),
        (nn.LazyLinear(2), "model: parameter 'weight' has no shape yet"),
    ],
    ids=["none", "frozen", "lazy"],
)
def test_models_without_a_trainable_parameter(model: nn.Module, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        find_parameters(model)
