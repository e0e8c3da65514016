"""Per-head RMSNorm and rotary embedding in one Triton kernel, forward and backward.

The specification is apply_rotary(rms_norm(x)). A row is one head of one token, held as its two
halves, since rotation pairs column i with column i + H / 2. x is read once and the result written
once each way; backward recomputes the statistic from x. The weight gradient is summed per
program, then over programs in a fixed order. Tables get no gradient.
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

_BACKWARD_PROGRAMS = 512
_HALF_TILE = 2048
_NUM_WARPS = 8


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, num_rows, num_heads, x_token, x_head,
    HALF: tl.constexpr, EPS: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (cols < HALF)[None, :]
    tokens = rows // num_heads
    x_at = x_ptr + (tokens * x_token + (rows - tokens * num_heads) * x_head)[:, None]
    first = tl.load(x_at + cols[None, :], mask=mask, other=0.0)
    second = tl.load(x_at + (cols + HALF)[None, :], mask=mask, other=0.0)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    wide1, wide2 = first.to(WIDE), second.to(WIDE)
    mean = tl.sum(wide1 * wide1 + wide2 * wide2, axis=1) / (2 * HALF)
    rstd = tl.rsqrt(mean + EPS)[:, None]
    weight1 = tl.load(weight_ptr + cols, mask=cols < HALF, other=0.0).to(WIDE)[None, :]
    weight2 = tl.load(weight_ptr + cols + HALF, mask=cols < HALF, other=0.0).to(WIDE)[None, :]
    # Rounded wherever the torch form stores a tensor, so that both give the same bf16.
    normed1 = (weight1 * (wide1 * rstd).to(first.dtype).to(WIDE)).to(dtype).to(WIDE)
    normed2 = (weight2 * (wide2 * rstd).to(first.dtype).to(WIDE)).to(dtype).to(WIDE)
    table = tokens[:, None] * (2 * HALF) + cols[None, :]
    cos1 = tl.load(cos_ptr + table, mask=mask, other=0.0).to(WIDE)
    cos2 = tl.load(cos_ptr + table + HALF, mask=mask, other=0.0).to(WIDE)
    sin1 = tl.load(sin_ptr + table, mask=mask, other=0.0).to(WIDE)
    sin2 = tl.load(sin_ptr + table + HALF, mask=mask, other=0.0).to(WIDE)
    out1 = (normed1 * cos1).to(dtype).to(WIDE) - (normed2 * sin1).to(dtype).to(WIDE)
    out2 = (normed2 * cos2).to(dtype).to(WIDE) + (normed1 * sin2).to(dtype).to(WIDE)
    out_at = out_ptr + rows[:, None] * (2 * HALF) + cols[None, :]
    tl.store(out_at, out1, mask=mask)
    tl.store(out_at + HALF, out2, mask=mask)


@triton.jit
def _backward_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, grad_ptr, grad_x_ptr, partial_ptr,
    num_rows, num_heads, x_token, x_head, grad_token, grad_head,
    HALF: tl.constexpr, EPS: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    weight1 = tl.load(weight_ptr + cols, mask=cols < HALF, other=0.0).to(WIDE)[None, :]
    weight2 = tl.load(weight_ptr + cols + HALF, mask=cols < HALF, other=0.0).to(WIDE)[None, :]
    sum1 = tl.zeros((ROWS, BLOCK), dtype=WIDE)
    sum2 = tl.zeros((ROWS, BLOCK), dtype=WIDE)
    for start in range(program * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows = tl.arange(0, ROWS).to(tl.int64) + start
        mask = (rows < num_rows)[:, None] & (cols < HALF)[None, :]
        tokens = rows // num_heads
        heads = rows - tokens * num_heads
        x_at = x_ptr + (tokens * x_token + heads * x_head)[:, None] + cols[None, :]
        grad_at = grad_ptr + (tokens * grad_token + heads * grad_head)[:, None] + cols[None, :]
        first = tl.load(x_at, mask=mask, other=0.0)
        second = tl.load(x_at + HALF, mask=mask, other=0.0)
        grad1 = tl.load(grad_at, mask=mask, other=0.0).to(WIDE)
        grad2 = tl.load(grad_at + HALF, mask=mask, other=0.0).to(WIDE)
        table = tokens[:, None] * (2 * HALF) + cols[None, :]
        cos1 = tl.load(cos_ptr + table, mask=mask, other=0.0).to(WIDE)
        sin2 = tl.load(sin_ptr + table + HALF, mask=mask, other=0.0).to(WIDE)
        turned1 = grad1 * cos1 + grad2 * sin2
        cos2 = tl.load(cos_ptr + table + HALF, mask=mask, other=0.0).to(WIDE)
        sin1 = tl.load(sin_ptr + table, mask=mask, other=0.0).to(WIDE)
        turned2 = grad2 * cos2 - grad1 * sin1
        wide1, wide2 = first.to(WIDE), second.to(WIDE)
        mean = tl.sum(wide1 * wide1 + wide2 * wide2, axis=1) / (2 * HALF)
        rstd = tl.rsqrt(mean + EPS)[:, None]
        normed1, normed2 = wide1 * rstd, wide2 * rstd
        sum1 += turned1 * normed1.to(first.dtype).to(WIDE)
        sum2 += turned2 * normed2.to(first.dtype).to(WIDE)
        turned1 *= weight1
        turned2 *= weight2
        slope = tl.sum(turned1 * normed1 + turned2 * normed2, axis=1)[:, None] / (2 * HALF)
        out_at = grad_x_ptr + rows[:, None] * (2 * HALF) + cols[None, :]
        tl.store(out_at, (turned1 - normed1 * slope) * rstd, mask=mask)
        tl.store(out_at + HALF, (turned2 - normed2 * slope) * rstd, mask=mask)
    partial_at = partial_ptr + program.to(tl.int64) * (2 * HALF) + cols
    tl.store(partial_at, tl.sum(sum1, axis=0), mask=cols < HALF)
    tl.store(partial_at + HALF, tl.sum(sum2, axis=0), mask=cols < HALF)


class QkNormRope(torch.autograd.Function):
    """apply(x [T, N, H], weight [H], eps, cos [T, 1, H], sin) -> [T, N, H]; H is even."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor
    ) -> Tensor:
        x = _unit_stride(x)
        weight, cos, sin = weight.contiguous(), cos.contiguous(), sin.contiguous()
        dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), cos.dtype)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        num_tokens, num_heads, head_dim = x.shape
        constants = _constants(head_dim, eps, x.dtype)
        _forward_kernel[(triton.cdiv(num_tokens * num_heads, constants["ROWS"]),)](
            x, weight, cos, sin, out, num_tokens * num_heads, num_heads, x.stride(0), x.stride(1),
            **constants, num_warps=_NUM_WARPS,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, cos, sin = ctx.saved_tensors
        grad = _unit_stride(grad)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        num_tokens, num_heads, head_dim = x.shape
        constants = _constants(head_dim, ctx.eps, x.dtype)
        num_rows = num_tokens * num_heads
        programs = min(triton.cdiv(num_rows, constants["ROWS"]), _BACKWARD_PROGRAMS)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        partial = torch.empty(programs, head_dim, dtype=wide, device=x.device)
        _backward_kernel[(programs,)](
            x, weight, cos, sin, grad, grad_x, partial, num_rows, num_heads,
            x.stride(0), x.stride(1), grad.stride(0), grad.stride(1),
            **constants, num_warps=_NUM_WARPS,
        )  # fmt: skip
        return grad_x, partial.sum(dim=0).to(weight.dtype), None, None, None


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _constants(head_dim: int, eps: float, dtype: torch.dtype) -> dict[str, Any]:
    block = triton.next_power_of_2(head_dim // 2)
    # Half as many wide elements: the backward kernel would spill a register at 80 and 96.
    tile = _HALF_TILE // 2 if dtype.itemsize > 2 else _HALF_TILE
    return {
        "HALF": head_dim // 2,
        "EPS": eps,
        "WIDE": tl.float64 if dtype == torch.float64 else tl.float32,
        "ROWS": max(1, tile // block),
        "BLOCK": block,
    }


def shipped(arch: str) -> list[KernelSpec]:
    """Every form launched for bf16 and fp32 at the usual head dims; the same on every arch."""
    return [
        spec
        for dtype, pointer in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32"))
        for head_dim in (64, 80, 96, 128, 256)
        for spec in _specs(head_dim, dtype, pointer)
    ]


def _specs(head_dim: int, dtype: torch.dtype, pointer: str) -> list[KernelSpec]:
    inputs = dict.fromkeys(("x_ptr", "weight_ptr", "cos_ptr", "sin_ptr"), pointer)
    counts = {"num_rows": "i32", "num_heads": "i32"}
    strides = {"x_token": "i32", "x_head": "i32"}
    signatures = {
        "forward": (_forward_kernel, {**inputs, "out_ptr": pointer}, strides),
        "backward": (
            _backward_kernel,
            {**inputs, "grad_ptr": pointer, "grad_x_ptr": pointer, "partial_ptr": "*fp32"},
            {**strides, "grad_token": "i32", "grad_head": "i32"},
        ),
    }
    return [
        KernelSpec(
            name=f"qk_norm_rope {direction} {pointer[1:]} d{head_dim}",
            kernel=kernel,
            signature={**pointers, **counts, **steps},
            constexprs=_constants(head_dim, 1e-6, dtype),
            num_warps=_NUM_WARPS,
            num_stages=3,
            aligned=(*pointers, *steps),
        )
        for direction, (kernel, pointers, steps) in signatures.items()
    ]
