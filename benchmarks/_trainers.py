"""Trainings by the trainers that benchmarks/real_models.py looks at, with the probe attached as their users would.

The bare trainings note the gradients where the trainer has just finished the backward passes of a step and has not
clipped yet.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _compare import MAX_NORM, Check, Training, bits_of, seed_all, truth_of
from _real_models import N_TOKENS, tokens, transformers_model
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import gradprobe

N_PARTS, BATCH = 2, 4  # backward passes per step, samples per backward pass
EVEN, UNEVEN = 8, 7  # batches per epoch; of the odd number, the last step of an epoch has one backward pass


def network() -> nn.Sequential:
    """Builds a small classifier, [B, 12] to [B, 5], with normalisation and dropout."""
    return nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 5))


def samples(n_batches: int) -> TensorDataset:
    """Draws labelled samples for a number of batches."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n_batches * BATCH, 12, generator=generator)
    return TensorDataset(x, torch.randint(5, (len(x),), generator=generator))


def train_with_lightning(
    attached: bool, clips: bool, *, way: str = "trainer.optimizers", n_batches: int = EVEN, precision: str = "32-true"
) -> Training:
    """Trains with lightning's Trainer: automatic optimization, accumulation and its own clipping.

    Args:
        attached: Attach a probe when the training starts.
        clips: Clip.
        way: What `attach` gets for optimizer: "trainer.optimizers" as they are, the wrappers of "self.optimizers()",
            or "alone" for nothing.
        n_batches: Batches per epoch.
        precision: Lightning's precision.

    Returns:
        What the training left.
    """
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    training = Training(max_norm=MAX_NORM if clips else None)
    losses: list[float] = []

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()
            self.probe: gradprobe.Probe | None = None

        def on_fit_start(self) -> None:
            if not attached:
                return
            if way == "alone":
                self.probe = gradprobe.attach(self)
            else:
                optimizer = self.optimizers() if way == "self.optimizers()" else self.trainer.optimizers
                self.probe = gradprobe.attach(self, optimizer=optimizer)

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            x, labels = batch
            loss = functional.cross_entropy(self.network(x).float(), labels)
            losses.append(loss.item())
            return loss

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            if not attached:
                training.truths.append(truth_of(self))

        def on_train_end(self) -> None:
            training.bits = bits_of(self, self.trainer.optimizers[0], losses)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    seed_all()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, max_epochs=2, accumulate_grad_batches=N_PARTS, precision=precision,
            gradient_clip_val=MAX_NORM if clips else None, default_root_dir=folder, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        module = Classifier()
        trainer.fit(module, DataLoader(samples(n_batches), BATCH, shuffle=True))
    return _finished(training, module.probe)


def train_with_transformers(
    attached: bool, clips: bool, *, way: str = "before", n_batches: int = EVEN, max_norm: float | None = MAX_NORM
) -> Training:
    """Trains with the Trainer of transformers, which clips at 1.0 unless it is told otherwise.

    Args:
        attached: Attach a probe.
        clips: Clip.
        way: "before" the trainer is made, to the model alone, or in a "callback", with the optimizer it is given.
        n_batches: Batches per epoch.
        max_norm: Norm to clip to, None for the trainer's default.

    Returns:
        What the training left.
    """
    import transformers

    training = Training(max_norm=(1.0 if max_norm is None else max_norm) if clips else None)
    before_clipping: list[Any] = []
    probes: list[gradprobe.Probe] = []

    class NotingTrainer(transformers.Trainer):
        def training_step(self, model: nn.Module, *arguments: Any, **options: Any) -> torch.Tensor:
            loss = super().training_step(model, *arguments, **options)
            if not attached:
                before_clipping[:] = [truth_of(model)]
            return loss

    class Noting(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *arguments: Any, **options: Any) -> None:
            training.truths.extend(before_clipping)

        def on_train_end(self, *arguments: Any, **options: Any) -> None:
            training.bits = bits_of(options["model"], options["optimizer"])

    class Attaching(transformers.TrainerCallback):
        def on_train_begin(self, *arguments: Any, **options: Any) -> None:
            probes.append(gradprobe.attach(options["model"], optimizer=options["optimizer"]))

    _forget_accelerators()
    seed_all()
    model, _ = transformers_model(
        "GPT2LMHeadModel", "GPT2Config", lambda *_: torch.zeros(()), vocab_size=N_TOKENS, n_embd=32, n_layer=2,
        n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    ids = tokens(torch.Generator().manual_seed(1), n_batches * BATCH, 12)
    clipping = {} if clips and max_norm is None else {"max_grad_norm": max_norm if clips else 0.0}
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, num_train_epochs=2, per_device_train_batch_size=BATCH, learning_rate=1e-3,
            gradient_accumulation_steps=N_PARTS, use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no",
            disable_tqdm=True, **clipping,
        )  # fmt: skip
        if attached and way == "before":
            probes.append(gradprobe.attach(model))
        callbacks = [Noting(), *([Attaching()] if attached and way == "callback" else [])]
        data = [{"input_ids": row, "labels": row} for row in ids]
        trainer = NotingTrainer(model, arguments, train_dataset=data, callbacks=callbacks)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return _finished(training, probes[0] if probes else None)


def train_with_accelerate(
    attached: bool, clips: bool, *, way: str = "prepared", n_batches: int = EVEN, precision: str = "no"
) -> Training:
    """Trains with a loop that accelerate prepared: `accumulate`, and clipping with the accelerator.

    Args:
        attached: Attach a probe.
        clips: Clip.
        way: What is given to `attach`: what is "prepared", the "unwrapped" model and optimizer, the prepared model
            "alone", or both "before" they are prepared.
        n_batches: Batches per epoch.
        precision: Mixed precision of the accelerator.

    Returns:
        What the training left.
    """
    import accelerate

    _forget_accelerators()
    seed_all()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=N_PARTS, mixed_precision=precision)
    plain = network()
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    probe = gradprobe.attach(plain, optimizer=adamw) if attached and way == "before" else None
    loader = DataLoader(samples(n_batches), BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(plain, adamw, loader)
    if attached and way == "prepared":
        probe = gradprobe.attach(model, optimizer=optimizer)
    elif attached and way == "unwrapped":
        probe = gradprobe.attach(accelerator.unwrap_model(model), optimizer=optimizer.optimizer)
    elif attached and way == "alone":
        probe = gradprobe.attach(model)
    training, losses = Training(max_norm=MAX_NORM if clips else None), []
    for _ in range(2):
        for x, labels in loader:
            with accelerator.accumulate(model):
                loss = functional.cross_entropy(model(x), labels)
                losses.append(loss.item())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    if not attached:
                        training.truths.append(truth_of(model))
                    if clips:
                        accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()
    training.bits = bits_of(model, adamw, losses)
    return _finished(training, probe)


def _finished(training: Training, probe: gradprobe.Probe | None) -> Training:
    if probe is not None:
        training.history = probe.history()
        probe.detach()
    return training


def _forget_accelerators() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _checks() -> list[Check]:
    lightning, transformers, accelerate = ("lightning",), ("transformers", "accelerate"), ("accelerate",)
    table: list[tuple[str, tuple[str, ...], Callable[..., Training], dict[str, dict[str, Any]]]] = [
        ("trainer/lightning", lightning, train_with_lightning, {
            "optimizers": {},
            "wrapped": {"way": "self.optimizers()"},
            "alone": {"way": "alone"},
            "bf16": {"precision": "bf16-mixed"},
            "uneven": {"n_batches": UNEVEN},
        }),
        ("trainer/transformers", transformers, train_with_transformers, {
            "before": {},
            "callback": {"way": "callback"},
            "default": {"max_norm": None},
            "uneven": {"n_batches": UNEVEN},
        }),
        ("trainer/accelerate", accelerate, train_with_accelerate, {
            "prepared": {},
            "unwrapped": {"way": "unwrapped"},
            "alone": {"way": "alone"},
            "before": {"way": "before"},
            "bf16": {"precision": "bf16"},
            "uneven": {"n_batches": UNEVEN},
        }),
    ]  # fmt: skip
    return [
        Check(name, setting, packages, partial(train, **options))
        for name, packages, train, settings in table
        for setting, options in settings.items()
    ]


TRAINER_CHECKS = _checks()
