"""SwiGLU in Triton, forward and backward (the specification is swiglu.swiglu).

One elementwise kernel each way over the flat tensors; backward recomputes silu from the gate and
writes both gradients in one pass, so nothing but the two inputs is kept. Arithmetic is fp32, fp64
for fp64 input.
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
def _forward_kernel(gate_ptr, up_ptr, out_ptr, count, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    narrow = tl.load(gate_ptr + at, mask=at < count, other=0.0)
    up = tl.load(up_ptr + at, mask=at < count, other=0.0).to(WIDE)
    gate = narrow.to(WIDE)
    silu = (gate * tl.sigmoid(gate)).to(narrow.dtype).to(WIDE)
    tl.store(out_ptr + at, silu * up, mask=at < count)


@triton.jit
def _backward_kernel(
    gate_ptr, up_ptr, grad_ptr, grad_gate_ptr, grad_up_ptr, count,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at, mask=at < count, other=0.0).to(WIDE)
    up = tl.load(up_ptr + at, mask=at < count, other=0.0).to(WIDE)
    grad = tl.load(grad_ptr + at, mask=at < count, other=0.0).to(WIDE)
    sigmoid = tl.sigmoid(gate)
    slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(grad_gate_ptr + at, grad * up * slope, mask=at < count)
    tl.store(grad_up_ptr + at, grad * gate * sigmoid, mask=at < count)


class Swiglu(torch.autograd.Function):
    """apply(gate, up) -> silu(gate) * up; one shape, one dtype."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        assert gate.shape == up.shape, "gate and up are projections of the same width"
        assert gate.dtype == up.dtype, "gate and up have one dtype"
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        _forward_kernel[_grid(gate)](
            gate, up, out, gate.numel(), **_constants(gate.dtype), num_warps=_NUM_WARPS
        )
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        _backward_kernel[_grid(gate)](
            gate, up, grad.contiguous(), grad_gate, grad_up, gate.numel(),
            **_constants(gate.dtype), num_warps=_NUM_WARPS,
        )  # fmt: skip
        return grad_gate, grad_up


def _grid(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), _BLOCK),)


def _constants(dtype: torch.dtype) -> dict[str, Any]:
    return {"WIDE": tl.float64 if dtype == torch.float64 else tl.float32, "BLOCK": _BLOCK}


def shipped(arch: str) -> list[KernelSpec]:
    """Every form launched for bf16 and fp32; the same on every architecture."""
    return [
        KernelSpec(
            name=f"swiglu {direction} {pointer[1:]}",
            kernel=kernel,
            signature={**dict.fromkeys(pointers, pointer), "count": "i32"},
            constexprs=_constants(dtype),
            num_warps=_NUM_WARPS,
            num_stages=3,
            aligned=(*pointers, "count"),
        )
        for dtype, pointer in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32"))
        for direction, kernel, pointers in (
            ("forward", _forward_kernel, ("gate_ptr", "up_ptr", "out_ptr")),
            (
                "backward",
                _backward_kernel,
                ("gate_ptr", "up_ptr", "grad_ptr", "grad_gate_ptr", "grad_up_ptr"),
            ),
        )
    ]
