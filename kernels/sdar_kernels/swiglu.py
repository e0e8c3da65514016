"""SwiGLU: the gated activation of the MLP, in torch, in Triton or by torch.compile.

`reference.swiglu` is the plain form. Invariant: `impl` changes speed and memory, not values
beyond rounding. Not operations of autograd: the projection that reads the activation keeps gate and
up only, and its backward gets the activation back from the pass that makes their gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements per thread that are worked on together; measured, see rms_norm.
_TILE_ELEMENTS = 1 << 18


def swiglu(gate: Tensor, up: Tensor, impl: str = "torch") -> Tensor:
    """silu(gate) * up, elementwise; gate and up of one shape and dtype.

    Args:
        impl: "torch", or "triton" or "inductor" where sdar_kernels.fused_kernels says that it runs.
    """
    assert gate.shape == up.shape, "gate and up are projections of the same width"
    assert gate.dtype == up.dtype, "gate and up have one dtype"
    if impl == "triton":
        from sdar_kernels import triton_swiglu

        return triton_swiglu.swiglu(gate, up)
    if impl == "inductor":
        from sdar_kernels import inductor_kernels

        return inductor_kernels.swiglu(gate, up)
    assert impl == "torch", f"unresolved fused_kernels {impl!r}"
    flat_gate, flat_up = gate.reshape(-1), up.reshape(-1)
    out = torch.empty_like(flat_gate)
    for tile in _tiles(out):
        part = torch.ops.aten.silu.out(flat_gate[tile], out=out[tile])
        part.mul_(flat_up[tile])
    return out.view(gate.shape)


def swiglu_gradients(
    grad: Tensor, gate: Tensor, up: Tensor, impl: str = "torch"
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up for the upstream `grad`, and `swiglu(gate, up)` once more."""
    if impl == "triton":
        from sdar_kernels import triton_swiglu

        return triton_swiglu.swiglu_gradients(grad, gate, up)
    if impl == "inductor":
        from sdar_kernels import inductor_kernels

        return inductor_kernels.swiglu_gradients(grad, gate, up)
    assert impl == "torch", f"unresolved fused_kernels {impl!r}"
    shape = gate.shape
    grad, gate, up = (x.reshape(-1) for x in (grad, gate, up))
    grad_gate, grad_up, product = (torch.empty_like(gate) for _ in range(3))
    for tile in _tiles(grad):
        silu = torch.ops.aten.silu.out(gate[tile], out=product[tile])
        torch.mul(silu, grad[tile], out=grad_up[tile])
        silu.mul_(up[tile])
        slope = torch.mul(grad[tile], up[tile], out=grad_gate[tile])
        torch.ops.aten.silu_backward.grad_input(slope, gate[tile], grad_input=slope)
    return grad_gate.view(shape), grad_up.view(shape), product.view(shape)


def _tiles(x: Tensor) -> list[slice]:
    """Parts of a flat tensor."""
    if x.device.type != "cpu":
        return [slice(None)]
    step = _TILE_ELEMENTS * torch.get_num_threads()
    return [slice(at, at + step) for at in range(0, x.shape[0], step)]
