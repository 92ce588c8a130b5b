"""Lightning with a probe: one callback. Its numbers go where `self.log` goes; a resumed training continues the steps.

    pip install 'gradprobe[lightning]'
    python examples/lightning_callback.py

Trains two epochs, stops, resumes from the checkpoint for a third, and prints the diagnosis. A few seconds on a CPU.
"""

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradprobe.integrations.lightning import GradProbeCallback


class Classifier(lightning.LightningModule):
    """A small network that says which of the first five inputs is the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        x, labels = batch
        loss = nn.functional.cross_entropy(self.network(x), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        x, labels = batch
        self.log("accuracy", (self.network(x).argmax(dim=1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


def make_loader(n: int, shuffle: bool) -> DataLoader[Any]:
    x = torch.randn(n, 12)
    return DataLoader(TensorDataset(x, x[:, :5].argmax(dim=1)), batch_size=16, shuffle=shuffle)


def train(epochs: int, checkpoint: str | None = None) -> tuple[GradProbeCallback, str]:
    """Trains up to an epoch, and returns the callback and the path of the last checkpoint."""
    watched = GradProbeCallback(activations=True, updates=True)
    keep = ModelCheckpoint(dirpath="runs/lightning", save_last=True)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        accelerator="auto",
        devices=1,
        logger=CSVLogger("runs", name="csv"),
        log_every_n_steps=5,
        callbacks=[watched, keep],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), make_loader(640, True), make_loader(160, False), ckpt_path=checkpoint)
    print(f"epoch {epochs}: accuracy {trainer.callback_metrics['accuracy']:.2f}")
    return watched, keep.last_model_path


def main() -> None:
    """Trains, resumes and judges."""
    lightning.seed_everything(0)
    _, checkpoint = train(epochs=2)
    watched, _ = train(epochs=3, checkpoint=checkpoint)
    probe = watched.probe  # detached now, and still readable
    assert probe is not None
    steps = [snapshot.step for snapshot in probe.history()]
    print(f"the resumed training went on with step {steps[0]} and ended with step {steps[-1]}")
    print(probe.findings())


if __name__ == "__main__":
    main()
