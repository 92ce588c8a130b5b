"""A loop of accelerate with a probe: micro-batches, clipping and a checkpoint.

    pip install 'gradprobe[accelerate]'
    python examples/accelerate_loop.py           # or: accelerate launch examples/accelerate_loop.py

Trains, saves in the middle, and resumes from there with the same step numbers. Seconds on a CPU.
"""

from typing import Any

import accelerate
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradprobe.integrations.accelerate import attach


def prepare() -> tuple[accelerate.Accelerator, nn.Module, Any, Any]:
    """Makes an accelerator and prepares model, optimizer and data."""
    accelerate.utils.set_seed(0)
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2)  # log_with="tensorboard", "wandb", ...
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    x = torch.randn(640, 12)
    loader = DataLoader(TensorDataset(x, x[:, :5].argmax(dim=1)), batch_size=16, shuffle=True)
    return (accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-3), loader))


def train(start_step: int, checkpoint: str) -> int:
    """Trains one epoch, from the checkpoint unless start_step is 0; saves, and returns the next step."""
    accelerator, model, optimizer, loader = prepare()
    if start_step:
        accelerator.load_state(checkpoint)
    with attach(accelerator, model, optimizer, start_step=start_step, updates=True, log_every=10) as probed:
        for x, labels in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(x), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                probed.step(loss)  # of every micro-batch, last in the loop
    accelerator.save_state(checkpoint)
    history = probed.probe.history()
    accelerator.print(
        f"steps {history[0].step} to {history[-1].step}: loss {history[0].loss:.3f} to {history[-1].loss:.3f}"
    )
    accelerator.print(probed.probe.findings())
    return history[-1].step + 1


def main() -> None:
    """Trains two epochs, the second as after an interruption."""
    next_step = train(0, "runs/accelerate")
    train(next_step, "runs/accelerate")


if __name__ == "__main__":
    main()
