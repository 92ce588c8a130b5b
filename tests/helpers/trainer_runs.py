"""Trainings by real trainers, with the project's callback and without, in one process or as one of several ranks."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from _compare import MAX_NORM, Training, bits_of, differences, seed_all, truth_of
from _trainers import _forget_accelerators, network, samples

import gradprobe

N_PARTS, BATCH, N_BATCHES = 2, 4, 30  # micro-batches per step, samples in each, micro-batches per epoch
N_STEPS = 2 * N_BATCHES // N_PARTS  # in two epochs


@dataclass
class Run:
    """What a training left.

    Attributes:
        training: Bits, and the gradients or the snapshots.
        losses: One per micro-batch, in the trainer's order, as the model returned it.
        findings: What `Probe.findings` says at the end.
        console: What the trainer's own log said.
    """

    training: Training
    losses: list[float] = field(default_factory=list)
    findings: list[gradprobe.Finding] = field(default_factory=list)
    console: list[str] = field(default_factory=list)

    def step_losses(self, n_batches: int = N_BATCHES) -> list[float]:
        """Returns the mean loss of the micro-batches of each step; the last one of an epoch may have fewer."""
        epochs = [self.losses[k : k + n_batches] for k in range(0, len(self.losses), n_batches)]
        steps = [epoch[k : k + N_PARTS] for epoch in epochs for k in range(0, len(epoch), N_PARTS)]
        return [sum(parts) / len(parts) for parts in steps]


def wrong(bare: Run, probed: Run, first_step: int = 0) -> list[object]:
    """Lists what differs between two runs, and each number that is not that of the bare one.

    Args:
        bare: Without a probe.
        probed: With one.
        first_step: Number that the probe's first step must have.
    """
    history = [replace(snapshot, step=snapshot.step - first_step) for snapshot in probed.training.history]
    return list(differences(bare.training, replace(probed.training, history=history)))


def scalars(folder: Path, name: str) -> dict[int, float]:
    """Reads back with TensorBoard's own reader what a trainer has written, by its step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[int, float] = {}
    for path in sorted(folder.rglob("events.out.*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        if name in events.Tags()["scalars"]:
            found.update({event.step: event.value for event in events.Scalars(name)})
    return found


def told_by(run: Run) -> list[str]:
    """Returns the findings that a trainer's log has told."""
    return [line for line in run.console if "gradprobe: " in line]


def poison(step: int, model: nn.Module) -> None:
    """Makes the gradients NaN from step 12 on."""
    if step == 12:
        with torch.no_grad():
            next(model.parameters())[0].fill_(float("nan"))


def break_off(step: int, model: nn.Module) -> None:
    """Ends the training with an error in step 12."""
    if step == 12:
        raise RuntimeError("the data are gone")


class _Console(logging.Handler):
    def __init__(self, console: list[str]) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.append(record.getMessage())


def batches(n_batches: int = N_BATCHES) -> TensorDataset:
    """Draws the samples of an epoch."""
    return samples(n_batches)


def train_with_lightning(
    folder: Path,
    callback: Any = None,
    *,
    precision: str = "32-true",
    logger: Any = False,
    resume: Path | None = None,
    keep: Path | None = None,
    epochs: int = 2,
    log_every: int = 5,
    n_ranks: int = 1,
    spoil: Callable[[int, nn.Module], None] = lambda step, model: None,
) -> Run:
    """Trains a small classifier with Lightning: accumulation, clipping and a learning rate of AdamW.

    Args:
        folder: For the trainer's files.
        callback: The callback under test, None for the bare training, which notes the gradients.
        precision: Lightning's.
        logger: Lightning's.
        resume: Checkpoint to start from.
        keep: Checkpoint to write at the end.
        epochs: Last epoch.
        log_every: Steps between logs.
        n_ranks: Processes, 1 or those that the environment describes.
        spoil: Called in each training step with the global step and the model.
    """
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    run = Run(Training(max_norm=MAX_NORM))

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            spoil(self.global_step, self)
            x, labels = batch
            loss = functional.cross_entropy(self.network(x).float(), labels)
            run.losses.append(loss.item())
            self.log("loss", loss)
            return loss

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            if callback is None:
                run.training.truths.append(truth_of(self))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    seed_all()
    module = Classifier()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer = lightning.Trainer(
            accelerator="cpu", devices=n_ranks, strategy="ddp" if n_ranks > 1 else "auto", max_epochs=epochs,
            accumulate_grad_batches=N_PARTS, precision=precision, gradient_clip_val=MAX_NORM, logger=logger,
            default_root_dir=folder, enable_checkpointing=False, enable_progress_bar=False, log_every_n_steps=log_every,
            enable_model_summary=False, callbacks=[] if callback is None else [callback],
        )  # fmt: skip
        listener = _Console(run.console)
        logging.getLogger("lightning.pytorch").addHandler(listener)
        try:
            trainer.fit(module, DataLoader(batches(), BATCH, shuffle=True), ckpt_path=resume, weights_only=False)
        finally:
            logging.getLogger("lightning.pytorch").removeHandler(listener)
            _end(run, callback)
    run.training.bits = bits_of(module, trainer.optimizers[0], run.losses)
    if keep is not None:
        trainer.save_checkpoint(keep)
    return run


class Scored(nn.Module):
    """The classifier as a model of the kind that the Trainer of transformers wants: it returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": functional.cross_entropy(self.network(x).float(), labels)}


def language_model() -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    """Builds a small GPT-2, whose loss is a mean over the tokens of all micro-batches, and texts of unequal lengths."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (N_BATCHES * BATCH, 12), generator=generator)
    lengths = torch.randint(3, 12, (len(ids),), generator=generator)
    labels = torch.where(torch.arange(12) < lengths[:, None], ids, -100)
    texts = [{"input_ids": row, "labels": targets} for row, targets in zip(ids, labels, strict=True)]
    return transformers.GPT2LMHeadModel(config), texts


def train_with_transformers(
    folder: Path,
    callback: Any = None,
    *,
    is_language: bool = False,
    resume: Path | None = None,
    spoil: Callable[[int, nn.Module], None] = lambda step, model: None,
    **options: Any,
) -> Run:
    """Trains with the Trainer of transformers: accumulation and clipping.

    Args:
        folder: For the trainer's files.
        callback: As for `train_with_lightning`.
        is_language: Train the language model instead of the classifier.
        resume: Checkpoint to start from.
        spoil: Called in each training step with the global step and the model.
        options: Further arguments of the Trainer.
    """
    import transformers

    run = Run(Training(max_norm=MAX_NORM))
    newest: list[Any] = []

    class Noting(transformers.Trainer):
        def training_step(self, model: nn.Module, *arguments: Any, **options: Any) -> torch.Tensor:
            spoil(self.state.global_step, self.model)
            loss = super().training_step(model, *arguments, **options)
            run.losses.append(loss.item())
            if callback is None:
                newest[:] = [truth_of(self.model)]
            return loss

    class Truths(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *arguments: Any, **options: Any) -> None:
            run.training.truths.extend(newest)

    _forget_accelerators()
    seed_all()
    if is_language:
        model, data = language_model()
    else:
        x, labels = batches().tensors
        model, data = Scored(), [{"x": row, "labels": label} for row, label in zip(x, labels, strict=True)]
    settings = transformers.TrainingArguments(**{
        "output_dir": str(folder), "use_cpu": True, "num_train_epochs": 2, "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": N_PARTS, "max_grad_norm": MAX_NORM, "learning_rate": 1e-2, "logging_steps": 5,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, "remove_unused_columns": False, **options,
    })  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers|torch")
        callbacks = [Truths()] if callback is None else [callback]
        trainer = Noting(model=model, args=settings, train_dataset=data, callbacks=callbacks)
        listener = _Console(run.console)
        logging.getLogger("transformers").addHandler(listener)
        try:
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        finally:
            logging.getLogger("transformers").removeHandler(listener)
            _end(run, callback)
    run.training.bits = bits_of(model, trainer.optimizer, run.losses)
    return run


def train_with_accelerate(
    folder: Path,
    is_probed: bool = False,
    *,
    precision: str = "no",
    trackers: Any = None,
    start_step: int = 0,
    log_every: int = 5,
    spoil: Callable[[int, nn.Module], None] = lambda step, model: None,
    **options: Any,
) -> Run:
    """Trains with a loop that accelerate prepared: accumulation and clipping.

    Args:
        folder: For the trackers' files.
        is_probed: Attach a probe.
        precision: Mixed precision of the accelerator.
        trackers: What the accelerator logs with.
        start_step: Steps that the training has made before.
        log_every: Steps between logs.
        spoil: Called in each training step with its number and the model.
        options: Options of the probe.
    """
    import accelerate

    from gradprobe.integrations.accelerate import attach

    _forget_accelerators()
    seed_all()
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=N_PARTS, mixed_precision=precision, log_with=trackers, project_dir=folder
    )
    if trackers:
        accelerator.init_trackers("run")
    plain = network()
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    loader = DataLoader(batches(), BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(plain, adamw, loader)
    run, probed = Run(Training(max_norm=MAX_NORM)), None
    listener = _Console(run.console)
    logging.getLogger("accelerate").addHandler(listener)
    if is_probed:
        probed = attach(accelerator, model, optimizer, start_step=start_step, log_every=log_every, **options)
    for _ in range(2):
        for x, labels in loader:
            with accelerator.accumulate(model):
                spoil(len(run.losses) // N_PARTS, plain)
                loss = functional.cross_entropy(model(x), labels)
                run.losses.append(loss.item())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    if probed is None:
                        run.training.truths.append(truth_of(plain))
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()
                if probed is not None:
                    probed.step(loss)
    if probed is not None:
        probed.close()
    _end(run, probed)
    accelerator.end_training()
    logging.getLogger("accelerate").removeHandler(listener)
    run.training.bits = bits_of(plain, adamw, run.losses)
    return run


def _end(run: Run, owner: Any) -> None:
    if owner is not None:
        run.training.history = owner.probe.history()
        run.findings = list(owner.probe.findings())


def run_on_ranks(name: str, folder: Path, n_ranks: int = 2, limit_s: float = 200.0) -> list[dict[str, Run]]:
    """Runs a training of `RANKS` in several processes: bare, probed, and probed with gradients that become NaN.

    Args:
        name: Name of the training.
        folder: For files.
        n_ranks: Number of processes.
        limit_s: Time that they have.

    Returns:
        For each rank, the runs by name.
    """
    # A port for each training: on the port of the one before, a rank may find its store, which is about to close.
    with contextlib.ExitStack() as reserved:
        sockets = [reserved.enter_context(socket.socket()) for _ in _KINDS]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
    processes = []
    for rank in range(n_ranks):
        environment = {
            **os.environ, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{n_ranks}", "GROUP_RANK": "0",
            "LOCAL_WORLD_SIZE": f"{n_ranks}", "MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo", "TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(["tests", os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        script = f"from helpers.trainer_runs import run_rank; run_rank({name!r}, {str(folder)!r}, {ports})"
        command = [sys.executable, "-c", script]
        log = (folder / f"rank{rank}.log").open("w")
        root = Path(__file__).parents[2]
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=root))
    try:
        codes = [process.wait(limit_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(n_ranks))
    assert codes == [0] * n_ranks, logs
    return [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(n_ranks)]


def _lightning_rank(folder: Path, kind: str) -> Run:
    from lightning.pytorch.loggers import CSVLogger

    from gradprobe.integrations.lightning import GradProbeCallback

    if kind == "bare":
        return train_with_lightning(folder, n_ranks=2)
    if kind == "poisoned":
        return train_with_lightning(folder, GradProbeCallback(), n_ranks=2, spoil=poison)
    return train_with_lightning(folder, GradProbeCallback(), n_ranks=2, logger=CSVLogger(folder, name="csv"))


def _transformers_rank(folder: Path, kind: str) -> Run:
    from gradprobe.integrations.transformers import GradProbeCallback

    options: dict[str, Any] = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    if kind == "bare":
        return train_with_transformers(folder, **options)
    if kind == "poisoned":
        return train_with_transformers(folder, GradProbeCallback(), spoil=poison, **options)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    return train_with_transformers(folder, GradProbeCallback(), report_to=["tensorboard"], **options)


def _accelerate_rank(folder: Path, kind: str) -> Run:
    if kind == "poisoned":
        return train_with_accelerate(folder, True, spoil=poison)
    return train_with_accelerate(folder, kind == "probed", trackers=["tensorboard"] if kind == "probed" else None)


_KINDS = ("bare", "probed", "poisoned")
RANKS: dict[str, Callable[[Path, str], Run]] = {
    "lightning": _lightning_rank,
    "transformers": _transformers_rank,
    "accelerate": _accelerate_rank,
}


def run_rank(name: str, folder: str, ports: Sequence[int]) -> None:
    """Runs the trainings of one rank, in a process of its own; each has a port for its ranks to meet."""
    torch.set_num_threads(1)
    runs = {}
    for kind, port in zip(_KINDS, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        runs[kind] = RANKS[name](Path(folder), kind)
    Path(folder, f"rank{os.environ['RANK']}.pickle").write_bytes(pickle.dumps(runs))
    os._exit(0)
