"""Families of the sweep beside plain and resnet: their definitions at initialisation, and what a probe sees."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradprobe import attach, networks
from gradprobe.errors import ArgumentError
from gradprobe.networks.common import initialise
from gradprobe.networks.transformers import positions
from gradprobe.networks.without_norm import layerscale_start

WITHOUT_NORM = ("fixup", "skipinit", "rezero", "layerscale")
TRANSFORMERS = tuple(networks.TRANSFORMERS)
OTHERS = (*WITHOUT_NORM, *TRANSFORMERS)


def build(family: str, depth: int = 20, **options: int) -> nn.Module:
    torch.manual_seed(0)
    return networks.BUILDERS[family](depth, **options)


def joins(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, networks.ResidualAdd)]


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize(("depth", "channels", "size", "classes"), [(8, 1, (8, 8), 10), (20, 3, (17, 9), 7)])
def test_any_image_gives_logits(family: str, depth: int, channels: int, size: tuple[int, int], classes: int) -> None:
    options = {"image_size": min(size)} if family in TRANSFORMERS else {}
    model = build(family, depth, in_channels=channels, num_classes=classes, **options)
    assert model(torch.randn(2, channels, *size)).shape == (2, classes)


@pytest.mark.parametrize("family", OTHERS)
def test_everything_is_computed_where_the_weights_are(family: str) -> None:
    model = build(family, 8).to("meta")
    assert model(torch.empty(2, 3, 32, 32, device="meta")).device.type == "meta"


@pytest.mark.parametrize("family", WITHOUT_NORM)
@pytest.mark.parametrize("depth", [8, 20])
def test_depth_counts_weight_layers_of_the_cifar_layout(family: str, depth: int) -> None:
    model = build(family, depth)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    resnet = [m for m in networks.resnet(depth).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert [layer.weight.shape for layer in layers] == [layer.weight.shape for layer in resnet]
    assert len(layers) == depth
    assert len(joins(model)) == (depth - 2) // 2
    assert not any("BatchNorm" in type(module).__name__ for module in model.modules())


@pytest.mark.parametrize(("family", "count"), [("pre", 6), ("post", 6), ("plain", 0)])
def test_depth_counts_sublayers_of_a_transformer(family: str, count: int) -> None:
    model = build(f"transformer-{family}", 6)
    assert len(model.sublayers) == 6
    assert len(joins(model)) == count
    kinds = [type(sublayer.branch).__name__ for sublayer in model.sublayers]
    assert kinds == ["Attention", "Sequential"] * 3


def test_arrangements_have_the_same_weights_of_one_seed() -> None:
    pre, post, plain = (build(f"transformer-{name}", 4).state_dict() for name in ("pre", "post", "plain"))
    assert pre.keys() == plain.keys()
    assert pre.keys() - post.keys() == {"norm.weight", "norm.bias"}
    assert all(torch.equal(pre[name], plain[name]) for name in pre)
    assert all(torch.equal(pre[name], post[name]) for name in post)


@pytest.mark.parametrize("family", ["fixup", "skipinit", "rezero"])
def test_every_block_starts_as_the_identity(family: str) -> None:
    model = build(family)
    for stage, channels in zip(model.stages, (16, 32, 64), strict=True):
        x = torch.rand(2, channels, 6, 6)
        for block in list(stage)[1 if channels > 16 else 0 :]:
            assert torch.equal(block(x), x)
    x = torch.rand(2, 16, 6, 6)
    y = model.stages[1][0](x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert y[:, :8].abs().max() == y[:, 24:].abs().max() == 0


def test_a_block_of_layerscale_is_close_to_the_identity() -> None:
    torch.manual_seed(0)
    block = build("layerscale", 20).stages[0][1]
    x = torch.rand(2, 16, 6, 6)
    branch = block.second(torch.relu(block.first(x)))
    assert torch.equal(block(x), torch.relu(x + 0.1 * branch))
    assert block.factors.shape == (16,)
    assert [layerscale_start(count) for count in (1, 18, 19, 24, 25)] == [0.1, 0.1, 1e-5, 1e-5, 1e-6]
    assert build("layerscale", 110).stages[2][3].factors.unique().tolist() == [pytest.approx(1e-6)]


def test_fixup_has_the_papers_weights() -> None:
    model = build("fixup", 56)
    first = torch.cat([block.first.weight.flatten() for block in list(model.stages[0])])
    assert first.std().item() == pytest.approx(math.sqrt(2 / (9 * 16)) * 27**-0.5, rel=0.02)
    assert all(not block.second.weight.any() for stage in model.stages for block in stage)
    assert not model(torch.randn(2, 3, 8, 8)).any()
    block = model.stages[1][1]
    scalars = {name: p.item() for name, p in block.named_parameters() if p.numel() == 1}
    assert scalars == {"factor": 1.0, **{f"biases.{k}.bias": 0.0 for k in range(4)}}


def test_a_block_of_fixup_is_its_formula() -> None:
    block = build("fixup", 8).stages[0][0].double()
    torch.manual_seed(1)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    b1, b2, b3, b4 = (bias.bias for bias in block.biases)
    f = F.conv2d(torch.relu(F.conv2d(x + b1, block.first.weight, padding=1) + b2) + b3, block.second.weight, padding=1)
    assert torch.allclose(block(x), torch.relu(x + block.factor * f + b4))


def test_only_the_place_of_the_relus_differs_between_skipinit_and_rezero() -> None:
    skipinit, rezero = (build(name, 14).stages[1][1].double() for name in ("skipinit", "rezero"))
    x = torch.randn(2, 32, 5, 5, dtype=torch.float64)
    for block in (skipinit, rezero):
        nn.init.constant_(block.factors, 0.5)

    def branch(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * block.second(torch.relu(block.first(x)))

    assert torch.allclose(skipinit(x), x + branch(skipinit, torch.relu(x)))
    assert torch.allclose(rezero(x), torch.relu(x + branch(rezero, x)))
    assert all(torch.equal(a, b) for a, b in zip(skipinit.parameters(), rezero.parameters(), strict=True))


def test_a_transformer_is_its_formula() -> None:
    for name in TRANSFORMERS:
        sublayer = build(name, 4).double().sublayers[2]
        x = torch.randn(2, 9, 64, dtype=torch.float64)
        branch, norm = sublayer.branch, sublayer.norm
        expected = {
            "transformer-pre": x + branch(norm(x)),
            "transformer-post": norm(x + branch(x)),
            "transformer-plain": branch(norm(x)),
        }[name]
        assert torch.equal(sublayer(x), expected)


def test_attention_equals_torchs() -> None:
    ours = build("transformer-pre", 2, width=32).double().sublayers[0].branch
    torchs = nn.MultiheadAttention(32, 2, batch_first=True).double()
    torchs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.out.weight,
            "out_proj.bias": ours.out.bias,
        }
    )
    x = torch.randn(3, 5, 32, dtype=torch.float64)
    assert torch.allclose(ours(x), torchs(x, x, x, need_weights=False)[0])
    bound = math.sqrt(6 / (32 + 32))
    assert 0.95 * bound < ours.qkv.weight.abs().max() <= bound


def test_tokens_have_different_positions_and_images_any_number_of_patches() -> None:
    table = positions(8, 8, 64).flatten(1).T
    embedded = build("transformer-pre", 2, image_size=8).embed(torch.randn(16, 3, 8, 8))
    assert embedded.std().item() == pytest.approx(1.0, rel=0.2)
    distances = torch.cdist(table, table) + 10 * torch.eye(64)
    assert distances.min() > 0.5
    model = build("transformer-pre", 2, image_size=32)
    seen = []
    model.sublayers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    for size in ((32, 32), (33, 30), (4, 4)):
        model(torch.randn(1, 3, *size))
    assert [tuple(shape) for shape in seen] == [(1, 64, 64), (1, 72, 64), (1, 1, 64)]


def test_gradients_of_transformers_at_initialisation_are_those_of_the_literature() -> None:
    """Xiong et al. 2020: the gradient of the last layer falls with depth in pre-norm, and does not in post-norm."""

    def last(arrangement: str, depth: int) -> float:
        logs = []
        for seed in range(6):
            torch.manual_seed(seed)
            model = networks.transformer(depth, arrangement=arrangement, image_size=8)
            F.cross_entropy(model(torch.randn(32, 3, 8, 8)), torch.arange(32) % 10).backward()
            logs.append(model.sublayers[depth - 1].branch[2].weight.grad.norm().log().item())
        return math.exp(sum(logs) / len(logs))

    assert last("pre", 24) / last("pre", 2) < 0.75
    assert last("post", 24) / last("post", 2) > 1.5


def test_without_residual_adds_attention_makes_all_tokens_alike() -> None:
    """Dong et al. 2021."""
    spreads = {}
    for name in ("transformer-pre", "transformer-plain"):
        model = build(name, 24, image_size=16)
        with torch.no_grad():
            x = (model.embed(torch.randn(8, 3, 16, 16)) + positions(8, 8, 64)).flatten(2).transpose(1, 2)
            y = model.sublayers(x)
        spreads[name] = (y - y.mean(dim=1, keepdim=True)).norm().item() / y.norm().item()
    assert spreads["transformer-plain"] < 1e-3
    assert spreads["transformer-pre"] > 0.1


@pytest.mark.parametrize("family", OTHERS)
def test_the_probe_sees_the_residual_adds_and_changes_no_bit(family: str) -> None:
    images, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    observed = build(family, 8, in_channels=1, **({"image_size": 8} if family in TRANSFORMERS else {}))
    free = copy.deepcopy(observed)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (observed, free)]
    with attach(observed, optimizer=optimizers[0]) as probe:
        for _ in range(3):
            for model, optimizer in zip((observed, free), optimizers, strict=True):
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
        snapshots = probe.history()
    assert all(torch.equal(a, b) for a, b in zip(observed.parameters(), free.parameters(), strict=True))
    assert [list(snapshot.junctions) for snapshot in snapshots] == [joins(observed)] * 3
    if family in ("fixup", "skipinit", "rezero"):
        assert all(junction.f.norm == 0 for junction in snapshots[0].junctions.values())
        assert all(junction.f.norm > 0 for junction in snapshots[2].junctions.values())


@pytest.mark.parametrize("shape", [(24, 24, 3, 3), (12, 24, 1, 1), (24, 16), (8, 8, 5, 3)])
def test_orthogonal_weights_are_orthogonal(shape: tuple[int, ...]) -> None:
    layer = nn.Conv2d(shape[1], shape[0], shape[2:]) if len(shape) == 4 else nn.Linear(shape[1], shape[0])
    bias = layer.bias.clone()
    initialise(layer, "orthogonal")
    weight = layer.weight.detach()
    if weight.ndim == 4:
        middle = weight[:, :, shape[2] // 2, shape[3] // 2]
        assert weight.count_nonzero() == middle.count_nonzero()
        weight = middle
    product = weight @ weight.T if shape[0] <= shape[1] else weight.T @ weight
    assert torch.allclose(product, 2 * torch.eye(len(product)), atol=1e-5)
    assert torch.equal(layer.bias, bias)


def test_a_plain_network_without_normalisation_keeps_its_signal_longer_with_orthogonal_weights() -> None:
    """The interior of a feature map keeps its norm on average, and no random direction is lost layer by layer."""
    ratio = {}
    for init in ("he", "orthogonal"):
        torch.manual_seed(0)
        model = networks.plain(56, in_channels=1, norm="none", init=init)
        F.cross_entropy(model(torch.rand(64, 1, 8, 8) - 0.5), torch.arange(64) % 10).backward()
        norms = [p.grad.norm().item() for p in model.parameters() if p.ndim == 4]
        ratio[init] = norms[0] / norms[-1]
    assert ratio["he"] < 1e-2
    assert ratio["orthogonal"] > 0.05


@pytest.mark.parametrize(
    ("family", "depth", "options", "message"),
    [
        ("fixup", 9, {}, r"depth: the CIFAR layout has 6n\+2 .*, got 9"),
        ("skipinit", 18, {}, r"depth: the CIFAR layout has 6n\+2 .*, got 18"),
        ("rezero", 2, {}, r"depth: the CIFAR layout has 6n\+2 .*, got 2"),
        ("layerscale", True, {}, r"depth: the CIFAR layout has 6n\+2 .*, got True"),
        ("fixup", 8, {"width": 0}, "width: needed a whole number of at least 1, got 0"),
        ("transformer-pre", 7, {}, "depth: a transformer needs an even number of sublayers of at least 2, got 7"),
        ("transformer-post", 0, {}, "depth: a transformer needs an even number of sublayers of at least 2, got 0"),
        ("transformer-plain", 8.0, {}, "depth: a transformer needs an even number .*, got 8.0"),
        ("transformer-pre", 8, {"width": 40}, "width: needed a multiple of 16, got 40"),
        ("transformer-pre", 8, {"image_size": 0}, "image_size: needed a whole number of at least 1, got 0"),
    ],
)
def test_bad_options_of_a_family_are_named(family: str, depth: int, options: dict[str, int], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{message}$"):
        networks.BUILDERS[family](depth, **options)


def test_an_unknown_arrangement_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"^arrangement: needed one of pre, post, plain, got 'sandwich'$"):
        networks.transformer(4, arrangement="sandwich")
