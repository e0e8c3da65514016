"""Every compiled form of every Triton kernel that is shipped, gathered from the kernel modules.

Each of them has `shipped(arch) -> list[KernelSpec]`. Names are unique, so that a worker process
can find a form by its name.
"""

from __future__ import annotations

from importlib import import_module

from sdar_kernels.triton_runtime import KernelSpec

KERNEL_MODULES = (
    "triton_attention",
    "triton_rms_norm",
    "triton_qk_norm_rope",
    "triton_swiglu",
    "triton_cross_entropy",
)


def shipped_kernels(arch: str) -> list[KernelSpec]:
    """What is shipped for ARCH, in the order of KERNEL_MODULES.

    Raises ValueError if two forms have one name.
    """
    specs: list[KernelSpec] = []
    for module in KERNEL_MODULES:
        specs += import_module(f"sdar_kernels.{module}").shipped(arch)
    names = [spec.name for spec in specs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"several shipped kernels for {arch} are called {', '.join(repeated)}")
    return specs
