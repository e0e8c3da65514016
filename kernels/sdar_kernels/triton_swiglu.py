"""SwiGLU in Triton, forward and backward (the specification is swiglu.swiglu).

One elementwise kernel each way; backward makes silu from the gate again and writes both gradients
and the activation in one pass, so nothing but the input, gate and up side by side, is kept.
Arithmetic is fp32, fp64 for fp64 input.
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

# Columns of a program: intermediate sizes are multiples of it, or not far below one.
_BLOCK = 1024
_NUM_WARPS = 4


@triton.jit
def _product(gate, up, sigmoid, NARROW: tl.constexpr):
    # silu is rounded, as where the torch form stores it.
    return (gate * sigmoid).to(NARROW).to(gate.dtype) * up


@triton.jit
def _place(width, BLOCK: tl.constexpr):
    """Row and columns of this program."""
    blocks = tl.cdiv(width, BLOCK)
    program = tl.program_id(0)
    return (program // blocks).to(tl.int64), program % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _forward_kernel(gate_up_ptr, out_ptr, width, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row, column = _place(width, BLOCK)
    gate_ptr = gate_up_ptr + row * 2 * width + column
    narrow = tl.load(gate_ptr, mask=column < width, other=0.0)
    up = tl.load(gate_ptr + width, mask=column < width, other=0.0).to(WIDE)
    gate = narrow.to(WIDE)
    product = _product(gate, up, tl.sigmoid(gate), narrow.dtype)
    tl.store(out_ptr + row * width + column, product, mask=column < width)


@triton.jit
def _backward_kernel(
    gate_up_ptr, grad_ptr, grad_gate_up_ptr, out_ptr, width, WIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, column = _place(width, BLOCK)
    inside = column < width
    at, gate_at = row * width + column, row * 2 * width + column
    narrow = tl.load(gate_up_ptr + gate_at, mask=inside, other=0.0)
    gate = narrow.to(WIDE)
    up = tl.load(gate_up_ptr + gate_at + width, mask=inside, other=0.0).to(WIDE)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(WIDE)
    sigmoid = tl.sigmoid(gate)
    slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(grad_gate_up_ptr + gate_at, grad * up * slope, mask=inside)
    tl.store(grad_gate_up_ptr + gate_at + width, grad * gate * sigmoid, mask=inside)
    tl.store(out_ptr + at, _product(gate, up, sigmoid, narrow.dtype), mask=inside)


def swiglu(gate_up: Tensor) -> Tensor:
    """As `swiglu.swiglu`."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    _forward_kernel[_grid(out)](
        gate_up, out, width, **_constants(gate_up.dtype), num_warps=_NUM_WARPS
    )
    return out


def swiglu_gradients(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """As `swiglu.swiglu_gradients`."""
    grad, gate_up = grad.contiguous(), gate_up.contiguous()
    grad_gate_up, out = torch.empty_like(gate_up), torch.empty_like(grad)
    _backward_kernel[_grid(out)](
        gate_up, grad, grad_gate_up, out, out.shape[-1],
        **_constants(gate_up.dtype), num_warps=_NUM_WARPS,
    )  # fmt: skip
    return grad_gate_up, out


def _grid(out: Tensor) -> tuple[int]:
    width = out.shape[-1]
    return (out.numel() // width * triton.cdiv(width, _BLOCK),)


def _constants(dtype: torch.dtype) -> dict[str, Any]:
    return {"WIDE": tl.float64 if dtype == torch.float64 else tl.float32, "BLOCK": _BLOCK}


def shipped(arch: str) -> list[KernelSpec]:
    """Every form launched for bf16 and fp32; the same on every architecture."""
    return [
        KernelSpec(
            name=f"swiglu {direction} {pointer[1:]}",
            kernel=kernel,
            signature={**dict.fromkeys(pointers, pointer), "width": "i32"},
            constexprs=_constants(dtype),
            num_warps=_NUM_WARPS,
            num_stages=3,
            aligned=(*pointers, "width"),
        )
        for dtype, pointer in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32"))
        for direction, kernel, pointers in (
            ("forward", _forward_kernel, ("gate_up_ptr", "out_ptr")),
            (
                "backward",
                _backward_kernel,
                ("gate_up_ptr", "grad_ptr", "grad_gate_up_ptr", "out_ptr"),
            ),
        )
    ]
