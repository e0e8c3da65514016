"""The rank grid: named axes (pp, dp_replicate, dp_shard, tp) over torch's DeviceMesh.

tp is innermost (neighbouring ranks), pp outermost, as in Megatron. The mesh is made once and
passed to whoever needs it; nothing here is global. Only this file starts and ends the process
group.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_sdar.parallel.rendezvous import own_store

AXES = ("pp", "dp_replicate", "dp_shard", "tp")
CONTROL_TIMEOUT = timedelta(days=7)
RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Beginnings of the names of torchrun's other variables.
_TORCHRUN = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "TORCHELASTIC_")


@dataclass(frozen=True)
class PipelineGroups:
    """One process group per kind of pipeline message.

    NCCL orders messages per communicator and ignores tags, so activations and gradients, and
    messages between neighbours and around the end of the ring, each get their own.
    """

    forward: dist.ProcessGroup
    backward: dist.ProcessGroup
    forward_wrap: dist.ProcessGroup
    backward_wrap: dist.ProcessGroup


@dataclass(frozen=True)
class ParallelMesh:
    """The mesh and what is asked of it most.

    Attributes:
        device_mesh: 4-D, axes AXES.
        dp: 1-D mesh over dp_replicate x dp_shard.
        device: where this rank computes.
        pipeline_groups: None when the pipeline has one stage.
        tied_group: first and last pipeline stage of this rank's pipeline, or None.
        control: the world on gloo with a very long timeout, for waiting while rank 0 does
            lengthy work alone (tokenising, exporting) and for writing checkpoints.
    """

    device_mesh: DeviceMesh
    dp: DeviceMesh
    device: torch.device
    pipeline_groups: PipelineGroups | None
    tied_group: dist.ProcessGroup | None
    control: dist.ProcessGroup

    @property
    def tp(self) -> DeviceMesh:
        return self.device_mesh["tp"]

    @property
    def pp(self) -> DeviceMesh:
        return self.device_mesh["pp"]

    @property
    def data_parallel_axes(self) -> DeviceMesh:
        """The mesh FSDP shards over: 1-D (dp_shard), or 2-D when parameters are replicated."""
        if self.device_mesh["dp_replicate"].size() > 1:
            return self.device_mesh["dp_replicate", "dp_shard"]
        return self.device_mesh["dp_shard"]

    @property
    def tp_size(self) -> int:
        return self.tp.size()

    @property
    def tp_rank(self) -> int:
        return self.tp.get_local_rank()

    @property
    def pp_size(self) -> int:
        return self.pp.size()

    @property
    def pp_rank(self) -> int:
        return self.pp.get_local_rank()

    @property
    def dp_size(self) -> int:
        return self.dp.size()

    @property
    def dp_rank(self) -> int:
        return self.dp.get_local_rank()

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size * self.dp_size

    @property
    def place(self) -> str:
        """This rank's coordinates in words."""
        return f"pp {self.pp_rank}, dp {self.dp_rank}, tp {self.tp_rank}"

    @property
    def is_main(self) -> bool:
        """Global rank 0: the rank that prints and writes shared files."""
        return dist.get_rank() == 0


@dataclass(frozen=True)
class LaunchInfo:
    """What torchrun told this process; a plain `python` start is a world of one."""

    rank: int
    local_rank: int
    world_size: int


def read_launch_info() -> LaunchInfo:
    """Read torchrun's environment variables (the only place that does)."""
    return LaunchInfo(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
    )


def environment_of_one_process() -> dict[str, str]:
    """This process's environment without what torchrun put there: for a child that is a world
    of its own. It finds modules where this process does."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in RENDEZVOUS and not name.startswith(_TORCHRUN)
    }
    return kept | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


def start_process_group(
    launch: LaunchInfo, device_type: str, backend: str | None, timeout_seconds: int
) -> torch.device:
    """Join the world and return this rank's device.

    Args:
        launch: from `read_launch_info`.
        device_type: "cpu" or "cuda".
        backend: None picks gloo on cpu and nccl (gloo for cpu tensors) on cuda.
        timeout_seconds: collective timeout.

    Raises:
        RuntimeError: the ranks do not find each other.
    """
    if backend is None:
        backend = "gloo" if device_type == "cpu" else "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=timeout_seconds)
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
    if set(RENDEZVOUS) <= set(os.environ):
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        dist.init_process_group(
            backend,
            store=own_store(store, rank, world_size, timeout),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
    else:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    return device


def connect_store(prefix: str, timeout_seconds: float) -> dist.Store:
    """A connection of its own to the rendezvous store; a world of one has a store to itself.

    Args:
        prefix: of all keys.
        timeout_seconds: until an operation on it fails.

    Raises:
        RuntimeError: it cannot be reached.
    """
    if not set(RENDEZVOUS) <= set(os.environ):
        return dist.PrefixStore(prefix, dist.HashStore())
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
    )
    return dist.PrefixStore(prefix, store)


def build_mesh(
    device: torch.device,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    replicate_data_parallel: bool = False,
) -> ParallelMesh:
    """Lay the whole world out as pp x dp x tp.

    Args:
        device: this rank's device.
        tensor_model_parallel_size, pipeline_model_parallel_size: their product divides the
            world size (config.validate said so).
        replicate_data_parallel: True keeps full parameters and optimizer state on every
            data-parallel rank (`no_shard`); False shards them.

    Runs collectives: creates process groups, so every rank must call it.
    """
    world_size = dist.get_world_size()
    tp, pp = tensor_model_parallel_size, pipeline_model_parallel_size
    assert world_size % (tp * pp) == 0, "world size was validated against the axes"
    dp = world_size // (tp * pp)
    dp_sizes = (dp, 1) if replicate_data_parallel else (1, dp)
    mesh = init_device_mesh(device.type, (pp, *dp_sizes, tp), mesh_dim_names=AXES)
    dp_mesh = mesh["dp_replicate", "dp_shard"]._flatten("dp")
    pipeline_groups = tied_group = None
    if pp > 1:
        columns = mesh.mesh.reshape(pp, -1).T.tolist()
        pipeline_groups = PipelineGroups(*(_own_group(columns) for _ in range(4)))
        tied_group = _group_per_row([[ranks[0], ranks[-1]] for ranks in columns])
    control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    return ParallelMesh(mesh, dp_mesh, device, pipeline_groups, tied_group, control)


def mesh_for_thread(mesh: ParallelMesh) -> ParallelMesh:
    """The same mesh with a control group of its own, for work of a second thread.

    Two threads that used one group would take each other's messages. The second thread must keep
    to `control`.

    Runs a collective: creates a process group, so every rank must call it.
    """
    return replace(mesh, control=dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT))


def _group_per_row(rows: list[list[int]]) -> dist.ProcessGroup | None:
    """Make one group per row of ranks; returns the one this rank is in."""
    group, _ = dist.new_subgroups_by_enumeration(rows)
    return group


def _own_group(rows: list[list[int]]) -> dist.ProcessGroup:
    """Like `_group_per_row`, for rows that cover the world."""
    group = _group_per_row(rows)
    assert group is not None, "every rank is in one row"
    return group


def place_in_world() -> tuple[int, int]:
    """This rank and the number of ranks."""
    return dist.get_rank(), dist.get_world_size()


def stop_process_group() -> None:
    """Leave the world. Call after the last reference to meshes and models is dropped.

    A Python object that still holds the default gloo group makes the interpreter abort at
    exit, hence the collection first.
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_data_parallel(value: float, mesh: ParallelMesh) -> float:
    """Sum of a host number over data-parallel ranks, exact below 2^53.

    Collective: all_reduce (dp).
    """
    (total,) = sums_over_data_parallel([value], mesh)
    return total


def sums_over_data_parallel(values: Sequence[float], mesh: ParallelMesh) -> list[float]:
    """Sums of several host numbers at once, see `sum_over_data_parallel`."""
    total = torch.tensor(values, dtype=torch.float64, device=mesh.device)
    dist.all_reduce(total, group=mesh.dp.get_group())
    return [float(value) for value in total.tolist()]


def sum_over_world(value: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all ranks, float64. Collective: all_reduce (world)."""
    total = value.double()
    dist.all_reduce(total)
    return total
