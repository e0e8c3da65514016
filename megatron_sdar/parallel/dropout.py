"""Dropout by counter: whether an element is dropped follows from its place alone.

A mask is a hash of (key, token, column). So tensor-parallel ranks that hold different columns
agree with one process, backward makes the mask again instead of keeping it, and recomputed layers
see the one they saw before. Invariant: integer arithmetic only, the same on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TOKEN_STEP, _COLUMN_STEP = -1640531535, 1013904223  # odd, so that steps never meet
_FIRST, _SECOND = -2048144789, -1028477387  # murmur3's finaliser, as signed 32-bit numbers


def dropped(x: Tensor, probability: float, key: int, first_column: int) -> Tensor:
    """x with each element zero by `probability`, the others divided by 1 - probability.

    Linear in x, and its own transpose: backward calls it with the same arguments.

    Args:
        x: [T, C], columns `first_column` to first_column + C of the whole row.
        probability: from 0 to below 1.
        key: what tells this mask from all others; 64 bits are used.

    Takes memory for two int32 tensors of x's shape.
    """
    if probability == 0.0:
        return x
    tokens = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    columns = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
    # int32 arithmetic wraps, which is what a hash wants.
    rows = _mixed(tokens.mul_(_TOKEN_STEP).add_(_signed(key)))
    rows = _mixed(rows.bitwise_xor_(_signed(key >> 32)))
    columns = columns.add_(first_column).mul_(_COLUMN_STEP)
    bits = _mixed(rows.unsqueeze(1) + columns).bitwise_and_(2**31 - 1)
    kept = bits >= min(round(probability * 2**31), 2**31 - 1)
    return torch.where(kept, x * (1.0 / (1.0 - probability)), x.new_zeros(()))


def _mixed(bits: Tensor) -> Tensor:
    """Every bit of the result depends on every bit of the argument, which is overwritten."""
    bits.bitwise_xor_(_shifted(bits, 16)).mul_(_FIRST)
    bits.bitwise_xor_(_shifted(bits, 13)).mul_(_SECOND)
    return bits.bitwise_xor_(_shifted(bits, 16))


def _shifted(bits: Tensor, count: int) -> Tensor:
    """Logical shift to the right: the sign bit moves too."""
    return (bits >> count).bitwise_and_((1 << (32 - count)) - 1)


def _signed(value: int) -> int:
    """The lowest 32 bits as a signed number."""
    low = value & 0xFFFFFFFF
    return low - 2**32 if low >= 2**31 else low
