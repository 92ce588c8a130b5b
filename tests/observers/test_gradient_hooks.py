"""Gradient hooks under checkpointing, compilation, data parallelism and copying."""

import copy
import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradprobe


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


def batch() -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


def assert_measured(probe: gradprobe.Probe, model: nn.Module) -> None:
    snapshot = probe.latest()
    assert snapshot is not None
    truth = {name: np.linalg.norm(p.grad.double().numpy().ravel()) for name, p in model.named_parameters()}
    assert {name: site.norm for name, site in snapshot.sites.items()} == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("when", ["step", "backward"])
def test_checkpointing(when: str, use_reentrant: bool) -> None:
    model = mlp()
    with gradprobe.attach(model, when=when) as probe:
        x = batch().requires_grad_()
        checkpoint(model, x, use_reentrant=use_reentrant).square().mean().backward()
        probe.step()
        assert_measured(probe, model)
        assert probe.coverage().unhooked == ()


def test_retained_graph_and_double_backward_and_a_module_used_twice() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with gradprobe.attach(model) as probe:
        loss = model(model(torch.ones(2, 4))).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        probe.step()
        assert_measured(probe, model)
        model.zero_grad()
        loss = model(torch.ones(2, 4)).square().sum()
        (gradient,) = torch.autograd.grad(loss, [model[0].weight], create_graph=True)
        (loss + gradient.square().sum()).backward()
        probe.step()
        assert_measured(probe, model)
        assert len(probe.history()) == 2


def test_gradients_that_carry_a_graph() -> None:
    model = mlp()
    with gradprobe.attach(model) as probe:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about the reference cycle
            model(batch()).square().mean().backward(create_graph=True)
        assert all(parameter.grad.requires_grad for parameter in model.parameters())
        probe.step()
        gradients = {name: p.grad.detach() for name, p in model.named_parameters()}
        snapshot = probe.latest()
        assert snapshot is not None
        assert snapshot["0.weight"].norm == pytest.approx(gradients["0.weight"].norm().item(), rel=1e-6)
        model.zero_grad()


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("when", ["step", "backward"])
def test_a_compiled_model(when: str, moment: str) -> None:
    model = mlp()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if moment == "after":
        compiled(batch()).square().mean().backward()
        model.zero_grad()
    with gradprobe.attach(model, when=when) as probe:
        compiled(batch()).square().mean().backward()
        probe.step()
        assert_measured(probe, model)


@pytest.mark.parametrize("when", ["step", "backward"])
def test_compiled_autograd(when: str) -> None:
    model = mlp()
    with gradprobe.attach(model, when=when) as probe:
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
            model(batch()).square().mean().backward()
        with pytest.warns(gradprobe.GradprobeWarning, match="no hook fired for 4 of 4 parameters"):
            probe.step()
        assert_measured(probe, model)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("attached_to", ["replica", "its module", "the module before", "a module around it"])
def test_data_parallel_gradients_are_labelled_averaged(clip: bool, attached_to: str, one_process: None) -> None:
    module = mlp()
    early = gradprobe.attach(module) if attached_to == "the module before" else None
    model = nn.parallel.DistributedDataParallel(module)
    targets = {"replica": model, "its module": module, "a module around it": nn.ModuleList([model])}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with early or gradprobe.attach(targets[attached_to], optimizer=optimizer) as probe:
        model(batch()).square().mean().backward()
        truth = [parameter.grad.double().norm().item() for parameter in model.parameters()]
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        snapshot = probe.latest()
        assert snapshot is not None
        assert snapshot.provenance == ("unscaled", "averaged", "clipped" if clip else "raw")
        assert [site.norm for site in snapshot.sites.values()] == pytest.approx(truth, rel=1e-6)


def test_gradients_that_no_replica_has_averaged_are_local(one_process: None) -> None:
    model = nn.parallel.DistributedDataParallel(mlp())
    other = mlp()
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    with gradprobe.attach(model) as probe, gradprobe.attach(other) as beside:
        with model.no_sync():
            model(batch()).square().mean().backward()
        other(batch()).square().mean().backward()
        optimizer.step()
        model(batch()).square().mean().backward()
        optimizer.step()
        assert [snapshot.provenance.reduction for snapshot in probe.history()] == ["local", "averaged"]
        assert beside.latest().provenance.reduction == "local"


def test_copies_and_pickles_of_an_attached_model_are_not_observed() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradprobe.attach(model, optimizer=optimizer) as probe:
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            clone(batch()).square().mean().backward()
            gradprobe.attach(clone).detach()
        copy.deepcopy(optimizer)
        pickle.loads(pickle.dumps(optimizer))
        assert probe.coverage().observed == ()


def test_users_hooks_stay_and_run() -> None:
    model = mlp()
    seen: list[str] = []
    early = model[0].weight.register_hook(lambda gradient: seen.append("early"))
    with gradprobe.attach(model) as probe:
        late = model[2].weight.register_hook(lambda gradient: seen.append("late"))
        model(batch()).square().mean().backward()
        probe.step()
        assert_measured(probe, model)
    model(batch()).square().mean().backward()
    assert sorted(seen) == ["early", "early", "late", "late"]
    early.remove()
    late.remove()


def test_two_models_in_a_gan_step() -> None:
    generator, critic = mlp(), nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (generator, critic)]
    probes = [
        gradprobe.attach(model, optimizer=optimizer)
        for model, optimizer in zip((generator, critic), optimizers, strict=True)
    ]
    critic(generator(batch()).detach()).mean().backward()
    optimizers[1].step()
    optimizers[1].zero_grad()
    critic(generator(batch())).mean().neg().backward()
    optimizers[0].step()
    assert_measured(probes[0], generator)
    assert [len(probe.history()) for probe in probes] == [1, 1]
    for probe in probes:
        probe.detach()


def test_the_number_of_threads_changes_no_bit() -> None:
    model = nn.Sequential(nn.Linear(700, 900))
    x = torch.randn(4, 700)
    rows = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            model.zero_grad()
            with gradprobe.attach(model, when="step") as probe:
                model(x).square().sum().backward()
                model[0].weight.grad = torch.linspace(-1, 1, 700 * 900).reshape(900, 700)
                probe.step()
            snapshot = probe.latest()
            assert snapshot is not None
            rows.append(snapshot.rows[0])
    finally:
        torch.set_num_threads(threads)
    assert rows[0].tobytes() == rows[1].tobytes()
