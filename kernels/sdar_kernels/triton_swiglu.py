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

# Elements of a program: columns of one row, or several rows that are short.
_ELEMENTS = 1024
_NUM_WARPS = 4


@triton.jit
def _product(gate, up, sigmoid, NARROW: tl.constexpr):
    # silu is rounded, as where the torch form stores it.
    return (gate * sigmoid).to(NARROW).to(gate.dtype) * up


@triton.jit
def _place(num_rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """[ROWS, BLOCK] of this program: row, column, and whether they are inside the matrix."""
    blocks = tl.cdiv(width, BLOCK)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, column, (row < num_rows) & (column < width)


@triton.jit
def _forward_kernel(
    gate_up_ptr, out_ptr, num_rows, width,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, inside = _place(num_rows, width, ROWS, BLOCK)
    gate_ptr = gate_up_ptr + row * 2 * width + column
    narrow = tl.load(gate_ptr, mask=inside, other=0.0)
    up = tl.load(gate_ptr + width, mask=inside, other=0.0).to(WIDE)
    gate = narrow.to(WIDE)
    product = _product(gate, up, tl.sigmoid(gate), narrow.dtype)
    tl.store(out_ptr + row * width + column, product, mask=inside)


@triton.jit
def _backward_kernel(
    gate_up_ptr, grad_ptr, grad_gate_up_ptr, out_ptr, num_rows, width,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, inside = _place(num_rows, width, ROWS, BLOCK)
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
    num_rows, constants = out.numel() // width, _constants(width, gate_up.dtype)
    _forward_kernel[_grid(num_rows, width, constants)](
        gate_up, out, num_rows, width, **constants, num_warps=_NUM_WARPS
    )
    return out


def swiglu_gradients(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """As `swiglu.swiglu_gradients`."""
    grad, gate_up = grad.contiguous(), gate_up.contiguous()
    grad_gate_up, out = torch.empty_like(gate_up), torch.empty_like(grad)
    width = out.shape[-1]
    num_rows, constants = out.numel() // width, _constants(width, gate_up.dtype)
    _backward_kernel[_grid(num_rows, width, constants)](
        gate_up, grad, grad_gate_up, out, num_rows, width, **constants, num_warps=_NUM_WARPS
    )
    return grad_gate_up, out


def _grid(num_rows: int, width: int, constants: dict[str, Any]) -> tuple[int]:
    return (triton.cdiv(num_rows, constants["ROWS"]) * triton.cdiv(width, constants["BLOCK"]),)


def _constants(width: int, dtype: torch.dtype) -> dict[str, Any]:
    block = min(_ELEMENTS, triton.next_power_of_2(width))
    wide = tl.float64 if dtype == torch.float64 else tl.float32
    return {"WIDE": wide, "ROWS": _ELEMENTS // block, "BLOCK": block}


def shipped(arch: str) -> list[KernelSpec]:
    """Forms for bf16 and fp32, of wide rows and of a narrow shard, for every architecture."""
    return [
        KernelSpec(
            name=f"swiglu {direction} {pointer[1:]} {width}",
            kernel=kernel,
            signature={**dict.fromkeys(pointers, pointer), "num_rows": "i32", "width": "i32"},
            constexprs=_constants(width, dtype),
            num_warps=_NUM_WARPS,
            num_stages=3,
            aligned=(*pointers, "width"),
        )
        for dtype, pointer in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32"))
        for width in (_ELEMENTS, 96)
        for direction, kernel, pointers in (
            ("forward", _forward_kernel, ("gate_up_ptr", "out_ptr")),
            (
                "backward",
                _backward_kernel,
                ("gate_up_ptr", "grad_ptr", "grad_gate_up_ptr", "out_ptr"),
            ),
        )
    ]
