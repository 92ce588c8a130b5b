"""What layers answer with: figure 7 of He et al. 2015, on handwritten digits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradprobe


@pytest.mark.soak
def test_responses_shrink_with_shortcuts_and_with_depth() -> None:
    """He et al. 2015, figure 7: layers of residual networks respond less than plain ones, and less with more depth.

    The response is the normalisation's output after each 3x3 convolution, before ReLU and sum. It shrinks over the
    paper's 64,000 steps with a weight decay of 1e-4; here 500 steps have the same total decay.
    """
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = (
        torch.as_tensor(array) for array in (datasets.load_digits().images, datasets.load_digits().target)
    )
    images = (images / 16).float().unsqueeze(1)
    images = (images - images.mean()) / images.std()
    n_steps, weight_decay = 500, 64_000 * 1e-4 / 500

    def mean_response(family: str, depth: int) -> float:
        torch.manual_seed(0)
        net = getattr(gradprobe.networks, family)(depth, in_channels=1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=weight_decay)
        milestones = [n_steps // 2, n_steps * 3 // 4]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
        generator = torch.Generator().manual_seed(0)
        norms_alone = lambda name, module: isinstance(module, nn.BatchNorm2d)  # noqa: E731
        with gradprobe.attach(net, optimizer=optimizer, activations=norms_alone, activations_every=10) as probe:
            for _ in range(n_steps):
                chosen = torch.randint(0, len(images), (64,), generator=generator)
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(images[chosen]), labels[chosen]).backward()
                optimizer.step()
                schedule.step()
        observed = [snapshot for snapshot in probe.history() if snapshot.activations][-3:]
        deviations = [one.output.std for snapshot in observed for one in snapshot.activations.values()]
        return sum(deviations) / len(deviations)

    plain, short, deep = (mean_response(*net) for net in (("plain", 20), ("resnet", 20), ("resnet", 56)))
    assert plain > 1.15 * short  # measured 0.21 and 0.15
    assert short > 1.25 * deep  # measured 0.15 and 0.09
