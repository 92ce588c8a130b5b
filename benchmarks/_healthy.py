"""Healthy runs of benchmarks/diagnosis.py."""

from __future__ import annotations

from functools import partial

import torch
from _networks import (
    HE,
    Encoder,
    Gan,
    Highway,
    Recurrent,
    ReZero,
    Scaled,
    Text,
    Transformer,
    cnn,
    discriminator_turn,
    frozen,
    generator_turn,
    gpt2,
    linear,
    mlp,
)
from _run import ADAM, ADAMW, Run, classify
from torch import nn

import gradprobe

DECAYED = partial(ADAM, weight_decay=1e-2)
GAN_ADAM = partial(ADAM, betas=(0.5, 0.999))  # Radford et al. 2016
POST_NORM_ADAM = partial(ADAM, betas=(0.9, 0.98))  # Vaswani et al. 2017


def noisy(images: torch.Tensor, step: int) -> torch.Tensor:
    """Adds noise, so that the loss has a floor."""
    return images + 0.3 * torch.randn_like(images)


def relu_mlp() -> nn.Module:
    """The MLP of most runs."""
    return mlp(4, nn.ReLU, HE)


def relu_cnn() -> nn.Module:
    """The CNN of most runs."""
    return cnn(4, HE)


HEALTHY = (
    Run("MLP, ReLU, He", lambda: mlp(4, nn.ReLU, HE)),
    Run("MLP of 3, ReLU, torch's weights", lambda: mlp(3, nn.ReLU, None), learning_rate=0.1),
    Run("MLP, tanh", lambda: mlp(4, nn.Tanh)),
    Run("MLP, sigmoid", lambda: mlp(2, nn.Sigmoid, 4.0), learning_rate=0.1),
    Run("MLP of 10, ReLU, BN", lambda: mlp(10, nn.ReLU, HE, norm=True)),
    Run("CNN", lambda: cnn(4, HE), learning_rate=0.01),
    Run("ResNet-8", lambda: gradprobe.networks.resnet(8, in_channels=1)),
    Run("plain-8", lambda: gradprobe.networks.plain(8, in_channels=1)),
    Run(
        "ResNet-20 without BN",
        lambda: gradprobe.networks.resnet(20, in_channels=1, width=8, norm="none"),
        learning_rate=1e-3,
    ),
    Run("highway net of 6", lambda: Highway(6), learning_rate=0.05),
    Run("12 branches that start at zero", lambda: ReZero(12)),
    Run("RNN", lambda: Recurrent(nn.RNN), learning_rate=0.05),
    Run("LSTM", lambda: Recurrent(nn.LSTM), learning_rate=0.2),
    Run("GRU", lambda: Recurrent(nn.GRU), learning_rate=0.2),
    Run("transformer", Transformer),
    Run("embedding and GRU", Text, learning_rate=0.05),
    Run("transformer, float16", Transformer, dtype=torch.float16),
    Run("MLP, bfloat16, loss times 1e-5", lambda: mlp(4, nn.ReLU, HE), dtype=torch.bfloat16, loss_factor=1e-5),
    Run("MLP, tanh, 150 steps", lambda: mlp(4, nn.Tanh), learning_rate=0.2, n_steps=150),
    Run("LSTM, 150 steps", lambda: Recurrent(nn.LSTM), learning_rate=0.2, n_steps=150),
    # Rates and networks as they are usual with AdamW.
    Run("MLP, AdamW, rate of 1e-4", relu_mlp, learning_rate=1e-4, optimizer=ADAMW, n_steps=150),
    Run("MLP, AdamW", relu_mlp, learning_rate=3e-3, optimizer=ADAMW),
    Run("CNN, AdamW", relu_cnn, learning_rate=1e-3, optimizer=ADAMW),
    Run("transformer of 4, AdamW", Encoder, learning_rate=1e-3, optimizer=ADAMW, n_steps=60, is_slow=True),
    Run("GPT-2's weights, AdamW", gpt2, learning_rate=1e-3, optimizer=ADAMW, n_steps=60, is_slow=True),
    Run("GPT-2's weights, AdamW, rate of 1e-4", gpt2, learning_rate=1e-4, optimizer=ADAMW, n_steps=150, is_slow=True),
    Run("GPT-2's weights, AdamW, rate of 3e-3", gpt2, learning_rate=3e-3, optimizer=ADAMW, n_steps=150, is_slow=True),
    Run(
        "post-norm transformer of 8, warm-up",
        lambda: Encoder(8, norm_first=False),
        learning_rate=1e-2,
        optimizer=POST_NORM_ADAM,
        warm_up=75,
        n_steps=150,
        is_slow=True,
    ),
    # Branches that are hardly there at the start.
    Run("branches that end in zeros, AdamW", lambda: Scaled(6, None), learning_rate=1e-3, optimizer=ADAMW),
    Run("branches times 1e-6, AdamW", lambda: Scaled(6, 1e-6), learning_rate=1e-3, optimizer=ADAMW, n_steps=100),
    Run("12 branches that start at zero, AdamW", lambda: ReZero(12), learning_rate=1e-3, optimizer=ADAMW, n_steps=60),
    # A new head on a network that is not trained.
    Run("MLP, frozen except the head", lambda: frozen(relu_mlp())),
    Run("CNN, frozen except the head, AdamW", lambda: frozen(relu_cnn()), learning_rate=1e-3, optimizer=ADAMW),
    # Losses with a floor.
    Run("MLP, label smoothing of 0.2", relu_mlp, loss=partial(classify, smoothing=0.2), n_steps=150),
    Run(
        "MLP, label smoothing of 0.2, at its floor",
        relu_mlp,
        loss=partial(classify, smoothing=0.2),
        n_before=600,
        n_steps=60,
        is_slow=True,
    ),
    Run(
        "linear, label smoothing of 0.5, at its floor",
        linear,
        learning_rate=1e-3,
        optimizer=ADAM,
        loss=partial(classify, smoothing=0.5),
        n_before=600,
        n_steps=60,
    ),
    # Runs that are resumed at their plateau, with a new probe.
    Run("linear, resumed", linear, learning_rate=1e-2, optimizer=DECAYED, n_before=600, n_steps=100),
    Run("MLP, resumed", relu_mlp, learning_rate=1e-3, optimizer=ADAMW, n_before=500, is_slow=True),
    Run(
        "MLP, noisy images, resumed",
        relu_mlp,
        learning_rate=1e-3,
        optimizer=ADAMW,
        n_before=500,
        n_steps=60,
        disturb=noisy,
        is_slow=True,
    ),
    Run("CNN, resumed", relu_cnn, learning_rate=0.01, n_before=300, n_steps=60, is_slow=True),
    # Runs that reach their plateau.
    Run("linear, 600 steps", linear, learning_rate=1e-2, optimizer=DECAYED, n_steps=600, is_slow=True),
    Run("MLP, 600 steps", relu_mlp, learning_rate=1e-3, optimizer=ADAMW, n_steps=600, is_slow=True),
    Run(
        "MLP, noisy images, 600 steps",
        relu_mlp,
        learning_rate=1e-3,
        optimizer=ADAMW,
        n_steps=600,
        disturb=noisy,
        is_slow=True,
    ),
    Run("CNN, 600 steps", relu_cnn, learning_rate=0.01, n_steps=600, is_slow=True),
    # Two networks that train against each other.
    Run(
        "GAN, generator",
        Gan,
        learning_rate=1e-3,
        optimizer=GAN_ADAM,
        loss=generator_turn,
        observed="generator",
        n_steps=150,
    ),
    Run(
        "GAN, discriminator",
        Gan,
        learning_rate=1e-3,
        optimizer=GAN_ADAM,
        loss=discriminator_turn,
        observed="discriminator",
        n_steps=150,
    ),
)
