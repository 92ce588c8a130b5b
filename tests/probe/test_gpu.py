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


def captured(model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.zero_grad(set_to_none=False)
        model(batch).square().mean().backward()
        optimizer.step()
    return graph


@pytest.mark.filterwarnings("ignore:gradprobe")
def test_a_captured_step_is_measured_by_each_replay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), gradprobe.nn.ResidualAdd(), nn.Linear(32, 1)).cuda()
    join, layers = model[1], (model[0], nn.Linear(32, 32).cuda(), model[2])

    def forward(x: torch.Tensor) -> torch.Tensor:
        x = layers[0](x)
        return layers[2](join(x, layers[1](x)))

    model.forward = forward  # type: ignore[method-assign]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.randn(1024, 64, device="cuda")
    probe = gradprobe.attach(model, optimizer=optimizer, activations=True, activations_every=2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # steps 0 to 2
            optimizer.zero_grad(set_to_none=False)
            model(batch).square().mean().backward()
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = captured(model, optimizer, batch)
    truth = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):  # steps 3 to 6
            batch.normal_()
            truth.append(layers[0](batch).detach().norm())
            graph.replay()
            probe.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_measured(probe, model)
    steps = {snapshot.step: snapshot for snapshot in probe.history()}
    assert [step for step, snapshot in steps.items() if snapshot.activations] == [0, 2, 4, 6]
    for step in (4, 6):
        assert steps[step].activations["0"].output.norm == pytest.approx(truth[step - 3].item(), rel=1e-5)
        assert steps[step].junctions["1"].branch is not None
        assert steps[step].junctions["1"].y.numel == 1024 * 32


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.filterwarnings("ignore:gradprobe")
def test_compiled_models_with_and_without_graphs(mode: str) -> None:
    torch._dynamo.reset()
    model = mlp().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    probe = gradprobe.attach(model, optimizer=optimizer, activations=True)
    compiled = torch.compile(model, mode=mode)
    batch = torch.randn(16, 64, device="cuda")
    for _ in range(6):
        optimizer.zero_grad()
        compiled(batch).square().mean().backward()
        optimizer.step()
    assert_measured(probe, model)
    snapshot = probe.latest(wait=True)
    assert snapshot is not None
    assert snapshot.activations["0"].output.norm == pytest.approx(model[0](batch).norm().item(), rel=1e-4)
