"""Tiled attention for CPU: only key ranges that some query of a tile may see are computed.

Saves only q, k and v (O(T)), recomputes the probabilities in backward, and
folds the query heads of one key head into matmul rows. Softmax runs in fp32 or wider.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdar_kernels.block_mask import AttentionMask, QueryTile


def tiled_attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, mask: AttentionMask) -> Tensor:
    """Attention under `mask`; same contract as `reference.attention`."""
    return _TiledAttention.apply(q_TNH, k_TKH, v_TKH, mask)


def _tile_keys(x_TKH: Tensor, tile: QueryTile) -> Tensor:
    """Rows of both hulls as [K, keys, H]."""
    first = x_TKH[tile.first[0] : tile.first[1]]
    if tile.second[1] > tile.second[0]:
        first = torch.cat((first, x_TKH[tile.second[0] : tile.second[1]]))
    return first.transpose(0, 1)


def _hidden_columns(mask: AttentionMask, tile: QueryTile, device: torch.device) -> Tensor:
    """bool [queries, keys - open_keys]: True where the query may not see the key."""
    key_ids = torch.cat(
        (
            torch.arange(tile.first[0] + tile.open_keys, tile.first[1], device=device),
            torch.arange(tile.second[0], tile.second[1], device=device),
        )
    )
    lo1, hi1, lo2, hi2 = mask.key_intervals[tile.start : tile.end].unsqueeze(-1).unbind(1)
    return ~(((key_ids >= lo1) & (key_ids < hi1)) | ((key_ids >= lo2) & (key_ids < hi2)))


def _fold(x_TNH: Tensor, tile: QueryTile, num_kv_heads: int) -> Tensor:
    """[queries, N, H] -> [K, queries * N/K, H], query-major inside a key head."""
    queries = tile.end - tile.start
    x = x_TNH[tile.start : tile.end].view(queries, num_kv_heads, -1, x_TNH.shape[-1])
    return x.transpose(0, 1).reshape(num_kv_heads, -1, x_TNH.shape[-1])


def _unfold(x: Tensor, tile: QueryTile) -> Tensor:
    """Inverse of `_fold`."""
    queries = tile.end - tile.start
    num_kv_heads, rows, head_dim = x.shape
    x = x.view(num_kv_heads, queries, rows // queries, head_dim)
    return x.transpose(0, 1).reshape(queries, -1, head_dim)


def _probabilities(q: Tensor, k: Tensor, mask: AttentionMask, tile: QueryTile) -> Tensor:
    """softmax(q k^T / sqrt(H)) of one tile, [K, rows, keys], in fp32 or wider."""
    scores = torch.bmm(q, k.transpose(1, 2))
    scores = scores if scores.dtype == torch.float64 else scores.float()
    scores = scores.mul_(q.shape[-1] ** -0.5)
    if tile.open_keys < k.shape[1]:
        hidden = _hidden_columns(mask, tile, q.device)
        grouped = scores.view(scores.shape[0], hidden.shape[0], -1, scores.shape[-1])
        grouped[..., tile.open_keys :].masked_fill_(hidden.unsqueeze(1), float("-inf"))
    return torch.softmax(scores, dim=-1)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        out = torch.empty_like(q)
        for tile in mask.query_tiles:
            probabilities = _probabilities(
                _fold(q, tile, k.shape[1]), _tile_keys(k, tile), mask, tile
            )
            values = torch.bmm(probabilities.to(v.dtype), _tile_keys(v, tile))
            out[tile.start : tile.end] = _unfold(values, tile)
        ctx.save_for_backward(q, k, v)
        ctx.mask = mask
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        mask: AttentionMask = ctx.mask
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        scale = q.shape[-1] ** -0.5
        for tile in mask.query_tiles:
            folded, keys = _fold(q, tile, k.shape[1]), _tile_keys(k, tile)
            probabilities = _probabilities(folded, keys, mask, tile)
            upstream = _fold(grad_out, tile, k.shape[1])
            part_v = torch.bmm(probabilities.to(v.dtype).transpose(1, 2), upstream)
            grad_p = torch.bmm(upstream, _tile_keys(v, tile).transpose(1, 2)).to(wide)
            grad_s = torch._softmax_backward_data(grad_p, probabilities, -1, wide)
            grad_s = grad_s.mul_(scale).to(q.dtype)
            grad_q[tile.start : tile.end] = _unfold(torch.bmm(grad_s, keys), tile)
            part_k = torch.bmm(grad_s.transpose(1, 2), folded)
            split = tile.first[1] - tile.first[0]
            for total, part in ((grad_k, part_k), (grad_v, part_v)):
                part = part.transpose(0, 1)
                total[tile.first[0] : tile.first[1]] += part[:split]
                if tile.second[1] > tile.second[0]:
                    total[tile.second[0] : tile.second[1]] += part[split:]
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None
