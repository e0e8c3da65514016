"""What the machine offers: GPUs, processors, limits, network, process groups.

Nothing here is specific to a run. Every check reads, or tries for a moment, and leaves nothing.
"""

from __future__ import annotations

import resource
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import torch
from sdar_kernels.bf16_products import bf16_is_slow, bf16_slowdown

from megatron_sdar.data.building.build_options import available_cores
from megatron_sdar.doctor.findings import Finding, missing, ok, slow
from megatron_sdar.parallel.mesh import (
    LaunchInfo,
    start_process_group,
    stop_process_group,
    sum_over_world,
)
from megatron_sdar.training.memory_estimate import GIB

_DRIVER = Path("/proc/driver/nvidia/version")
_NETWORKS, _INFINIBAND = Path("/sys/class/net"), Path("/sys/class/infiniband")
_SHARED = Path("/dev/shm")
_LEAST_FILES = 4096
_LEAST_SHARED = 2**30
_GROUP_SECONDS = 20


def machine(device: torch.device) -> Iterator[Finding]:
    """GPUs, processors, limits, network."""
    yield from gpus(device)
    yield processors(available_cores(), torch.get_num_threads(), device)
    if device.type == "cpu":
        yield bf16_units(bf16_slowdown())
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield shared_memory(_SHARED, device)
    yield host_name(socket.gethostname())
    yield interfaces(_NETWORKS, _INFINIBAND)
    yield process_group(device)


def gpus(device: torch.device) -> Iterator[Finding]:
    """Driver, cards, their memory, bf16, NCCL; one line where there is no GPU."""
    if device.type != "cuda":
        if torch.version.cuda is None and torch.version.hip is None and _DRIVER.exists():
            yield slow(
                "gpu",
                "there is an NVIDIA driver, but this torch is built for CPUs",
                "pip install --force-reinstall torch, without an index for CPUs",
            )
            return
        yield ok("gpu", "none: runs use the CPU, as device: cpu")
        return
    driver = _DRIVER.read_text().split("Module  ")[-1].split()[0] if _DRIVER.exists() else "?"
    yield ok("driver", f"{driver}, torch is built for {torch.version.cuda or torch.version.hip}")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        text = (
            f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        )
        if free < 0.9 * total:
            yield slow(
                f"gpu {index}", text, "end what else runs there (nvidia-smi), or use another one"
            )
        else:
            yield ok(f"gpu {index}", text)
    if torch.cuda.is_bf16_supported():
        yield ok("bf16", "supported")
    else:
        yield slow("bf16", "not supported by this GPU", "leave bf16 out, or use an Ampere or newer")


def processors(cores: int, threads: int, device: torch.device) -> Finding:
    """How many threads each process would take; torchrun gives one to each of several."""
    text = f"{cores} cores, {threads} threads per process"
    if threads > cores:
        return slow("cpu", text, f"export OMP_NUM_THREADS={cores} or less")
    if device.type == "cuda" and cores < 2 * torch.cuda.device_count():
        return slow("cpu", text, "give the job at least two cores per GPU (Slurm: --cpus-per-task)")
    return ok("cpu", text)


def bf16_units(slowdown: float) -> Finding:
    """Whether a CPU computes in bf16 at a useful speed."""
    if bf16_is_slow(slowdown):
        return slow(
            "bf16",
            f"this CPU has no bf16 units: a product takes {slowdown:.0f} times as long as in "
            "float32",
            "set bf16: false for runs on this CPU",
        )
    return ok("bf16", "supported by this CPU")


def open_files(limit: int) -> Finding:
    """Checkpoints, shards and sockets of a large world are open at the same time."""
    if 0 <= limit < _LEAST_FILES:
        return slow("open files", f"limit {limit}", f"ulimit -n {_LEAST_FILES}")
    return ok("open files", "no limit" if limit < 0 else f"limit {limit}")


def shared_memory(path: Path, device: torch.device) -> Finding:
    """NCCL and gloo pass messages inside a node through it."""
    if not path.is_dir():
        return ok("shared memory", f"{path} is not there: processes of a node use the network")
    free = shutil.disk_usage(path).free
    text = f"{free / GIB:.1f} GiB free in {path}"
    if device.type == "cuda" and free < _LEAST_SHARED:
        return slow("shared memory", text, "start the container with --ipc=host or --shm-size=8g")
    return ok("shared memory", text)


def host_name(name: str) -> Finding:
    """gloo listens on the address that the host's own name has."""
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        return slow(
            "host name",
            f"{name} has no address ({error})",
            "export GLOO_SOCKET_IFNAME=lo on one node, or the interface between several; "
            "or add the name to /etc/hosts",
        )
    return ok("host name", f"{name} is {address}")


def interfaces(networks: Path, infiniband: Path) -> Finding:
    """Which interfaces several nodes could use: InfiniBand, else those that are up."""
    cards = sorted(path.name for path in infiniband.iterdir()) if infiniband.is_dir() else []
    up = sorted(
        path.name
        for path in (networks.iterdir() if networks.is_dir() else ())
        if path.name != "lo" and _is_up(path) and not path.name.startswith(("docker", "veth"))
    )
    text = f"{', '.join(up) or 'none but lo'}; InfiniBand: {', '.join(cards) or 'none'}"
    if len(up) > 1:
        text += f"; for several nodes choose one: export NCCL_SOCKET_IFNAME={up[0]}"
        text += f" GLOO_SOCKET_IFNAME={up[0]}"
    return ok("network", text)


def _is_up(interface: Path) -> bool:
    state = interface / "operstate"
    return state.is_file() and state.read_text().strip() in ("up", "unknown")


def process_group(device: torch.device) -> Finding:
    """A world of one sums a number on the CPU and, if there is one, on the GPU."""
    names = "gloo" if device.type == "cpu" else "gloo and nccl"
    try:
        where = start_process_group(LaunchInfo(0, 0, 1), device.type, None, _GROUP_SECONDS)
        total = sum_over_world(torch.ones((), device=where)).item()
    except (RuntimeError, ValueError, OSError) as error:
        text = " ".join(str(error).split())[:200]
        return missing(
            "process group",
            f"{names}: {text}",
            "mend host name and network above; NCCL_DEBUG=INFO shows more of NCCL",
        )
    finally:
        stop_process_group()
    assert total == 1, "one process adds one"
    return ok("process group", f"{names} work")
