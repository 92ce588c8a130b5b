"""Networks that show what depth does: plain and residual ones of equal depth, and what else the sweep compares.

| family | network | depth |
|---|---|---|
| `plain`, `resnet` | convolutions without and with residual adds | weight layers: 6n+2, or an ImageNet depth |
| `fixup`, `skipinit`, `rezero`, `layerscale` | `resnet` without normalisation | weight layers: 6n+2 |
| `transformer-pre`, `transformer-post`, `transformer-plain` | attention and MLPs in turn | sublayers: even |
"""

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from gradprobe.networks.common import INITS, Init, count_parameters, initialise
from gradprobe.networks.deep_cnn import deep_cnn
from gradprobe.networks.layouts import (
    IMAGENET_DEPTHS,
    LAYOUTS,
    NORMS,
    Block,
    CifarNet,
    Layout,
    Norm,
    PadShortcut,
    Shortcut,
    default_layout,
    plain,
    resnet,
)
from gradprobe.networks.transformers import transformer
from gradprobe.networks.without_norm import fixup, layerscale, rezero, skipinit
from gradprobe.nn.residual import ResidualAdd

NORMALISED_FAMILIES: Mapping[str, Callable[..., nn.Module]] = {"plain": plain, "resnet": resnet}
"""Functions that build a network of a depth, and take `norm` and `init`."""

TRANSFORMERS: Mapping[str, Callable[..., nn.Module]] = {
    f"transformer-{arrangement}": partial(transformer, arrangement=arrangement)
    for arrangement in ("pre", "post", "plain")
}
"""Functions that build a network of a depth, and take `image_size`."""

BUILDERS: Mapping[str, Callable[..., nn.Module]] = {
    **NORMALISED_FAMILIES,
    "fixup": fixup,
    "skipinit": skipinit,
    "rezero": rezero,
    "layerscale": layerscale,
    **TRANSFORMERS,
}

FAMILIES = tuple(BUILDERS)

__all__ = [
    "BUILDERS",
    "FAMILIES",
    "IMAGENET_DEPTHS",
    "INITS",
    "LAYOUTS",
    "NORMALISED_FAMILIES",
    "NORMS",
    "TRANSFORMERS",
    "Block",
    "CifarNet",
    "Init",
    "Layout",
    "Norm",
    "PadShortcut",
    "ResidualAdd",
    "Shortcut",
    "count_parameters",
    "deep_cnn",
    "default_layout",
    "fixup",
    "initialise",
    "layerscale",
    "plain",
    "resnet",
    "rezero",
    "skipinit",
    "transformer",
]
