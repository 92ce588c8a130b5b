"""Ways to lay out a small model over several processes, each with its single-process twin."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
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

Gradients = dict[str, torch.Tensor]
LossOf = Callable[[torch.Tensor], torch.Tensor]
"""Returns the loss of an output, a mean over its rows."""
Reduction = Literal["local", "averaged", "global", "shard"]


class Tied(nn.Module):
    """Shares one matrix between its first and its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(torch.tanh(self.hidden(self.embed(tokens))))
        return y


class Normed(nn.Module):
    """A block of a transformer without its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.tanh(self.up(self.norm(x))))
        return y


class Unused(nn.Module):
    """Has a layer that no forward pass uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.extra = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x)
        return y


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))


def uneven() -> nn.Sequential:
    """Sizes that two and four do not divide; ranks without a row of the last weight."""
    return nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1))


def numbers(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(8, 8, generator=generator)


def sequences(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(8, 4, 8, generator=generator)


def tokens(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 7, (8,), generator=generator)  # three rows of the embedding stay unused


@dataclass
class Part:
    """One rank's part in a training.

    Attributes:
        model: What the probe is attached to.
        call: The forward pass.
        share: This rank takes every n-th row of the batch, counted from this one.
        process_group: Argument of `attach`.
        around: Entered around each pass; its argument says whether it is the last one of the step.
        gather: Returns the whole gradients, by the name of the parameter, the same on every rank.
        clip: Clips with torch's own function and returns the total norm; None if torch has none that is right here.
        run: Runs forward and backward pass itself, if it is not the usual one.
        parts: Names of the parameters of the model in one process that make up a parameter, if not that of its name.
    """

    model: nn.Module
    call: Callable[[torch.Tensor], torch.Tensor]
    share: tuple[int, int] = (0, 1)
    process_group: Any = None
    around: Callable[[bool], AbstractContextManager[Any]] = lambda _: contextlib.nullcontext()
    gather: Callable[[], Gradients] | None = None
    clip: Callable[[float], torch.Tensor] | None = None
    run: Callable[[torch.Tensor, LossOf], None] | None = None
    parts: Mapping[str, tuple[str, ...]] | None = None

    def backward(self, batch: torch.Tensor, loss_of: LossOf, is_last: bool) -> None:
        """Adds to the gradients those of the loss of this rank's rows of a batch."""
        rows = batch[self.share[0] :: self.share[1]]
        with self.around(is_last):
            if self.run is not None:
                self.run(rows, loss_of)
            else:
                loss_of(self.call(rows)).backward()

    def gradients(self) -> Gradients:
        """Returns the whole gradients, by the name of the parameter. Every rank must call it."""
        return self.gather() if self.gather is not None else gathered(self.model)


def gathered(model: nn.Module) -> Gradients:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            found[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).detach().clone()
    return found


def clipper(model: nn.Module) -> Callable[[float], torch.Tensor]:
    def clip(max_norm: float) -> torch.Tensor:
        total = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        return total.full_tensor() if isinstance(total, DTensor) else total

    return clip


@dataclass(frozen=True)
class Layout:
    """A way to lay out a model.

    Attributes:
        n_ranks: Number of processes.
        build: Returns this rank's part. Takes the model of one process, the rank, the number of ranks and whether to
            compute in bfloat16.
        model: Returns the model in one process.
        batch: Returns the batch of all ranks together.
        reduction: What snapshots say.
        variants: How it is trained.
        is_exact: The gradients are those of one process, but for rounding.
        is_same: All ranks have the same numbers.
        warning: Part of the warning that the first rank gives, and no other.
    """

    n_ranks: int
    build: Callable[[nn.Module, int, int, bool], Part]
    model: Callable[[], nn.Module] = mlp
    batch: Callable[[torch.Generator], torch.Tensor] = numbers
    reduction: Reduction = "global"
    variants: tuple[str, ...] = ("plain", "accumulated", "torch clip", "probe clip")
    is_exact: bool = True
    is_same: bool = True
    warning: str | None = None


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


def plain_name(name: str) -> str:
    """Returns the name that a parameter has in the model of one process."""
    for prefix in ("_fsdp_wrapped_module.", "_orig_mod.", "module."):
        name = name.replace(prefix, "")
    return name


_BASIC = ("plain", "accumulated", "probe clip")
_CLIPS = ("plain", "accumulated", "torch clip", "probe clip")
_RANGE = ("nonfinite", "tiny")
_WAYS = ("activations", "updates", "by hand", "at step")
_ALL = (*_CLIPS, *_RANGE, *_WAYS, "wide", "bfloat16", "scaler")

LAYOUTS: dict[str, Layout] = {
    "ddp": Layout(2, ddp(), reduction="averaged", variants=_ALL),
    "ddp bucket view": Layout(2, ddp(gradient_as_bucket_view=True), reduction="averaged"),
    "ddp static graph": Layout(2, ddp(static_graph=True), reduction="averaged", variants=("plain", "torch clip")),
    "ddp unused": Layout(
        2,
        ddp(find_unused_parameters=True),
        Unused,
        reduction="averaged",
        variants=("plain", "probe clip"),
        warning="no gradient for 2 of 8 parameters",
    ),
    "ddp fp16 hook": Layout(2, ddp(hook=fp16_compress_hook), reduction="averaged", variants=("plain",), is_exact=False),
    "ddp.module": Layout(2, ddp("module"), reduction="averaged"),
    "ddp compiled": Layout(2, ddp("compiled"), reduction="averaged", variants=("plain",)),
    "ddp no_sync": Layout(2, ddp(sync=False), reduction="local", variants=("plain",), is_exact=False, is_same=False),
    "fsdp2": Layout(2, fsdp2(), variants=(*_ALL, "in hooks")),
    "fsdp2 nested": Layout(2, fsdp2(nested=True), variants=(*_CLIPS, "bfloat16")),
    "fsdp2 uneven": Layout(2, fsdp2(nested=True), uneven, variants=(*_CLIPS, *_RANGE, "updates")),
    "fsdp2 unused": Layout(2, fsdp2(nested=True), Unused, variants=_CLIPS, warning="no gradient for 2 of 8 parameters"),
    "fsdp2 by columns": Layout(2, fsdp2(by_columns=True)),
    "fsdp2 tied": Layout(2, fsdp2(), Tied, tokens),
    "fsdp2 local": Layout(2, local_of(fsdp2()), reduction="shard", variants=("plain",), is_exact=False, is_same=False),
    "fsdp1": Layout(2, fsdp1(), variants=(*_CLIPS, *_RANGE, *_WAYS, "in hooks", "bfloat16")),
    "fsdp1 nested": Layout(2, fsdp1(nested=True), uneven),
    "fsdp1 flat": Layout(2, fsdp1(orig=False), uneven, variants=(*_CLIPS, *_RANGE, *_WAYS, "bfloat16")),
    "fsdp1 shard_grad_op": Layout(2, fsdp1(ShardingStrategy.SHARD_GRAD_OP), uneven),
    "fsdp1 no_shard": Layout(2, fsdp1(ShardingStrategy.NO_SHARD)),
    "tensor parallel": Layout(2, tensor_parallel(head=True), variants=(*_ALL, "in hooks")),
    "tensor parallel beside plain": Layout(2, tensor_parallel(), variants=(*_BASIC, *_RANGE, "updates")),
    "tensor parallel local": Layout(
        2, local_of(tensor_parallel(head=True)), reduction="shard", variants=("plain",), is_exact=False, is_same=False
    ),
    "sequence parallel": Layout(2, sequence_parallel, Normed, sequences, variants=(*_CLIPS, *_RANGE, *_WAYS)),
    "replicate": Layout(2, replicated("replicate")),
    "distribute_module": Layout(2, replicated("distribute"), variants=(*_BASIC, *_RANGE, *_WAYS)),
    "hand-made": Layout(2, hand_made(), uneven, variants=(*_BASIC, *_RANGE, "updates")),
    "hand-made beside replicas": Layout(2, hand_made(beside_replicas=True), variants=_BASIC),
    "pipeline": Layout(2, pipeline(), variants=(*_BASIC, *_WAYS)),
    "pipeline 1F1B": Layout(2, pipeline(scheduled=True), variants=_BASIC),
    "fsdp2 on 4": Layout(4, fsdp2(nested=True), uneven, variants=(*_CLIPS, *_RANGE)),
    "hsdp": Layout(4, fsdp2(nested=True, shape=(2, 2)), variants=_ALL),
    "hsdp uneven": Layout(4, fsdp2(shape=(2, 2)), uneven, variants=_BASIC),
    "fsdp2 x tensor parallel": Layout(
        4, fsdp2_and_tensor_parallel, variants=(*_BASIC, *_RANGE, "wide", "activations", "updates")
    ),
    "two meshes": Layout(4, two_meshes, variants=_BASIC),
    "fsdp1 on 4": Layout(4, fsdp1(), uneven),
    "fsdp1 hybrid": Layout(4, fsdp1(ShardingStrategy.HYBRID_SHARD), uneven, variants=_BASIC),
    "tensor parallel on 4": Layout(4, tensor_parallel(), variants=(*_BASIC, *_RANGE)),
    "sequence parallel on 4": Layout(4, sequence_parallel, Normed, sequences, variants=_BASIC),
    "hand-made on 4": Layout(4, hand_made(), uneven, variants=(*_BASIC, *_RANGE)),
}
