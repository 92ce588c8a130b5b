"""The probe on a GPU: right numbers, no synchronisation, models that move."""

import numpy as np
import pytest
import torch
from torch import nn

import gradprobe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))


def assert_measured(probe: gradprobe.Probe, model: nn.Module) -> None:
    snapshot = probe.latest(wait=True)
    assert snapshot is not None
    truth = {name: np.linalg.norm(p.grad.double().cpu().numpy().ravel()) for name, p in model.named_parameters()}
    assert {name: site.norm for name, site in snapshot.sites.items()} == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("backend", ["auto", "native", "triton", "reference"])
def test_numbers(backend: str) -> None:
    if not gradprobe.backends().get(backend, "ready").startswith("ready"):
        pytest.skip(f"{backend}: {gradprobe.backends()[backend]}")
    model = mlp().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradprobe.attach(model, optimizer=optimizer, backend=backend, capacity=50) as probe:
        for _ in range(60):
            optimizer.zero_grad()
            loss = model(torch.randn(16, 64, device="cuda")).square().mean()
            loss.backward()
            optimizer.step()
            probe.step(loss=loss)
        assert_measured(probe, model)
        assert [snapshot.step for snapshot in probe.history()] == list(range(10, 60))
        assert probe.history()[-1].loss == pytest.approx(loss.item())


@pytest.mark.parametrize("clip", [False, True])
def test_a_step_never_waits_for_the_gpu(clip: bool) -> None:
    model = mlp().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(16, 64, device="cuda")
    with gradprobe.attach(model, optimizer=optimizer) as probe:
        for step in range(5):
            torch.cuda.set_sync_debug_mode("default" if step == 0 else "error")  # the first step loads kernels
            try:
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                if clip:
                    probe.clip_grad_norm_(0.1)
                optimizer.step()
                probe.step(loss=loss)
                probe.latest()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert len(probe.history()) == 5


def test_a_model_that_moves_to_the_gpu_is_followed() -> None:
    model = mlp()
    with gradprobe.attach(model) as probe:
        for device in ("cpu", "cuda", "cpu"):
            model.to(device)
            model.zero_grad()
            model(torch.randn(4, 64, device=device)).sum().backward()
            probe.step()
            assert_measured(probe, model)
        assert [snapshot.step for snapshot in probe.history()] == [0, 1, 2]


def test_a_model_on_two_devices() -> None:
    model = mlp()
    model[2].cuda()
    with gradprobe.attach(model) as probe:
        model[2](model[1](model[0](torch.randn(4, 64))).cuda()).sum().backward()
        total = probe.clip_grad_norm_(1e9)
        probe.step()
        assert_measured(probe, model)
        snapshot = probe.latest(wait=True)
        assert snapshot is not None
        assert total.item() == pytest.approx(snapshot.total_norm, rel=1e-6)
