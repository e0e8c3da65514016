"""SwiGLU: the gated activation of the MLP, in torch or in Triton.

The torch form is the specification. Invariant: `impl` changes speed and memory, not values
beyond rounding.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def swiglu(gate: Tensor, up: Tensor, impl: str = "torch") -> Tensor:
    """silu(gate) * up, elementwise; gate and up of one shape and dtype.

    Args:
        impl: "torch", or "triton" where sdar_kernels.fused_kernels says that it runs.
    """
    if impl == "triton":
        from sdar_kernels.triton_swiglu import Swiglu

        return Swiglu.apply(gate, up)
    assert impl == "torch", f"unresolved fused_kernels {impl!r}"
    return F.silu(gate) * up
