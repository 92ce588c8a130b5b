"""Evaluation with batch normalisation folded into the convolutions gives what the network itself gives."""

import math

import pytest
import torch
from torch.nn import functional as F

from gradprobe import networks
from gradprobe.experiments.data import load
from gradprobe.experiments.folding import folded
from gradprobe.experiments.models import build


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(params=networks.NORMALISED_FAMILIES)
def trained(request, digits):
    """A network with running averages of a training, so that its normalisation does something."""
    torch.manual_seed(0)
    model = build(request.param, 20, digits).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for images, labels in zip(digits.train_x.split(64)[:20], digits.train_y.split(64), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


def test_the_logits_are_the_networks_own_but_for_rounding(trained, digits):
    with torch.no_grad():
        expected, got = trained(digits.test_x), folded(trained)(digits.test_x)
        exact = trained.double()(digits.test_x.double())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(got.argmax(dim=1), expected.argmax(dim=1))
    assert (got - exact).abs().max() < 3 * (expected - exact).abs().max() + 1e-6


def test_the_network_itself_is_unchanged(trained, digits):
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    images = digits.test_x.clone()
    with torch.no_grad():
        folded(trained)(images)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert torch.equal(images, digits.test_x)


def test_a_nan_reaches_the_logits(trained, digits):
    with torch.no_grad():
        trained.stages[0][0].convs[0][0].weight[0, 0, 0, 0] = math.nan
        assert folded(trained)(digits.test_x).isnan().all()


@pytest.mark.parametrize(
    "model",
    [networks.plain(8, norm="none"), networks.resnet(18), networks.deep_cnn(3), torch.nn.Linear(3, 3)],
    ids=["no-norm", "imagenet", "deep-cnn", "linear"],
)
def test_other_networks_are_not_folded(model):
    assert folded(model) is None


def test_a_network_that_was_changed_is_not_folded():
    nets = [networks.resnet(8) for _ in range(5)]
    assert all(folded(net) for net in nets)
    nets[0].stages[1][0].convs[0][1] = torch.nn.GroupNorm(4, 32)
    nets[1].stages[1][0].convs[0].insert(1, torch.nn.ReLU())
    nets[2].stages[1][0].convs[1].register_forward_hook(lambda *_: None)
    torch.nn.utils.parametrizations.weight_norm(nets[3].stem[0])
    nets[4].stages[0].append(torch.nn.ReLU())
    assert [folded(net) for net in nets] == [None] * 5
