"""SwiGLU: the gated activation of the MLP, in torch, in Triton or by torch.compile.

`reference.swiglu` is the plain form. Invariant: `impl` changes speed and memory, not values
beyond rounding. Not operations of autograd: the projection that reads the activation keeps gate and
up only, and its backward gets the activation back from the pass that makes their gradients.

gate and up are the halves of a row [.., 2 I], as one product makes them; so are their gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements per thread that are worked on together; measured, see rms_norm.
_TILE_ELEMENTS = 1 << 18


def swiglu(gate_up: Tensor, impl: str = "torch") -> Tensor:
    """silu(gate) * up: [.., 2 I] -> [.., I].

    Args:
        impl: "torch", or "triton" or "inductor" where sdar_kernels.fused_kernels says that it runs.
    """
    assert gate_up.shape[-1] % 2 == 0, "gate and up are projections of the same width"
    if impl == "triton":
        from sdar_kernels import triton_swiglu

        return triton_swiglu.swiglu(gate_up)
    if impl == "inductor":
        from sdar_kernels import inductor_kernels

        return inductor_kernels.swiglu(gate_up)
    assert impl == "torch", f"unresolved fused_kernels {impl!r}"
    rows = gate_up.reshape(-1, gate_up.shape[-1])
    gate, up = rows.chunk(2, dim=1)
    out = gate.new_empty(gate.shape)
    for tile in _tiles(rows):
        part = torch.ops.aten.silu.out(gate[tile], out=out[tile])
        part.mul_(up[tile])
    return out.view(*gate_up.shape[:-1], gate.shape[1])


def swiglu_gradients(grad: Tensor, gate_up: Tensor, impl: str = "torch") -> tuple[Tensor, Tensor]:
    """The gradient of `gate_up` for the upstream `grad`, and `swiglu(gate_up)` once more."""
    if impl == "triton":
        from sdar_kernels import triton_swiglu

        return triton_swiglu.swiglu_gradients(grad, gate_up)
    if impl == "inductor":
        from sdar_kernels import inductor_kernels

        return inductor_kernels.swiglu_gradients(grad, gate_up)
    assert impl == "torch", f"unresolved fused_kernels {impl!r}"
    rows, upstream = gate_up.reshape(-1, gate_up.shape[-1]), grad.reshape(-1, grad.shape[-1])
    gate, up = rows.chunk(2, dim=1)
    grad_rows = rows.new_empty(rows.shape)
    grad_gate, grad_up = grad_rows.chunk(2, dim=1)
    product = gate.new_empty(gate.shape)
    for tile in _tiles(rows):
        silu = torch.ops.aten.silu.out(gate[tile], out=product[tile])
        torch.mul(silu, upstream[tile], out=grad_up[tile])
        silu.mul_(up[tile])
        slope = torch.mul(upstream[tile], up[tile], out=grad_gate[tile])
        torch.ops.aten.silu_backward.grad_input(slope, gate[tile], grad_input=slope)
    return grad_rows.view(gate_up.shape), product.view(grad.shape)


def _tiles(rows: Tensor) -> list[slice]:
    """Parts of a matrix, by rows."""
    if rows.device.type != "cpu":
        return [slice(None)]
    step = max(1, 2 * _TILE_ELEMENTS * torch.get_num_threads() // max(1, rows.shape[1]))
    return [slice(at, at + step) for at in range(0, rows.shape[0], step)]
