"""Where a run computes: the configured device, and what the launch has to have for it."""

from __future__ import annotations

import torch

from megatron_sdar.parallel.mesh import LaunchInfo


def device_type(name: str) -> str:
    """ "cpu" or "cuda" for a configured device; "auto" takes a GPU when there is one.

    Raises:
        ValueError: cuda was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError(
            "device: cuda, but torch finds no GPU here; use device: cpu (--device cpu) or auto"
        )
    return ("cuda" if available else "cpu") if name == "auto" else name


def check_launch(launch: LaunchInfo, device: str, backend: str | None) -> None:
    """Refuse what the process group could not be made of.

    Args:
        device: "cpu" or "cuda".
        backend: ddp_backend, None for the device's own.

    Raises:
        ValueError: the backend does not serve the device, or a local rank has no GPU.
    """
    if backend is not None and backend != {"cpu": "gloo", "cuda": "nccl"}[device]:
        raise ValueError(
            f"ddp_backend: {backend} does not serve device {device}; leave it out, or use "
            "gloo on cpu and nccl on cuda"
        )
    if device == "cuda" and launch.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {launch.local_rank} has no GPU: this host has "
            f"{torch.cuda.device_count()}; launch at most that many processes per node"
        )
