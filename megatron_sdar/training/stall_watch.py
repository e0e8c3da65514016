"""The watchdog of a run: its timeout, its store and where it reports."""

from __future__ import annotations

import math
import secrets
import time
from pathlib import Path

from megatron_sdar.config import ParallelConfig
from megatron_sdar.parallel.launch import run_on_main
from megatron_sdar.parallel.mesh import ParallelMesh, connect_store, place_in_world
from megatron_sdar.parallel.watchdog import Watchdog

LONGEST_DEFAULT = 1800
_STORE_SECONDS = 5.0


def watchdog_timeout(parallel: ParallelConfig) -> float:
    """Seconds; inf: nobody is timed.

    By default it comes before the collectives' own timeout, which ends a process without naming
    anybody.
    """
    if parallel.watchdog_timeout is None:
        return min(LONGEST_DEFAULT, 0.9 * parallel.ddp_timeout)
    return parallel.watchdog_timeout or math.inf


def make_watchdog(parallel: ParallelConfig, output_dir: Path, mesh: ParallelMesh) -> Watchdog:
    """A watchdog over all ranks of the run, not begun.

    Collective: broadcast_object_list (world).
    """
    # Keys of an earlier start may still lie in the store, which is torchrun's.
    name = run_on_main(lambda: f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}", mesh)
    timeout = watchdog_timeout(parallel)
    store = connect_store(f"watchdog/{name}", _STORE_SECONDS)
    directory = output_dir / f"stalled-{name}"
    return Watchdog(store, *place_in_world(), mesh.place, timeout, directory)
