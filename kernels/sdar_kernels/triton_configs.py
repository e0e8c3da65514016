"""Tile sizes and launch options of the attention kernels, chosen ahead of time per architecture.

Every entry compiles without register spills and within the architecture's shared memory:
`make aot` proves it without a GPU. Speed on a GPU can be searched over `candidates`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sdar_kernels.triton_runtime import device_architecture, interpreting

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
HEAD_DIMS = (64, 80, 96, 128, 256)


@dataclass(frozen=True)
class KernelConfig:
    """One kernel's launch.

    Attributes:
        rows: (query, head) rows of a tile or step, a power of two.
        keys: keys of a step or tile, a power of two.
        masked: size of a step with the mask: keys in the query kernels, rows in the key kernel.
        num_warps, num_stages: Triton's launch options.
    """

    rows: int
    keys: int
    masked: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class AttentionConfig:
    """The three kernels of one architecture, head size and element size."""

    forward: KernelConfig
    backward_queries: KernelConfig
    backward_keys: KernelConfig


def padded_head_dim(head_dim: int) -> int:
    """The power of two that a head is padded to inside the kernels."""
    return max(16, 1 << (head_dim - 1).bit_length())


_CONFIG_16BIT = {
    64: AttentionConfig(
        KernelConfig(128, 64, 32, 4, 3),
        KernelConfig(128, 64, 32, 4, 2),
        KernelConfig(64, 64, 32, 4, 2),
    ),
    128: AttentionConfig(
        KernelConfig(128, 64, 32, 8, 2),
        KernelConfig(128, 64, 32, 8, 2),
        KernelConfig(64, 64, 32, 8, 2),
    ),
    256: AttentionConfig(
        KernelConfig(64, 32, 32, 8, 1),
        KernelConfig(64, 32, 32, 8, 1),
        KernelConfig(32, 32, 32, 8, 1),
    ),
}
_CONFIG_32BIT = {
    64: AttentionConfig(
        KernelConfig(64, 32, 32, 8, 1),
        KernelConfig(64, 32, 32, 8, 1),
        KernelConfig(32, 32, 32, 8, 1),
    ),
    128: AttentionConfig(
        KernelConfig(32, 32, 32, 8, 1),
        KernelConfig(32, 32, 32, 8, 1),
        KernelConfig(32, 32, 32, 8, 1),
    ),
    256: AttentionConfig(
        KernelConfig(32, 16, 16, 8, 1),
        KernelConfig(32, 16, 16, 8, 1),
        KernelConfig(16, 16, 16, 8, 1),
    ),
}

# Each step costs milliseconds there, whatever its size.
_INTERPRETER = AttentionConfig(
    KernelConfig(64, 64, 32, 4, 1), KernelConfig(64, 64, 32, 4, 1), KernelConfig(64, 64, 64, 4, 1)
)


def listed_architecture(device: torch.device) -> str | None:
    """The newest architecture in the tables whose code form suits this GPU; None if none does."""
    arch = device_architecture(device)
    if not arch.startswith("sm_"):
        return "gfx942" if arch.startswith("gfx9") else None
    mine = int(arch.removeprefix("sm_"))
    known = [int(name.removeprefix("sm_")) for name in ARCHITECTURES if name.startswith("sm_")]
    older = [number for number in known if number <= mine]
    return f"sm_{max(older)}" if older else None


def why_no_config(device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
    """Why no configuration fits, or None."""
    if head_dim > max(HEAD_DIMS):
        return f"head_dim {head_dim} is above {max(HEAD_DIMS)}"
    if interpreting():
        return None
    if dtype == torch.float64:
        return "the kernels have no fp64 form on a GPU"
    if listed_architecture(device) is None:
        return f"no configuration for {device_architecture(device)}"
    return None


def default_config(device: torch.device, head_dim: int, dtype: torch.dtype) -> AttentionConfig:
    """What runs on `device`; `why_no_config` said that there is one."""
    if interpreting():
        return _INTERPRETER
    arch = listed_architecture(device)
    assert arch is not None, f"no attention configuration for {device}"
    return attention_config(arch, head_dim, dtype)


def attention_config(arch: str, head_dim: int, dtype: torch.dtype) -> AttentionConfig:
    """The configuration of one architecture ("sm_90"), head size and dtype."""
    table = _CONFIG_16BIT if dtype.itemsize == 2 else _CONFIG_32BIT
    return table[max(64, padded_head_dim(head_dim))]
