"""Residual adds: both parts of the gradient against autograd in float64, and their share as depth grows."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.signal_cases import Block
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradprobe
from gradprobe.nn import ResidualAdd

pytestmark = pytest.mark.usefixtures("any_hooks")


def curved(width: int, relu: bool) -> Block:
    """A block whose branch has a second derivative."""
    return Block(width, relu, nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.flatten() @ b.flatten() / (a.norm() * b.norm())).item()


@pytest.mark.parametrize("relu", [False, True], ids=["sum", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_both_parts_equal_those_of_autograd(relu: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), *(curved(8, relu) for _ in range(4)), nn.Linear(8, 1)).double()
    batch = torch.randn(5, 6, dtype=torch.float64)

    # the chain rule, step by step, in float64
    states = [net[0](batch)]
    for k in range(1, 5):
        states.append(net[k](states[-1]))
    outputs = net[5](states[-1]).square().sum()
    incoming = torch.autograd.grad(outputs, states, retain_graph=True)
    expected = {}
    for k in range(1, 5):
        x = states[k - 1].detach().requires_grad_()
        f = net[k].branch(x)
        mask = (states[k] > 0).double() if relu else 1.0
        shortcut = incoming[k] * mask
        (branch,) = torch.autograd.grad(f, x, shortcut)
        expected[f"{k}.join"] = (x.detach(), f.detach(), states[k].detach(), incoming[k], shortcut, branch)
        assert torch.allclose(shortcut + branch, incoming[k - 1], rtol=1e-12, atol=0)

    net.to(dtype)
    probe = gradprobe.attach(net)
    net(batch.to(dtype)).square().sum().backward()
    probe.step()
    junctions = probe.latest().junctions
    assert list(junctions) == list(expected)
    for name, (x, f, y, gradient, shortcut, branch) in expected.items():
        junction = junctions[name]
        for seen, value in (
            (junction.x, x),
            (junction.f, f),
            (junction.y, y),
            (junction.gradient, gradient),
            (junction.shortcut, shortcut),
            (junction.branch, branch),
        ):
            assert seen is not None
            assert seen.norm == pytest.approx(value.norm().item(), rel=1e-5)
            assert seen.std == pytest.approx(value.std(correction=0).item(), rel=1e-4)
        assert junction.cosine == pytest.approx(cosine(shortcut, branch), abs=1e-5)
        share = shortcut.norm() / (shortcut.norm() + branch.norm())
        assert junction.shortcut_share == pytest.approx(share.item(), rel=1e-5)


def test_a_branch_with_a_zero_gradient() -> None:
    block = Block(3, relu=False, branch=nn.Linear(3, 3))
    nn.init.zeros_(block.branch.weight)
    net = nn.Sequential(nn.Linear(3, 3), block)
    probe = gradprobe.attach(net)
    net(torch.randn(4, 3)).sum().backward()
    probe.step()
    junction = probe.latest().junctions["1.join"]
    assert (junction.branch.norm, junction.shortcut_share) == (0.0, 1.0)
    assert math.isnan(junction.cosine)


def test_with_a_projection_shortcut_there_is_no_branch_part() -> None:
    class Projected(nn.Module):
        """Both the shortcut and the branch have a layer."""

        def __init__(self) -> None:
            super().__init__()
            self.shortcut, self.branch, self.join = nn.Linear(3, 3), nn.Linear(3, 3), ResidualAdd()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.join(self.shortcut(x), self.branch(x))

    net = nn.Sequential(nn.Linear(3, 3), Projected())
    probe = gradprobe.attach(net)
    net(torch.randn(4, 3)).sum().backward()
    probe.step()
    junction = probe.latest().junctions["1.join"]
    assert junction.shortcut.norm == pytest.approx(math.sqrt(12))
    assert junction.branch is None
    assert math.isnan(junction.shortcut_share)


class Attention(nn.Module):
    """Three projections of x, as in a transformer's attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))


class TwoStreams(nn.Module):
    """x is also used outside the residual block: by a long skip connection and by a second head."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(6, 8), Block(8, relu=True, branch=branch), nn.Linear(16, 1)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        x = self.stem(batch)
        return self.above(x, self.block(x))

    def above(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat((x.sigmoid(), y), dim=-1)) + x.square().mean(-1, keepdim=True)


BRANCHES = {
    "one way": lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)),
    "three ways": lambda: Attention(8),
    "none": lambda: nn.Identity(),
    "nested": lambda: nn.Sequential(curved(8, relu=False), nn.Linear(8, 8)),
}


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("how", ["eager", "checkpointed", "reentrant", "compiled"])
def test_the_branchs_part_excludes_other_uses_of_x(how: str, branch: str) -> None:
    torch.manual_seed(0)
    net, batch = TwoStreams(BRANCHES[branch]()), torch.randn(5, 6)
    block, x = net.block, net.stem(batch)
    y = block(x)
    (incoming,) = torch.autograd.grad(net.above(x, y).square().sum(), y)
    shortcut = incoming * (y > 0)
    x = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad(block.branch(x), x, shortcut)

    probe = gradprobe.attach(net)
    if how == "compiled":
        torch._dynamo.reset()
        block.compile(backend="aot_eager", fullgraph=True)
    elif how != "eager":
        forward = block.forward
        block.forward = lambda x: checkpoint(forward, x, use_reentrant=how == "reentrant")
    net(batch).square().sum().backward()
    probe.step()
    junction = probe.latest().junctions["block.join"]
    assert junction.shortcut.norm == pytest.approx(shortcut.norm().item(), rel=1e-5)
    assert junction.branch.norm == pytest.approx(expected.norm().item(), rel=1e-5)
    assert junction.cosine == pytest.approx(cosine(shortcut, expected), abs=1e-5)


def test_a_sparse_part_is_not_measured() -> None:
    class Table(nn.Module):
        """Adds an embedding lookup of all rows of a table to the table."""

        def __init__(self) -> None:
            super().__init__()
            self.rows, self.join = nn.Parameter(torch.randn(4, 3)), ResidualAdd()

        def forward(self) -> torch.Tensor:
            found = nn.functional.embedding(torch.arange(4), self.rows, sparse=True)
            return self.join(self.rows, found)

    table = Table()
    probe = gradprobe.attach(table)
    table().sum().backward()
    probe.step()
    assert torch.equal(table.rows.grad, torch.full((4, 3), 2.0))
    junction = probe.latest().junctions["join"]
    assert (junction.shortcut.numel, junction.branch) == (12, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_branch_far_smaller_than_the_shortcut_keeps_its_digits(dtype: torch.dtype) -> None:
    """Computed as the sum minus the shortcut's part, it would be lost to rounding."""
    torch.manual_seed(0)
    block = Block(8, relu=False, branch=nn.Linear(8, 8, bias=False).to(dtype))
    norms = []
    for scale in (1.0, 2.0**-30):
        nn.init.constant_(block.branch.weight, scale / 8)
        net = nn.Sequential(nn.Linear(8, 8).to(dtype), block)
        with gradprobe.attach(net) as probe:
            net(torch.randn(4, 8, dtype=dtype)).sum().backward()
            probe.step()
        norms.append(probe.latest().junctions["1.join"].branch.norm)
    assert norms == pytest.approx([math.sqrt(32), math.sqrt(32) * 2.0**-30], rel=1e-6)


@pytest.mark.parametrize("magnitude", [1e-170, 1e170])
def test_the_cosine_when_the_product_of_the_norms_leaves_the_range_of_double(magnitude: float) -> None:
    torch.manual_seed(0)
    block = curved(8, relu=False)
    net = nn.Sequential(nn.Linear(8, 8), block, nn.Linear(8, 1)).double()
    seen = []
    for factor in (1.0, magnitude):
        with gradprobe.attach(net) as probe:
            (net(torch.ones(2, 8, dtype=torch.float64)).sum() * factor).backward()
            probe.step()
        seen.append(probe.latest().junctions["1.join"])
    plain, extreme = seen
    assert extreme.cosine == pytest.approx(plain.cosine, rel=1e-9)
    assert extreme.branch.norm == pytest.approx(plain.branch.norm * magnitude, rel=1e-9)


def test_autograd_still_accumulates_in_place() -> None:
    """A probe that kept the shortcut's part until the sum would cost one more tensor per residual add."""

    def is_one_memory(net: nn.Sequential) -> bool:
        addresses = []
        x = net[0](torch.randn(4, 8))
        x.register_hook(lambda total: addresses.append(total.data_ptr()))
        f = net[1].branch(x)
        f.register_hook(lambda shortcut: addresses.append(shortcut.data_ptr()))
        net[1].join(x, f).square().sum().backward()
        return len(addresses) == 2 and addresses[0] == addresses[1]

    net = nn.Sequential(nn.Linear(8, 8), curved(8, relu=True))
    assert is_one_memory(net)
    with gradprobe.attach(net) as probe:
        assert is_one_memory(net)
        probe.step()
        assert probe.latest().junctions["1.join"].branch.numel == 32


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_training_is_the_same_bit_for_bit(relu: bool, inplace: bool) -> None:
    def weights(probed: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), *(curved(8, relu) for _ in range(3)), nn.Linear(8, 2))
        for module in net.modules():
            if isinstance(module, ResidualAdd):
                module.inplace = inplace
        optimizer = torch.optim.Adam(net.parameters())
        probe = gradprobe.attach(net, optimizer=optimizer) if probed else None
        for _ in range(4):
            optimizer.zero_grad()
            net(torch.randn(6, 4)).square().mean().backward()
            optimizer.step()
        if probe is not None:
            assert len(probe.latest().junctions) == (0 if inplace else 3)
            assert len(probe.coverage().unmeasured) == (3 if inplace else 0)
        return [parameter.detach() for parameter in net.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights(True), weights(False), strict=True))


def test_second_derivatives_through_an_observed_residual_add() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), curved(3, relu=True), nn.Linear(3, 1)).double()

    def penalty(x: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return gradient.square().sum()

    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(penalty(x), x)
    with gradprobe.attach(net):
        (seen,) = torch.autograd.grad(penalty(x), x)
    assert torch.equal(seen, expected)


def test_loss_scaling_is_undone_for_gradients_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), curved(4, relu=True), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    batch = torch.randn(5, 3)
    snapshots = []
    for scale in (1.0, 1024.0):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with gradprobe.attach(net, optimizer=optimizer, grad_scaler=scaler, activations=True) as probe:
            optimizer.zero_grad()
            scaler.scale(net(batch).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        snapshots.append(probe.latest())
    plain, scaled = snapshots
    for name, activation in plain.activations.items():
        assert scaled.activations[name].output.norm == activation.output.norm
        assert scaled.activations[name].gradient.norm == pytest.approx(activation.gradient.norm, rel=1e-6)
    assert scaled.junctions["1.join"].branch.norm == pytest.approx(plain.junctions["1.join"].branch.norm, rel=1e-5)
    assert scaled.junctions["1.join"].y.std == plain.junctions["1.join"].y.std


def test_the_shortcut_carries_more_of_the_gradient_in_deeper_nets() -> None:
    """At initialisation, the blocks of a deeper network are closer to the identity after normalisation."""
    shares = {}
    for depth in (20, 56):
        torch.manual_seed(0)
        net = gradprobe.networks.resnet(depth, width=8)
        probe = gradprobe.attach(net)
        images, labels = torch.randn(16, 3, 16, 16), torch.randint(0, 10, (16,))
        nn.functional.cross_entropy(net(images), labels).backward()
        probe.step()
        seen = [junction.shortcut_share for junction in probe.latest().junctions.values()]
        assert sum(map(math.isnan, seen)) == 2  # the two with a projection, which halve the feature map
        shares[depth] = [share for share in seen if not math.isnan(share)]
    assert all(0.3 < share < 1 for depth in shares for share in shares[depth])
    assert min(shares[56][-6:]) > 0.6  # there is always a direct gradient
    assert sum(shares[56]) / len(shares[56]) > sum(shares[20]) / len(shares[20])
