"""A deep CNN without normalisation, whose gradients vanish."""

from __future__ import annotations

from torch import Tensor, nn

from gradprobe.networks.common import check_sizes
from gradprobe.nn.convolution import Conv2d


def deep_cnn(num_layers: int = 20, *, in_channels: int = 3, num_classes: int = 10, width: int = 64) -> nn.Module:
    """Builds a stack of 3x3 convolutions and ReLUs whose gradients vanish: no normalisation, PyTorch's initialisation.

    Args:
        num_layers: Number of convolutions, at least 1.
        in_channels: Channels of the input images.
        num_classes: Number of outputs.
        width: Channels of every convolution.

    Returns:
        A module that maps [N, in_channels, H, W] to logits [N, num_classes].

    Raises:
        ArgumentError: A size is not a whole number of at least 1.

    Example:
        >>> import torch
        >>> deep_cnn(50)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    check_sizes(num_layers=num_layers, in_channels=in_channels, num_classes=num_classes, width=width)
    return _DeepCNN(num_layers, in_channels, num_classes, width)


class _DeepCNN(nn.Module):
    def __init__(self, num_layers: int, in_channels: int, num_classes: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(num_layers):
            layers += [Conv2d(width if index else in_channels, width, 3, padding=1), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(x).mean(dim=(2, 3)))
        return logits
