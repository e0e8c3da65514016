"""Block-diffusion attention by our Triton kernels: the fallback of FlexAttention.

One autograd function over `tile_runs`: it saves q, k, v, out and one number per (query, head).
Deterministic, O(tokens) memory, any number of query heads per key head, head sizes up to 256.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.tile_runs import make_key_tiles, make_query_tiles
from sdar_kernels.triton_attention_backward import (
    attention_backward_keys,
    attention_backward_queries,
)
from sdar_kernels.triton_attention_forward import attention_forward
from sdar_kernels.triton_configs import (
    HEAD_DIMS,
    AttentionConfig,
    KernelConfig,
    attention_config,
    default_config,
    padded_head_dim,
)
from sdar_kernels.triton_runtime import KernelSpec

_LOG2_E = math.log2(math.e)
# Columns of a product's operands in fp32 above 128: whole heads do not fit the registers there.
_CHUNK = 32
_TRITON_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
}  # fmt: skip
_POINTERS_INT32 = ("intervals_ptr", "tiles_ptr", "runs_ptr")
_POINTERS_WIDE = ("lse_ptr", "delta_ptr")


def triton_attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    mask: AttentionMask,
    config: AttentionConfig | None = None,
) -> Tensor:
    """Attention under `mask`; same contract as `reference.attention`.

    Args:
        q_TNH, k_TKH, v_TKH: queries, keys, values.
        mask: of these T tokens.
        config: tile sizes; default: those chosen for this GPU.
    """
    if config is None:
        group = q_TNH.shape[1] // k_TKH.shape[1]
        config = default_config(q_TNH.device, q_TNH.shape[-1], q_TNH.dtype, group)
    return _TritonAttention.apply(q_TNH, k_TKH, v_TKH, mask, config)


def _constexprs(group: int, head_dim: int, dtype: torch.dtype, on_amd: bool) -> dict[str, Any]:
    return {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded_head_dim(head_dim),
        "CHUNK": _CHUNK if dtype.itemsize > 2 and padded_head_dim(head_dim) > 128 else 0,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        # NVIDIA's tensor cores take fp32 in three products of its halves; 16-bit inputs have
        # one form, and AMD's matrix cores take fp32 as it is.
        "PRECISION": "tf32x3" if dtype == torch.float32 and not on_amd else "ieee",
    }


def _on_amd() -> bool:
    return torch.version.hip is not None


def _forward_sizes(launch: KernelConfig) -> dict[str, int]:
    return {"BLOCK_M": launch.rows, "BLOCK_N": launch.keys, "MASKED_N": launch.masked}


def _query_sizes(launch: KernelConfig) -> dict[str, int]:
    return {**_forward_sizes(launch), "HOIST": launch.hoist}


def _key_sizes(launch: KernelConfig) -> dict[str, int]:
    return {"BLOCK_M": launch.rows, "BLOCK_N": launch.keys, "MASKED_M": launch.masked}


def _options(config: KernelConfig) -> dict[str, int]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, config: AttentionConfig
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        num_tokens, num_heads, head_dim = q.shape
        num_kv_heads = k.shape[1]
        group = num_heads // num_kv_heads
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        out = torch.empty_like(q)
        lse = torch.empty(num_tokens, num_heads, dtype=wide, device=q.device)
        launch = config.forward
        plan = mask.plan(make_query_tiles, launch.rows // group, launch.keys, launch.masked)
        attention_forward[(plan.tiles.shape[0], num_kv_heads)](
            q, k, v, out, lse, mask.key_intervals, plan.tiles,
            head_dim**-0.5 * _LOG2_E, num_heads, num_kv_heads,
            **_constexprs(group, head_dim, q.dtype, _on_amd()),
            **_forward_sizes(launch), **_options(launch),
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask, ctx.config = mask, config
        return out

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        mask: AttentionMask = ctx.mask
        config: AttentionConfig = ctx.config
        grad_out = grad_out.contiguous()
        num_heads, head_dim = q.shape[1:]
        num_kv_heads = k.shape[1]
        group = num_heads // num_kv_heads
        scale = head_dim**-0.5
        numbers = (scale, scale * _LOG2_E, num_heads, num_kv_heads)
        constexprs = _constexprs(group, head_dim, q.dtype, _on_amd())
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        delta = torch.empty_like(lse)
        launch = config.backward_queries
        queries = mask.plan(make_query_tiles, launch.rows // group, launch.keys, launch.masked)
        attention_backward_queries[(queries.tiles.shape[0], num_kv_heads)](
            q, k, v, out, grad_out, lse, delta, grad_q, mask.key_intervals, queries.tiles,
            *numbers,
            **_query_sizes(launch), **constexprs, **_options(launch),
        )  # fmt: skip
        launch = config.backward_keys
        keys = mask.plan(make_key_tiles, launch.rows // group, launch.keys, launch.masked // group)
        attention_backward_keys[(keys.tiles.shape[0], num_kv_heads)](
            q, k, v, grad_out, lse, delta, grad_k, grad_v,
            mask.key_intervals, keys.tiles, keys.runs,
            *numbers,
            **_key_sizes(launch), **constexprs, **_options(launch),
        )  # fmt: skip
        return grad_q, grad_k, grad_v, None, None


def attention_specs(
    arch: str, config: AttentionConfig, head_dim: int, dtype: torch.dtype, group: int
) -> list[KernelSpec]:
    """The three kernels of a configuration, described for ahead-of-time compilation."""
    launches = (
        (attention_forward, config.forward, _forward_sizes),
        (attention_backward_queries, config.backward_queries, _query_sizes),
        (attention_backward_keys, config.backward_keys, _key_sizes),
    )
    specs = []
    for kernel, launch, sizes in launches:
        constexprs = _constexprs(group, head_dim, dtype, arch.startswith("gfx")) | sizes(launch)
        arguments = [name for name in kernel.arg_names if name not in constexprs]
        specs.append(
            KernelSpec(
                name=f"{kernel.__name__} {_TRITON_TYPES[dtype]} d{head_dim} g{group}",
                kernel=kernel,
                signature={name: _argument_type(name, dtype) for name in arguments},
                constexprs=constexprs,
                aligned=tuple(name for name in arguments if name.endswith("_ptr")),
                **_options(launch),
            )
        )
    return specs


def _argument_type(name: str, dtype: torch.dtype) -> str:
    if name in _POINTERS_INT32:
        return "*i32"
    if name in _POINTERS_WIDE:
        return "*fp32"
    if name.endswith("_ptr"):
        return f"*{_TRITON_TYPES[dtype]}"
    return "fp32" if name.startswith("scale") else "i32"


def shipped(arch: str) -> list[KernelSpec]:
    """Every configuration that `attention_config` hands out, with SDAR's head groups at d 128."""
    # Groups of two and of four stand for the smaller and the larger ones.
    return [
        spec
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for head_dim in HEAD_DIMS
        for group in ((2, 4, 8) if head_dim == 128 else (2, 4))
        for spec in attention_specs(
            arch, attention_config(arch, head_dim, dtype, group), head_dim, dtype, group
        )
    ]
