"""torch.compile with a probe: attach before the first compiled step, and nothing else changes.

    python examples/compiled.py                        # inductor, which needs a C++ compiler and about a minute
    python examples/compiled.py --backend aot_eager    # no code generation, seconds

Gradients, activations and updates are measured with no graph break: with fullgraph=True, a break would be an error.
"""

import argparse

import torch
from torch import nn

import gradprobe


def main() -> None:
    """Trains a compiled network for 20 steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="inductor", help="what torch.compile generates code with")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 8 * 8, 4),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    probe = gradprobe.attach(model, optimizer=optimizer, activations=True, activations_every=5, updates=True)
    compiled = torch.compile(model, backend=options.backend, fullgraph=True)  # fullgraph: a graph break is an error

    labels = torch.randint(4, (16,))
    images = torch.randn(16, 3, 16, 16) + labels.view(-1, 1, 1, 1)
    for step in range(20):
        loss = nn.functional.cross_entropy(compiled(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        probe.step(loss)
        if step % 5 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    newest = probe.latest(wait=True)
    if newest is not None:
        for name, gradient in newest.sites.items():
            print(f"{name:10} rms {gradient.rms:.1e}, update / weight {newest.updates[name].ratio:.1e}")
    observed = [snapshot.step for snapshot in probe.history() if snapshot.activations]
    print(f"activations were observed in steps {observed}")
    print(probe.findings())
    probe.detach()


if __name__ == "__main__":
    main()
