"""The parameters that a probe observes: order, ties, frozen ones, and errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradprobe.errors import ArgumentError
from gradprobe.observers.parameters import find_parameters, stepped_by


def test_many_parameters_keep_the_models_order_and_ties_come_once() -> None:
    model = nn.ModuleList(nn.Linear(2, 1) for _ in range(1000))
    for layer in model[::2]:
        layer.bias.requires_grad_(False)
    model[999].weight = model[1].weight

    found = find_parameters(model)

    names = [name for k in range(1000) for name in ([f"{k}.weight"] if k % 2 == 0 else [f"{k}.weight", f"{k}.bias"])]
    names.remove("999.weight")
    assert [site.name for site in found.sites] == names
    assert found.frozen_names == tuple(f"{k}.bias" for k in range(0, 1000, 2))
    tied = [site for site in found.sites if len(site.names) > 1]
    assert [(site.names, site.shape) for site in tied] == [(("1.weight", "999.weight"), (1, 2))]
    assert all(tensor is model.get_parameter(name) for name, tensor in zip(names, found.parameters, strict=True))


def test_frozen_parameters_have_all_their_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[0].weight.requires_grad_(False)
    assert find_parameters(model).frozen_names == ("0.weight", "1.weight")


def test_parameters_of_an_optimizer() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD([model[0].weight, model[1].bias], lr=0.1)
    assert stepped_by(optimizer, [*model.parameters(), None]) == [True, False, False, True, False]


def test_a_frozen_parameter_that_is_known_stays() -> None:
    model = nn.Linear(2, 2)
    known = {id(model.bias): "bias"}
    model.bias.requires_grad_(False)
    assert [site.name for site in find_parameters(model, known).sites] == ["weight", "bias"]
    assert find_parameters(model).frozen_names == ("bias",)
    assert find_parameters(nn.Sequential(model), known).frozen_names == ("0.bias",)  # under another name


def test_dtypes_without_a_kernel_are_named() -> None:
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(2)), "q": torch.zeros(2).to(torch.float8_e4m3fnuz)})
    model["q"].requires_grad_()
    found = find_parameters(model)
    assert [site.name for site in found.sites] == ["w"]
    assert found.unmeasured == ("q",)


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
