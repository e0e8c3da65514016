"""Whether Triton kernels can run here, and how one compiled form of a kernel is described.

Nothing here imports triton at module level: the torch paths must work without it.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class KernelSpec:
    """One compiled form of a kernel: what ahead-of-time compilation needs to know.

    Attributes:
        name: what a report calls it, e.g. "attention forward bf16 d128 g4".
        kernel: the triton.jit function.
        signature: type of each argument that is not a constexpr ("*bf16", "i32", "fp32"), by name.
        constexprs: value of each constexpr argument, by name.
        num_warps, num_stages: launch options.
        aligned: names of arguments that are multiples of 16 (pointers, strides).
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...] = ()


def interpreting() -> bool:
    """True when kernels run in Triton's interpreter (TRITON_INTERPRET=1 at import)."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def why_no_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device`, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device.type != "cuda" and not interpreting():
        return f"triton needs a GPU, the device is {device.type}"
    return None


def device_architecture(device: torch.device) -> str:
    """Name of the GPU's architecture as in `triton_configs`: "sm_90", "gfx942"; "cpu" without."""
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
