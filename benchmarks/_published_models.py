"""The models of benchmarks/real_model_flow.py: published architectures at their published width, with random weights.

Nothing is downloaded. Where a model would not fit into 6 GiB with its gradients, it has fewer layers or experts, never
a smaller width; the name says so. Each function builds a model and a batch for it; libraries are imported then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

Build = Callable[[], tuple[nn.Module, Any]]

IMAGE, TOKENS = 224, 32


@dataclass(frozen=True)
class PublishedModel:
    """One architecture.

    Attributes:
        name: Library and name.
        build: Returns a model and its inputs, as `gradprobe.check_gradient_flow` takes them; called with the seed set.
    """

    name: str
    build: Build

    @property
    def library(self) -> str:
        """Name of the package that the model comes from."""
        return self.name.split("/")[0]


def images(size: int = IMAGE, n: int = 4, channels: int = 3) -> torch.Tensor:
    """Returns noise of shape [n, channels, size, size]."""
    return torch.randn(n, channels, size, size)


def text(vocabulary: int, length: int = TOKENS, n: int = 2) -> torch.Tensor:
    """Returns token ids of shape [n, length], none of the first three."""
    return torch.randint(3, vocabulary, (n, length))


def torchvision_model(name: str, size: int = IMAGE, n: int = 4, **options: Any) -> tuple[nn.Module, Any]:
    """Builds an image model of torchvision by name."""
    from torchvision import models

    if name in models.list_models(models.segmentation):
        options["weights_backbone"] = None
    return models.get_model(name, weights=None, **options), images(size, n)


def detector(name: str) -> tuple[nn.Module, Any]:
    """Builds a detector of torchvision, which returns its losses."""
    from torchvision import models

    targets = [{"boxes": torch.tensor([[20.0, 30.0, 150.0, 160.0]]), "labels": torch.tensor([k + 1])} for k in range(2)]
    return models.get_model(name, weights=None, weights_backbone=None), (list(images(n=2)), targets)


def clip_of_video(name: str) -> tuple[nn.Module, Any]:
    """Builds a video classifier of torchvision."""
    from torchvision import models

    return models.get_model(name, weights=None), torch.randn(1, 3, 16, 112, 112)


def timm_model(name: str, size: int = IMAGE, n: int = 4, **options: Any) -> tuple[nn.Module, Any]:
    """Builds an image model of timm by name."""
    import timm

    return timm.create_model(name, **options), images(size, n)


def transformers_model(
    architecture: str, config: str, inputs: Callable[[Any], dict[str, Any]], **options: Any
) -> tuple[nn.Module, Any]:
    """Builds a model of transformers from the names of its class and of its configuration's class."""
    import transformers

    settings = getattr(transformers, config)(**options)
    return getattr(transformers, architecture)(settings), inputs(settings)


def labelled_text(config: Any) -> dict[str, Any]:
    """Returns a batch of a language model, with labels: such a model returns its own loss."""
    ids = text(config.vocab_size)
    return {"input_ids": ids, "labels": ids}


def translation(config: Any) -> dict[str, Any]:
    """Returns a batch of a sequence-to-sequence model, without labels."""
    return {"input_ids": text(config.vocab_size), "decoder_input_ids": text(config.vocab_size, 9)}


def pictures(config: Any, size: int = IMAGE) -> dict[str, Any]:
    """Returns a batch of images by keyword."""
    return {"pixel_values": images(size, n=2)}


def picture_and_caption(config: Any) -> dict[str, Any]:
    """Returns a batch of CLIP."""
    ids = text(config.text_config.vocab_size, 12)
    ids[:, -1] = config.text_config.eos_token_id
    return {"input_ids": ids, "pixel_values": images(n=2), "return_loss": True}


def sound(config: Any) -> dict[str, Any]:
    """Returns half a second of noise."""
    return {"input_values": torch.randn(2, 8000)}


def spectrogram(config: Any) -> dict[str, Any]:
    """Returns a batch of Whisper."""
    return {"input_features": torch.randn(1, 80, 3000), "decoder_input_ids": text(config.vocab_size, 8, 1)}


def diffusers_model(name: str, inputs: Callable[[], dict[str, Any]], **options: Any) -> tuple[nn.Module, Any]:
    """Builds a model of diffusers by name."""
    import diffusers

    return getattr(diffusers, name)(**options), inputs()


def noisy(channels: int, size: int, **conditions: Any) -> dict[str, Any]:
    """Returns a batch of a denoiser."""
    return {"sample": images(size, 2, channels), "timestep": torch.tensor([10, 700]), **conditions}


def flux_inputs() -> dict[str, Any]:
    """Returns a batch of Flux: latents and text as sequences, with their positions."""
    positions = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(8.0))  # [64, 3]
    return {
        "hidden_states": torch.randn(1, 64, 64), "encoder_hidden_states": torch.randn(1, 16, 4096),
        "pooled_projections": torch.randn(1, 768), "timestep": torch.rand(1), "guidance": torch.ones(1),
        "img_ids": positions, "txt_ids": torch.zeros(16, 3),
    }  # fmt: skip


def graph_model(name: str, n_layers: int = 3, **options: Any) -> tuple[nn.Module, Any]:
    """Builds a model of PyG for a graph of 200 nodes with 1433 features, as Cora's have."""
    from torch_geometric import nn as layers

    edges = torch.randint(200, (2, 800))
    inputs = (torch.randn(200, 1433), torch.cat([edges, edges.flip(0)], dim=1))
    return getattr(layers, name)(1433, 256, n_layers, 7, **options), inputs


def schnet() -> tuple[nn.Module, Any]:
    """Builds SchNet and two molecules of twelve atoms."""
    from torch_geometric.nn import SchNet

    def all_pairs(positions: torch.Tensor, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        same = (batch[:, None] == batch[None]) & ~torch.eye(len(batch), dtype=torch.bool)
        edges = same.nonzero().T  # [2, E]
        return edges, (positions[edges[0]] - positions[edges[1]]).norm(dim=-1)

    inputs = (torch.randint(1, 9, (24,)), 2 * torch.randn(24, 3), torch.arange(24) // 12)
    return SchNet(interaction_graph=all_pairs), inputs


def attentive_fp() -> tuple[nn.Module, Any]:
    """Builds AttentiveFP and a batch of four molecules."""
    from torch_geometric.nn import AttentiveFP

    edges = torch.randint(48, (2, 120))
    inputs = (torch.randn(48, 39), edges, torch.randn(120, 10), torch.arange(48) // 12)
    return AttentiveFP(39, 200, 1, 10, num_layers=2, num_timesteps=2, dropout=0.2), inputs


_LLAMA = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
_QWEN = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "num_hidden_layers": 28, "vocab_size": 32000, "tie_word_embeddings": True,
}  # fmt: skip
_GEMMA = {"num_hidden_layers": 2, "vocab_size": 32000}
_MIXTRAL = {"num_hidden_layers": 1, "num_local_experts": 2, "vocab_size": 8000}
_UNET = {
    "sample_size": 32, "block_out_channels": (128, 256, 256, 256), "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
_STABLE = {"sample_size": 16, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 1}
_VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
_VQ = {
    "block_out_channels": (128, 256, 512), "layers_per_block": 2, "latent_channels": 3, "num_vq_embeddings": 8192,
    "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
    "lookup_from_codebook": False,
}  # fmt: skip

_VISION: dict[str, dict[str, Any]] = {
    "alexnet": {}, "vgg16": {"n": 2}, "resnet50": {}, "densenet121": {}, "mobilenet_v3_large": {},
    "shufflenet_v2_x1_0": {}, "squeezenet1_1": {}, "efficientnet_b0": {}, "mnasnet1_0": {}, "regnet_y_400mf": {},
    "googlenet": {"aux_logits": True, "init_weights": False}, "inception_v3": {"size": 299, "init_weights": False},
    "convnext_tiny": {}, "vit_b_16": {"n": 2}, "swin_t": {"n": 2}, "swin_v2_t": {"n": 2}, "maxvit_t": {"n": 2},
    "deeplabv3_mobilenet_v3_large": {}, "lraspp_mobilenet_v3_large": {},
}  # fmt: skip
_TIMM: dict[str, dict[str, Any]] = {
    "mixer_b16_224": {"n": 2}, "resmlp_12_224": {"n": 2}, "gmlp_s16_224": {"n": 2}, "cait_xxs24_224": {"n": 2},
    "xcit_nano_12_p16_224": {}, "beit_base_patch16_224": {"n": 2}, "deit3_small_patch16_224": {"n": 2},
    "coatnet_0_rw_224": {"n": 2}, "mobilevit_xxs": {}, "mambaout_tiny": {"n": 2}, "dm_nfnet_f0": {"size": 192, "n": 2},
    "tf_efficientnetv2_s": {"n": 2}, "resnetv2_50x1_bit": {"n": 2},
}  # fmt: skip
_TRANSFORMERS: dict[str, tuple[str, str, Callable[[Any], dict[str, Any]], dict[str, Any]]] = {
    "Bert base": ("BertForMaskedLM", "BertConfig", labelled_text, {}),
    "Roberta base": ("RobertaForMaskedLM", "RobertaConfig", labelled_text, {}),
    "DistilBert": ("DistilBertForMaskedLM", "DistilBertConfig", labelled_text, {}),
    "Albert base": ("AlbertForMaskedLM", "AlbertConfig", labelled_text, {
        "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
    }),
    "DebertaV2 base": ("DebertaV2ForMaskedLM", "DebertaV2Config", labelled_text, {
        "vocab_size": 32000, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
    }),
    "GPT2": ("GPT2LMHeadModel", "GPT2Config", labelled_text, {}),
    "Llama, 4 layers": ("LlamaForCausalLM", "LlamaConfig", labelled_text, {**_LLAMA, "num_hidden_layers": 4}),
    "Gemma2 2b, 2 layers": ("Gemma2ForCausalLM", "Gemma2Config", labelled_text, _GEMMA),
    "Qwen3 0.6b": ("Qwen3ForCausalLM", "Qwen3Config", labelled_text, _QWEN),
    "Mixtral, 1 layer, 2 experts": ("MixtralForCausalLM", "MixtralConfig", labelled_text, _MIXTRAL),
    "Bloom 560m": ("BloomForCausalLM", "BloomConfig", labelled_text, {
        "vocab_size": 32000, "hidden_size": 1024, "n_layer": 24, "n_head": 16,
    }),
    "Mamba 130m": ("MambaForCausalLM", "MambaConfig", labelled_text, {"num_hidden_layers": 24}),
    "T5 small": ("T5ForConditionalGeneration", "T5Config", translation, {}),
    "Bart base": ("BartForConditionalGeneration", "BartConfig", translation, {
        "d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072,
        "encoder_attention_heads": 12, "decoder_attention_heads": 12,
    }),
    "ViT base": ("ViTForImageClassification", "ViTConfig", pictures, {}),
    "Segformer b0": ("SegformerForImageClassification", "SegformerConfig", pictures, {}),
    "CLIP base": ("CLIPModel", "CLIPConfig", picture_and_caption, {}),
    "Wav2Vec2 base": ("Wav2Vec2ForCTC", "Wav2Vec2Config", sound, {}),
    "Whisper base": ("WhisperForConditionalGeneration", "WhisperConfig", spectrogram, {
        "d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 8,
        "decoder_attention_heads": 8, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048,
    }),
}  # fmt: skip
_DIFFUSERS: dict[str, tuple[str, Callable[[], dict[str, Any]], dict[str, Any]]] = {
    "UNet2DModel (DDPM)": ("UNet2DModel", partial(noisy, 3, 32), _UNET),
    "UNet2DConditionModel, 1 layer a block": (
        "UNet2DConditionModel", lambda: noisy(4, 16, encoder_hidden_states=torch.randn(2, 77, 768)),
        {**_STABLE, "cross_attention_dim": 768},
    ),
    "AutoencoderKL (Stable Diffusion)": ("AutoencoderKL", lambda: {"sample": images(64, 1)}, _VAE),
    "VQModel": ("VQModel", lambda: {"sample": images(64, 1)}, _VQ),
    "DiTTransformer2DModel XL, 6 layers": (
        "DiTTransformer2DModel",
        lambda: {"hidden_states": images(32, 2, 4), "timestep": torch.tensor([3, 9]), "class_labels": torch.arange(2)},
        {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 6,
         "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000},
    ),
    "FluxTransformer2DModel, 1 + 1 layers": (
        "FluxTransformer2DModel", flux_inputs, {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True},
    ),
}  # fmt: skip
_GRAPHS: dict[str, dict[str, Any]] = {
    "GCN": {}, "GAT": {"heads": 8}, "GraphSAGE": {}, "GIN": {"norm": "batch_norm"}, "EdgeCNN": {},
}  # fmt: skip


def detr() -> tuple[nn.Module, Any]:
    """Builds DETR, whose learned queries are read without being called."""
    import transformers

    backbone = transformers.ResNetConfig(out_features=["stage4"])  # as ResNet-50
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone
    )
    return transformers.DetrForObjectDetection(config), {"pixel_values": images(n=2)}


PUBLISHED_MODELS = [
    *(
        PublishedModel(f"torchvision/{name}", partial(torchvision_model, name, **options))
        for name, options in _VISION.items()
    ),
    PublishedModel("torchvision/retinanet_resnet50_fpn", partial(detector, "retinanet_resnet50_fpn")),
    PublishedModel("torchvision/ssdlite320_mobilenet_v3_large", partial(detector, "ssdlite320_mobilenet_v3_large")),
    PublishedModel("torchvision/r3d_18", partial(clip_of_video, "r3d_18")),
    *(PublishedModel(f"timm/{name}", partial(timm_model, name, **options)) for name, options in _TIMM.items()),
    *(
        PublishedModel(f"transformers/{name}", partial(transformers_model, *row[:3], **row[3]))
        for name, row in _TRANSFORMERS.items()
    ),
    PublishedModel("transformers/DETR", detr),
    *(
        PublishedModel(f"diffusers/{name}", partial(diffusers_model, *row[:2], **row[2]))
        for name, row in _DIFFUSERS.items()
    ),
    *(
        PublishedModel(f"torch_geometric/{name}", partial(graph_model, name, **options))
        for name, options in _GRAPHS.items()
    ),
    PublishedModel("torch_geometric/SchNet", schnet),
    PublishedModel("torch_geometric/AttentiveFP", attentive_fp),
]
