"""The networks: published sizes, shapes, options, and errors that list the valid options."""

import pytest
import torch
from torch import nn

from gradprobe import networks
from gradprobe.errors import ArgumentError

# He et al. 2015, table 6, exact: bias-free convolutions, affine normalisation, option-A shortcuts.
CIFAR_PARAMETERS = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962, 1202: 19_421_274}
# The standard ImageNet networks with 1000 classes and projections where the shape changes.
IMAGENET_PARAMETERS = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}


def on_meta(make, *args, **options):
    with torch.device("meta"):
        return make(*args, **options)


@pytest.mark.parametrize(
    ("depth", "parameters"),
    [pytest.param(*pair, marks=pytest.mark.soak if pair[0] > 1000 else ()) for pair in CIFAR_PARAMETERS.items()],
)
@pytest.mark.parametrize("make", [networks.plain, networks.resnet], ids=["plain", "resnet"])
def test_cifar_networks_have_the_published_number_of_parameters(make, depth, parameters):
    assert networks.count_parameters(on_meta(make, depth)) == parameters


@pytest.mark.parametrize(("depth", "parameters"), IMAGENET_PARAMETERS.items())
def test_imagenet_networks_have_the_known_number_of_parameters(depth, parameters):
    assert networks.count_parameters(on_meta(networks.resnet, depth)) == parameters


@pytest.mark.parametrize("depth", networks.IMAGENET_DEPTHS)
def test_a_plain_imagenet_network_is_the_residual_one_without_projections(depth):
    residual = {name: p.shape for name, p in on_meta(networks.resnet, depth).named_parameters()}
    plain = {name: p.shape for name, p in on_meta(networks.plain, depth).named_parameters()}
    assert plain == {name: shape for name, shape in residual.items() if ".shortcut." not in name}
    assert len(plain) < len(residual)


@pytest.mark.parametrize("make", [networks.plain, networks.resnet], ids=["plain", "resnet"])
@pytest.mark.parametrize("depth", [8, 20, 56])
def test_depth_counts_the_weight_layers(make, depth):
    layers = [m for m in on_meta(make, depth).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth


@pytest.mark.parametrize("depth", [50, 152])
def test_a_depth_of_both_layouts_is_imagenet_unless_cifar_is_requested(depth):
    stem = on_meta(networks.resnet, depth).stem[0]
    assert stem.kernel_size == (7, 7)
    stem = on_meta(networks.resnet, depth, layout="cifar").stem[0]
    assert stem.kernel_size == (3, 3)


@pytest.mark.parametrize("make", [networks.plain, networks.resnet], ids=["plain", "resnet"])
@pytest.mark.parametrize(("depth", "classes"), [(8, 10), (18, 1000), (50, 1000)])
@pytest.mark.parametrize("size", [8, 33])
def test_any_image_size_gives_logits(make, depth, classes, size):
    model = make(depth, width=4).eval()
    assert model(torch.randn(2, 3, size, size)).shape == (2, classes)


@pytest.mark.parametrize("norm", networks.NORMS)
@pytest.mark.parametrize("init", networks.INITS)
def test_options_reach_the_network(norm, init):
    model = networks.resnet(14, in_channels=1, num_classes=7, width=5, norm=norm, init=init)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert convs[0].weight.shape == (5, 1, 3, 3)
    assert convs[-1].out_channels == 20
    assert len(norms) == (len(convs) if norm == "batch" else 0)
    assert all((conv.bias is None) == (norm == "batch") for conv in convs)
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 7)


@pytest.mark.parametrize(("init", "expected_std"), [("he", (2 / 144) ** 0.5), ("xavier", (2 / 288) ** 0.5)])
def test_init_has_the_variance_of_its_paper(init, expected_std):
    torch.manual_seed(0)
    weights = torch.cat([b.convs[0][0].weight.flatten() for b in networks.plain(56, init=init).stages[0]])
    assert weights.std().item() == pytest.approx(expected_std, rel=0.03)


def test_a_block_whose_branch_is_zero_returns_its_input():
    model = networks.resnet(20, width=4)
    block = model.stages[0][1]
    nn.init.zeros_(block.convs[-1][1].weight)
    x = torch.rand(2, 4, 8, 8)
    assert torch.equal(block(x), x)


def test_the_parameter_free_shortcut_takes_every_second_pixel_and_pads_with_zeros():
    block = networks.resnet(20, width=4).eval().stages[1][0]
    nn.init.zeros_(block.convs[-1][1].weight)
    x = torch.rand(2, 4, 8, 8)
    y = block(x)
    assert y.shape == (2, 8, 4, 4)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


def test_plain_and_residual_networks_of_one_seed_have_the_same_weights():
    torch.manual_seed(3)
    plain = networks.plain(20)
    torch.manual_seed(3)
    residual = networks.resnet(20)
    pairs = zip(plain.parameters(), residual.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def first_and_last_gradient(model, images, labels):
    nn.functional.cross_entropy(model(images), labels).backward()
    convs = [p.grad.norm().item() for p in model.parameters() if p.ndim == 4]
    return convs[0], convs[-1]


def test_gradients_at_initialisation_are_those_of_the_literature():
    """The normalised plain network explodes towards the input, the residual one does not, the bare one vanishes."""
    torch.manual_seed(0)
    images, labels = torch.rand(64, 1, 8, 8) - 0.5, torch.randint(0, 10, (64,))
    ratio = {}
    for name, make, norm in [
        ("plain", networks.plain, "batch"),
        ("resnet", networks.resnet, "batch"),
        ("bare", networks.plain, "none"),
    ]:
        first, last = first_and_last_gradient(make(56, in_channels=1, norm=norm), images, labels)
        ratio[name] = first / last
    assert ratio["plain"] > 50
    assert 0.1 < ratio["resnet"] < 20
    assert ratio["bare"] < 1e-2


def test_deep_cnn_is_the_lessons_stack():
    model = networks.deep_cnn(50)
    convs = [m for m in model.features if isinstance(m, nn.Conv2d)]
    assert len(convs) == 50
    assert convs[0].weight.shape == (64, 3, 3, 3)
    assert all(conv.out_channels == 64 and conv.bias is not None for conv in convs)
    assert model.fc.weight.shape == (10, 64)
    assert networks.count_parameters(networks.deep_cnn(1, in_channels=1, num_classes=2, width=3)) == 30 + 8


@pytest.mark.parametrize("depth", [0, 1, 2, 7, 19, 57, -4, True, "20", 20.0, None])
def test_an_unknown_depth_is_refused_with_the_valid_ones(depth):
    with pytest.raises(ArgumentError, match=r"depth: needed 6n\+2 .*18, 34, 50, 101, 152, got"):
        networks.resnet(depth)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "vgg"}, "layout: needed one of cifar, imagenet, got 'vgg'"),
        ({"layout": "imagenet"}, "depth: the ImageNet layout has 18, 34, 50, 101, 152, got 20"),
        ({"norm": "layer"}, "norm: needed one of batch, none, got 'layer'"),
        ({"init": "zeros"}, "init: needed one of he, xavier, orthogonal, default, got 'zeros'"),
        ({"width": 0}, "width: needed a whole number of at least 1, got 0"),
        ({"in_channels": 1.5}, "in_channels: needed a whole number of at least 1, got 1.5"),
        ({"num_classes": -1}, "num_classes: needed a whole number of at least 1, got -1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_invalid_option_is_rejected_by_name(options, message):
    with pytest.raises(ArgumentError) as raised:
        networks.plain(20, **options)
    assert str(raised.value) == message


def test_the_cifar_layout_rejects_an_imagenet_depth():
    with pytest.raises(ArgumentError, match=r"the CIFAR layout has 6n\+2 .*got 34"):
        networks.plain(34, layout="cifar")


def test_deep_cnn_rejects_zero_layers():
    with pytest.raises(ArgumentError, match="num_layers: needed a whole number of at least 1, got 0"):
        networks.deep_cnn(0)
