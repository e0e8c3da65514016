"""RMSNorm and rotary embedding, as Hugging Face's Qwen3 computes them.

Statistics and angles are at least fp32 whatever the activations are; fp64 activations keep fp64
statistics (verification runs). Angles are always made in fp32, because the published weights
were trained with fp32 angles. `reference` has the plain forms. The torch forms here keep little for
backward and pass over a tile while it is in the cache; with impl "triton" or "inductor" an op runs
as one kernel each way, where sdar_kernels.fused_kernels says that it can.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of a tile per thread: 1 MiB of fp32, so that a few stay in the last cache. A quarter of
# that, which would fit a core's L2, took up to twice as long: calls cost more than they save. Twice
# as much saves a few percent more, but such temporaries scatter the heap: up to 150 MiB at peak.
_TILE_ELEMENTS = 1 << 18


def rms_norm(x: Tensor, weight: Tensor, eps: float, impl: str = "torch") -> Tensor:
    """weight * x / sqrt(mean(x^2, last dim) + eps); x [..., D], weight [D].

    The normed value is rounded to the dtype of x before it meets the weight. Kept for backward:
    x and one number per row.
    """
    return residual_rms_norm(x, None, weight, eps, impl)[1]


def residual_rms_norm(
    x: Tensor, addend: Tensor | None, weight: Tensor, eps: float, impl: str = "torch"
) -> tuple[Tensor, Tensor]:
    """The residual stream r = x + addend, and rms_norm(r): both are read further on.

    One pass each way: forward adds on the way to the norm, backward adds the gradient that reaches
    r beside the norm. Kept for backward: r and one number per row.

    Args:
        x: [..., D].
        addend: of the shape and dtype of x; None: r is x.
        weight: [D].
    """
    assert addend is None or (addend.shape, addend.dtype) == (x.shape, x.dtype), "one stream"
    if impl == "triton":
        from sdar_kernels.triton_rms_norm import ResidualRmsNorm

        return ResidualRmsNorm.apply(x, addend, weight, eps)
    if impl == "inductor":
        from sdar_kernels import inductor_kernels

        return inductor_kernels.ResidualRmsNorm.apply(x, addend, weight, eps)
    assert impl == "torch", f"unresolved fused_kernels {impl!r}"
    return _ResidualRmsNorm.apply(x, addend, weight, eps)


def rotary_tables(
    position_ids: Tensor, head_dim: int, rope_theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin tables, each [T, 1, head_dim], for positions [T]."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    angles = torch.outer(position_ids.float(), 1.0 / rope_theta**exponents)
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def qk_norm_rope(
    x_TNH: Tensor, weight_H: Tensor, eps: float, cos: Tensor, sin: Tensor, impl: str = "torch"
) -> Tensor:
    """Queries or keys, normed per head and rotated.

    With n = rms_norm(x): n * cos + rotate_half(n) * sin. Kept for backward: x, one number a head.

    Args:
        x_TNH: [T, N, H], H even; any strides.
        weight_H: norm scale shared by the heads.
        cos, sin: tables [T, 1, H] of `rotary_tables`; they get no gradient.
    """
    if impl == "triton":
        from sdar_kernels.triton_qk_norm_rope import QkNormRope

        return QkNormRope.apply(x_TNH, weight_H, eps, cos, sin)
    if impl == "inductor":
        from sdar_kernels import inductor_kernels

        return inductor_kernels.QkNormRope.apply(x_TNH, weight_H, eps, cos, sin)
    assert impl == "torch", f"unresolved fused_kernels {impl!r}"
    out: Tensor = _QkNormRope.apply(x_TNH, weight_H, eps, cos, sin)
    return out


def _row_tiles(x: Tensor) -> list[slice]:
    """Parts of dim 0 that stay in a CPU's cache from one elementwise pass to the next."""
    if x.device.type != "cpu":
        return [slice(None)]
    elements = _TILE_ELEMENTS * torch.get_num_threads()
    step = max(1, elements // max(1, x[:1].numel()))
    return [slice(start, start + step) for start in range(0, x.shape[0], step)]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rstd(wide: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean of squares + eps) over the last dim, kept as a dim of 1."""
    return wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, grad_x: Tensor) -> Tensor:
    """Write grad_x of a tile; returns the tile's part of the weight's gradient [D].

    With n = x * rstd and g = weight * grad: grad_x = rstd * (g - n * mean(g * n)).
    """
    if x.device.type == "cpu" and x.dtype == grad.dtype == weight.dtype == rstd.dtype:
        return _norm_backward_by_layer_norm(grad, x, weight, rstd, grad_x)
    normed = _wide(x) * rstd
    # As the forward pass: the weight met the rounded value.
    rounded = normed if normed.dtype == x.dtype else _wide(normed.to(x.dtype))
    products = _wide(grad) * rounded
    grad_weight = products.flatten(0, -2).sum(0)
    mean = (products @ _wide(weight)).unsqueeze(-1).div_(x.shape[-1])
    scaled = torch.mul(_wide(grad), _wide(weight), out=products)
    grad_x.copy_(scaled.addcmul_(normed, mean, value=-1).mul_(rstd))
    return grad_weight


def _norm_backward_by_layer_norm(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, grad_x: Tensor
) -> Tensor:
    """As `_norm_backward`, by torch's one pass for LayerNorm: two thirds of the time on a CPU.

    At a mean of 0 LayerNorm's gradient is rstd * (g - mean(g) - n * mean(g * n)).
    """
    rows, size = rstd.numel(), x.shape[-1]
    centered, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
        grad, x, [size], torch.zeros_like(rstd), rstd, weight, None, [True, True, False]
    )
    means = torch.mv(grad.reshape(rows, size), weight).view(rstd.shape).mul_(rstd)
    torch.add(centered, means, alpha=1 / size, out=grad_x)
    part: Tensor = grad_weight
    return part


class _ResidualRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, addend: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = x if addend is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        rows = total.reshape(-1, x.shape[-1])
        out = torch.empty_like(rows, dtype=torch.promote_types(x.dtype, weight.dtype))
        rstd = rows.new_empty((rows.shape[0], 1), dtype=_wide(rows[:0]).dtype)
        summands = () if addend is None else (x.reshape(rows.shape), addend.reshape(rows.shape))
        for tile in _row_tiles(rows):
            if summands:
                torch.add(*(summand[tile] for summand in summands), out=rows[tile])
            wide = _wide(rows[tile])
            rstd[tile] = _rstd(wide, eps)
            torch.mul((wide * rstd[tile]).to(x.dtype), weight, out=out[tile])
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
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        beside = None if grad_total is None else grad_total.reshape(rows.shape)
        grad_x = torch.empty_like(rows)
        grad_weight = torch.zeros_like(weight, dtype=rstd.dtype)
        for tile in _row_tiles(rows):
            parts = (grad_rows[tile], rows[tile], weight, rstd[tile], grad_x[tile])
            grad_weight += _norm_backward(*parts)
            if beside is not None:
                grad_x[tile] += beside[tile]
        grad_x = grad_x.view(x.shape)
        return grad_x, grad_x if ctx.has_addend else None, grad_weight.to(weight.dtype), None


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor
    ) -> Tensor:
        dtype = torch.promote_types(x.dtype, weight.dtype)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        rstd = x.new_empty((*x.shape[:-1], 1), dtype=_wide(x[:0]).dtype)
        half = x.shape[-1] // 2
        for tile in _row_tiles(x):
            wide = _wide(x[tile])
            rstd[tile] = _rstd(wide, eps)
            normed = (wide * rstd[tile]).to(x.dtype) * weight
            part, tile_sin = torch.mul(normed, cos[tile], out=out[tile]), sin[tile]
            first = normed[..., half:], tile_sin[..., :half]
            second = normed[..., :half], tile_sin[..., half:]
            if dtype == wide.dtype:
                part[..., :half].addcmul_(*first, value=-1)
                part[..., half:].addcmul_(*second)
            else:
                # Products rounded before the sum, as published.
                part[..., :half] -= first[0] * first[1]
                part[..., half:] += second[0] * second[1]
        ctx.save_for_backward(x, weight, rstd, cos, sin)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, rstd, cos, sin = ctx.saved_tensors
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_weight = torch.zeros_like(weight, dtype=rstd.dtype)
        half = x.shape[-1] // 2
        for tile in _row_tiles(x):
            upstream, tile_sin = grad[tile], sin[tile]
            turned = upstream * cos[tile]
            turned[..., :half].addcmul_(upstream[..., half:], tile_sin[..., half:])
            turned[..., half:].addcmul_(upstream[..., :half], tile_sin[..., :half], value=-1)
            grad_weight += _norm_backward(turned, x[tile], weight, rstd[tile], grad_x[tile])
        return grad_x, grad_weight.to(weight.dtype), None, None, None
