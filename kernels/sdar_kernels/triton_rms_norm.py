"""RMSNorm of a residual stream in Triton, forward and backward.

The specification is rms_norm.residual_rms_norm. Forward adds to the stream, and backward to its
gradient, where there is something to add.

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
    x_ptr, addend_ptr, weight_ptr, total_ptr, out_ptr, num_rows, x_stride,
    SIZE: tl.constexpr, EPS: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (cols < SIZE)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0)
    weight = tl.load(weight_ptr + cols, mask=cols < SIZE, other=0.0).to(WIDE)
    offsets = rows[:, None] * SIZE + cols[None, :]
    if addend_ptr is not None:
        addend = tl.load(addend_ptr + offsets, mask=mask, other=0.0)
        x = (x.to(WIDE) + addend.to(WIDE)).to(x.dtype)
        tl.store(total_ptr + offsets, x, mask=mask)
    wide = x.to(WIDE)
    rstd = tl.rsqrt(tl.sum(wide * wide, axis=1) / SIZE + EPS)
    normed = (wide * rstd[:, None]).to(x.dtype).to(WIDE)
    out = weight[None, :] * normed
    tl.store(out_ptr + offsets, out, mask=mask)


@triton.jit
def _backward_kernel(
    x_ptr, weight_ptr, grad_ptr, grad_total_ptr, grad_x_ptr, partial_ptr, num_rows, x_stride,
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
        grad_x = (scaled - normed * slope) * rstd
        if grad_total_ptr is not None:
            grad_x += tl.load(grad_total_ptr + offsets, mask=mask, other=0.0).to(WIDE)
        tl.store(grad_x_ptr + offsets, grad_x, mask=mask)
    total = tl.sum(grad_weight, axis=0)
    tl.store(partial_ptr + program.to(tl.int64) * SIZE + cols, total, mask=cols < SIZE)


class ResidualRmsNorm(torch.autograd.Function):
    """apply(x [..., D], addend or None, weight [D], eps) -> (x + addend, its norm)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, addend: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        rows = _rows(x)
        weight = weight.contiguous()
        dtype = torch.promote_types(x.dtype, weight.dtype)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        total = None if addend is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        constants, num_warps = _configuration(x.shape[-1], eps, x.dtype)
        grid = (triton.cdiv(rows.shape[0], constants["ROWS"]),)
        _forward_kernel[grid](
            rows, None if addend is None else addend.contiguous(), weight, total, out,
            rows.shape[0], rows.stride(0), **constants, num_warps=num_warps,
        )  # fmt: skip
        total = x if total is None else total
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.has_addend = eps, addend is not None
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_total: Tensor | None, grad: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        rows, size = _rows(x), x.shape[-1]
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        constants, num_warps = _configuration(size, ctx.eps, x.dtype)
        programs = min(triton.cdiv(rows.shape[0], constants["ROWS"]), _BACKWARD_PROGRAMS)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        partial = torch.empty(programs, size, dtype=wide, device=x.device)
        _backward_kernel[(programs,)](
            rows, weight, grad.contiguous(),
            None if grad_total is None else grad_total.contiguous(),
            grad_x, partial, rows.shape[0], rows.stride(0), **constants, num_warps=num_warps,
        )  # fmt: skip
        grad_weight = partial.sum(dim=0).to(weight.dtype)
        return grad_x, grad_x if ctx.has_addend else None, grad_weight, None


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
    forward = ("x_ptr", "addend_ptr", "weight_ptr", "total_ptr", "out_ptr")
    backward = ("x_ptr", "weight_ptr", "grad_ptr", "grad_total_ptr", "grad_x_ptr")
    # The final norm has nothing beside it: left out are the pointers that are None there.
    forms = (
        ("forward", _forward_kernel, forward, ()),
        ("forward of a sum", _forward_kernel, forward, ("addend_ptr", "total_ptr")),
        ("backward", _backward_kernel, backward, ()),
        ("backward beside", _backward_kernel, backward, ("grad_total_ptr",)),
    )
    optional = {"addend_ptr", "total_ptr", "grad_total_ptr"}
    specs = []
    for form, kernel, names, given in forms:
        pointers = {name: pointer for name in names if name not in optional - {*given}}
        if kernel is _backward_kernel:
            pointers["partial_ptr"] = "*fp32"
        specs.append(
            KernelSpec(
                name=f"rms_norm {form} {pointer[1:]} d{size}",
                kernel=kernel,
                signature={**pointers, **sizes},
                constexprs={**constants, **{name: None for name in names if name not in pointers}},
                num_warps=num_warps,
                num_stages=3,
                aligned=(*pointers, "x_stride"),
            )
        )
    return specs
