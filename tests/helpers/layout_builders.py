"""Lays out a model of one process over several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from helpers.layout_parts import Gradients, LossOf, Part, clipper, gathered, plain_name
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel


def ddp(pick: str = "ddp", hook: Any = None, sync: bool = True, **options: Any) -> Callable[..., Part]:
    def build(model: nn.Module, rank: int, n_ranks: int, half: bool) -> Part:
        wrapped = DistributedDataParallel(model, **options)
        if hook is not None:
            wrapped.register_comm_hook(None, hook)
        call: Any = torch.compile(wrapped, backend="eager") if pick == "compiled" else wrapped
        attached = {"ddp": wrapped, "module": model, "compiled": call}[pick]

        @contextlib.contextmanager
        def around(is_last: bool) -> Iterator[None]:
            with contextlib.ExitStack() as stack:
                if half:
                    stack.enter_context(torch.autocast("cpu", torch.bfloat16))
                if not (is_last and sync):
                    stack.enter_context(wrapped.no_sync())
                yield

        return Part(attached, call, (rank, n_ranks), around=around, clip=clipper(wrapped))

    return build


def fsdp2(nested: bool = False, shape: tuple[int, ...] | None = None, by_columns: bool = False) -> Callable[..., Part]:
    def build(model: nn.Module, rank: int, n_ranks: int, half: bool) -> Part:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
        names = None if shape is None else ("copies", "shards")
        mesh = init_device_mesh("cpu", shape or (n_ranks,), mesh_dim_names=names)
        for layer in model.children() if nested else ():
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh, mp_policy=policy)
        placement = (lambda parameter: Shard(parameter.ndim - 1)) if by_columns else None
        whole: Any = fully_shard(model, mesh=mesh, mp_policy=policy, shard_placement_fn=placement)

        @contextlib.contextmanager
        def around(is_last: bool) -> Iterator[None]:
            if nested:
                whole.set_requires_gradient_sync(is_last)
            yield

        return Part(model, model, (rank, n_ranks), around=around, clip=clipper(model))

    return build


def tensor_parallel(head: bool = False) -> Callable[..., Part]:
    """Splits the first two layers, and with `head` also the third."""

    def build(model: nn.Module, rank: int, n_ranks: int, half: bool) -> Part:
        mesh = init_device_mesh("cpu", (n_ranks,))
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        if head:
            plan["4"] = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(model, mesh, plan)
        # torch's own refuses DTensors beside plain tensors
        return Part(model, model, around=_autocast(half), clip=clipper(model) if head else None)

    return build


def sequence_parallel(model: Any, rank: int, n_ranks: int, half: bool) -> Part:
    mesh = init_device_mesh("cpu", (n_ranks,))
    plan = {
        "": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)
    return Part(model, model, around=_autocast(half), clip=clipper(model))


def fsdp2_and_tensor_parallel(model: nn.Module, rank: int, n_ranks: int, half: bool) -> Part:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    return Part(model, model, (rank // 2, 2))  # the head has another mesh than the rest, which torch does not clip


def two_meshes(model: Any, rank: int, n_ranks: int, half: bool) -> Part:
    """Layers on different dimensions of a mesh; every rank takes the whole batch."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    fully_shard(model[0], mesh=mesh["a"])
    fully_shard(model[2], mesh=mesh["b"])
    fully_shard(model[4], mesh=mesh["a"])
    return Part(model, model)


def fsdp1(
    strategy: ShardingStrategy = ShardingStrategy.FULL_SHARD, orig: bool = True, nested: bool = False
) -> Callable[..., Part]:
    def build(model: nn.Module, rank: int, n_ranks: int, half: bool) -> Part:
        shape = (2, 2) if strategy is ShardingStrategy.HYBRID_SHARD else (n_ranks,)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")[-len(shape) :])
        wrapped = FullyShardedDataParallel(
            model,
            sharding_strategy=strategy,
            device_mesh=mesh,
            auto_wrap_policy=ModuleWrapPolicy({nn.Linear}) if nested else None,
            use_orig_params=orig,
            device_id=torch.device("cpu"),
            mixed_precision=MixedPrecision(torch.bfloat16, torch.float32) if half else None,
        )
        parts = None if orig else {name: tuple(flat._fqns) for name, flat in wrapped.named_parameters()}
        gather = (lambda: _summoned(wrapped)) if orig else (lambda: _unflattened(wrapped))
        return Part(wrapped, wrapped, (rank, n_ranks), gather=gather, clip=wrapped.clip_grad_norm_, parts=parts)

    return build


def replicated(how: str) -> Callable[..., Part]:
    def build(model: nn.Module, rank: int, n_ranks: int, half: bool) -> Part:
        mesh = init_device_mesh("cpu", (n_ranks,))
        if how == "replicate":
            replicate(model, mesh=mesh)
            return Part(model, model, (rank, n_ranks), clip=clipper(model))
        distribute_module(model, mesh)

        def run(rows: torch.Tensor, loss_of: LossOf) -> None:
            loss_of(model(DTensor.from_local(rows, mesh, [Shard(0)], run_check=False))).backward()

        return Part(model, model, (rank, n_ranks), run=run)

    return build


def local_of(build: Callable[..., Part]) -> Callable[..., Part]:
    """Asks for the numbers of this rank's pieces."""

    def local(model: nn.Module, rank: int, n_ranks: int, half: bool) -> Part:
        part = build(model, rank, n_ranks, half)
        part.process_group = "local"
        part.gather = lambda: {
            name: (g.to_local() if isinstance(g := parameter.grad, DTensor) else g).detach().clone()  # type: ignore[union-attr]
            for name, parameter in part.model.named_parameters()
            if parameter.grad is not None
        }
        return part

    return local


class SplitLinear(nn.Module):
    """A linear layer of which each rank has some rows, as plain parameters."""

    def __init__(self, whole: nn.Linear, rank: int, n_ranks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(whole.weight.detach().tensor_split(n_ranks)[rank].clone())
        self.bias = nn.Parameter(whole.bias.detach().tensor_split(n_ranks)[rank].clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Collect.apply(nn.functional.linear(_Spread.apply(x), self.weight, self.bias))
        return y


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        pieces: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(pieces, y.detach())
        ctx.widths = [piece.shape[-1] for piece in pieces]
        return torch.cat(pieces, -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.split(ctx.widths, -1)[dist.get_rank()].contiguous()


def hand_made(beside_replicas: bool = False) -> Callable[..., Part]:
    """Splits the first two layers by hand, and the third too or, with `beside_replicas`, not."""

    def build(model: Any, rank: int, n_ranks: int, half: bool) -> Part:
        split = (0, 2) if beside_replicas else (0, 2, 4)
        for k in split:
            model[k] = SplitLinear(model[k], rank, n_ranks)

        def gather() -> Gradients:
            found = gathered(model)
            everywhere: list[Any] = [None] * n_ranks
            dist.all_gather_object(everywhere, found)
            return {
                name: torch.cat([one[name] for one in everywhere]) if int(name[0]) in split else gradient
                for name, gradient in found.items()
            }

        group = dist.group.WORLD
        return Part(
            model, model, process_group={"0.*": group, "2.*": group} if beside_replicas else group, gather=gather
        )

    return build


def pipeline(scheduled: bool = False) -> Callable[..., Part]:
    """Puts the first half on the first rank and the second half on the other."""

    def build(model: Any, rank: int, n_ranks: int, half: bool) -> Part:
        stage = nn.ModuleDict({str(k): model[k] for k in ((0, 1, 2), (3, 4))[rank]})

        class Stage(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = stage

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for layer in self.layers.values():
                    x = layer(x)
                return x

        module = Stage()

        def by_hand(rows: torch.Tensor, loss_of: LossOf) -> None:
            if rank == 0:
                y = module(rows)
                dist.send(y.detach(), 1)
                gradient = torch.empty_like(y)
                dist.recv(gradient, 1)
                y.backward(gradient)
            else:
                x = torch.empty(len(rows), 12)
                dist.recv(x, 0)
                x.requires_grad_()
                loss_of(module(x)).backward()
                dist.send(x.grad, 0)

        def by_schedule(rows: torch.Tensor, loss_of: LossOf) -> None:
            schedule = Schedule1F1B(
                PipelineStage(module, rank, n_ranks, torch.device("cpu")),
                n_microbatches=2,
                loss_fn=lambda y, _: loss_of(y) / 2,
                scale_grads=False,
            )
            if rank == 0:
                schedule.step(rows)
            else:
                schedule.step(target=torch.zeros(len(rows), 4), losses=[])

        def gather() -> Gradients:
            everywhere: list[Any] = [None] * n_ranks
            dist.all_gather_object(everywhere, gathered(module))
            return {name: gradient for one in everywhere for name, gradient in one.items()}

        parts = {f"layers.{k}.{kind}": (f"{k}.{kind}",) for k in (0, 2, 4) for kind in ("weight", "bias")}
        run = by_schedule if scheduled else by_hand
        return Part(module, module, process_group=dist.group.WORLD, gather=gather, run=run, parts=parts)

    return build


def _autocast(half: bool) -> Callable[[bool], AbstractContextManager[Any]]:
    return lambda _: torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext()


def _summoned(model: FullyShardedDataParallel) -> Gradients:
    names = {plain_name(name): name for name, _ in model.named_parameters()}
    with FullyShardedDataParallel.summon_full_params(model, writeback=False, with_grads=True):
        return {
            names[plain_name(name)]: parameter.grad.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }


def _unflattened(model: FullyShardedDataParallel) -> Gradients:
    ((name, flat),) = model.named_parameters()
    assert flat.grad is not None
    pieces = [torch.empty_like(flat.grad) for _ in range(dist.get_world_size())]
    dist.all_gather(pieces, flat.grad.detach())
    return {name: torch.cat(pieces)[: flat._unpadded_unsharded_size.numel()]}
