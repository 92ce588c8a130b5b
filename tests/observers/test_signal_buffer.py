"""What the buffer of activations and residual adds copies to the device when a step is closed."""

from __future__ import annotations

import pytest
import torch
from helpers.signal_cases import Block
from torch import nn

import gradprobe
from gradprobe.observers import signal_buffer
from gradprobe.ops.transfer import to_device


@pytest.mark.usefixtures("any_rows")
def test_batches_of_changing_size_upload_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = []

    def counted(values: torch.Tensor, device: torch.device) -> torch.Tensor:
        uploads.append(values)
        return to_device(values, device)

    monkeypatch.setattr(signal_buffer, "to_device", counted)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Block())
    sizes = [3, 5, 4, 5, 6, 3]
    outputs = []
    model[1].register_forward_hook(lambda module, inputs, output: outputs.append(output.detach()))
    with gradprobe.attach(model, activations=True) as probe:
        for size in sizes:
            model(torch.randn(size, 4)).sum().backward()
            probe.step()
        history = probe.history()
    assert len(uploads) == 1
    for snapshot, output, size in zip(history, outputs, sizes, strict=True):
        shown = snapshot.activations["1"].output
        assert shown.numel == 4 * size
        assert shown.norm == pytest.approx(output.norm().item(), rel=1e-6)


@pytest.mark.usefixtures("any_rows")
def test_another_number_of_calls_is_another_plan() -> None:
    class Repeated(nn.Module):
        """Calls its layer a changing number of times."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.n = 1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(self.n):
                x = self.layer(x)
            return x

    model = Repeated()
    with gradprobe.attach(model, activations=True) as probe:
        for model.n in (1, 3, 1):
            model(torch.randn(2, 4)).sum().backward()
            probe.step()
        assert [snapshot.activations["layer"].output.numel for snapshot in probe.history()] == [8, 24, 8]
