"""Spawning gloo worlds inside pytest: one world runs many jobs, so start-up is paid once."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distributed.forks import fork_context

Job = tuple[Callable[..., None], tuple[object, ...]]


def _rank_main(rank: int, world_size: int, jobs: Sequence[Job], directory: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store-{world_size}", world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    code = 0
    try:
        for function, arguments in jobs:
            function(*arguments)
        dist.barrier()
    except BaseException:
        Path(directory, f"failure-{world_size}-{rank}.txt").write_text(traceback.format_exc())
        code = 1
    gc.collect()
    # Meshes kept by test code would abort the interpreter's own exit (see mesh.py).
    os._exit(code)


def run_world(
    world_size: int,
    jobs: Sequence[Job],
    directory: Path,
    environment: Mapping[str, str] | None = None,
    time_limit: float = 600,
) -> None:
    """Run jobs in order on `world_size` processes; raises with the ranks' tracebacks.

    Args:
        environment: variables that the processes find set before their first import.
        time_limit: seconds that each process may take.
    """
    directory.mkdir(parents=True, exist_ok=True)
    context = mp.get_context("spawn") if environment else fork_context()
    ranks = [
        context.Process(target=_rank_main, args=(rank, world_size, list(jobs), str(directory)))
        for rank in range(world_size)
    ]
    with mock.patch.dict(os.environ, environment or {}):
        for process in ranks:
            process.start()
    for process in ranks:
        process.join(timeout=time_limit)
    hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for rank in hung:
        ranks[rank].kill()
    failures = [path.read_text() for path in sorted(directory.glob(f"failure-{world_size}-*"))]
    codes = [process.exitcode for process in ranks]
    if hung or failures or any(codes):
        raise RuntimeError(f"hung ranks {hung}, exit codes {codes}\n" + "\n".join(failures[:2]))
