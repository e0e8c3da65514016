"""SwiGLU in Triton, forward and backward (the specification is swiglu.swiglu).

One elementwise kernel each way over the flat tensors; backward makes silu from the gate again and
writes both gradients and the activation in one pass, so nothing but the two inputs is kept.
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

_BLOCK = 4096
_NUM_WARPS = 8


@triton.jit
def _product(gate, up, sigmoid, NARROW: tl.constexpr):
    # silu is rounded, as where the torch form stores it.
    return (gate * sigmoid).to(NARROW).to(gate.dtype) * up


@triton.jit
def _forward_kernel(gate_ptr, up_ptr, out_ptr, count, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    narrow = tl.load(gate_ptr + at, mask=at < count, other=0.0)
    up = tl.load(up_ptr + at, mask=at < count, other=0.0).to(WIDE)
    gate = narrow.to(WIDE)
    tl.store(out_ptr + at, _product(gate, up, tl.sigmoid(gate), narrow.dtype), mask=at < count)


@triton.jit
def _backward_kernel(
    gate_ptr, up_ptr, grad_ptr, grad_gate_ptr, grad_up_ptr, out_ptr, count,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    narrow = tl.load(gate_ptr + at, mask=at < count, other=0.0)
    gate = narrow.to(WIDE)
    up = tl.load(up_ptr + at, mask=at < count, other=0.0).to(WIDE)
    grad = tl.load(grad_ptr + at, mask=at < count, other=0.0).to(WIDE)
    sigmoid = tl.sigmoid(gate)
    slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(grad_gate_ptr + at, grad * up * slope, mask=at < count)
    tl.store(grad_up_ptr + at, grad * gate * sigmoid, mask=at < count)
    tl.store(out_ptr + at, _product(gate, up, sigmoid, narrow.dtype), mask=at < count)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As `swiglu.swiglu`."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _forward_kernel[_grid(gate)](
        gate, up, out, gate.numel(), **_constants(gate.dtype), num_warps=_NUM_WARPS
    )
    return out


def swiglu_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `swiglu.swiglu_gradients`."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up, out = (torch.empty_like(gate) for _ in range(3))
    _backward_kernel[_grid(gate)](
        gate, up, grad, grad_gate, grad_up, out, gate.numel(),
        **_constants(gate.dtype), num_warps=_NUM_WARPS,
    )  # fmt: skip
    return grad_gate, grad_up, out


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
                ("gate_ptr", "up_ptr", "grad_ptr", "grad_gate_ptr", "grad_up_ptr", "out_ptr"),
            ),
        )
    ]
