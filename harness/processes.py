"""The processes that torchrun has started: their number, their group, sums over them."""

import datetime
import os
import sys
import time
import uuid

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

RANK, WORLD_SIZE = 0, 1
if {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():  # torchrun sets them
    RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def join_processes(device):
    """Makes one group of the processes that torchrun has started, of which only the first prints.

    device: the torch.device of this one.
    """
    backend, timeout = "nccl" if device.type == "cuda" else "gloo", datetime.timedelta(hours=1)
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(attempt(store), store)
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD_SIZE, timeout=timeout)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def attempt(store):
    """A name that only the processes of this attempt have, and all of them: the first one's, once each has got it.

    After a restart torchrun's store still holds the addresses of the processes before (pytorch issue 167288).
    """
    mine = uuid.uuid4().hex
    if RANK == 0:
        store.set("attempt", mine)
        others = [store.get(f"{mine}/{rank}").decode() for rank in range(1, WORLD_SIZE)]  # waits for each
        store.set(f"{mine}/complete", " ".join(others))
        return mine
    while True:
        name = store.get("attempt").decode()  # that of the attempt before, if this one's first process is not there yet
        store.set(f"{name}/{RANK}", mine)
        if store.check([f"{name}/complete"]) and mine in store.get(f"{name}/complete").decode():
            return name
        time.sleep(0.05)


def summed(values, device):
    """The sums of a list of numbers over the processes."""
    if WORLD_SIZE == 1:
        return values
    total = torch.tensor(values, dtype=torch.double, device=device)
    dist.all_reduce(total)
    return total.tolist()
