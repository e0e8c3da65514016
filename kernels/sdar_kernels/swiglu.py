"""SwiGLU: the gated activation of the MLP, in torch, in Triton or by torch.compile.

`reference.swiglu` is the plain form. Invariant: `impl` changes speed and memory, not values
beyond rounding. Kept for backward: gate and up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements per thread that are worked on together; measured, see rms_norm.
_TILE_ELEMENTS = 1 << 18


def swiglu(gate: Tensor, up: Tensor, impl: str = "torch") -> Tensor:
    """silu(gate) * up, elementwise; gate and up of one shape and dtype.

    Args:
        impl: "torch", or "triton" or "inductor" where sdar_kernels.fused_kernels says that it runs.
    """
    if impl == "triton":
        from sdar_kernels.triton_swiglu import Swiglu

        return Swiglu.apply(gate, up)
    if impl == "inductor":
        from sdar_kernels import inductor_kernels

        return inductor_kernels.Swiglu.apply(gate, up)
    assert impl == "torch", f"unresolved fused_kernels {impl!r}"
    out: Tensor = _Swiglu.apply(gate, up)
    return out


def _tiles(x: Tensor) -> list[slice]:
    """Parts of a flat tensor."""
    if x.device.type != "cpu":
        return [slice(None)]
    step = _TILE_ELEMENTS * torch.get_num_threads()
    return [slice(at, at + step) for at in range(0, x.shape[0], step)]


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        flat_gate, flat_up = gate.reshape(-1), up.reshape(-1)
        out = torch.empty_like(flat_gate)
        for tile in _tiles(out):
            part = torch.ops.aten.silu.out(flat_gate[tile], out=out[tile])
            part.mul_(flat_up[tile])
        return out.view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (saved.reshape(-1) for saved in ctx.saved_tensors)
        shape, grad = grad.shape, grad.reshape(-1)
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        for tile in _tiles(grad):
            torch.ops.aten.silu.out(gate[tile], out=grad_up[tile]).mul_(grad[tile])
            product = torch.mul(grad[tile], up[tile], out=grad_gate[tile])
            torch.ops.aten.silu_backward.grad_input(product, gate[tile], grad_input=product)
        return grad_gate.view(shape), grad_up.view(shape)
