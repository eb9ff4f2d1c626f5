"""The processes started by torchrun: their ranks, their group, and sums and broadcasts over it."""

import datetime
import io
import os
import sys
import time
import uuid

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

RANK, LOCAL_RANK, WORLD_SIZE = 0, 0, 1
if {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():  # torchrun sets them
    RANK, LOCAL_RANK, WORLD_SIZE = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def join_processes(device: torch.device) -> None:
    """Join the group of torchrun's processes. From here on only rank 0 prints.

    device: the device that this process trains on.
    """
    backend, timeout = "nccl" if device.type == "cuda" else "gloo", datetime.timedelta(hours=1)
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(agree_on_name(store), store)
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD_SIZE, timeout=timeout)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def agree_on_name(store: dist.Store) -> str:
    """Return rank 0's name for this start of the group, once every rank has read it.

    It is needed because after a restart torchrun's store still holds the addresses of the earlier processes (pytorch
    issue 135712).
    """
    own_name = uuid.uuid4().hex
    if RANK == 0:
        store.set("start", own_name)
        others = [store.get(f"{own_name}/{rank}").decode() for rank in range(1, WORLD_SIZE)]  # waits for each
        store.set(f"{own_name}/complete", " ".join(others))
        return own_name
    while True:
        name = store.get("start").decode()  # an earlier start's, until this start's rank 0 has set its own
        store.set(f"{name}/{RANK}", own_name)
        if store.check([f"{name}/complete"]) and own_name in store.get(f"{name}/complete").decode():
            return name
        time.sleep(0.05)


def leave_processes() -> None:
    """Leave the group, if this process has joined one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_processes(values: list[float], device: torch.device) -> list[float]:
    """Return the sum of each value over the processes."""
    if WORLD_SIZE == 1:
        return values
    total = torch.tensor(values, dtype=torch.double, device=device)
    dist.all_reduce(total)
    return total.tolist()


def add_over_processes(tensor: torch.Tensor) -> None:
    """Add the other processes' tensors to `tensor`, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)


def broadcast(value: object, device: torch.device) -> object:
    """Return rank 0's `value` in every process, with its tensors on the CPU. The other ranks' values are ignored.

    value: anything that torch.load reads with weights_only=True.
    """
    if WORLD_SIZE == 1:
        return value
    buffer = io.BytesIO()
    torch.save(value, buffer)
    shared = [buffer.getvalue()]
    dist.broadcast_object_list(shared, device=device)
    return torch.load(io.BytesIO(shared[0]), map_location="cpu", weights_only=True)


def gather(value: object) -> list:
    """Return every process's `value`, in the order of their ranks."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process rank 0's buffers. While processes train, their batch-norm statistics differ."""
    if WORLD_SIZE > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
