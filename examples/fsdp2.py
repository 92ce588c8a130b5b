"""FSDP2 with a probe: each process holds a part of every gradient, all of them see the norms of the whole.

    torchrun --nproc-per-node 2 examples/fsdp2.py

Runs on GPUs where there are enough, otherwise on CPU processes that talk by gloo.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gradprobe


def main() -> None:
    """Trains 20 steps, clipping by the norm of the whole gradient."""
    local_rank, on_gpu = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device.type, (n_ranks,))

    torch.manual_seed(0)  # the same weights on every rank
    layers = [nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4)]
    model = nn.Sequential(*layers).to(device)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    # After sharding, on every rank: the ranks agree here on what they will reduce, and when.
    probe = gradprobe.attach(model, optimizer=optimizer, updates=True)
    torch.manual_seed(rank)  # other data on every rank
    for _ in range(20):
        x = torch.randn(16, 32, device=device)
        loss = nn.functional.cross_entropy(model(x), x[:, :4].argmax(dim=1))
        optimizer.zero_grad()
        loss.backward()
        probe.clip_grad_norm_(1.0)  # on every rank
        optimizer.step()
        probe.step(loss)

    newest = probe.latest(wait=True)
    assert newest is not None
    norms: list[float | None] = [None] * n_ranks
    dist.all_gather_object(norms, newest.total_norm)  # for this example only
    if rank == 0:
        weight = newest["0.weight"]
        held = model[0].weight.to_local().numel()
        print(f"step {newest.step}: loss {newest.loss:.3f}, gradients {newest.provenance.reduction}")
        print(f"0.weight: {weight.numel} elements, of which this rank holds {held}")
        print(f"total norm on each rank: {norms}")
        print(probe.findings())
    probe.detach()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
