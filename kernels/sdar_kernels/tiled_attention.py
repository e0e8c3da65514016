"""Tiled attention for CPU: only keys that some query of a tile may see are computed.

Every query's two ranges are attended to apart and joined by their log-sum-exp, so a noisy query
pays for its own block exactly. Query heads of one key head are folded into matmul rows. Saves
O(T) tensors and recomputes the probabilities in backward; gradients of keys and values, which
many queries add to, are summed in fp32 or wider.

Shape legend: T queries, S keys, N query heads, K key heads, G = N // K, H head_dim.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.tile_groups import (
    KeySet,
    Piece,
    QueryTile,
    TilePlan,
    TileSizes,
    make_tile_plan,
)

# torch.softmax takes as long for a row of 4 as for one of 100.
_NARROW = 16
# Up to this many keys a product with transposed probabilities is as fast as any; beyond, MKL
# takes 1.4 times as long, unless the transpose of the product is computed.
_FEW_KEYS = 256


def tiled_attention(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    mask: AttentionMask,
    sizes: TileSizes | None = None,
) -> Tensor:
    """Attention under `mask`; same contract as `reference.attention`."""
    sizes = sizes or default_sizes()
    num_kv_heads = k_SKH.shape[1]
    plan = mask.plan(make_tile_plan, num_kv_heads, sizes, q_TNH.shape[1] // num_kv_heads)
    out: Tensor = _TiledAttention.apply(q_TNH, k_SKH, v_SKH, plan)
    return out


def default_sizes() -> TileSizes:
    """Measured sizes. With several threads fewer and larger tiles: calls from Python are serial."""
    return TileSizes() if torch.get_num_threads() == 1 else TileSizes(short_tile=64)


class _Workspace:
    """Buffers that are used again by every piece of one call: fresh memory costs page faults."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}
        self._tables: dict[int, Tensor] = {}

    def get(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised; whatever was got under this name before is lost."""
        size = prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = self._like.new_empty(size, dtype=dtype)
        return buffer[:size].view(shape)

    def gather(self, name: str, source: Tensor, index: Tensor) -> Tensor:
        """source[index], [rows, columns]."""
        out = self.get(name, len(index), source.shape[1], dtype=source.dtype)
        return torch.index_select(source, 0, index, out=out)

    def hiding(self, size: int) -> Tensor:
        """[size + 1, size]: row i is 0 for i columns, then -inf."""
        if size not in self._tables:
            columns = torch.arange(size, device=self._like.device)
            seen = torch.arange(size + 1, device=self._like.device)[:, None]
            table = self._like.new_zeros(size + 1, size)
            self._tables[size] = table.masked_fill_(columns >= seen, float("-inf"))
        return self._tables[size]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _scores(
    space: _Workspace, kept: Tensor, q: Tensor, keys: Tensor, tile: QueryTile, piece: Piece
) -> Tensor:
    """q k^T / sqrt(H), hidden keys at -inf: [batch, queries * G, width]; in `kept` if so."""
    batch, rows = q.shape[:2]
    if tile.kept is None:
        scores = space.get("scores", batch, rows, tile.width)
    else:
        scores = _kept(kept, q, tile, piece)
    scores.baddbmm_(q, keys.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
    if tile.seen is not None:
        num_queries = (piece.last - piece.first) // batch
        table, seen = space.hiding(tile.masked), tile.seen[piece.first : piece.last]
        hidden = space.get("hidden", len(seen), tile.masked, dtype=table.dtype)
        torch.index_select(table, 0, seen, out=hidden)
        last = scores[..., tile.width - tile.masked :]
        last = last.view(batch, num_queries, rows // num_queries, tile.masked)
        last.add_(hidden.view(batch, num_queries, 1, tile.masked))
    return scores


def _kept(kept: Tensor, q: Tensor, tile: QueryTile, piece: Piece) -> Tensor:
    """The piece's part of what is kept for backward: [batch, queries * G, width]."""
    assert tile.kept is not None, "the tile's probabilities are kept"
    batch, rows = q.shape[:2]
    groups = batch * rows // (piece.last - piece.first)
    start = (tile.kept + piece.first * tile.width) * groups
    size = batch * rows * tile.width
    return kept[start : start + size].view(batch, rows, tile.width)


def _softmax_(scores: Tensor) -> Tensor:
    """In place, over the last dim; returns its argument."""
    if scores.shape[-1] > _NARROW:
        return torch.softmax(scores, -1, out=scores)
    scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    return scores.div_(scores.sum(-1, keepdim=True))


def _softmax_and_lse_(scores: Tensor) -> Tensor:
    """Softmax in place over the last dim; returns log-sum-exp, [batch, rows], in fp32 or wider."""
    wide = _wide(scores.dtype)
    top = scores.amax(-1).to(wide)
    # The largest probability is exp(top - lse), and not small.
    return top - _softmax_(scores).amax(-1).to(wide).log_()


def _accumulate_(
    space: _Workspace, total: Tensor, left: Tensor, right: Tensor, scale: float, fresh: bool
) -> None:
    """total = scale * left @ right, or += unless fresh."""
    # torch loops over the batch unless the result is contiguous.
    direct = total.is_contiguous() or total.shape[0] == 1
    if direct and total.dtype == left.dtype:
        total.baddbmm_(left, right, beta=0 if fresh else 1, alpha=scale)
        return
    part = torch.bmm(left, right, out=space.get("product", *total.shape))
    if fresh:
        torch.mul(part, scale, out=total)
    else:
        total.add_(part, alpha=scale)


class _KeyGradient:
    """Gradient of the keys or the values of one key set, summed over its tiles."""

    def __init__(self, space: _Workspace, name: str, key_set: KeySet, like: Tensor) -> None:
        self._space = space
        self._few = key_set.extent <= _FEW_KEYS
        shape = (key_set.extent, like.shape[1]) if self._few else (like.shape[1], key_set.extent)
        self._sum = space.get(name, key_set.batch, *shape, dtype=like.dtype)

    def add(
        self, weights: Tensor, rows: Tensor, piece: Piece, *, scale: float, fresh: bool
    ) -> None:
        """+= scale * weights^T rows; weights [batch, queries * G, width], rows [..., H]."""
        part, width = self._sum[piece.start : piece.end], weights.shape[-1]
        if self._few:
            factors = (weights.transpose(1, 2), rows)
            _accumulate_(self._space, part[:, :width], *factors, scale, fresh)
        else:
            factors = (rows.transpose(1, 2), weights)
            _accumulate_(self._space, part[..., :width], *factors, scale, fresh)

    def add_to(self, total: Tensor, index: Tensor) -> None:
        """total[index] += the gradient."""
        keys_first = self._sum if self._few else self._sum.transpose(1, 2)
        total.index_add_(0, index, keys_first.reshape(-1, total.shape[1]))


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: TilePlan) -> Tensor:
        num_kv_heads, head_dim = k.shape[1:]
        groups = q.shape[1] // num_kv_heads
        space = _Workspace(q)
        q_rows = q.reshape(-1, groups * head_dim)
        k_rows, v_rows = k.reshape(-1, head_dim), v.reshape(-1, head_dim)
        out = torch.zeros_like(q_rows, memory_format=torch.contiguous_format)
        lse = q.new_full((out.shape[0], groups), float("-inf"), dtype=_wide(q.dtype))
        # Share of a query's first range in its probability; that of the second is the rest.
        share = torch.ones_like(lse)
        kept = q.new_empty(plan.num_kept * groups)
        for key_set in plan.key_sets:
            shape = (key_set.batch, key_set.extent, head_dim)
            keys = space.gather("keys", k_rows, key_set.index).view(shape)
            values = space.gather("values", v_rows, key_set.index).view(shape)
            for chunk in key_set.chunks:
                queries = space.gather("q", q_rows, chunk.index)
                part = space.get("out", *queries.shape)
                part_lse = space.get("lse", len(queries), groups, dtype=lse.dtype)
                for tile in chunk.tiles:
                    for piece in tile.pieces:
                        entries, rows = slice(piece.start, piece.end), _rows(tile, piece)
                        q_piece = _by_entry(queries[rows], piece, head_dim)
                        visible = keys[entries, : tile.width]
                        scores = _scores(space, kept, q_piece, visible, tile, piece)
                        part_lse[rows] = _softmax_and_lse_(scores).view(-1, groups)
                        out_piece = _by_entry(part[rows], piece, head_dim)
                        torch.bmm(scores, values[entries, : tile.width], out=out_piece)
                if not key_set.second:
                    lse.index_copy_(0, chunk.index, part_lse)
                    # Rows that no range has written yet are zero, and adding is faster.
                    out.index_add_(0, chunk.index, part)
                    continue
                first_lse = space.gather("first_lse", lse, chunk.index)
                part_share = torch.sigmoid(first_lse.sub_(part_lse))
                share.index_copy_(0, chunk.index, part_share)
                first = space.gather("q", out, chunk.index).view(-1, groups, head_dim)
                weight = part_share.to(q.dtype).unsqueeze(-1)
                part.view(first.shape).lerp_(first, weight)
                out.index_copy_(0, chunk.index, part)
        out = out.view(q.shape)
        ctx.save_for_backward(q, k, v, out, share, kept)
        ctx.plan = plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, share, kept = ctx.saved_tensors
        plan: TilePlan = ctx.plan
        num_kv_heads, head_dim = k.shape[1:]
        groups, scale = q.shape[1] // num_kv_heads, head_dim**-0.5
        space = _Workspace(q)
        q_rows, upstream_rows = (x.reshape(-1, groups * head_dim) for x in (q, grad_out))
        k_rows, v_rows = k.reshape(-1, head_dim), v.reshape(-1, head_dim)
        delta = _row_products(out, grad_out).view(share.shape)
        grad_q = torch.zeros_like(q_rows, memory_format=torch.contiguous_format)
        grad_k, grad_v = (x.new_zeros(x.shape, dtype=_wide(q.dtype)) for x in (k_rows, v_rows))
        for key_set in plan.key_sets:
            shape = (key_set.batch, key_set.extent, head_dim)
            keys = space.gather("keys", k_rows, key_set.index).view(shape)
            values = space.gather("values", v_rows, key_set.index).view(shape)
            sum_k = _KeyGradient(space, "sum_k", key_set, grad_k)
            sum_v = _KeyGradient(space, "sum_v", key_set, grad_v)
            widest = key_set.chunks[0].tiles[0]
            for chunk in key_set.chunks:
                queries = space.gather("q", q_rows, chunk.index)
                # With s the share of this range, and P its own probabilities, the gradient of
                # the scores is P * (s * grad_P - s * delta): s goes into the small factors.
                part_share = space.gather("share", share, chunk.index)
                part_share = 1 - part_share if key_set.second else part_share
                part = space.gather("upstream", upstream_rows, chunk.index)
                part.view(-1, groups, head_dim).mul_(part_share.to(q.dtype).unsqueeze(-1))
                part_delta = space.gather("delta", delta, chunk.index).mul_(part_share).to(q.dtype)
                for tile in chunk.tiles:
                    for piece in tile.pieces:
                        entries, rows = slice(piece.start, piece.end), _rows(tile, piece)
                        # The first tile covers all keys, so it need not find zeros in the sums.
                        entry_begins = piece.first == piece.start * tile.num_tokens
                        fresh = tile is widest and entry_begins
                        q_piece = _by_entry(queries[rows], piece, head_dim)
                        upstream = _by_entry(part[rows], piece, head_dim)
                        visible = keys[entries, : tile.width]
                        if tile.kept is None:
                            scores = _scores(space, kept, q_piece, visible, tile, piece)
                            probabilities = _softmax_(scores)
                        else:
                            probabilities = _kept(kept, q_piece, tile, piece)
                        sum_v.add(probabilities, upstream, piece, scale=1.0, fresh=fresh)
                        grad_s = space.get("grad_scores", *probabilities.shape)
                        seen_values = values[entries, : tile.width]
                        torch.bmm(upstream, seen_values.transpose(1, 2), out=grad_s)
                        grad_s.sub_(part_delta[rows].view(*upstream.shape[:2], 1))
                        grad_s.mul_(probabilities)
                        sum_k.add(grad_s, q_piece, piece, scale=scale, fresh=fresh)
                        upstream.baddbmm_(grad_s, visible, beta=0, alpha=scale)
                grad_q.index_add_(0, chunk.index, part)
            sum_k.add_to(grad_k, key_set.index)
            sum_v.add_to(grad_v, key_set.index)
        grads = (grad_q.view(q.shape), grad_k.view(k.shape), grad_v.view(v.shape))
        return (*(grad.to(q.dtype) for grad in grads), None)


def _rows(tile: QueryTile, piece: Piece) -> slice:
    """The piece's rows in its chunk."""
    return slice(tile.start + piece.first, tile.start + piece.last)


def _by_entry(rows: Tensor, piece: Piece, head_dim: int) -> Tensor:
    """[rows, G * H] -> [batch, queries * G, H]."""
    return rows.view(piece.end - piece.start, -1, head_dim)


def _row_products(left: Tensor, right: Tensor) -> Tensor:
    """Sum of products over the last dim, [T, N], in fp32 or wider."""
    out = left.new_empty(left.shape[:-1], dtype=_wide(left.dtype))
    # In steps that stay in cache: a product of full size would cost more than the sum.
    for start in range(0, left.shape[0], 256):
        part = slice(start, start + 256)
        torch.sum(left[part].to(out.dtype) * right[part], -1, out=out[part])
    return out
