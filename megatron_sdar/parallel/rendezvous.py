"""Keys of a start's own in the store that torchrun keeps over its restarts.

Since torch 2.5 torchrun's store outlives the processes that it starts again, and a process group
made there finds the addresses of those that are gone (pytorch/pytorch#135712). How often torchrun
restarted is not the same on all hosts, so the processes of a start agree on a name by themselves.
"""

from __future__ import annotations

import secrets
import time
from datetime import timedelta

import torch.distributed as dist

_LOOK_EVERY = 0.02


def own_store(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """A part of the store in which no earlier start wrote, the same on all ranks.

    Rank 0 makes up a name. A rank that asks for it does so under a name of its own, which nobody
    used before, so neither takes an answer or a question from an earlier start for this one's.

    Args:
        store: of all ranks.

    Raises:
        RuntimeError: not all ranks came in time, or the store cannot be reached.

    Every rank must call.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        name = _lead(store, world_size, deadline)
    else:
        question = secrets.token_hex(8)
        store.set(f"start/asks/{rank}", question)
        store.wait([f"start/answers/{question}"], timeout)
        name = store.get(f"start/answers/{question}").decode()
        store.set(f"start/{name}/{rank}", "here")
    return dist.PrefixStore(name, store)


def _lead(store: dist.Store, world_size: int, deadline: float) -> str:
    name = secrets.token_hex(8)
    answered: set[str] = set()
    missing = set(range(1, world_size))
    while missing:
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {sorted(missing)} did not come in time")
        for rank in sorted(missing):
            if store.check([f"start/{name}/{rank}"]):
                missing.remove(rank)
            elif store.check([f"start/asks/{rank}"]):
                question = store.get(f"start/asks/{rank}").decode()
                if question not in answered:
                    store.set(f"start/answers/{question}", name)
                    answered.add(question)
        time.sleep(_LOOK_EVERY)
    return name
