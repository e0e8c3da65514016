"""Softmax statistics and cross-entropy gradient of a chunk's logits, in Triton.

Two kernels on a buffer [m, V] that is as large as the chunk allows: one pass that reads it (row
maximum, sum of exponentials, target logit; one exponential per element), one that replaces it by
the gradient. The specification is linear_cross_entropy's torch forms of the same two steps. No
atomics: a row is one program's own, and so is each tile of the gradient.
"""

# The arguments of a kernel are typed by its launch.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdar_kernels.triton_runtime import KernelSpec

_BLOCK = 4096
_NUM_WARPS = 8


@triton.jit
def _statistics_kernel(
    logits_ptr, target_ptr, out_ptr, num_rows, num_columns, row_stride,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_at = logits_ptr + row * row_stride
    # Not -inf: the difference of two such values must be a number.
    lowest: tl.constexpr = -3.0e38
    peak = tl.full((BLOCK,), lowest, dtype=WIDE)
    total = tl.zeros((BLOCK,), dtype=WIDE)
    for start in range(0, num_columns, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(row_at + cols, mask=cols < num_columns, other=0.0).to(WIDE)
        x = tl.where(cols < num_columns, x, lowest)
        # Each lane keeps its own running maximum, so no lane waits for another in the loop.
        factor = tl.exp(-tl.abs(x - peak))
        total = tl.where(x > peak, total * factor + 1.0, total + factor)
        peak = tl.maximum(peak, x)
    row_peak = tl.max(peak, axis=0)
    row_total = tl.sum(total * tl.exp(peak - row_peak), axis=0)
    target = tl.load(target_ptr + row)
    inside = (target >= 0) & (target < num_columns)
    target_logit = tl.load(row_at + target, mask=inside, other=0.0).to(WIDE)
    tl.store(out_ptr + row, row_peak)
    tl.store(out_ptr + num_rows + row, row_total)
    tl.store(out_ptr + 2 * num_rows + row, target_logit)


@triton.jit
def _gradient_kernel(
    logits_ptr, target_ptr, peak_ptr, scale_ptr, weight_ptr, num_columns, row_stride,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits_ptr + row * row_stride + cols
    x = tl.load(at, mask=cols < num_columns, other=0.0).to(WIDE)
    target = tl.load(target_ptr + row)
    gradient = tl.exp(x - tl.load(peak_ptr + row)) * tl.load(scale_ptr + row)
    gradient -= tl.where(cols == target, tl.load(weight_ptr + row), 0.0)
    tl.store(at, gradient, mask=cols < num_columns)


def row_statistics(
    logits_MV: Tensor, targets_M: Tensor, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As cross_entropy_rows.row_statistics_torch."""
    num_rows, num_columns = logits_MV.shape
    out = torch.empty(3, num_rows, dtype=wide, device=logits_MV.device)
    _statistics_kernel[(num_rows,)](
        logits_MV, targets_M.contiguous(), out, num_rows, num_columns, logits_MV.stride(0),
        **_constants(wide), num_warps=_NUM_WARPS,
    )  # fmt: skip
    return out[0], out[1], out[2]


def write_gradient(
    logits_MV: Tensor, targets_M: Tensor, peak_M: Tensor, scale_M: Tensor, weights_M: Tensor
) -> None:
    """As cross_entropy_rows.write_gradient_torch."""
    num_rows, num_columns = logits_MV.shape
    _gradient_kernel[(num_rows, triton.cdiv(num_columns, _BLOCK))](
        logits_MV, targets_M.contiguous(), peak_M.contiguous(), scale_M.contiguous(),
        weights_M.contiguous(), num_columns, logits_MV.stride(0),
        **_constants(peak_M.dtype), num_warps=_NUM_WARPS,
    )  # fmt: skip


def _constants(wide: torch.dtype) -> dict[str, Any]:
    return {"WIDE": tl.float64 if wide == torch.float64 else tl.float32, "BLOCK": _BLOCK}


def shipped(arch: str) -> list[KernelSpec]:
    """Both kernels for bf16 and fp32 logits at vocabulary 151936; the same on every arch.

    Sizes are arguments, not constants: one form serves every vocabulary whose row stride is a
    multiple of 16.
    """
    return [spec for pointer in ("*bf16", "*fp32") for spec in _specs(pointer)]


def _specs(pointer: str) -> list[KernelSpec]:
    logits = {"logits_ptr": pointer, "target_ptr": "*i64"}
    sizes = {"num_columns": "i32", "row_stride": "i32"}
    row_vectors = dict.fromkeys(("peak_ptr", "scale_ptr", "weight_ptr"), "*fp32")
    return [
        KernelSpec(
            name=f"cross_entropy {name} {pointer[1:]} v151936",
            kernel=kernel,
            signature=signature,
            constexprs=_constants(torch.float32),
            num_warps=_NUM_WARPS,
            num_stages=3,
            aligned=tuple(argument for argument in signature if argument != "num_rows"),
        )
        for name, kernel, signature in (
            (
                "statistics",
                _statistics_kernel,
                {**logits, "out_ptr": "*fp32", "num_rows": "i32", **sizes},
            ),
            ("gradient", _gradient_kernel, {**logits, **row_vectors, **sizes}),
        )
    ]
