"""Runs of benchmarks/diagnosis.py with a planted fault."""

from __future__ import annotations

import math

import torch
from _healthy import POST_NORM_ADAM, relu_cnn, relu_mlp
from _networks import (
    HE,
    BranchTimesZero,
    Encoder,
    Recurrent,
    Transformer,
    WayAround,
    cnn,
    gpt2,
    mlp,
)
from _run import ADAM, ADAMW, Run
from torch import nn

import gradprobe

STILL = ("updates too small", "not learning")  # follow from steps that hardly move the weights
# Faults that follow from steps that are too large.
THROWN = (
    "non-finite",
    "loss blow-up",
    "updates too large",
    "unstable loss",
    "exploding (forward)",
    "vanishing (backward)",
    "saturation",
    "dead ReLU",
    "dying",
    "silent parameter",
    "layer drift",
    "spike",
    "not learning",
)
UNDERFLOW = (
    "dying",
    "silent parameter",
    "layer drift",
    "vanishing (backward)",
    "not learning",
    "spike",
)  # follow from float16 underflow
SMALL = ("poor initialisation", *STILL)  # follow from weights that are too small
CUT = ("vanishing (backward)", "silent parameter", *STILL)  # follow from dead units, which pass no gradient
UNCLEARED = (
    "updates too large",
    "unstable loss",
    "not learning",
    "spike",
    "loss blow-up",
    "dying",
    "dead ReLU",
    "silent parameter",
    "layer drift",
)  # follow from gradients that add up


def nan_at(images: torch.Tensor, step: int) -> torch.Tensor:
    """Sets one pixel of one batch to NaN."""
    images = images.clone()
    if step == 23:
        images[3, 0, 4, 4] = math.nan
    return images


def outlier_at(images: torch.Tensor, step: int) -> torch.Tensor:
    """Makes one batch far brighter than all others."""
    return images * 100 if step == 31 else images


def cut_branch(model: nn.Module, step: int) -> None:
    """Multiplies one of two branches by zero from step 25 on."""
    if step == 25:
        model.factor = 0.0


def kill_layer(model: nn.Module, step: int) -> None:
    """Kills the second layer's units at step 25, as a step that is too large would."""
    if step == 25:
        torch.nn.init.constant_(model[3].bias, -30.0)


def bright(images: torch.Tensor, step: int) -> torch.Tensor:
    """Scales the images far out of the usual range."""
    return images * 1000


def shuffled(labels: torch.Tensor) -> torch.Tensor:
    """Gives the images of a batch each other's labels."""
    return labels[torch.randperm(len(labels))]


FAULTY = (
    Run("MLP of 20, sigmoid", lambda: mlp(20, nn.Sigmoid), "vanishing (backward)", STILL),
    Run("MLP of 20, tanh, small weights", lambda: mlp(20, nn.Tanh, 0.4), "vanishing (backward)", SMALL),
    Run("20 sigmoid layers and a way around", lambda: WayAround(20), "vanishing (backward)", STILL, 1e-4),
    Run(
        "deep_cnn(24)",
        lambda: gradprobe.networks.deep_cnn(24, in_channels=1, width=16),
        "vanishing (backward)",
        ("dying", *SMALL),
    ),
    Run(
        "MLP of 50, ReLU, BN", lambda: mlp(50, nn.ReLU, HE, norm=True), "exploding (backward)", ("not learning",), 1e-4
    ),
    Run(
        "MLP of 50, ReLU, BN, huge first weights",
        lambda: mlp(50, nn.ReLU, HE, norm=True, first_gain=1e4),
        "exploding (backward)",
        STILL,
        1e-4,
    ),
    Run("MLP of 40, tanh, large weights", lambda: mlp(40, nn.Tanh, 3.0), "exploding (backward)", STILL, 1e-6),
    Run("MLP of 30, ReLU, large weights", lambda: mlp(30, nn.ReLU, 2 * HE), "exploding (forward)", THROWN, 1e-3),
    Run(
        "ResNet-80 without BN",
        lambda: gradprobe.networks.resnet(80, in_channels=1, width=4, norm="none"),
        "exploding (forward)",
        STILL,
        1e-12,
    ),
    Run("MLP, leaky ReLU, rate of 50", lambda: mlp(4, nn.LeakyReLU, HE), "loss blow-up", THROWN, 50.0),
    Run(
        "MLP of 30, ReLU, large weights, outputs not observed",
        lambda: mlp(30, nn.ReLU, 2 * HE),
        "loss blow-up",
        THROWN,
        1e-3,
        activations=False,
    ),
    Run("MLP, NaN in a batch", lambda: mlp(4, nn.ReLU, HE), "non-finite", ("loss blow-up",), disturb=nan_at),
    Run("transformer, NaN in a batch", Transformer, "non-finite", ("loss blow-up",), disturb=nan_at),
    Run(
        "MLP of 12, ReLU, small weights",
        lambda: mlp(12, nn.ReLU, 0.3),
        "poor initialisation",
        (*STILL, "vanishing (backward)", "dying", "dead ReLU", "layer drift"),
    ),
    Run(
        "CNN of 8, small weights",
        lambda: cnn(8, 0.2),
        "poor initialisation",
        (*STILL, "vanishing (backward)", "dying", "dead ReLU", "silent parameter", "layer drift"),
    ),
    Run(
        "MLP of 6, tanh, huge weights",
        lambda: mlp(6, nn.Tanh, 30.0),
        "saturation",
        ("not learning", "exploding (backward)"),
        1e-3,
    ),
    Run(
        "MLP of 4, sigmoid, huge weights",
        lambda: mlp(4, nn.Sigmoid, 100.0),
        "saturation",
        ("not learning", "exploding (backward)"),
    ),
    Run("MLP, dead units", lambda: mlp(4, nn.ReLU, HE, bias=-30.0), "dead ReLU", ("dying", *CUT)),
    Run("CNN, dead units", lambda: cnn(4, HE, bias=-30.0), "dead ReLU", ("dying", *CUT)),
    Run("MLP, most units dead", lambda: mlp(4, nn.ReLU, HE, bias=-2.0), "dying", ("dead ReLU", "layer drift", *CUT)),
    Run("branch times zero", BranchTimesZero, "silent parameter", ("dying",), 0.05),
    Run(
        "branch cut at step 25",
        lambda: BranchTimesZero(0.5),
        "layer drift",
        ("silent parameter",),
        0.05,
        alter=cut_branch,
    ),
    Run(
        "MLP, a layer dies at step 25",
        lambda: mlp(4, nn.ReLU, HE),
        "layer drift",
        ("dead ReLU", *CUT),
        alter=kill_layer,
    ),
    Run(
        "MLP, float16, loss times 1e-5",
        lambda: mlp(4, nn.ReLU, HE),
        "precision loss",
        UNDERFLOW,
        dtype=torch.float16,
        loss_factor=1e-5,
    ),
    Run(
        "transformer, float16, loss times 1e-4",
        Transformer,
        "precision loss",
        UNDERFLOW,
        dtype=torch.float16,
        loss_factor=1e-4,
    ),
    Run("MLP, tanh, rate of 100", lambda: mlp(4, nn.Tanh), "updates too large", THROWN, 100.0),
    Run("transformer, rate of 10", Transformer, "updates too large", THROWN, 10.0),
    Run(
        "MLP, bfloat16 weights, rate of 1e-4",
        lambda: mlp(4, nn.ReLU, HE),
        "updates too small",
        ("not learning",),
        1e-4,
        weights=torch.bfloat16,
    ),
    Run("transformer, rate of 1e-9", Transformer, "updates too small", ("not learning",), 1e-9),
    Run(
        "RNN, rate of 0.3",
        lambda: Recurrent(nn.RNN),
        "unstable loss",
        ("layer drift", "silent parameter", "spike", "not learning"),
        0.3,
        n_steps=150,
    ),
    Run("MLP, tanh, rate of 1", lambda: mlp(4, nn.Tanh), "unstable loss", THROWN, 1.0, n_steps=150),
    Run("MLP, no rate", lambda: mlp(4, nn.ReLU, HE), "not learning", ("updates too small",), 0.0),
    Run(
        "ResNet-8, no rate",
        lambda: gradprobe.networks.resnet(8, in_channels=1),
        "not learning",
        ("updates too small",),
        0.0,
    ),
    Run("MLP, outlier", lambda: mlp(4, nn.ReLU, HE), "spike", ("loss blow-up", "not learning"), disturb=outlier_at),
    Run("transformer, outlier", Transformer, "spike", ("loss blow-up", "not learning"), disturb=outlier_at),
    # AdamW at 100 times the usual rate.
    Run(
        "transformer of 4, AdamW, rate of 0.1",
        Encoder,
        "updates too large",
        THROWN,
        0.1,
        optimizer=ADAMW,
    ),
    Run(
        "transformer of 4, AdamW, rate of 0.1, 150 steps",
        Encoder,
        "updates too large",
        THROWN,
        0.1,
        optimizer=ADAMW,
        n_steps=150,
        is_slow=True,
    ),
    Run(
        "GPT-2's weights, AdamW, rate of 0.1",
        gpt2,
        "updates too large",
        THROWN,
        0.1,
        optimizer=ADAMW,
        n_steps=150,
        is_slow=True,
    ),
    Run("MLP, AdamW, rate of 0.1", relu_mlp, "updates too large", THROWN, 0.1, optimizer=ADAMW),
    Run("MLP, AdamW, rate of 0.1, 150 steps", relu_mlp, "updates too large", THROWN, 0.1, optimizer=ADAMW, n_steps=150),
    Run("CNN, AdamW, rate of 0.1", relu_cnn, "updates too large", THROWN, 0.1, optimizer=ADAMW),
    # SGD at a rate that is too high.
    Run("MLP, ReLU, rate of 3", relu_mlp, "loss blow-up", THROWN, 3.0),
    Run("transformer of 4, rate of 3", Encoder, "loss blow-up", THROWN, 3.0, is_slow=True),
    Run("CNN, rate of 0.3", relu_cnn, "dead ReLU", THROWN, 0.3, n_steps=60),
    # No warm-up where it is needed: the first steps leave a network that passes no gradient.
    Run(
        "post-norm transformer of 8, no warm-up",
        lambda: Encoder(8, norm_first=False),
        "vanishing (backward)",
        THROWN,
        1e-2,
        optimizer=POST_NORM_ADAM,
        n_steps=100,
        is_slow=True,
    ),
    Run(
        "post-norm transformer of 12, no warm-up",
        lambda: Encoder(12, norm_first=False),
        "vanishing (backward)",
        THROWN,
        5e-3,
        optimizer=POST_NORM_ADAM,
        n_steps=100,
        is_slow=True,
    ),
    # Images that are not normalised kill the units; the loss falls to that of a constant answer.
    Run(
        "MLP of 3, bright images, Adam",
        lambda: mlp(3, nn.ReLU, None),
        "dead ReLU",
        THROWN,
        0.3,
        disturb=bright,
        optimizer=ADAM,
        n_steps=60,
    ),
    Run("CNN, bright images", relu_cnn, "dead ReLU", THROWN, 2e-3, disturb=bright, n_steps=60),
    Run("CNN, bright images, Adam", relu_cnn, "dead ReLU", THROWN, 0.1, disturb=bright, optimizer=ADAM, n_steps=60),
    # Gradients that add up, in runs that fall and in runs that do not.
    Run("MLP, no zero_grad", relu_mlp, "gradients not cleared", UNCLEARED, clears_gradients=False),
    Run("MLP, no zero_grad, rate of 2e-3", relu_mlp, "gradients not cleared", UNCLEARED, 2e-3, clears_gradients=False),
    Run(
        "MLP, no zero_grad, AdamW",
        relu_mlp,
        "gradients not cleared",
        UNCLEARED,
        1e-3,
        clears_gradients=False,
        optimizer=ADAMW,
    ),
    Run("CNN, no zero_grad", relu_cnn, "gradients not cleared", UNCLEARED, 0.01, clears_gradients=False),
    Run(
        "transformer of 4, no zero_grad, AdamW",
        Encoder,
        "gradients not cleared",
        UNCLEARED,
        1e-3,
        clears_gradients=False,
        optimizer=ADAMW,
        n_steps=60,
        is_slow=True,
    ),
    # Labels that say nothing of the images.
    Run("MLP, shuffled labels", relu_mlp, "not learning", labels=shuffled),
    Run(
        "MLP, shuffled labels, AdamW",
        relu_mlp,
        "not learning",
        learning_rate=1e-3,
        labels=shuffled,
        optimizer=ADAMW,
        n_steps=150,
    ),
    Run(
        "CNN, shuffled labels, AdamW",
        relu_cnn,
        "not learning",
        learning_rate=1e-3,
        labels=shuffled,
        optimizer=ADAMW,
        n_steps=60,
    ),
    Run(
        "transformer of 4, shuffled labels, AdamW",
        Encoder,
        "not learning",
        learning_rate=1e-3,
        labels=shuffled,
        optimizer=ADAMW,
        n_steps=60,
        is_slow=True,
    ),
    # Values beyond 65,504.
    Run(
        "MLP, float16, loss times 1e7",
        relu_mlp,
        "non-finite",
        ("loss blow-up",),
        dtype=torch.float16,
        loss_factor=1e7,
        n_steps=20,
    ),
    Run(
        "transformer, float16, loss times 1e7",
        Transformer,
        "non-finite",
        ("loss blow-up",),
        dtype=torch.float16,
        loss_factor=1e7,
        n_steps=20,
    ),
)
