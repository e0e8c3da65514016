"""RMSNorm in Triton, forward and backward (the specification is rms_norm.rms_norm).

A tile of rows per program; the last dim is padded to a power of two and masked. Backward reads x
and the gradient once, recomputes the statistic, writes the gradient of x, and adds up the weight
gradient of its rows; the programs' partial sums are reduced in a second step, in a fixed order,
so results repeat bit for bit. Statistics and sums are fp32, fp64 for fp64 input.
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

# Programs of the backward pass: enough to fill a GPU, few enough that their partial sums are
# small. A constant, so that the sum does not depend on the device.
_BACKWARD_PROGRAMS = 256
_TILE = 4096


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, out_ptr, num_rows, x_stride,
    SIZE: tl.constexpr, EPS: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (cols < SIZE)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0)
    weight = tl.load(weight_ptr + cols, mask=cols < SIZE, other=0.0).to(WIDE)
    wide = x.to(WIDE)
    rstd = tl.rsqrt(tl.sum(wide * wide, axis=1) / SIZE + EPS)
    normed = (wide * rstd[:, None]).to(x.dtype).to(WIDE)
    out = weight[None, :] * normed
    tl.store(out_ptr + rows[:, None] * SIZE + cols[None, :], out, mask=mask)


@triton.jit
def _backward_kernel(
    x_ptr, weight_ptr, grad_ptr, grad_x_ptr, partial_ptr, num_rows, x_stride,
    SIZE: tl.constexpr, EPS: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + cols, mask=cols < SIZE, other=0.0).to(WIDE)
    grad_weight = tl.zeros((ROWS, BLOCK), dtype=WIDE)
    for start in range(program * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows = tl.arange(0, ROWS).to(tl.int64) + start
        mask = (rows < num_rows)[:, None] & (cols < SIZE)[None, :]
        offsets = rows[:, None] * SIZE + cols[None, :]
        narrow = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0)
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(WIDE)
        x = narrow.to(WIDE)
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + EPS)[:, None]
        normed = x * rstd
        grad_weight += grad * normed.to(narrow.dtype).to(WIDE)
        scaled = grad * weight[None, :]
        slope = tl.sum(scaled * normed, axis=1)[:, None] / SIZE
        tl.store(grad_x_ptr + offsets, (scaled - normed * slope) * rstd, mask=mask)
    total = tl.sum(grad_weight, axis=0)
    tl.store(partial_ptr + program.to(tl.int64) * SIZE + cols, total, mask=cols < SIZE)


class RmsNorm(torch.autograd.Function):
    """apply(x [..., D], weight [D], eps) -> [..., D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = _rows(x)
        weight = weight.contiguous()
        dtype = torch.promote_types(x.dtype, weight.dtype)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        constants, num_warps = _configuration(x.shape[-1], eps, x.dtype)
        grid = (triton.cdiv(rows.shape[0], constants["ROWS"]),)
        _forward_kernel[grid](
            rows, weight, out, rows.shape[0], rows.stride(0), **constants, num_warps=num_warps
        )
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows, size = _rows(x), x.shape[-1]
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        constants, num_warps = _configuration(size, ctx.eps, x.dtype)
        programs = min(triton.cdiv(rows.shape[0], constants["ROWS"]), _BACKWARD_PROGRAMS)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        partial = torch.empty(programs, size, dtype=wide, device=x.device)
        _backward_kernel[(programs,)](
            rows, weight, grad.contiguous(), grad_x, partial, rows.shape[0], rows.stride(0),
            **constants, num_warps=num_warps,
        )  # fmt: skip
        return grad_x, partial.sum(dim=0).to(weight.dtype), None


def _rows(x: Tensor) -> Tensor:
    """x as [R, D] with unit stride in D; a view where that is possible."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _configuration(size: int, eps: float, dtype: torch.dtype) -> tuple[dict[str, Any], int]:
    """Constant arguments of both kernels, and num_warps."""
    block = triton.next_power_of_2(size)
    rows = max(1, _TILE // block)
    constants = {
        "SIZE": size,
        "EPS": eps,
        "WIDE": tl.float64 if dtype == torch.float64 else tl.float32,
        "ROWS": rows,
        "BLOCK": block,
    }
    return constants, min(16, rows * block // 512)


def shipped(arch: str) -> list[KernelSpec]:
    """Every form launched for bf16 and fp32 at hidden sizes 2048, 2560 and 4096.

    The configuration is the same on every architecture.
    """
    return [
        spec
        for dtype, pointer in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32"))
        for size in (2048, 2560, 4096)
        for spec in _specs(size, dtype, pointer)
    ]


def _specs(size: int, dtype: torch.dtype, pointer: str) -> list[KernelSpec]:
    constants, num_warps = _configuration(size, 1e-6, dtype)
    sizes = {"num_rows": "i32", "x_stride": "i32"}
    signatures = {
        "forward": (_forward_kernel, dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), pointer)),
        "backward": (
            _backward_kernel,
            dict.fromkeys(("x_ptr", "weight_ptr", "grad_ptr", "grad_x_ptr"), pointer)
            | {"partial_ptr": "*fp32"},
        ),
    }
    return [
        KernelSpec(
            name=f"rms_norm {direction} {pointer[1:]} d{size}",
            kernel=kernel,
            signature={**pointers, **sizes},
            constexprs=constants,
            num_warps=num_warps,
            num_stages=3,
            aligned=(*pointers, "x_stride"),
        )
        for direction, (kernel, pointers) in signatures.items()
    ]
