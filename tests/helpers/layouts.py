"""Ways to lay out a small model over several processes, each with its single-process twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from helpers.layout_builders import (
    ddp,
    fsdp1,
    fsdp2,
    fsdp2_and_tensor_parallel,
    hand_made,
    local_of,
    pipeline,
    replicated,
    sequence_parallel,
    tensor_parallel,
    two_meshes,
)
from helpers.layout_parts import Normed, Part, Tied, Unused, mlp, numbers, sequences, tokens, uneven
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.fsdp import (
    ShardingStrategy,
)

Reduction = Literal["local", "averaged", "global", "shard"]


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
