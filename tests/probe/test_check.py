"""`check_gradient_flow`: the one-call check of a model."""

import copy
import math

import pytest
import torch
from torch import nn

import gradprobe


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 2)  # registered first, runs last
        self.embed = nn.Embedding(100, 8)
        self.mix = nn.Linear(5, 8)

    def forward(self, tokens: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(torch.tanh(self.embed(tokens).mean(1) + self.mix(x)))}


def test_the_lessons_deep_net_vanishes_and_says_where() -> None:
    torch.manual_seed(0)
    report = gradprobe.check_gradient_flow(gradprobe.networks.deep_cnn(50), (3, 32, 32))
    assert report.verdict == "vanishing"
    first, last = report.layers[0], report.layers[-2]
    assert (first.name, last.name) == ("features.0.weight", "fc.weight")
    assert first.norm < 1e-15 * last.norm
    assert first.status == "vanishing"
    assert last.status == "healthy"
    (finding,) = report.findings
    assert finding.sites[0] == "features.0.weight"
    assert "fc.weight" not in finding.sites


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: gradprobe.networks.plain(20, in_channels=1), "healthy"),
        (lambda: gradprobe.networks.resnet(56, in_channels=1), "healthy"),
        (lambda: gradprobe.networks.plain(110, in_channels=1), "exploding"),
        (lambda: gradprobe.networks.plain(110, in_channels=1, norm="none"), "vanishing"),
        (lambda: gradprobe.networks.resnet(110, in_channels=1, norm="none"), "exploding"),
    ],
    ids=["plain-20", "resnet-56", "plain-110", "plain-110 without normalisation", "resnet-110 without"],
)
def test_verdicts_at_initialisation(model, expected: str) -> None:  # type: ignore[no-untyped-def]
    # as measured on the digits data; facts of the depth problem that a checker has to reproduce
    torch.manual_seed(0)
    assert gradprobe.check_gradient_flow(model(), (1, 8, 8), batch_size=64).verdict == expected


def test_layers_stand_in_the_order_of_execution() -> None:
    report = gradprobe.check_gradient_flow(TwoInputs(), ["int64[0:100]:7", (5,)], batch_size=3)
    assert [layer.name for layer in report.layers] == [
        "embed.weight",
        "mix.weight",
        "mix.bias",
        "head.weight",
        "head.bias",
    ]
    assert [layer.depth for layer in report.layers] == [0, 1, 1, 2, 2]


def test_the_table_shows_each_norm_and_the_verdict() -> None:
    report = gradprobe.check_gradient_flow(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), (4,))
    text = str(report)
    for layer in report.layers:
        (line,) = [line for line in text.splitlines() if f" {layer.name} " in line]
        assert f"{layer.norm:.2e}" in line
        assert f"{layer.rms:.2e}" in line
    assert "verdict: healthy" in text
    assert report.as_dict()["verdict"] == "healthy"


def test_a_layer_that_gets_no_gradient_is_listed() -> None:
    model = TwoInputs()
    model.unused = nn.Linear(2, 2)
    report = gradprobe.check_gradient_flow(model, ["int64[0:100]:7", "5"])
    statuses = {layer.name: layer.status for layer in report.layers}
    assert statuses["unused.weight"] == "no gradient"
    assert report.notes == ("no gradient reaches unused.weight and unused.bias: not used by this batch, or detached",)
    assert statuses["head.weight"] == "healthy"


def test_a_nonfinite_gradient_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        model[1].weight[0, 0] = math.inf
    report = gradprobe.check_gradient_flow(model, (3,))
    assert report.verdict == "non-finite"
    assert {layer.name: layer.status for layer in report.layers}["0.weight"] == "non-finite"


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2)).train(training)
    model(torch.randn(8, 4)).sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    rng = torch.get_rng_state()
    gradprobe.check_gradient_flow(model, (4,), batch_size=8)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), gradients, strict=True))
    assert model.training is training
    assert not any(module._forward_pre_hooks for module in model.modules())
    gradprobe.attach(model).detach()


def test_the_same_model_gives_the_same_numbers() -> None:
    model = gradprobe.networks.deep_cnn(3)
    first, second = (gradprobe.check_gradient_flow(model, (3, 8, 8), batch_size=2) for _ in range(2))
    assert first.layers == second.layers


def test_a_softmax_at_the_end_does_not_look_like_vanishing() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 5), nn.Softmax(dim=1))
    assert gradprobe.check_gradient_flow(model, (4,), batch_size=4).verdict == "healthy"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, (3,)), "model: needed a torch.nn.Module, got int"),
        ((nn.Linear(3, 1), (3.5,)), "input_shape: needed sizes"),
        ((nn.Linear(3, 1), None), "input_shape: needed sizes"),
        ((nn.Linear(3, 1), (4,)), r"input_shape: Linear cannot take inputs of shape \(1, 4\) float32: mat1 and mat2"),
        ((nn.Linear(3, 1).requires_grad_(False), (3,)), "all 2 of Linear are frozen"),
    ],
    ids=["model", "float size", "nothing", "wrong shape", "frozen"],
)
def test_bad_arguments(arguments: tuple[object, object], message: str) -> None:
    with pytest.raises(gradprobe.ArgumentError, match=message):
        gradprobe.check_gradient_flow(*arguments)  # type: ignore[arg-type]


def test_a_batch_of_one_through_batch_norm_says_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(gradprobe.ArgumentError, match="batch_size of at least 2"):
        gradprobe.check_gradient_flow(model, (3,))
    with pytest.raises(gradprobe.ArgumentError, match="batch_size: needed an integer of at least 1, got 0"):
        gradprobe.check_gradient_flow(model, (3,), batch_size=0)


def test_an_output_without_a_gradient() -> None:
    class Blind(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).argmax(dim=1)

    with pytest.raises(gradprobe.ArgumentError, match="needed an output that depends on a trainable parameter"):
        gradprobe.check_gradient_flow(Blind(3, 2), (3,))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_model_is_refused() -> None:
    model = nn.Sequential(torch.jit.trace(nn.Linear(3, 1), torch.ones(3)))
    with pytest.raises(gradprobe.ArgumentError, match="model: needed a model in Python, got a scripted one"):
        gradprobe.check_gradient_flow(model, (3,))
