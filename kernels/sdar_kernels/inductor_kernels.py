"""RMSNorm, q/k-norm with rotation and SwiGLU as C++ loops that torch.compile makes for a CPU.

Each op is one loop each way, where the torch forms pass over every tile several times. It takes a
C++ compiler and some seconds of a process's first step (torch keeps what it built on disk), hence
only on request: fused_kernels: inductor. `rms_norm` and `swiglu` state what the ops compute.

The numbers of tokens and of heads are dynamic: after the first step nothing is built again, but
for a single token or head, and where torch sums few rows in another way than many.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Far above what dtypes and special sizes can ask for; behind it torch stops with an error.
_MOST_GRAPHS = 64


class ResidualRmsNorm(torch.autograd.Function):
    """As `rms_norm.residual_rms_norm`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, addend: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        parts = [part.reshape(-1, x.shape[-1]) for part in (x, addend) if part is not None]
        run = _rms_norm(eps) if addend is None else _added_rms_norm(eps)
        out, rstd, *total = run(*_inputs(1, *parts), weight.detach())
        total = total[0].view(x.shape) if total else x
        ctx.save_for_backward(total, weight, rstd)
        ctx.has_addend = addend is not None
        ctx.set_materialize_grads(False)
        return total, out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_total: Tensor | None, grad: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        run = _compiled(_norm_gradients if grad_total is None else _residual_gradients)
        grads = [part for part in (grad, grad_total) if part is not None]
        rows = (part.reshape(-1, x.shape[-1]) for part in (*grads, x))
        grad_x, grad_weight = run(*_inputs(1, *rows, rstd), weight.detach())
        grad_x = grad_x.view(x.shape)
        return grad_x, grad_x if ctx.has_addend else None, grad_weight, None


class QkNormRope(torch.autograd.Function):
    """As `rms_norm.qk_norm_rope`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor
    ) -> Tensor:
        tables = _inputs(1, cos, sin)
        out, rstd = _qk_norm_rope(eps)(*_inputs(2, x), *tables, weight.detach())
        ctx.save_for_backward(x, weight, rstd, cos, sin)
        rotated: Tensor = out
        return rotated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, rstd, cos, sin = ctx.saved_tensors
        grads, tables = _inputs(2, grad, x, rstd), _inputs(1, cos, sin)
        run = _compiled(_qk_gradients)
        grad_x, grad_weight = run(*grads, *tables, weight.detach())
        return grad_x, grad_weight, None, None, None


def swiglu(gate_up: Tensor) -> Tensor:
    """As `swiglu.swiglu`."""
    out: Tensor = _compiled(_swiglu)(*_inputs(1, _rows(gate_up)))
    return out.view(*gate_up.shape[:-1], out.shape[1])


def swiglu_gradients(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """As `swiglu.swiglu_gradients`."""
    grad_gate_up, product = _compiled(_swiglu_gradients)(*_inputs(1, _rows(grad), _rows(gate_up)))
    return grad_gate_up.view(gate_up.shape), product.view(grad.shape)


@lru_cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Kept, so that all layers share its graphs.
    compile_function: Any = torch.compile  # its stubs do not know recompile_limit
    compiled: Callable[..., Any] = compile_function(
        function, fullgraph=True, recompile_limit=_MOST_GRAPHS
    )
    return compiled


@lru_cache
def _rms_norm(eps: float) -> Callable[..., Any]:
    def rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        rstd = _rstd(_wide(x), eps)
        return _scaled(x, rstd, weight), rstd

    return _compiled(rms_norm)


@lru_cache
def _added_rms_norm(eps: float) -> Callable[..., Any]:
    def added_rms_norm(x: Tensor, addend: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = x + addend
        rstd = _rstd(_wide(total), eps)
        return _scaled(total, rstd, weight), rstd, total

    return _compiled(added_rms_norm)


@lru_cache
def _qk_norm_rope(eps: float) -> Callable[..., Any]:
    def qk_norm_rope(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        rstd = _rstd(_wide(x), eps)
        normed = _scaled(x, rstd, weight)
        first, second = normed.chunk(2, dim=-1)
        return normed * cos + torch.cat((-second, first), dim=-1) * sin, rstd

    return _compiled(qk_norm_rope)


def _norm_gradients(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = _wide_gradients(grad, x, rstd, weight)
    return grad_x.to(x.dtype), grad_weight


def _residual_gradients(
    grad: Tensor, grad_total: Tensor, x: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = _wide_gradients(grad, x, rstd, weight)
    return (grad_x + _wide(grad_total)).to(x.dtype), grad_weight


def _wide_gradients(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """With n = x * rstd and g = weight * grad: rstd * (g - n * mean(g * n)), sum(grad * n)."""
    normed = _wide(x) * rstd
    # As the forward pass: the weight met the rounded value.
    products = _wide(grad) * _wide(normed.to(x.dtype))
    mean = (products * _wide(weight)).mean(-1, keepdim=True)
    grad_x = (_wide(grad) * _wide(weight) - normed * mean) * rstd
    grad_weight = products.flatten(0, -2).sum(0)
    return grad_x, grad_weight.to(weight.dtype)


def _qk_gradients(
    grad: Tensor, x: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    first, second = (grad * sin).chunk(2, dim=-1)
    return _norm_gradients(grad * cos + torch.cat((second, -first), dim=-1), x, rstd, weight)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def _swiglu_gradients(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    # All of one sigmoid.
    gate, up = gate_up.chunk(2, dim=1)
    wide = _wide(gate)
    share = torch.sigmoid(wide)
    silu = (wide * share).to(gate.dtype)
    slope = share + wide * share * (1 - share)
    grad_gate = (_wide(grad) * _wide(up) * slope).to(gate.dtype)
    return torch.cat((grad_gate, grad * silu), dim=1), silu * up


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rstd(wide: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def _scaled(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    return (_wide(x) * rstd).to(x.dtype) * weight


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _inputs(num_dynamic: int, *tensors: Tensor) -> list[Tensor]:
    """The tensors as a graph takes them: no gradient, contiguous, the first dims of any size.

    A graph is bound to all that is not said to be dynamic, strides and requires_grad too.
    """
    inputs = []
    for tensor in tensors:
        plain = tensor.detach().contiguous()
        for dim in range(num_dynamic):
            if plain.shape[dim] > 1:
                torch._dynamo.mark_dynamic(plain, dim)
        inputs.append(plain)
    return inputs
