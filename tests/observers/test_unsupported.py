"""Models that cannot be measured are refused by name, before anything is put on them."""

import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from gradprobe.errors import ArgumentError
from gradprobe.observers.unsupported import refuse_unsupported

SHARDED = "whole numbers of gradients sharded in this way are not available"


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 2)))


def refusal(model: nn.Module) -> str:
    with pytest.raises(ArgumentError) as caught:
        refuse_unsupported(model)
    return str(caught.value)


class Tagged(torch.Tensor):
    """A subclass whose gradients are ordinary tensors."""


def test_what_can_be_measured_is_accepted() -> None:
    model = net()
    model[0].weight.no_weight_decay = True  # users mark parameters too
    model[0].bias.main_grad = None
    model[2][0].bias = nn.Parameter(torch.zeros(2).as_subclass(Tagged))
    refuse_unsupported(model)
    refuse_unsupported(nn.LazyLinear(3))
    refuse_unsupported(nn.ReLU())
    refuse_unsupported(nn.DataParallel(net()))


def test_parameters_on_the_meta_device() -> None:
    model = net()
    model[2].to("meta")
    assert refusal(model).startswith("parameter '2.0.weight': needed data on cpu or cuda, got the device meta")
    assert refusal(nn.Linear(1, 1, device="meta")).startswith("parameter 'weight': ")


def test_frozen_parameters_may_be_anywhere() -> None:
    # Offloading puts the frozen part of a large model on the meta device, and trains an adapter beside it.
    model = net()
    model[2].to("meta").requires_grad_(requires_grad=False)
    refuse_unsupported(model)


def test_fake_parameters() -> None:
    with torch._subclasses.FakeTensorMode():
        model = net()
    message = refusal(model)
    assert message.startswith("parameter '0.weight': needed data on cpu or cuda, got a fake tensor")
    assert message.endswith("outside FakeTensorMode")


@pytest.mark.parametrize("device", ["mps", "xpu", "hpu"])
def test_devices_that_are_not_run_on(device: str) -> None:
    kind = type("Elsewhere", (nn.Parameter,), {"is_cpu": False, "device": torch.device(device)})
    model = net()
    model[0]._parameters["weight"] = kind(torch.ones(3, 4))
    message = refusal(model)
    assert message.startswith(f"parameter '0.weight': needed the device cpu or cuda, got {device}")
    assert ("float64" in message) == (device == "mps")


def class_named(name: str, module: str, base: type) -> type:
    return type(name, (base,), {"__module__": module})


@pytest.mark.parametrize("engine", ["DeepSpeedEngine", "PipelineEngine"])
def test_deepspeed_engines(engine: str) -> None:
    kind = class_named("DeepSpeedEngine", "deepspeed.runtime.engine", nn.Sequential)
    if engine == "PipelineEngine":
        kind = class_named(engine, "deepspeed.runtime.pipe.engine", kind)
    needed = f"needed a module with whole parameters, got a DeepSpeed engine; {SHARDED}"
    assert refusal(kind(nn.Linear(2, 2))) == f"model: {needed}"
    assert refusal(nn.Sequential(nn.ReLU(), kind(nn.Linear(2, 2)))) == f"module '1': {needed}"


def test_a_layer_of_deepspeed_alone_is_accepted() -> None:
    refuse_unsupported(class_named("TopKGate", "deepspeed.moe.sharded_moe", nn.Linear)(2, 2))


@pytest.mark.parametrize(
    ("mark", "who"),
    [
        ("ds_id", "DeepSpeed (ZeRO-3)"),
        ("ds_tensor", "DeepSpeed (ZeRO-3)"),
        ("_hp_mapping", "DeepSpeed (ZeRO)"),
        ("main_grad", "Megatron"),
    ],
)
def test_parameters_that_a_library_has_marked(mark: str, who: str) -> None:
    model = net()
    setattr(model[2][0].bias, mark, torch.zeros(2))
    message = refusal(model)
    assert message.startswith("parameter '2.0.bias': needed a whole gradient in .grad, got a parameter ")
    assert who in message
    assert message.endswith(SHARDED)
    model[2][0].bias.requires_grad_(requires_grad=False)
    refuse_unsupported(model)


SHARDING = """
import os, sys, torch
from torch import nn
from gradprobe.errors import ArgumentError
from gradprobe.observers.parameters import find_parameters
from gradprobe.observers.unsupported import refuse_unsupported

def net():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 2)))

def told(model):
    try:
        refuse_unsupported(model)
        find_parameters(model)
        print("accepted")
    except ArgumentError as error:
        print(error)

torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
{body}
torch.distributed.destroy_process_group()
"""


def told(body: str) -> list[str]:
    script = SHARDING.format(body=body)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_fsdp2_and_tensor_parallelism() -> None:
    body = """
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
model = net()
fully_shard(model[2], mesh=mesh)
told(model)
told(fully_shard(net(), mesh=mesh))
told(model[2][0])
model[2][0].register_forward_pre_hook(lambda module, arguments: told(model))  # its parameters are whole just then
model(torch.ones(2, 4))
told(distribute_module(net(), mesh))
model = net()
model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(0)]))
told(model)
told(torch.nn.parallel.DistributedDataParallel(net()))
"""
    assert told(body) == ["accepted"] * 7


def test_fsdp1() -> None:
    body = """
from torch.distributed.fsdp import FullyShardedDataParallel
for use_orig_params in (False, True):
    model = net()
    model[2] = FullyShardedDataParallel(model[2], use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    told(model)
    told(model[2])
    told(model[2].module)
"""
    lines = told(body)
    assert lines[:2] == lines[3:5] == ["accepted"] * 2
    for line, name in ((lines[2], "_flat_param"), (lines[5], "0.weight")):
        assert line.startswith(f"parameter '{name}': needed the whole FullyShardedDataParallel module, got the module ")


def test_a_parameter_that_has_to_be_added_up() -> None:
    body = """
from torch.distributed.tensor import DTensor, Partial
model = net()
model[0].weight = nn.Parameter(DTensor.from_local(torch.zeros(3, 4), mesh, [Partial()]))
told(model)
"""
    assert told(body) == ["parameter '0.weight': needed the placements Replicate or Shard, got P(sum)"]


def test_nothing_of_torch_distributed_is_imported() -> None:
    script = """
import sys, torch
from gradprobe.observers.unsupported import refuse_unsupported
before = set(sys.modules)
refuse_unsupported(torch.nn.Linear(2, 2))
assert set(sys.modules) == before
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.bench
def test_ten_thousand_parameters_take_milliseconds() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5_000)))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        refuse_unsupported(model)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.02
