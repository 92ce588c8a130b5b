"""Models that add inline: in the styles of well-known libraries, and in styles that cannot be replaced."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """A block as torchvision writes it."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class Bottleneck(nn.Module):
    """A bottleneck with a subclassed normalisation and `add_`."""

    def __init__(self, inplanes: int, planes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inplanes, planes, 1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, 1, 1), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1), NormAct(4 * planes)
        widens = inplanes != 4 * planes
        self.downsample = nn.Sequential(nn.Conv2d(inplanes, 4 * planes, 1)) if widens else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        out.add_(x if self.downsample is None else self.downsample(x))
        return F.relu(out, inplace=True)


class NormAct(nn.BatchNorm2d):
    """A normalisation that overrides forward."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


class Attention(nn.Module):
    """Attention with one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = q @ k.transpose(-2, -1)
        if attention_mask is not None:
            scores = scores + attention_mask
        return self.proj(scores.softmax(-1) @ v)


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(len(x), *[1] * (x.ndim - 1)) > 0.2) / 0.8


class TimmBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
        self.drop_path = nn.Identity()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.gamma is None:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        else:
            x = x + self.drop_path(self.gamma * self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class TimmViT(nn.Module):
    """Also adds positions, which is not a residual addition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.position = nn.Parameter(torch.randn(5, width))
        self.blocks = nn.Sequential(TimmBlock(width), TimmBlock(width))
        self.blocks[1].drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.position
        return self.blocks(x)


class DecoderLayer(nn.Module):
    """A layer as the transformers library writes it: optional arguments, tuples."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = nn.LayerNorm(width), Attention(width)
        self.post_attention_layernorm, self.mlp = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        if kwargs:
            raise TypeError(f"unexpected keyword argument {next(iter(kwargs))!r}")
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        attention_output = self.self_attn(hidden_states, attention_mask=attention_mask)
        hidden_states = residual + attention_output
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = torch.add(residual, hidden_states)
        outputs = (hidden_states,)
        if output_attentions:
            outputs = outputs + (attention_output,)  # noqa: RUF005
        return outputs


class Decoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DecoderLayer(width), DecoderLayer(width)])
        self.norm = nn.LayerNorm(width)

    def forward(self, inputs: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        all_hidden_states: tuple[Tensor, ...] = ()
        hidden_states = inputs
        for layer in self.layers:
            all_hidden_states += (hidden_states,)
            layer_outputs = layer(hidden_states, attention_mask=attention_mask)
            hidden_states = layer_outputs[0]
        return self.norm(hidden_states), all_hidden_states


class BertOutput(nn.Module):
    """Adds two tensors that its caller passes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.norm(self.dense(hidden_states) + input_tensor)


class BertLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.attention_output = Attention(width), BertOutput(width)
        self.intermediate, self.output = nn.Linear(width, width), BertOutput(width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        attention_output = self.attention_output(self.attention(hidden_states), hidden_states)
        return self.feed_forward_chunk(attention_output)

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        return self.output(F.gelu(self.intermediate(attention_output)), attention_output)


class Parallel(nn.Module):
    """Adds two branches before adding the shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(width), nn.Linear(width, width), Attention(width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return self.mlp(normed) + self.attn(normed) + x


def traced(width: int) -> nn.Module:
    return torch.fx.symbolic_trace(BertLayer(width))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 2 * k, 2, 3, padding=1) for k in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat((x, F.relu(layer(x))), dim=1)
        return x


class Positions(nn.Module):
    """Additions that are not residual: of positions, biases, constants, two branches, two projections."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table, self.bias = nn.Embedding(9, width), nn.Parameter(torch.randn(width))
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.register_buffer("pe", torch.randn(20, width))

    def forward(self, x: Tensor, scores: Tensor | None = None) -> Tensor:
        x = x + self.pe[: x.shape[1]] + self.table(torch.arange(x.size(1)))
        x = x * 2.0 + 1e-3
        return torch.tanh(self.a(x) + self.b(x)) + self.bias


class Root(nn.Module):
    """Adds in the root module, with the shortcut on either side, nested."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) + x
        return x + self.b(x) + self.c(x).add(0.5)


class Loop(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


class Twice(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = TimmBlock(width)
        self.nested = nn.ModuleDict({"again": nn.Sequential(self.block)})

    def forward(self, x: Tensor) -> Tensor:
        return self.nested["again"](self.block(x))


class DataDependent(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        f = self.a(x)
        if f.sum() > 0:
            f = self.b(torch.tanh(f))
        while f.abs().max() > 1e3:
            f = f / 2
        return x + f


class Methods(nn.Module):
    """Adds in methods that forward calls, once with a `__mangled` name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.__b, self.c = (nn.Linear(width, width) for _ in range(3))

    def _first(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.a(x)

    def _second(self, x: Tensor, *, f: Callable[[Tensor], Tensor]) -> Tensor:
        y = self.__b(f(x))
        y += x
        return y

    def forward(self, x: Tensor) -> Tensor:
        x = self._second(self._first(x, scale=0.5), f=lambda z: z * 2)
        return torch.utils.checkpoint.checkpoint(self.third, x, use_reentrant=False)

    def third(self, x: Tensor) -> Tensor:
        return self.c(x) + x


def doubled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * function(self, *args, **kwargs)

    return wrapper


class Decorated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    @doubled
    @doubled
    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


def closure(width: int) -> nn.Module:
    factor = 0.25

    class Base(nn.Module):
        def extra(self, x: Tensor) -> Tensor:
            return x * factor

    class Net(Base):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(width, width)

        def extra(self, x: Tensor) -> Tensor:
            return super().extra(x)

        def forward(self, x: Tensor) -> Tensor:
            return x + super().extra(self.layer(x)) * factor

    return Net()


class OneLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.keeps = True


class Chain(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, width), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def dropout_add(out: Tensor, residual: Tensor) -> Tensor:
    return residual + F.dropout(out, 0.1)


class OutsideFunction(OneLayer):
    def forward(self, x: Tensor) -> Tensor:
        return dropout_add(self.layer(x), x)


class OverChildren(OneLayer):
    def forward(self, x: Tensor) -> Tensor:
        f = x
        for child in self.children():
            f = child(f)
        return x + self.layer(f)


class Unclear(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
        self.b = nn.Sequential(*(nn.Linear(width, width) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)
