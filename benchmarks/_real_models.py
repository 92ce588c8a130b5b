"""The models of benchmarks/real_models.py: real architectures, small, with random weights. Nothing is downloaded.

Each function builds one model and returns it with its loss. A loss draws its batch from a generator, so that two runs
see the same batches and neither touches the global random numbers for it. Libraries are imported when a model is built.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Loss = Callable[[nn.Module, torch.Generator], torch.Tensor]
Build = Callable[[], tuple[nn.Module, Loss]]

N_CLASSES, N_TOKENS = 10, 64


@dataclass(frozen=True)
class RealModel:
    """One architecture.

    Attributes:
        name: Library and name.
        build: Returns a model and its loss; called with the seed set.
        amp: It trains under bf16 autocast on the CPU.
    """

    name: str
    build: Build
    amp: bool = True

    @property
    def library(self) -> str:
        """Name of the package that the model comes from."""
        return self.name.split("/")[0]


REAL_MODELS: list[RealModel] = []


def real_model(name: str, amp: bool = True) -> Callable[[Build], Build]:
    """Enters a function into the table.

    Args:
        name: Library and name, with a slash between.
        amp: As in `RealModel`.

    Returns:
        The decorator.
    """

    def enter(build: Build) -> Build:
        REAL_MODELS.append(RealModel(name, build, amp))
        return build

    return enter


_declared: list[torch.library.Library] = []  # their operators vanish with them


def prepare_imports() -> None:
    """Makes the libraries importable. Call it before the first of them is imported.

    The package index's torchvision is built for CUDA. Beside a CPU build of torch its compiled part cannot load, and
    importing it, or timm, transformers or lightning, fails unless these two operators are declared; no model here calls
    them. And transformers looks for an optional package that has the name of our kernels.py.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # not found, for find_spec and for import
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)


# Batches and losses


def images(generator: torch.Generator, n: int, size: int) -> torch.Tensor:
    """Returns noise with the low frequencies of photographs, of shape [n, 3, size, size]."""
    coarse = torch.randn(n, 3, 4, 4, generator=generator)
    fine = torch.randn(n, 3, size, size, generator=generator)
    return functional.interpolate(coarse, size=size, mode="bilinear", align_corners=False) + 0.3 * fine


def tokens(generator: torch.Generator, n: int, length: int) -> torch.Tensor:
    """Returns token ids of shape [n, length]: none of the first three, and small ones often, as in text."""
    uniform = torch.rand(n, length, generator=generator)
    return 3 + (uniform.square() * (N_TOKENS - 3)).long()


def classify(model: nn.Module, generator: torch.Generator, size: int = 32, n: int = 4) -> torch.Tensor:
    """Returns the cross entropy of an image classifier; auxiliary outputs count by 0.3."""
    labels = torch.randint(N_CLASSES, (n,), generator=generator)
    out = model(images(generator, n, size))
    main, *others = out if isinstance(out, tuple) else (out,)
    loss = functional.cross_entropy(main.float(), labels)
    return loss + sum(0.3 * functional.cross_entropy(other.float(), labels) for other in others if other is not None)


def segment(model: nn.Module, generator: torch.Generator, size: int = 64) -> torch.Tensor:
    """Returns the cross entropy per pixel of a segmentation model of torchvision."""
    labels = torch.randint(N_CLASSES, (2, size, size), generator=generator)
    outputs = model(images(generator, 2, size))
    return sum((functional.cross_entropy(out.float(), labels) for out in outputs.values()), start=torch.zeros(()))


def detect(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
    """Returns the sum of a detector's losses."""
    targets = [
        {"boxes": torch.tensor([[4.0, 5.0, 40.0, 50.0], [10.0, 8.0, 30.0, 28.0]]), "labels": torch.tensor([1, k + 2])}
        for k in range(2)
    ]
    losses = model(list(images(generator, 2, 64)), targets)
    return sum(losses.values(), start=torch.zeros(()))


def next_token(model: nn.Module, generator: torch.Generator, length: int = 16) -> torch.Tensor:
    """Returns the loss of a causal language model."""
    ids = tokens(generator, 2, length)
    return model(input_ids=ids, labels=ids).loss


def masked_token(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
    """Returns the loss of a masked language model: a padded row, and one token in four hidden."""
    ids = tokens(generator, 2, 16)
    attention = torch.ones_like(ids)
    attention[1, 12:] = 0
    hidden = (torch.rand(ids.shape, generator=generator) < 0.25) & attention.bool()
    hidden[0, 1] = True
    labels = ids.masked_fill(~hidden, -100)
    return model(input_ids=ids.masked_fill(hidden, 1), attention_mask=attention, labels=labels).loss


def translate(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
    """Returns the loss of a sequence-to-sequence model."""
    return model(input_ids=tokens(generator, 2, 12), labels=tokens(generator, 2, 9)).loss


def label_images(model: nn.Module, generator: torch.Generator, size: int = 32) -> torch.Tensor:
    """Returns the loss of an image classifier of transformers."""
    labels = torch.randint(2, (2,), generator=generator)
    return model(pixel_values=images(generator, 2, size), labels=labels).loss


def denoise(model: nn.Module, generator: torch.Generator, channels: int = 3, **conditions: Any) -> torch.Tensor:
    """Returns the loss of a denoiser that predicts the noise. Conditions are functions of the generator."""
    clean = torch.randn(2, channels, 16, 16, generator=generator)
    noise = torch.randn(2, channels, 16, 16, generator=generator)
    times = torch.randint(0, 1000, (2,), generator=generator)
    share = (times / 1000).view(-1, 1, 1, 1)
    given = {name: draw(generator) for name, draw in conditions.items()}
    predicted = model(torch.lerp(clean, noise, share), timestep=times, **given).sample
    return functional.mse_loss(predicted.float(), noise)


# torchvision


def torchvision_model(name: str, size: int = 32, **options: Any) -> tuple[nn.Module, Loss]:
    """Builds a classifier of torchvision by name."""
    from torchvision import models

    return models.get_model(name, weights=None, num_classes=N_CLASSES, **options), partial(classify, size=size)


for _name, _size in {
    "resnet18": 32,
    "mobilenet_v3_small": 32,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "efficientnet_b0": 32,
    "mnasnet0_5": 64,
    "regnet_y_400mf": 32,
}.items():
    real_model(f"torchvision/{_name}")(partial(torchvision_model, _name, _size))
real_model("torchvision/googlenet")(
    lambda: torchvision_model("googlenet", 64, aux_logits=True, init_weights=False)  # with two auxiliary classifiers
)


@real_model("torchvision/densenet")
def _() -> tuple[nn.Module, Loss]:
    from torchvision.models import DenseNet

    return DenseNet(8, (2, 3, 3), 16, num_classes=N_CLASSES, drop_rate=0.1, memory_efficient=True), classify


@real_model("torchvision/convnext")
def _() -> tuple[nn.Module, Loss]:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    blocks = [CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 2)]
    return ConvNeXt(blocks, stochastic_depth_prob=0.2, num_classes=N_CLASSES), classify


@real_model("torchvision/vit")
def _() -> tuple[nn.Module, Loss]:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 2, 32, 64, dropout=0.1, num_classes=N_CLASSES), classify


@real_model("torchvision/swin_v2")
def _() -> tuple[nn.Module, Loss]:
    from torchvision.models import SwinTransformer
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

    return SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=N_CLASSES, block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    ), classify  # fmt: skip


@real_model("torchvision/maxvit")
def _() -> tuple[nn.Module, Loss]:
    from torchvision.models import MaxVit

    return MaxVit((64, 64), 8, 4, [8, 16], [1, 2], 8, 0.2, num_classes=N_CLASSES), partial(classify, size=64)


@real_model("torchvision/lraspp_mobilenet_v3_large")
def _() -> tuple[nn.Module, Loss]:
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    return lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=N_CLASSES), segment


@real_model("torchvision/ssdlite320_mobilenet_v3_large")
def _() -> tuple[nn.Module, Loss]:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    return ssdlite320_mobilenet_v3_large(weights_backbone=None, num_classes=N_CLASSES), detect


@real_model("torchvision/s3d", amp=False)  # its gradients overflow in bfloat16
def _() -> tuple[nn.Module, Loss]:
    from torchvision.models.video import S3D

    model = S3D(num_classes=N_CLASSES)
    model.avgpool = nn.AdaptiveAvgPool3d(1)  # for clips smaller than 224 pixels

    def loss(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
        labels = torch.randint(N_CLASSES, (2,), generator=generator)
        clips = torch.randn(2, 3, 16, 64, 64, generator=generator)
        return functional.cross_entropy(model(clips).float(), labels)

    return model, loss


# timm


def timm_model(name: str, size: int = 32, **options: Any) -> tuple[nn.Module, Loss]:
    """Builds a classifier of timm by name."""
    import timm

    return timm.create_model(name, num_classes=N_CLASSES, **options), partial(classify, size=size)


for _name, _size, _options in (
    ("test_resnet", 32, {"drop_path_rate": 0.1}),
    ("test_vit", 32, {"img_size": 32}),
    ("test_efficientnet", 32, {"drop_path_rate": 0.1}),
    ("test_convnext2", 32, {}),
    ("test_maxvit", 64, {"img_size": 64}),
    ("test_coatnet", 64, {"img_size": 64}),
    ("test_nfnet", 32, {}),
    ("test_mambaout", 32, {}),
    ("xcit_nano_12_p16_224", 64, {"img_size": 64, "depth": 2}),
    ("beit_base_patch16_224", 32, {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}),
    ("mobilevit_xxs", 64, {}),
):
    real_model(f"timm/{_name}")(partial(timm_model, _name, _size, **_options))


# transformers

SMALL = {"vocab_size": N_TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CAUSAL = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def transformers_model(architecture: str, config: str, loss: Loss, **options: Any) -> tuple[nn.Module, Loss]:
    """Builds a model of transformers from the names of its class and of its configuration's class."""
    import transformers

    return getattr(transformers, architecture)(getattr(transformers, config)(**options)), loss


for _name, _head, _loss, _options in (
    ("Bert", "ForMaskedLM", masked_token, {**SMALL, "intermediate_size": 48}),
    ("Roberta", "ForMaskedLM", masked_token, {**SMALL, "intermediate_size": 48}),
    ("DistilBert", "ForMaskedLM", masked_token, {
        "vocab_size": N_TOKENS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
    }),
    ("Albert", "ForMaskedLM", masked_token, {**SMALL, "embedding_size": 16, "intermediate_size": 48}),  # shared layers
    ("DebertaV2", "ForMaskedLM", masked_token, {
        **SMALL, "intermediate_size": 48, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
    }),
    ("GPT2", "LMHeadModel", next_token, {
        **SPECIAL, "vocab_size": N_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    }),  # output tied to the embedding
    ("Llama", "ForCausalLM", next_token, {**CAUSAL, **SPECIAL}),
    ("Gemma2", "ForCausalLM", next_token, {**CAUSAL, **SPECIAL, "head_dim": 8}),
    ("Qwen3", "ForCausalLM", next_token, {**CAUSAL, **SPECIAL, "head_dim": 8}),
    ("Mixtral", "ForCausalLM", next_token, {
        **CAUSAL, **SPECIAL, "num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True,
    }),
    ("Bloom", "ForCausalLM", next_token, {
        **SPECIAL, "vocab_size": N_TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4,
    }),
    ("Mamba", "ForCausalLM", next_token, {
        **SPECIAL, "vocab_size": N_TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4,
    }),
    ("T5", "ForConditionalGeneration", translate, {
        "vocab_size": N_TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "pad_token_id": 0, "decoder_start_token_id": 0,
    }),
    ("Bart", "ForConditionalGeneration", translate, {
        "vocab_size": N_TOKENS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
        "encoder_layerdrop": 0.3, **SPECIAL, "decoder_start_token_id": 1, "forced_eos_token_id": 2,
    }),  # some steps leave a layer out
    ("ViT", "ForImageClassification", label_images, {
        "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "hidden_dropout_prob": 0.1,
    }),
    ("Segformer", "ForImageClassification", label_images, {
        "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "decoder_hidden_size": 32,
    }),
):  # fmt: skip
    real_model(f"transformers/{_name}")(
        partial(transformers_model, f"{_name}{_head}", f"{_name}Config", _loss, **_options)
    )


@real_model("transformers/CLIP")
def _() -> tuple[nn.Module, Loss]:
    from transformers import CLIPConfig, CLIPModel

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**shape, **SPECIAL, "vocab_size": N_TOKENS, "max_position_embeddings": 16}
    vision = {**shape, "image_size": 32, "patch_size": 8}

    def loss(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
        ids = tokens(generator, 4, 12)
        ids[:, -1] = SPECIAL["eos_token_id"]
        return model(input_ids=ids, pixel_values=images(generator, 4, 32), return_loss=True).loss

    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)), loss


@real_model("transformers/Wav2Vec2")
def _() -> tuple[nn.Module, Loss]:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        **SMALL, intermediate_size=48, conv_dim=(16, 16, 16), conv_kernel=(8, 4, 4), conv_stride=(4, 4, 2),
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, mask_time_length=4, layerdrop=0.2,
        pad_token_id=0, ctc_loss_reduction="mean",
    )  # fmt: skip  # its masks are drawn with numpy

    def loss(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
        sound = torch.randn(2, 2000, generator=generator)
        return model(input_values=sound, labels=tokens(generator, 2, 6)).loss

    return Wav2Vec2ForCTC(config), loss


@real_model("transformers/Whisper")
def _() -> tuple[nn.Module, Loss]:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=N_TOKENS, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48,
        encoder_attention_heads=4, decoder_attention_heads=4, decoder_ffn_dim=48, max_source_positions=32,
        max_target_positions=16, dropout=0.1, **SPECIAL, decoder_start_token_id=1,
    )  # fmt: skip

    def loss(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
        sound = torch.randn(2, 8, 64, generator=generator)
        return model(input_features=sound, labels=tokens(generator, 2, 8)).loss

    return WhisperForConditionalGeneration(config), loss


# diffusers


@real_model("diffusers/UNet2DModel")
def _() -> tuple[nn.Module, Loss]:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ), denoise  # fmt: skip


@real_model("diffusers/UNet2DConditionModel")
def _() -> tuple[nn.Module, Loss]:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=4, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    model.enable_gradient_checkpointing()
    text = {"encoder_hidden_states": lambda generator: torch.randn(2, 5, 16, generator=generator)}
    return model, partial(denoise, channels=4, **text)


@real_model("diffusers/AutoencoderKL")
def _() -> tuple[nn.Module, Loss]:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip

    def loss(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
        pictures = images(generator, 2, 32)
        posterior = model.encode(pictures).latent_dist
        decoded = model.decode(posterior.sample(generator)).sample
        return functional.mse_loss(decoded.float(), pictures) + 1e-3 * posterior.kl().mean()

    return model, loss


@real_model("diffusers/VQModel")
def _() -> tuple[nn.Module, Loss]:
    from diffusers import VQModel

    model = VQModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=3, num_vq_embeddings=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        lookup_from_codebook=False,
    )  # fmt: skip

    def loss(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
        pictures = images(generator, 2, 32)
        out = model(pictures)
        return functional.mse_loss(out.sample.float(), pictures) + out.commit_loss.mean()

    return model, loss


@real_model("diffusers/DiTTransformer2DModel")
def _() -> tuple[nn.Module, Loss]:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, norm_num_groups=4,
        sample_size=16, patch_size=4, num_embeds_ada_norm=1000,
    )  # fmt: skip
    classes = {"class_labels": lambda generator: torch.randint(10, (2,), generator=generator)}
    return model, partial(denoise, channels=4, **classes)


@real_model("diffusers/FluxTransformer2DModel")
def _() -> tuple[nn.Module, Loss]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip

    def loss(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
        noisy, target = torch.randn(2, 2, 16, 4, generator=generator)
        text = torch.randn(2, 6, 16, generator=generator)
        positions = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))  # [16, 3]
        out = model(
            noisy, encoder_hidden_states=text, pooled_projections=text[:, 0],
            timestep=torch.rand(2, generator=generator), img_ids=positions, txt_ids=torch.zeros(6, 3),
        )  # fmt: skip
        return functional.mse_loss(out.sample.float(), target)

    return model, loss


# PyG


def graph(generator: torch.Generator, n_nodes: int = 24, n_edges: int = 80) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the features of the nodes, [N, 8], and the edges of an undirected random graph, [2, 2 * E]."""
    edges = torch.randint(n_nodes, (2, n_edges), generator=generator)
    return torch.randn(n_nodes, 8, generator=generator), torch.cat([edges, edges.flip(0)], dim=1)


def label_nodes(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
    """Returns the cross entropy of a classifier of nodes."""
    x, edges = graph(generator)
    return functional.cross_entropy(model(x, edges).float(), torch.randint(5, (len(x),), generator=generator))


def pyg_model(name: str, *arguments: Any, **options: Any) -> tuple[nn.Module, Loss]:
    """Builds a model of PyG by name."""
    from torch_geometric import nn as layers

    return getattr(layers, name)(*arguments, **options), label_nodes


for _name in ("GCN", "GAT", "GraphSAGE", "GIN", "EdgeCNN"):
    real_model(f"torch_geometric/{_name}")(partial(pyg_model, _name, 8, 16, 2, 5, dropout=0.2, norm="batch_norm"))
real_model("torch_geometric/GraphUNet", amp=False)(lambda: pyg_model("GraphUNet", 8, 16, 5, 2))


@real_model("torch_geometric/PNA")
def _() -> tuple[nn.Module, Loss]:
    degrees = torch.tensor([0, 2, 4, 8, 6, 3, 1])
    return pyg_model("PNA", 8, 16, 2, 5, aggregators=["mean", "max", "std"], scalers=["identity", "amplification"],
                     deg=degrees)  # fmt: skip


@real_model("torch_geometric/SchNet")
def _() -> tuple[nn.Module, Loss]:
    from torch_geometric.nn import SchNet

    def all_pairs(positions: torch.Tensor, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        same = (batch[:, None] == batch[None]) & ~torch.eye(len(batch), dtype=torch.bool)
        edges = same.nonzero().T  # [2, E]
        return edges, (positions[edges[0]] - positions[edges[1]]).norm(dim=-1)

    def loss(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
        atoms = torch.randint(1, 9, (12,), generator=generator)
        positions = (2 * torch.randn(12, 3, generator=generator)).requires_grad_()
        energy = model(atoms, positions, torch.arange(12) // 6)
        forces = torch.autograd.grad(energy.sum(), positions, create_graph=True)[0]  # the loss differentiates twice
        return energy.float().square().mean() + forces.square().mean()

    return SchNet(16, 16, 2, 10, interaction_graph=all_pairs), loss


@real_model("torch_geometric/AttentiveFP")
def _() -> tuple[nn.Module, Loss]:
    from torch_geometric.nn import AttentiveFP

    def loss(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
        x, edges = graph(generator)
        features = torch.randn(edges.shape[1], 4, generator=generator)
        out = model(x, edges, features, torch.arange(len(x)) // 6)
        return functional.mse_loss(out.float(), torch.randn(4, 1, generator=generator))

    return AttentiveFP(8, 16, 1, 4, num_layers=2, num_timesteps=2, dropout=0.2), loss
