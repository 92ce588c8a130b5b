"""The networks' batch normalisation in one pass with ReLU and residual add: same weights, same signals, same graph."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradprobe
from gradprobe import networks
from gradprobe.nn import ResidualAdd
from gradprobe.nn.batch_norm import BatchNorm2d
from gradprobe.ops import libraries

pytestmark = pytest.mark.skipif(libraries.native_hooks()[0] is None, reason="needs the C++ hooks")

NETWORKS = {
    "plain": lambda: networks.plain(14, in_channels=1),
    "resnet": lambda: networks.resnet(14, in_channels=1),
    "projections": lambda: networks.resnet(18, in_channels=1, num_classes=10, width=8),
    "bottlenecks": lambda: networks.resnet(50, in_channels=1, num_classes=10, width=4),
}
EACH_NETWORK = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().to(memory_format=torch.channels_last)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(16, 1, 16, 16, generator=generator).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(0, 10, (16,), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, steps: int = 3) -> list[Tensor]:
    """Trains for a few steps; returns the state of the model, and the losses last."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        images, labels = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*(value.clone() for value in model.state_dict().values()), torch.stack(losses)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def by_torch(*_: object, **options: object) -> None:
    """Stands in for `BatchNorm2d.in_one_pass` where there is no kernel."""


@pytest.fixture
def n_passes(monkeypatch: pytest.MonkeyPatch) -> dict[bool, int]:
    """Counts the calls of the kernel: alone, and together with a ReLU."""
    counts = {False: 0, True: 0}
    original = BatchNorm2d.in_one_pass

    def counted(self, x, shortcut=None, relu=False):
        y = original(self, x, shortcut, relu)
        counts[relu] += y is not None
        return y

    monkeypatch.setattr(BatchNorm2d, "in_one_pass", counted)
    return counts


@EACH_NETWORK
def test_training_takes_the_kernel_and_gives_torchs_numbers(
    make, n_passes: dict[bool, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(make)
    fused = train(model, steps=2)
    n_norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    n_projections = sum(".shortcut.1.weight" in name for name, _ in model.named_parameters())
    assert n_passes == {False: 2 * n_projections, True: 2 * (n_norms - n_projections)}
    monkeypatch.setattr(BatchNorm2d, "in_one_pass", by_torch)
    expected = train(made(make), steps=2)
    assert fused[-1].tolist() == pytest.approx(expected[-1].tolist(), rel=5e-3)
    counts = [a for name, a in zip(model.state_dict(), fused, strict=False) if "num_batches" in name]
    assert {count.item() for count in counts} == {2}


@EACH_NETWORK
@pytest.mark.parametrize("options", [{}, {"activations": True}, {"activations": True, "every": 2}], ids=str)
def test_a_probe_changes_no_bit(make, options: dict[str, object]) -> None:
    expected = train(made(make))
    model = made(make)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with gradprobe.attach(model, optimizer=optimizer, **options):
        assert equal(train(model, optimizer), expected)


def test_a_probe_sees_what_it_saw_before(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for in_one_pass in (BatchNorm2d.in_one_pass, by_torch):
        monkeypatch.setattr(BatchNorm2d, "in_one_pass", in_one_pass)
        model = made(NETWORKS["resnet"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with gradprobe.attach(model, optimizer=optimizer, activations=True) as probe:
            train(model, optimizer, steps=1)
            seen.append(probe.latest(wait=True).metrics("all"))
    ours, before = seen
    assert list(ours) == list(before)
    assert any("act_rms" in name for name in ours)
    assert any("shortcut_share" in name for name in ours)
    for name, value in ours.items():
        assert value == pytest.approx(before[name], rel=1e-2, abs=1e-6, nan_ok=True), name


def test_hooks_still_see_every_module_and_change_no_bit() -> None:
    expected = train(made(NETWORKS["resnet"]))
    n_calls = []
    for kind in (nn.BatchNorm2d, nn.Sequential, ResidualAdd):
        model = made(NETWORKS["resnet"])
        watched = [module for module in model.modules() if isinstance(module, kind)]
        for module in watched:
            module.register_forward_hook(lambda *_: n_calls.append(1))
        n_calls.clear()
        assert equal(train(model), expected)
        assert len(n_calls) == 3 * len(watched)
    n_calls.clear()
    model = made(NETWORKS["resnet"])
    handle = nn.modules.module.register_module_forward_hook(lambda *_: n_calls.append(1))
    try:
        train(model, steps=1)
    finally:
        handle.remove()
    assert len(n_calls) == sum(not isinstance(module, nn.ModuleList) for module in model.modules())


def test_the_graph_has_the_nodes_of_separate_modules() -> None:
    """A walk over the graph, such as `Probe.check`, finds the residual add and both of its operands."""
    block = made(NETWORKS["resnet"]).stages[0][0]
    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = block(x)
    assert y.grad_fn.name() == "ResidualAddBackward"
    (shortcut, _), (branch, _) = y.grad_fn.next_functions
    assert shortcut.variable is x
    assert branch.name() == "BatchNormBackward"
    norm = block.convs[1][1]
    assert branch.next_functions[1][0].variable is norm.weight
    assert branch.next_functions[2][0].variable is norm.bias
    held: list[Tensor] = []
    branch.register_prehook(lambda grads: held.append(grads[0]))
    y.sum().backward()
    assert torch.equal(held[0], (y > 0).float())


def test_a_branch_of_weight_zero_passes_no_gradient_but_the_shortcut_does() -> None:
    model = made(NETWORKS["resnet"])
    for block in model.stages[0]:
        nn.init.zeros_(block.convs[-1][1].weight)
    train(model, torch.optim.SGD(model.parameters(), lr=0.0), steps=1)
    assert model.stem[0].weight.grad.abs().sum() > 0
    assert not model.stages[0][0].convs[0][0].weight.grad.any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint(reentrant: bool) -> None:
    model, other = made(NETWORKS["resnet"]), made(NETWORKS["resnet"])
    images, labels = batch(0)
    images.requires_grad_()
    F.cross_entropy(model(images), labels).backward()
    plain_stages = other.stages
    h = checkpoint(lambda x: plain_stages(torch.relu(other.stem(x))), images, use_reentrant=reentrant)
    F.cross_entropy(other.fc(h.mean(dim=(2, 3))), labels).backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_copies_pickles_and_parallel_clones_train_alike() -> None:
    expected = train(made(NETWORKS["resnet"]))
    for clone in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        assert equal(train(clone(made(NETWORKS["resnet"]))), expected)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(made(NETWORKS["resnet"]))
    assert not any(isinstance(module, BatchNorm2d) for module in model.modules())
    # An old pickle holds torch's own modules.
    model = made(NETWORKS["resnet"])
    for block in model.modules():
        if isinstance(block, nn.Sequential) and isinstance(block[-1], BatchNorm2d):
            block[-1].__class__ = nn.BatchNorm2d
    assert train(model)[-1].tolist() == pytest.approx(expected[-1].tolist(), rel=5e-3)


def test_keys_and_names_are_torchs() -> None:
    ours, torchs = BatchNorm2d(4), nn.BatchNorm2d(4)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    assert repr(ours) == repr(torchs)
    ours.load_state_dict(torchs.state_dict())
    assert "stages.1.0.convs.1.1.running_var" in networks.resnet(8).state_dict()


@pytest.mark.parametrize(
    "change",
    [
        lambda norm: norm.eval(),
        lambda norm: norm.double(),
        lambda norm: setattr(norm, "momentum", None),
        lambda norm: setattr(norm, "track_running_stats", False),
        lambda norm: norm.register_parameter("weight", None),
        lambda norm: norm.to("meta"),
    ],
    ids=["eval", "double", "cumulative", "untracked", "not-affine", "meta"],
)
def test_what_the_kernel_does_not_take_runs_in_torch(change: Callable[[nn.Module], object], n_passes) -> None:
    norms = [BatchNorm2d(16), nn.BatchNorm2d(16)]
    results = []
    for norm in norms:
        change(norm)
        like = next(iter(norm.buffers()))
        x = torch.linspace(-3, 5, 4 * 16 * 9, device=like.device, dtype=like.dtype).view(4, 16, 3, 3)
        x = x.contiguous(memory_format=torch.channels_last)
        results.append([norm(x), *norm.state_dict().values()])
    assert n_passes == {False: 0, True: 0}
    if not results[0][0].is_meta:
        assert equal(*results)


def test_bfloat16_autocast_changes_no_bit_when_observed(n_passes: dict[bool, int]) -> None:
    """The normalised branch is rounded before the addition, observed or not."""
    images, labels = batch(0)
    gradients = []
    for observed in (False, True):
        model = made(NETWORKS["resnet"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        probe = gradprobe.attach(model, optimizer=optimizer) if observed else None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
        if probe is not None:
            probe.detach()
    assert equal(*gradients)
    assert n_passes[True] > n_passes[False] > 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_graphs_hold_torchs_operators() -> None:
    block = made(NETWORKS["resnet"]).stages[0][0]
    x = torch.randn(4, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-4)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_autograd_gives_the_same_gradients() -> None:
    x = torch.randn(4, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    gradients = []
    for compiles in (False, True):
        block = made(NETWORKS["resnet"]).stages[0][0]
        loss = block(x).square().sum()
        if compiles:
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
                loss.backward()
        else:
            loss.backward()
        gradients.append([p.grad for p in block.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class Shifted(BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Halved(gradprobe.nn.ResidualAdd):
    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        return super().forward(x, f) / 2


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.stem.append(nn.Hardtanh(-0.1, 0.1)),
        lambda model: model.stem.__setitem__(1, Shifted(16)),
        lambda model: setattr(model.stages[0][0], "join", Halved(relu=True)),
        lambda model: setattr(model, "stem", nn.Identity()),
    ],
    ids=["one more layer", "another norm", "another join", "no layer"],
)
def test_layers_of_ones_own_run_while_training(change: Callable[[nn.Module], object]) -> None:
    channels = 16
    model = made(lambda: gradprobe.networks.resnet(8, in_channels=channels))
    change(model)
    x = torch.randn(4, channels, 8, 8).contiguous(memory_format=torch.channels_last)
    fused = model(x)
    with torch.no_grad():
        for module in model.modules():
            module.register_forward_hook(lambda *_: None)  # every module is called
    torch.testing.assert_close(fused, model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "unpack",
    [lambda saved: saved.contiguous(), lambda saved: saved.clone()],
    ids=["memory order", "copy"],
)
def test_hooks_on_saved_tensors_may_return_another_layout(unpack: Callable[[Tensor], Tensor]) -> None:
    def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
        model(x).square().sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    x = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    model = made(lambda: nn.Sequential(BatchNorm2d(3)))
    other = made(lambda: nn.Sequential(BatchNorm2d(3)))
    expected = gradients(model, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, unpack):
        found = gradients(other, x)
    torch.testing.assert_close(found, expected)
