"""Counts the residual adds that `gradprobe.instrument` finds in real models, against a count by hand from the source.

    pip install torchvision timm transformers diffusers torch_geometric     (or: make real-models)
    python benchmarks/instrumented_models.py [PATTERN ...]

Every model of _real_models.py, and two graph networks, take one training step plain and one instrumented and with a
probe, each from the same seeds: loss and gradients should be equal bit for bit, and the probe should see every residual
add. Prints the table of docs/instrument.md. Exits with 1 if a count or a number differs, or if nobody has counted by
hand; models of libraries that are not installed are listed as left out.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from fnmatch import fnmatch
from importlib.util import find_spec

import torch
from _compare import seed_all
from _real_models import REAL_MODELS, Loss, RealModel, images, prepare_imports
from torch import nn

import gradprobe

# By hand: number of residual adds, and the lines of the package in which they are, with the number of blocks. A place
# in a loop counts once.
BY_HAND: dict[str, tuple[int, str]] = {
    "torchvision/resnet18": (8, "models/resnet.py:102 × 8"),
    "torchvision/mobilenet_v3_small": (6, "models/mobilenetv3.py:114 × 6"),
    "torchvision/shufflenet_v2_x0_5": (0, "blocks concatenate"),
    "torchvision/squeezenet1_1": (0, "blocks concatenate"),
    "torchvision/efficientnet_b0": (9, "models/efficientnet.py:168 × 9"),
    "torchvision/mnasnet0_5": (10, "models/mnasnet.py:61 × 10"),
    "torchvision/regnet_y_400mf": (16, "models/regnet.py:145 × 4, 147 × 12"),
    "torchvision/googlenet": (0, "inception blocks concatenate"),
    "torchvision/densenet": (0, "dense blocks concatenate"),
    "torchvision/convnext": (4, "models/convnext.py:66 × 4"),
    "torchvision/vit": (4, "models/vision_transformer.py:115, 119 × 2; not the positions"),
    "torchvision/swin_v2": (8, "models/swin_transformer.py:503, 504 × 4"),
    "torchvision/maxvit": (15, "models/maxvit.py:138 × 3, 379, 380 × 6"),
    "torchvision/lraspp_mobilenet_v3_large": (10, "models/mobilenetv3.py:114 × 10; not the merge, lraspp.py:79"),
    "torchvision/ssdlite320_mobilenet_v3_large": (10, "models/mobilenetv3.py:114 × 10; not the box arithmetic"),
    "torchvision/s3d": (0, "inception blocks concatenate"),
    "timm/test_resnet": (4, "resnet.py:163 × 3, 283 × 1"),
    "timm/test_vit": (12, "vision_transformer.py:250, 251 × 6"),
    "timm/test_efficientnet": (0, "no block has a stride of 1 and as many channels as before"),
    "timm/test_convnext2": (4, "convnext.py:218 × 4"),
    "timm/test_maxvit": (20, "maxxvit.py:653 × 4, 888, 889 × 8"),
    "timm/test_coatnet": (8, "maxxvit.py:653 × 2, 507, 508 × 3"),
    "timm/test_nfnet": (4, "nfnet.py:280 × 4"),
    "timm/test_mambaout": (6, "mambaout.py:270 × 6"),
    "timm/xcit_nano_12_p16_224": (10, "xcit.py:345, 348, 349 × 2, 227, 237 × 2; not the positions, 615"),
    "timm/beit_base_patch16_224": (4, "beit.py:427, 428 × 2"),
    "timm/mobilevit_xxs": (21, "byobnet.py:509 × 3, vision_transformer.py:250, 251 × 9"),
    "transformers/Bert": (4, "modeling_bert.py:293, 352 × 2; not the embeddings"),
    "transformers/Roberta": (4, "modeling_roberta.py:338, 397 × 2; not the embeddings"),
    "transformers/DistilBert": (4, "modeling_distilbert.py:252, 256 × 2"),
    "transformers/Albert": (2, "modeling_albert.py:198, 231; both layers share them"),
    "transformers/DebertaV2": (4, "modeling_deberta_v2.py:52, 405 × 2; not the scores, 245 and 337"),
    "transformers/GPT2": (4, "modeling_gpt2.py:285, 310 × 2"),
    "transformers/Llama": (4, "modeling_llama.py:308, 314 × 2; not the rotary positions"),
    "transformers/Gemma2": (4, "modeling_gemma2.py:321, 327 × 2"),
    "transformers/Qwen3": (4, "modeling_qwen3.py:310, 316 × 2"),
    "transformers/Mixtral": (4, "modeling_mixtral.py:362, 366 × 2; not the sums over experts"),
    "transformers/Bloom": (4, "modeling_bloom.py:108, a function that attention and MLP share, × 2"),
    "transformers/Mamba": (4, "modeling_mamba.py:530 × 2, and the skip D·u, 271 × 2; not the scan, 263"),
    "transformers/T5": (10, "modeling_t5.py:141, 403 × 4, 435 × 2"),
    "transformers/Bart": (10, "modeling_bart.py:293, 301, 364, 379, 388 × 2; not the positions, 523"),
    "transformers/ViT": (4, "modeling_vit.py:277, 284 × 2"),
    "transformers/Segformer": (8, "modeling_segformer.py:299, 304 × 4"),
    "transformers/CLIP": (8, "modeling_clip.py:376, 381 × 4"),
    "transformers/Wav2Vec2": (5, "modeling_wav2vec2.py:604, 607 × 2, and x + conv(x), 680"),
    "transformers/Whisper": (10, "modeling_whisper.py:403, 411, 485, 499, 508 × 2; not the positions, 788"),
    "diffusers/UNet2DModel": (12, "resnet.py:375 × 8, attention_processor.py:2783, a function, × 4"),
    "diffusers/UNet2DConditionModel": (
        24,
        "resnet.py:375 × 8, transformer_2d.py:511 × 4, attention.py:1017, 1049, 1076 × 4",
    ),
    "diffusers/AutoencoderKL": (12, "resnet.py:375 × 10, attention_processor.py:2783 × 2"),
    "diffusers/VQModel": (12, "resnet.py:375 × 10, attention_processor.py:2783 × 2; not the quantisation, vae.py:657"),
    "diffusers/DiTTransformer2DModel": (4, "attention.py:1017, 1076 × 2; not the embeddings"),
    "diffusers/FluxTransformer2DModel": (5, "transformer_flux.py:473, 481, 487, 493 × 1, 407 × 1"),
    "torch_geometric/GCN": (0, "no addition of a layer's input"),
    "torch_geometric/GAT": (0, "gat_conv.py:392 adds scores"),
    "torch_geometric/GraphSAGE": (0, "sage_conv.py:139 adds two projections"),
    "torch_geometric/GIN": (0, "gin_conv.py:88 adds neighbours without a layer"),
    "torch_geometric/EdgeCNN": (0, "no addition of a layer's input"),
    "torch_geometric/GraphUNet": (1, "graph_unet.py:131, in a loop: the skip to the decoder"),
    "torch_geometric/PNA": (0, "no addition of a layer's input"),
    "torch_geometric/SchNet": (1, "schnet.py:290, in a loop"),
    "torch_geometric/AttentiveFP": (0, "attentive_fp.py:58 adds scores"),
    "torch_geometric/DeepGCN": (4, "deepgcn.py:97 × 4"),
    "torch_geometric/GPSConv": (6, "gps_conv.py:144, 163, 173 × 2; not the sum of local and global"),
}


class GraphLayers(nn.Module):
    """Layers on a ring of twelve nodes."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the features after the last layer."""
        nodes = torch.arange(len(x))
        for layer in self.layers:
            x = layer(x, torch.stack([nodes, nodes.roll(1)]))
        return x


def graph_loss(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
    out: torch.Tensor = model(torch.randn(12, 16, generator=generator))
    return out.square().mean()


def deep_gcn() -> tuple[nn.Module, Loss]:
    from torch_geometric.nn import DeepGCNLayer, GENConv

    layers = [DeepGCNLayer(GENConv(16, 16), nn.LayerNorm(16), nn.ReLU(), block="res+") for _ in range(4)]
    return GraphLayers(layers), graph_loss


def gps() -> tuple[nn.Module, Loss]:
    from torch_geometric.nn import GCNConv, GPSConv

    return GraphLayers([GPSConv(16, GCNConv(16, 16), heads=2) for _ in range(2)]), graph_loss


MODELS = [
    *REAL_MODELS,
    RealModel("torch_geometric/DeepGCN", deep_gcn),
    RealModel("torch_geometric/GPSConv", gps),
]


def step(model: nn.Module, loss: Loss) -> list[torch.Tensor | None]:
    """Takes one step; returns the loss and the gradients."""
    seed_all()
    value = loss(model, torch.Generator().manual_seed(2))
    value.backward()
    return [value.detach(), *(parameter.grad for parameter in model.parameters())]


def built(make: Callable[[], tuple[nn.Module, Loss]]) -> tuple[nn.Module, Loss]:
    seed_all()
    return make()


def row(each: RealModel) -> tuple[list[str], bool]:
    """Returns the row of a model, and whether everything is as expected."""
    plain = step(*built(each.build))
    model, loss = built(each.build)
    has_own_loop = each.name == "diffusers/AutoencoderKL"  # the loss calls encode and decode, not forward
    example = [images(torch.Generator().manual_seed(0), 2, 32)] if has_own_loop else []
    report = gradprobe.instrument(model, *example)
    with gradprobe.attach(model) as probe:
        seen = step(model, loss)
        probe.step()
    pairs = zip(plain, seen, strict=True)
    are_equal = all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)
    latest = probe.latest(wait=True)
    silent = len(report.junctions) - (0 if latest is None else len(latest.junctions))
    expected, where = BY_HAND.get(each.name, (None, "not counted by hand"))
    found = len(report.junctions)
    unseen = "; ".join(sorted(set(report.unseen.values()))) or "-"
    by_hand = "-" if expected is None else str(expected)
    cells = [each.name, str(found), by_hand, where, unseen, "yes" if are_equal else "no"]
    return cells, are_equal and expected == found and silent == 0


def main() -> int:
    warnings.simplefilter("ignore")
    prepare_imports()
    wanted = sys.argv[1:] or ["*"]
    matching = [one for one in MODELS if any(fnmatch(one.name, pattern) for pattern in wanted)]
    chosen = [one for one in matching if find_spec(one.library)]
    if not chosen:
        sys.exit(f"no model of an installed library matches {' '.join(wanted)}")
    if left_out := [one.name for one in matching if one not in chosen]:
        print(f"left out, since their libraries are not installed: {', '.join(left_out)}", file=sys.stderr)
    print("| model | found | by hand | where | unseen | training equal |\n|---|--:|--:|---|---|---|")
    is_right = True
    for each in chosen:
        cells, is_expected = row(each)
        is_right = is_right and is_expected
        print(f"| {' | '.join(cells)} |" + ("" if is_expected else "  <- differs"), flush=True)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
