"""Shared by the tests of residual adds: operands, bit patterns, operators with and without kernels."""

import itertools
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from gradprobe.ops import schemas
from gradprobe.ops.residual import residual_add_

NAMESPACES = ["gradprobe", "gradprobe_residual_twin"]
RELU = pytest.mark.parametrize("relu", [False, True], ids=["sum", "relu"])

Join = Callable[[Tensor, Tensor, bool], Tensor]


def name(value: object) -> str:
    return str(value).removeprefix("torch.")


def operators(namespace: str) -> torch._ops._OpNamespace:
    """Returns the operators of a namespace; those of the second always run the reference."""
    if namespace == NAMESPACES[1]:
        define_twin()
    return getattr(torch.ops, namespace)


@cache
def define_twin() -> torch.library.Library:
    library = torch.library.Library(NAMESPACES[1], "DEF")
    schemas.define_operators(library)
    return library


def every_kind(dtype: torch.dtype, n: int, seed: int) -> Tensor:
    """Returns numbers from the dtype's whole range, with subnormals, zeros of both signs, infinities and NaN."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.iinfo(integer)
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(info.min, info.max, (n,), dtype=torch.int64, generator=generator).to(integer)
    x = bits.view(dtype).clone()
    normal = torch.randn(n, generator=generator).to(dtype)
    x[: n // 2] = normal[: n // 2]
    return x


def specials(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns every pair of a few numbers that round, overflow, cancel or are not finite."""
    info = torch.finfo(dtype)
    values = [0.0, -0.0, 1.0, -1.0, info.eps / 2, info.max, -info.max, info.tiny, info.tiny * info.eps, -info.tiny]
    values += [torch.inf, -torch.inf, torch.nan]
    pairs = torch.tensor(list(itertools.product(values, values)), dtype=torch.float64).to(dtype)
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()


def bits(tensor: Tensor) -> Tensor:
    """Returns the bit patterns, the same for every NaN."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    clean = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor.detach())
    return clean.contiguous().view(integer)


def by_torch(x: Tensor, f: Tensor, relu: bool) -> Tensor:
    return torch.relu(x + f) if relu else x + f


def in_place_by_torch(x: Tensor, f: Tensor, relu: bool = False) -> Tensor:
    return x.add_(f).relu_() if relu else x.add_(f)


def assert_like_torch_in_place(of: Callable[[Join], tuple[Tensor, ...]]) -> None:
    """Checks that `residual_add_` and torch give the same values and gradients, bit for bit."""
    for ours, theirs in zip(of(residual_add_), of(in_place_by_torch), strict=True):
        assert torch.equal(bits(ours), bits(theirs))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.to(memory_format=torch.channels_last),
    "permuted": lambda x: x.contiguous().permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "every-second": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "narrowed": lambda x: torch.cat((x, x), dim=1)[:, 1 : 1 + x.shape[1]],
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "flipped-sign": lambda x: torch._neg_view(x),
}
SHAPES = [(2, 3, 4, 5), (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (2, 0, 4, 5), (1, 1, 1, 1), (3, 20, 33, 35)]

TRANSFORMS: dict[str, Callable[[Callable[[Tensor, Tensor], Tensor]], Callable[[Tensor, Tensor], object]]] = {
    "grad": lambda of: torch.func.grad(of, argnums=(0, 1)),
    "grad-of-grad": lambda of: torch.func.grad(lambda x, f: torch.func.grad(of)(x, f).pow(3).sum()),
    "jvp": lambda of: lambda x, f: torch.func.jvp(of, (x, f), (f, x)),
    "hessian": lambda of: torch.func.hessian(of),
    "vmap": lambda of: torch.vmap(of),
    "vmap-second-dimension": lambda of: torch.vmap(of, in_dims=(1, 1)),
    "vmap-of-grad": lambda of: torch.vmap(torch.func.grad(of)),
    "vmap-of-one": lambda of: lambda x, f: torch.vmap(torch.func.grad(of), in_dims=(0, None))(x, f[0]),
    "grad-of-vmap": lambda of: torch.func.grad(lambda x, f: torch.vmap(of)(x, f).pow(2).sum()),
    "vjp": lambda of: lambda x, f: torch.func.vjp(of, x, f)[1](torch.tensor(2.0, dtype=x.dtype)),
}


class Block(torch.nn.Module):
    """Two convolutions with batch normalisation, and a residual add."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        conv, norm = (lambda: torch.nn.Conv2d(4, 4, 3, padding=1, bias=False)), (lambda: torch.nn.BatchNorm2d(4))
        self.branch = torch.nn.Sequential(conv(), norm(), torch.nn.ReLU(), conv(), norm())
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.branch(x))


def weights_after_training(
    join: Callable[[Tensor, Tensor], Tensor], memory_format: torch.memory_format = torch.contiguous_format
) -> list[Tensor]:
    """Returns the parameters of a small residual network after three steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), *(Block(join) for _ in range(3)))
    model.to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 16, 16).contiguous(memory_format=memory_format)).square().mean().backward()
        optimizer.step()
    return list(model.parameters())
