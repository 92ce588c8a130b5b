"""DistributedDataParallel with a probe: every process attaches, the numbers are those of the averaged gradients.

    torchrun --nproc-per-node 2 examples/ddp.py

Runs on GPUs where there are enough, otherwise on CPU processes that talk by gloo. The probe adds no communication.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import gradprobe


def main() -> None:
    """Trains one epoch and lets the first process tell what was found."""
    local_rank, on_gpu = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank()

    torch.manual_seed(0)  # the same data and weights on every rank
    x = torch.randn(640, 20)
    data = TensorDataset(x, (x[:, :4] + 0.1 * torch.randn(640, 4)).argmax(dim=1))
    sampler = DistributedSampler(data, shuffle=True)
    loader = DataLoader(data, batch_size=8, sampler=sampler)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).to(device)
    ddp = DistributedDataParallel(model, device_ids=[local_rank] if on_gpu else None)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=2e-3)

    # On every rank. Names are those of the model that is given: of `model`, they have no "module." in front.
    probe = gradprobe.attach(model, optimizer=optimizer)
    sampler.set_epoch(0)
    for inputs, labels in loader:
        loss = nn.functional.cross_entropy(ddp(inputs.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
        optimizer.step()
        probe.step(loss)  # the loss of this rank's part of the batch

    newest = probe.latest(wait=True)
    assert newest is not None
    norms: list[float | None] = [None] * dist.get_world_size()
    dist.all_gather_object(norms, newest.total_norm)  # for this example only: the probe itself needs no such call
    if rank == 0:
        print(f"step {newest.step}: loss {newest.loss:.3f}, gradients {newest.provenance.reduction}")
        print(f"total norm on each rank: {norms}")
        print(probe.findings())
    probe.detach()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
