"""Leaving together: one readable message, exit code 1 on every rank, no hang.

torchrun kills the other ranks as soon as one exits, so a rank that leaves first could take the
message of rank 0 with it. Errors known on all ranks therefore pass through here.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from megatron_sdar.parallel.mesh import (
    LaunchInfo,
    ParallelMesh,
    connect_store,
    start_process_group,
)

LEAVE_TIMEOUT_SECONDS = 20
_STORE_SECONDS = 30.0

Result = TypeVar("Result")


def run_on_main(function: Callable[[], Result], mesh: ParallelMesh) -> Result:
    """Run on rank 0 only while the others wait, however long; all get its result or its error.

    Args:
        function: what rank 0 does; its result travels to every rank, so it is small.

    Raises:
        ValueError: on every rank, when rank 0 raised ValueError or OSError.

    Collective: broadcast_object_list (world).
    """
    box: list[Any] = [None, None]
    if mesh.is_main:
        try:
            box[0] = function()
        except (ValueError, OSError) as caught:
            box[1] = str(caught)
    dist.broadcast_object_list(box, src=0, group=mesh.control)
    result, error = box
    if error is not None:
        raise ValueError(error)
    return result


def launch_name() -> str:
    """A name of this launch by torchrun, which stays when torchrun starts the processes again.

    It lies in the rendezvous store, which lives as long as torchrun does. Asked for by rank 0.

    Raises:
        OSError: the store cannot be reached.
    """
    try:
        store = connect_store("launch", _STORE_SECONDS)
        return store.compare_set("name", "", secrets.token_hex(8)).decode()
    except RuntimeError as error:
        raise OSError(f"the rendezvous store cannot be reached: {error}") from error


def gather_from_all(value: Result, mesh: ParallelMesh) -> list[Result]:
    """Every rank's value, by rank; small and picklable. Collective: all_gather_object (world)."""
    values: list[Any] = [None] * dist.get_world_size(mesh.control)
    dist.all_gather_object(values, value, group=mesh.control)
    return values


def gather_from_world(value: Result) -> list[Result]:
    """Every rank's value, by rank, where there is no mesh at hand; small and picklable.

    Collective: all_gather_object (world).
    """
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def leave_together(message: str, launch: LaunchInfo) -> NoReturn:
    """Print the error once and exit with code 1 on every rank.

    Ranks exchange their messages; rank 0 prints each distinct one. A rank whose peers did not
    fail waits at most LEAVE_TIMEOUT_SECONDS for them, then prints its own and leaves, and
    torchrun stops the others.

    Collective: all_gather_object (world), with its own timeout.
    """
    try:
        for text in _exchange(message, launch):
            print(f"error: {text}", file=sys.stderr)
    except RuntimeError:
        leave_alone(message, launch)
    _exit_with_error()


def leave_alone(message: str, launch: LaunchInfo) -> NoReturn:
    """Print this rank's error and exit with code 1: the others are not to be reached."""
    print(f"rank {launch.rank}: error: {message}", file=sys.stderr)
    _exit_with_error()


def _exit_with_error() -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    # Interpreter teardown with a live process group may abort and replace the exit code.
    os._exit(1)


def _exchange(message: str, launch: LaunchInfo) -> list[str]:
    """On rank 0 the distinct messages of all ranks, elsewhere nothing."""
    if launch.world_size == 1:
        return [message]
    # The first exit makes torchrun send SIGTERM to the rest, which would then not exit with 1.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not dist.is_initialized():
        start_process_group(launch, "cpu", "gloo", LEAVE_TIMEOUT_SECONDS)
    timeout = timedelta(seconds=LEAVE_TIMEOUT_SECONDS)
    group = dist.new_group(backend="gloo", timeout=timeout)
    messages: list[str] = [""] * launch.world_size
    dist.all_gather_object(messages, message, group=group)
    if launch.rank != 0:
        return []
    return list(dict.fromkeys(messages))
