"""Your own training loop with a probe: micro-batches, clipping, a learning-rate schedule, evaluation.

    python examples/plain_loop.py

Prints a line every 20 steps and the diagnosis at the end. A few seconds on a CPU.
"""

import torch
from torch import nn

import gradprobe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, MICRO_BATCHES, BATCH = 80, 2, 32


class Block(nn.Module):
    """A residual block. `ResidualAdd` lets the probe see which part of the gradient takes the shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.add = gradprobe.nn.ResidualAdd()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.add(x, self.body(x))


def make_batches(teacher: nn.Module, n: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Makes random inputs, labelled by a fixed random network."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(BATCH, 20, generator=generator) for _ in range(n)]
    with torch.no_grad():
        return [(x.to(DEVICE), teacher(x).argmax(dim=1).to(DEVICE)) for x in inputs]


def evaluate(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Returns the share of correct answers. Without a backward pass, the probe does nothing."""
    model.eval()
    with torch.no_grad():
        hits = sum((model(x).argmax(dim=1) == labels).sum().item() for x, labels in batches)
    model.train()
    return hits / (len(batches) * BATCH)


def main() -> None:
    """Trains, measures and judges."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 5))
    training, held_out = make_batches(teacher, STEPS * MICRO_BATCHES, seed=1), make_batches(teacher, 20, seed=2)
    model = nn.Sequential(nn.Linear(20, 48), *(Block(48) for _ in range(4)), nn.LayerNorm(48), nn.Linear(48, 5)).to(
        DEVICE
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    probe = gradprobe.attach(model, optimizer=optimizer, activations=True, updates=True)

    batches = iter(training)
    for step in range(STEPS):
        optimizer.zero_grad()
        for _ in range(MICRO_BATCHES):
            x, labels = next(batches)
            loss = nn.functional.cross_entropy(model(x), labels)
            (loss / MICRO_BATCHES).backward()
            probe.step(loss)  # the step gets the mean of the losses of its micro-batches
        probe.clip_grad_norm_(1.0)  # reuses the norms that the probe has measured
        optimizer.step()  # closes the step
        schedule.step()
        if step % 20 == 19:
            seen = probe.latest()  # does not wait for the device, so on a GPU it may be an earlier step
            if seen is not None:
                ratio = max(update.ratio for update in seen.updates.values())
                print(f"step {seen.step}: loss {seen.loss:.3f}, norm {seen.total_norm:.3f}, largest update {ratio:.1e}")

    print(f"accuracy on new data: {evaluate(model, held_out):.2f}")
    newest = probe.latest(wait=True)
    if newest is not None:
        for name, add in newest.junctions.items():
            print(f"{name}: {add.shortcut_share:.0%} of the gradient comes through the shortcut")
    print(probe.findings())
    probe.detach()


if __name__ == "__main__":
    main()
