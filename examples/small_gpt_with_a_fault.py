"""A small GPT learns the characters of this file, with a fault in one layer that the probe finds and names.

    python examples/small_gpt_with_a_fault.py                 # the ReLUs of one block are dead
    python examples/small_gpt_with_a_fault.py --fault nan     # a weight of that block becomes infinite in step 30
    python examples/small_gpt_with_a_fault.py --fault none    # healthy

The loss hardly shows the first fault, since the other blocks make up for it. A few seconds on a CPU.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import gradprobe

CONTEXT, WIDTH, HEADS, BLOCKS = 32, 48, 4, 4
FAULTY = 2


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(n, length, WIDTH))


class Block(nn.Module):
    """Attention and a feed-forward network, each behind a normalisation and a residual add."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.attention, self.add_1 = nn.LayerNorm(WIDTH), Attention(), gradprobe.nn.ResidualAdd()
        self.norm_2, self.add_2 = nn.LayerNorm(WIDTH), gradprobe.nn.ResidualAdd()
        self.up, self.relu, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.add_1(x, self.attention(self.norm_1(x)))
        return self.add_2(x, self.down(self.relu(self.up(self.norm_2(x)))))


class GPT(nn.Module):
    """Characters in, logits of the next character out."""

    def __init__(self, n_characters: int) -> None:
        super().__init__()
        self.token = nn.Embedding(n_characters, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, n_characters)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.token(tokens) + self.position)))


def main() -> None:
    """Trains with the fault and prints what the probe found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", choices=("dead", "nan", "none"), default="dead")
    parser.add_argument("--log-dir", help="also store every step there, for gradprobe diagnose, report and watch")
    options = parser.parse_args()

    torch.manual_seed(0)
    text = Path(__file__).read_text(encoding="utf-8")
    number = {character: k for k, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([number[character] for character in text])
    model = GPT(len(number))
    faulty = model.blocks[FAULTY]
    assert isinstance(faulty, Block)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if options.fault == "dead":
        with torch.no_grad():
            faulty.up.bias.fill_(-30.0)  # as one step with a rate that is far too high would leave it

    with gradprobe.attach(model, optimizer=optimizer, activations=True, log_dir=options.log_dir) as probe:
        for step in range(60):
            if options.fault == "nan" and step == 30:
                with torch.no_grad():
                    faulty.up.weight[0, 0] = torch.inf
            starts = torch.randint(len(tokens) - CONTEXT, (16,))
            batch = torch.stack([tokens[start : start + CONTEXT + 1] for start in starts])
            logits = model(batch[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            probe.step(loss)
            if step % 20 == 0:
                print(f"step {step}: loss {loss.item():.3f}")
        print()
        print(probe.findings())
        first = probe.first_nonfinite()
        if first is not None:
            print(f"\nThe first NaN or infinity: step {first.step}, {first.phase} pass, {first.tensor}")


if __name__ == "__main__":
    main()
