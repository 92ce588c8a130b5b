"""transformers' Trainer with a probe: one callback. Its numbers go wherever the trainer reports to.

    pip install 'gradprobe[transformers]'
    python examples/transformers_trainer.py

Trains a small GPT-2 with random weights on made-up sentences, and prints the diagnosis. Seconds on a CPU; no download.
"""

import torch
import transformers

from gradprobe.integrations.transformers import GradProbeCallback


def make_sentences(n: int) -> list[dict[str, torch.Tensor]]:
    """Makes sequences in which each token is the one before plus a step that differs from sequence to sequence."""
    starts, steps = torch.randint(0, 40, (n, 1)), torch.randint(1, 4, (n, 1))
    rows = 3 + (starts + steps * torch.arange(16)) % 40
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    """Trains two epochs."""
    transformers.set_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    watched = GradProbeCallback(updates=True, activations=["transformer.h.*.mlp.act"])
    trainer = transformers.Trainer(
        model=transformers.GPT2LMHeadModel(config),
        args=transformers.TrainingArguments(
            "runs/transformers",
            per_device_train_batch_size=16,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            learning_rate=3e-3,
            warmup_steps=5,
            max_grad_norm=1.0,
            logging_steps=10,
            report_to=[],  # or "tensorboard", "wandb", ...
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=make_sentences(640),
        callbacks=[watched],
    )
    trainer.train()

    assert watched.probe is not None
    for snapshot in watched.probe.history()[9::10]:  # numbered as the trainer does
        ratios = sorted(update.ratio for update in snapshot.updates.values())
        measured = f"loss {snapshot.loss:.3f}, total norm {snapshot.total_norm:.3f}, largest update {ratios[-1]:.1e}"
        print(f"step {snapshot.step}: {measured}")
    print(watched.probe.findings())


if __name__ == "__main__":
    main()
