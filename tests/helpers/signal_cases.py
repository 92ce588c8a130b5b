"""Models that break other tools, and a float64 reference for their activations and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradprobe
from gradprobe.nn import ResidualAdd


class Block(nn.Module):
    """y = max(x + F(x), 0), or without the ReLU."""

    def __init__(self, width: int = 4, relu: bool = True, branch: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch or nn.Linear(width, width)
        self.join = ResidualAdd(relu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.join(x, self.branch(x))


def net(*more: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), Block(), *more)


class InPlace(nn.Module):
    """ReLU in place after a normalisation, a sum in place, a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm(self.conv(x)))
        out = self.again(x)
        out += x
        return self.head(self.relu(out).view(len(x), 4, -1).mean(2))


class DenseNet(nn.Module):
    """Every layer takes the outputs of all earlier layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 2 * k, 2, 3, padding=1) for k in range(4))
        self.relu = nn.ReLU()  # shared by all layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.cat((x, self.relu(layer(x))), dim=1)
        return x.mean((2, 3))


class UNet(nn.Module):
    """Downsampling, upsampling, and skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.middle = nn.Sequential(nn.GELU(), nn.Conv2d(4, 4, 3, padding=1))
        self.up = nn.ConvTranspose2d(8, 3, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.down(x)
        return self.up(torch.cat((low, self.middle(low)), dim=1)) + x


class Recurrent(nn.Module):
    """Contains a module that returns a tuple within a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 5, num_layers=2, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, (h, _) = self.lstm(x.flatten(2).mean(2, keepdim=True).expand(-1, -1, 8))
        return self.head(out[:, -1] + h[-1])


class Encoder(nn.Module):
    """Checkpointed transformer layers."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0) for _ in range(2))
        self.use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2).transpose(0, 1)[:, :, :1].expand(-1, -1, 8))
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return x.mean(0)


@dataclass
class Output:
    """The output of a module with several results."""

    logits: torch.Tensor
    extra: dict[str, torch.Tensor | int]


class Structured(nn.Module):
    """Passes on dictionaries and dataclasses that also hold integers; one layer is frozen."""

    class Inner(nn.Module):
        """Returns a dataclass."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> Output:
            y = self.linear(x)
            return Output(y, {"arg": y.argmax(1), "square": y * y, "n": 3})

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.inner = Structured.Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.inner(self.frozen(x.mean((2, 3))))
        return output.logits + output.extra["square"]


NETS: dict[str, Callable[[], nn.Module]] = {
    "in place": InPlace,
    "dense": DenseNet,
    "unet": UNet,
    "lstm": Recurrent,
    "transformer, checkpointed": lambda: Encoder(use_reentrant=False),
    "transformer, reentrant checkpoint": lambda: Encoder(use_reentrant=True),
    "dataclass and frozen": Structured,
    "resnet": lambda: gradprobe.networks.resnet(8, width=4),
}


def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def build(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = NETS[name]()
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, n_steps: int) -> None:
    for _ in range(n_steps):
        optimizer.zero_grad()
        model(images()).square().sum().backward()
        optimizer.step()


@dataclass
class Seen:
    """Reference statistics of one tensor or several together, in float64."""

    values: list[torch.Tensor]

    def of(self) -> tuple[float, float, float, int]:
        flat = torch.cat([value.reshape(-1).double() for value in self.values])
        return flat.norm().item(), flat.std(correction=0).item(), (flat == 0).double().mean().item(), flat.numel()


@contextmanager
def reference(model: nn.Module, names: list[str]) -> Iterator[tuple[dict[str, Seen], dict[str, Seen]]]:
    """Records module outputs and their gradients without a probe, with an identity function behind each module."""
    outputs: dict[str, Seen] = {}
    gradients: dict[str, Seen] = {}

    def tensors(value: object) -> list[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            return [value] if value.is_floating_point() else []
        if isinstance(value, Output):
            return [value.logits, value.extra["square"]]  # type: ignore[list-item]
        return [tensor for item in value for tensor in tensors(item)] if isinstance(value, tuple) else []

    class Observe(torch.autograd.Function):
        """The identity, which records its gradient."""

        @staticmethod
        def forward(ctx, x, name):  # type: ignore[no-untyped-def]
            ctx.name = name
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            gradients.setdefault(ctx.name, Seen([])).values.append(gradient.clone())
            return gradient, None

    def replace(value: object, name: str) -> object:
        if isinstance(value, torch.Tensor):
            return Observe.apply(value, name) if value.is_floating_point() else value
        if isinstance(value, Output):
            extra = {key: replace(item, name) for key, item in value.extra.items()}
            return Output(replace(value.logits, name), extra)  # type: ignore[arg-type]
        return tuple(replace(item, name) for item in value) if isinstance(value, tuple) else value

    def observe(name: str) -> Callable[..., object]:
        def hook(module: nn.Module, args: object, output: object) -> object:
            is_recomputed = torch._C._current_graph_task_id() != -1 and name in outputs
            if torch.is_grad_enabled() and not is_recomputed:
                outputs.setdefault(name, Seen([])).values += [tensor.detach().clone() for tensor in tensors(output)]
            return replace(output, name)

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(observe(name)) for name in names]
    yield outputs, gradients
    for handle in handles:
        handle.remove()
