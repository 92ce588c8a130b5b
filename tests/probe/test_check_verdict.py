"""The verdict of `check_gradient_flow` on models as they are built today, and what it explains in a note."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import gradprobe
from gradprobe.probe.check import FlowReport


def mlp(*layers: nn.Module, width: int = 32) -> nn.Sequential:
    """Returns a network of the given layers between a first and a last linear layer."""
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), *layers, nn.Linear(width, 4))


def zeroed(model: nn.Module, *names: str) -> nn.Module:
    """Sets parameters to zero."""
    for name in names:
        nn.init.zeros_(model.get_parameter(name))
    return model


def check(model: nn.Module, x: torch.Tensor | None = None) -> FlowReport:
    """Checks a model with eight examples, and that the table agrees with the verdict."""
    report = gradprobe.check_gradient_flow(model, inputs=torch.randn(8, 8) if x is None else x)
    faults = {layer.status for layer in report.layers} & {"vanishing", "exploding", "non-finite"}
    assert bool(report.findings) is (report.verdict != "healthy")
    assert faults <= {report.verdict}
    return report


class Attention(nn.Module):
    """Attention around a shortcut, with a head that may start at zero, as that of torchvision's ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.attention, self.head = (
            nn.Linear(8, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 3),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return self.head(x + self.attention(x, x, x)[0])  # type: ignore[no-any-return]


def test_a_head_that_starts_at_zero_is_explained() -> None:
    torch.manual_seed(0)
    report = check(zeroed(Attention(), "head.weight"), torch.randn(2, 6, 8))
    assert report.verdict == "healthy"
    assert "note: all gradients behind head are 0, because head.weight is 0; the first step changes that" in str(report)
    statuses = {layer.name: layer.status for layer in report.layers}
    assert (statuses["a.weight"], statuses["attention.out_proj.weight"]) == ("starts at 0", "starts at 0")
    assert (statuses["head.weight"], statuses["head.bias"]) == ("healthy", "healthy")


def test_a_model_behind_a_zero_head_is_judged_all_the_same() -> None:
    torch.manual_seed(0)
    deep = gradprobe.networks.deep_cnn(30, width=16)
    before = {name: value.clone() for name, value in deep.state_dict().items()} | {"fc.weight": torch.zeros(10, 16)}
    report = gradprobe.check_gradient_flow(zeroed(deep, "fc.weight"), (3, 8, 8))
    assert report.verdict == "vanishing"
    assert "(measured on a copy in which fc.weight had ordinary values)" in report.findings[0].message
    assert all(torch.equal(value, before[name]) for name, value in deep.state_dict().items())


class Block(nn.Module):
    """A residual branch that starts at zero, or close to it."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.gamma = nn.Parameter(torch.full((32,), start))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gamma * self.down(torch.relu(self.up(self.norm(x))))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("start", "note"),
    [
        (1e-6, "2.gamma and 11 others start at 1e-06: the gradients in these branches are small"),
        (0.0, "72 gradients are 0, because they are behind 2.gamma and 11 others, which start at 0"),
    ],
)
def test_branches_that_start_closed_are_explained(start: float, note: str) -> None:
    torch.manual_seed(0)
    report = check(mlp(*(Block(start) for _ in range(12))))
    assert report.verdict == "healthy"
    assert note in report.notes


def test_a_gate_in_series_is_opened_for_the_verdict() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((32,), 1e-5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * x

    torch.manual_seed(0)
    report = check(mlp(Scale()))
    assert report.verdict == "healthy"
    assert "the verdict is that of a copy in which 2.scale had ordinary values" in report.notes


def test_a_frozen_zero_is_no_start() -> None:
    model = zeroed(mlp(), "2.weight")
    model.get_parameter("2.weight").requires_grad_(False)
    report = check(model)
    assert report.verdict == "vanishing"
    assert "no gradient at all reaches the output of '0'" in report.findings[0].message


def test_zeros_that_no_step_opens_are_a_fault() -> None:
    report = check(zeroed(mlp(nn.Linear(32, 32), nn.ReLU()), "0.weight", "0.bias", "2.weight", "2.bias", "4.weight"))
    assert report.verdict == "vanishing"
    assert not any("first step" in note for note in report.notes)


class Keys(nn.Module):
    """Attention with a key layer of its own, whose bias no softmax lets through, and a bias in front of a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), dim=-1) @ self.v(x)
        return torch.sin(self.norm(x.transpose(1, 2)))


def test_biases_whose_gradient_is_zero_by_mathematics_are_explained() -> None:
    torch.manual_seed(0)
    report = check(Keys(), torch.randn(4, 6, 8))
    assert report.verdict == "healthy"
    statuses = {layer.name: layer.status for layer in report.layers}
    assert {name for name, status in statuses.items() if status == "cancels"} == {"k.bias", "v.bias"}
    assert any(note.startswith("the gradient of k.bias and v.bias is 0 up to rounding") for note in report.notes)


def test_queries_that_are_read_do_not_count_as_the_last_layer() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.queries = nn.Linear(8, 32), nn.Embedding(5, 32)
            layer = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True)
            self.decoder, self.classes = nn.TransformerDecoder(layer, 3), nn.Linear(32, 3)
            nn.init.normal_(self.queries.weight, std=1e-4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            queries = self.queries.weight.expand(len(x), 5, 32)
            return self.classes(self.decoder(queries, self.backbone(x)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    report = check(Detector(), torch.randn(2, 7, 8))
    assert report.verdict == "healthy"
    assert report.layers[-1].name == "classes.bias"


def deep_mlp(n_layers: int, layer: Callable[[], list[nn.Module]]) -> nn.Module:
    """Returns a network of equal layers."""
    return mlp(*(module for _ in range(n_layers) for module in layer()))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: deep_mlp(10, lambda: [nn.Linear(32, 32), nn.Sigmoid()]), "vanishing"),
        (lambda: deep_mlp(30, lambda: [nn.Linear(32, 32), nn.ReLU()]), "vanishing"),
        (lambda: deep_mlp(60, lambda: [nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()]), "exploding"),
        (lambda: deep_mlp(30, lambda: [nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU()]), "healthy"),
        (lambda: deep_mlp(48, lambda: [Block(1.0)]), "healthy"),
        (lambda: gradprobe.networks.resnet(20, in_channels=8), "healthy"),
    ],
    ids=["sigmoid", "default ReLU", "batch normalisation", "layer normalisation", "residual", "resnet-20"],
)
def test_depth(build: Callable[[], nn.Module], expected: str) -> None:
    torch.manual_seed(0)
    model = build()
    x = torch.randn(8, 8) if isinstance(model, nn.Sequential) else torch.randn(8, 8, 16, 16)
    assert check(model, x).verdict == expected


def test_the_finding_says_where_the_gradient_is_lost() -> None:
    class Damped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1e-9 * x

    torch.manual_seed(0)
    report = check(mlp(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), Damped(), nn.Linear(32, 32), nn.ReLU()))
    assert report.verdict == "vanishing"
    assert "most of it between the output of '5' and the output of '6'" in report.findings[0].message
    assert {"0.weight", "2.weight", "4.weight"} <= set(report.findings[0].sites)
    assert "8.weight" not in report.findings[0].sites


def test_dead_units_let_no_gradient_through() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.constant_(model.get_parameter("2.bias"), -99.0)
    report = check(model, torch.rand(8, 4))
    (finding,) = [one for one in report.findings if one.rule == "vanishing"]
    assert "no gradient at all reaches the output of '0': it is exactly zero there" in finding.message
    assert "inf" not in finding.message
    assert finding.sites[0] == "0.weight"


def test_the_length_of_a_sequence_is_no_depth() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.RNNCell(8, 32), nn.Linear(32, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = x.new_zeros(len(x), 32)
            for step in x.unbind(1):
                state = self.cell(step, state)
            return self.head(state)  # type: ignore[no-any-return]

    assert check(Recurrent(), torch.randn(4, 200, 8)).verdict == "healthy"


def test_sensitivity_is_what_noise_does_to_the_loss() -> None:
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(8, 8)
    weights = torch.randn(8, 4)
    report = gradprobe.check_gradient_flow(model, inputs=x, loss=lambda y: (y * weights).sum())
    (trunk,) = report.trunks
    assert [point.module for point in trunk] == ["0", "1", ""]
    hidden = model[0](x).detach()
    noise = 1e-3 * hidden.square().mean().sqrt()
    losses = [(model[2](model[1](hidden + noise * torch.randn_like(hidden))) * weights).sum() for _ in range(1000)]
    assert float(torch.stack(losses).detach().std()) / 1e-3 == pytest.approx(trunk[0].sensitivity, rel=0.1)


def test_each_tower_has_a_trunk() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image = deep_mlp(12, lambda: [nn.Linear(32, 32), nn.Tanh()])
            self.text = deep_mlp(12, lambda: [nn.Linear(32, 32), nn.Sigmoid()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.image(x) @ self.text(x).T  # type: ignore[no-any-return]

    torch.manual_seed(0)
    report = check(Towers())
    assert [trunk[0].module for trunk in report.trunks] == ["image.0", "text.0"]
    assert report.verdict == "vanishing"
    assert "text.0" in report.findings[0].message


def test_a_detector_of_transformers_is_healthy() -> None:
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    try:
        config = transformers.DetrConfig(
            use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
            encoder_layers=3, decoder_layers=3,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.DetrForObjectDetection(config)
    except ModuleNotFoundError as error:  # it imports torchvision
        pytest.skip(str(error))
    assert gradprobe.check_gradient_flow(model, "3,128,128", batch_size=2).verdict == "healthy"


class Parallel(nn.Module):
    """Two branches beside one shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.a(x) + self.b(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("block", [lambda: Block(1.0), Parallel])
def test_the_trunk_leaves_branches_out(block: Callable[[], nn.Module]) -> None:
    report = check(mlp(block(), block()))
    (trunk,) = report.trunks
    assert [point.module for point in trunk] == ["0", "1", "2", "3", ""]


def test_a_zero_that_is_only_added_blocks_nothing() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position, self.offset = nn.Parameter(torch.zeros(8, 32)), nn.Parameter(torch.zeros(32))
            self.weight = nn.Parameter(torch.eye(32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x + self.position, self.weight, self.offset)

    torch.manual_seed(0)
    report = check(mlp(*(module for _ in range(10) for module in (nn.Linear(32, 32), nn.Sigmoid())), Added()))
    assert report.verdict == "vanishing"
    assert "copy" not in report.findings[0].message
    assert report.notes == ()
