"""Tile sizes and launch options of the attention kernels, chosen ahead of time per architecture.

Every entry compiles without register spills and within the architecture's shared memory:
`make aot` proves it without a GPU. Speed on a GPU can be searched over `candidates`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sdar_kernels.head_layout import HeadLayout
from sdar_kernels.triton_runtime import device_architecture, interpreting

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
HEAD_DIMS = (64, 80, 96, 128, 256)
# Rows of the smallest step: one query's heads must fit.
MAX_GROUP = 16


@dataclass(frozen=True)
class KernelConfig:
    """One kernel's launch.

    Attributes:
        rows: (query, head) rows of a tile or step, a power of two.
        keys: keys of a step or tile, a power of two.
        masked: size of a step with the mask: keys in the query kernels, rows in the key kernel.
        num_warps, num_stages: Triton's launch options.
        hoist: let the compiler keep what a loop does not change in registers; where that spills,
            it is computed in every step instead. Only the query gradient's kernel reads it.
    """

    rows: int
    keys: int
    masked: int
    num_warps: int
    num_stages: int
    hoist: bool = True


@dataclass(frozen=True)
class AttentionConfig:
    """The three kernels of one architecture, head size and element size."""

    forward: KernelConfig
    backward_queries: KernelConfig
    backward_keys: KernelConfig


def padded_head_dim(head_dim: int) -> int:
    """The power of two that a head is padded to inside the kernels."""
    return max(16, 1 << (head_dim - 1).bit_length())


_Launch = tuple[int, int, int, int, int]


def _config(forward: _Launch, queries: _Launch, keys: _Launch) -> AttentionConfig:
    return AttentionConfig(KernelConfig(*forward), KernelConfig(*queries), KernelConfig(*keys))


# By padded head size, for 16-bit elements; rows, keys, masked, num_warps, num_stages. Of each
# list tried (largest tiles first), the first that compiles without a spill for all head groups
# and head sizes that share the entry.
_AMPERE_CONSUMER = {
    64: _config((128, 64, 32, 4, 3), (128, 64, 32, 8, 2), (64, 64, 32, 8, 2)),
    128: _config((128, 64, 32, 8, 3), (128, 32, 32, 8, 2), (32, 64, 32, 8, 2)),
    256: _config((64, 64, 32, 8, 1), (64, 32, 32, 8, 1), (32, 32, 32, 8, 2)),
}
_CONFIG_16BIT = {
    "sm_80": {
        **_AMPERE_CONSUMER,
        256: _config((64, 64, 32, 8, 1), (64, 64, 32, 8, 2), (32, 64, 32, 8, 1)),
    },
    "sm_86": _AMPERE_CONSUMER,
    "sm_89": _AMPERE_CONSUMER,
    "sm_90": {
        64: _config((128, 64, 32, 4, 3), (128, 64, 32, 8, 2), (64, 64, 32, 4, 2)),
        128: _config((128, 64, 32, 8, 3), (128, 64, 32, 8, 2), (64, 64, 32, 8, 2)),
        256: _config((64, 64, 32, 8, 2), (64, 32, 32, 8, 2), (32, 32, 32, 8, 2)),
    },
    "sm_100": {
        64: _config((128, 64, 32, 8, 3), (128, 64, 32, 8, 2), (128, 64, 32, 8, 2)),
        128: _config((128, 64, 32, 8, 3), (128, 64, 32, 8, 2), (32, 64, 32, 8, 2)),
        256: _config((64, 64, 32, 8, 2), (64, 64, 32, 8, 2), (32, 32, 32, 8, 2)),
    },
    "sm_120": {
        64: _config((128, 64, 32, 8, 3), (128, 64, 32, 8, 2), (64, 64, 32, 8, 2)),
        128: _config((128, 64, 32, 8, 3), (64, 64, 32, 8, 2), (32, 64, 32, 8, 2)),
        256: _config((64, 64, 32, 8, 1), (64, 32, 32, 8, 1), (32, 32, 32, 8, 2)),
    },
    "gfx942": {
        64: _config((128, 64, 32, 4, 3), (128, 64, 32, 8, 2), (64, 64, 32, 4, 2)),
        128: _config((128, 64, 32, 8, 2), (128, 32, 32, 8, 3), (32, 64, 32, 4, 2)),
        256: _config((64, 32, 32, 8, 2), (32, 32, 32, 4, 2), (32, 32, 32, 4, 1)),
    },
}
# Below this many query heads per key head, tiles of 128 rows span so many queries that they would
# compute more pairs in vain than is allowed: those kernels take 64 rows there.
_LARGE_GROUP = 4


def _small_group(forward: _Launch, queries: _Launch) -> dict[str, KernelConfig]:
    return {"forward": KernelConfig(*forward), "backward_queries": KernelConfig(*queries)}


_CONSUMER_SMALL_GROUP = {
    64: _small_group((64, 64, 32, 4, 3), (64, 64, 32, 4, 3)),
    128: _small_group((64, 64, 32, 8, 3), (64, 64, 32, 8, 2)),
}
_SMALL_GROUP_16BIT = {
    "sm_80": {
        64: _small_group((64, 64, 32, 4, 3), (64, 64, 32, 8, 3)),
        128: _small_group((64, 64, 32, 8, 3), (64, 64, 32, 4, 3)),
        # What groups of 4 run spills here.
        256: {"backward_keys": KernelConfig(32, 32, 32, 8, 2)},
    },
    "sm_86": _CONSUMER_SMALL_GROUP,
    "sm_89": _CONSUMER_SMALL_GROUP,
    "sm_90": {
        64: _small_group((64, 64, 32, 4, 3), (64, 64, 32, 4, 3)),
        128: _small_group((64, 64, 32, 4, 3), (64, 64, 32, 4, 3)),
    },
    "sm_100": {
        64: {
            **_small_group((64, 64, 32, 4, 3), (64, 64, 32, 4, 3)),
            "backward_keys": KernelConfig(64, 64, 32, 8, 2),
        },
        128: _small_group((64, 64, 32, 4, 3), (64, 64, 32, 4, 3)),
    },
    "sm_120": _CONSUMER_SMALL_GROUP,
    "gfx942": {
        64: _small_group((64, 64, 32, 4, 3), (64, 64, 32, 4, 3)),
        128: _small_group((64, 64, 32, 4, 2), (64, 64, 32, 4, 2)),
    },
}
# The same for 32-bit elements, whose products take three times the registers.
_SMALL_32BIT = _config((16, 32, 16, 8, 1), (16, 32, 16, 8, 1), (32, 16, 32, 8, 1))
# The kernels read the operands of heads above 128 in parts there.
_WIDE_32BIT = _config((32, 32, 32, 8, 1), (16, 32, 16, 8, 1), (16, 32, 16, 8, 1))
_AMPERE_32BIT = {
    64: _config((32, 32, 32, 8, 1), (32, 32, 32, 8, 1), (64, 32, 32, 8, 1)),
    128: _SMALL_32BIT,
    256: _WIDE_32BIT,
}
_CONFIG_32BIT = {
    "sm_80": _AMPERE_32BIT,
    "sm_86": _AMPERE_32BIT,
    "sm_89": _AMPERE_32BIT,
    "sm_90": {
        64: _config((64, 32, 32, 8, 2), (64, 32, 32, 8, 2), (64, 32, 32, 8, 1)),
        128: _SMALL_32BIT,
        256: _WIDE_32BIT,
    },
    "sm_100": {
        64: _config((64, 64, 32, 8, 1), (64, 32, 32, 8, 2), (32, 32, 32, 8, 1)),
        128: _SMALL_32BIT,
        256: _WIDE_32BIT,
    },
    "sm_120": {
        64: _config((64, 32, 32, 8, 2), (32, 32, 32, 8, 1), (64, 32, 32, 8, 1)),
        128: replace(_SMALL_32BIT, backward_queries=KernelConfig(16, 32, 16, 8, 1, hoist=False)),
        256: _WIDE_32BIT,
    },
    "gfx942": {
        64: _config((64, 64, 32, 8, 1), (64, 32, 32, 8, 2), (32, 32, 32, 8, 1)),
        128: _config((64, 32, 32, 8, 2), (32, 16, 16, 8, 1), (16, 32, 16, 8, 1)),
        256: _config((32, 32, 32, 8, 1), (32, 32, 32, 8, 1), (32, 32, 32, 8, 1)),
    },
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


def why_no_config(device: torch.device, heads: HeadLayout, dtype: torch.dtype) -> str | None:
    """Why no configuration fits, or None."""
    if heads.head_dim > max(HEAD_DIMS):
        return f"head_dim {heads.head_dim} is above {max(HEAD_DIMS)}"
    group = heads.num_heads // heads.num_kv_heads
    if group > MAX_GROUP:
        return f"{group} query heads share a key head, the tiles hold at most {MAX_GROUP}"
    if interpreting():
        return None
    if dtype == torch.float64:
        return "the kernels have no fp64 form on a GPU"
    if listed_architecture(device) is None:
        return f"no configuration for {device_architecture(device)}"
    return None


def default_config(
    device: torch.device, head_dim: int, dtype: torch.dtype, group: int
) -> AttentionConfig:
    """What runs on `device`; `why_no_config` said that there is one."""
    if interpreting():
        return _INTERPRETER
    arch = listed_architecture(device)
    assert arch is not None, f"no attention configuration for {device}"
    return attention_config(arch, head_dim, dtype, group)


def attention_config(arch: str, head_dim: int, dtype: torch.dtype, group: int) -> AttentionConfig:
    """The configuration of one listed architecture, head size, dtype and head group.

    Args:
        arch: one of ARCHITECTURES.
        head_dim: at most 256.
        group: query heads per key head, at most MAX_GROUP.
    """
    padded = max(64, padded_head_dim(head_dim))
    if dtype.itemsize > 2:
        return _CONFIG_32BIT[arch][padded]
    config = _CONFIG_16BIT[arch][padded]
    if group >= _LARGE_GROUP:
        return config
    return replace(config, **_SMALL_GROUP_16BIT[arch].get(padded, {}))
