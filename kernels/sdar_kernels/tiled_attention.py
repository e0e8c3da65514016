"""Tiled attention for CPU: only keys that some query of a tile may see are computed.

Every query's two ranges are attended to apart and joined by their log-sum-exp, so a noisy query
pays for its own block exactly. Query heads of one key head are folded into matmul rows. Saves
O(T) tensors and recomputes the probabilities in backward; gradients of keys and values, which
many queries add to, are summed in fp32 or wider.

Shape legend: T queries, S keys, N query heads, K key heads, G = N // K, H head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.tile_groups import KeySet, QueryTile, TilePlan, TileSizes, make_tile_plan
from sdar_kernels.tile_rows import Rows

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
    sizes = sizes or TileSizes()
    plan = mask.plan(make_tile_plan, k_SKH.shape[1], sizes)
    out: Tensor = _TiledAttention.apply(q_TNH, k_SKH, v_SKH, plan, sizes)
    return out


class _Piece(NamedTuple):
    """Part of a tile that is computed at a time: [start, end) of its batch, and of its queries."""

    start: int
    end: int
    first_query: int
    last_query: int

    @property
    def num_queries(self) -> int:
        return self.last_query - self.first_query

    @property
    def batch(self) -> int:
        return self.end - self.start

    def rows(self, tile: QueryTile) -> Rows:
        return tile.rows.part(self.start, self.end, self.first_query, self.last_query)

    def seen(self, tile: QueryTile) -> Tensor:
        assert tile.seen is not None, "the tile has hidden keys"
        start = self.start * tile.rows.num_tokens + self.first_query
        return tile.seen[start : (self.end - 1) * tile.rows.num_tokens + self.last_query]


def _pieces(key_set: KeySet, tile: QueryTile, groups: int, sizes: TileSizes) -> Iterator[_Piece]:
    """Pieces of bounded size; one that leaves out queries belongs to one batch entry."""
    num_tokens, num_kv_heads = tile.rows.num_tokens, tile.rows.num_kv_heads
    num_scores = num_tokens * groups * tile.width
    if num_scores > sizes.row_scores:
        # Fewer than 128 rows would cost more in packing the keys than they save in cache.
        step = max(-(-128 // groups), sizes.row_scores // (tile.width * groups))
        for entry in range(key_set.batch):
            for query in range(0, num_tokens, step):
                yield _Piece(entry, entry + 1, query, min(query + step, num_tokens))
    else:
        step = max(1, sizes.batch_scores // num_scores)
        # Whole documents if one fits, so that rows can be written as stretches of tokens.
        step = step // num_kv_heads * num_kv_heads or step
        for entry in range(0, key_set.batch, step):
            yield _Piece(entry, min(entry + step, key_set.batch), 0, num_tokens)


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

    def gather(self, name: str, source: Tensor, rows: Rows) -> Tensor:
        """source[rows], [rows, columns]."""
        out = self.get(name, len(rows.index), source.shape[1], dtype=source.dtype)
        return rows.gather(source, out)

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
    space: _Workspace,
    kept: Tensor,
    q: Tensor,
    keys: Tensor,
    tile: QueryTile,
    piece: _Piece,
    groups: int,
) -> Tensor:
    """q k^T / sqrt(H), hidden keys at -inf: [batch, queries * G, width]; in `kept` if so."""
    if tile.kept is None:
        scores = space.get("scores", piece.batch, piece.num_queries * groups, tile.width)
    else:
        scores = _kept(kept, tile, piece, groups)
    scores.baddbmm_(q, keys.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
    if tile.seen is not None:
        table = space.hiding(tile.masked)
        seen = piece.seen(tile)
        hidden = space.get("hidden", len(seen), tile.masked, dtype=table.dtype)
        torch.index_select(table, 0, seen, out=hidden)
        last = scores[..., tile.width - tile.masked :]
        last = last.view(piece.batch, piece.num_queries, groups, tile.masked)
        last.add_(hidden.view(piece.batch, piece.num_queries, 1, tile.masked))
    return scores


def _kept(kept: Tensor, tile: QueryTile, piece: _Piece, groups: int) -> Tensor:
    """The piece's part of what is kept for backward: [batch, queries * G, width]."""
    assert tile.kept is not None, "the tile's probabilities are kept"
    row = piece.start * tile.rows.num_tokens + piece.first_query
    start = (tile.kept + row * tile.width) * groups
    shape = (piece.batch, piece.num_queries * groups, tile.width)
    return kept[start : start + prod(shape)].view(shape)


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
        self, weights: Tensor, rows: Tensor, piece: _Piece, *, scale: float, fresh: bool
    ) -> None:
        """+= scale * weights^T rows; weights [batch, queries * G, width], rows [..., H]."""
        part, width = self._sum[piece.start : piece.end], weights.shape[-1]
        if self._few:
            factors = (weights.transpose(1, 2), rows)
            _accumulate_(self._space, part[:, :width], *factors, scale, fresh)
        else:
            factors = (rows.transpose(1, 2), weights)
            _accumulate_(self._space, part[..., :width], *factors, scale, fresh)

    def add_to(self, total: Tensor, rows: Rows) -> None:
        """total[rows] += the gradient."""
        keys_first = self._sum if self._few else self._sum.transpose(1, 2)
        rows.add(total, keys_first.reshape(-1, total.shape[1]))


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: TilePlan, sizes: TileSizes
    ) -> Tensor:
        num_kv_heads, head_dim = k.shape[1:]
        groups = q.shape[1] // num_kv_heads
        space = _Workspace(q)
        q_rows = q.reshape(-1, groups * head_dim)
        k_rows, v_rows = k.reshape(-1, head_dim), v.reshape(-1, head_dim)
        out = torch.empty_like(q_rows, memory_format=torch.contiguous_format)
        out.index_fill_(0, plan.second_only.index, 0)
        lse = q.new_full((out.shape[0], groups), float("-inf"), dtype=_wide(q.dtype))
        # Share of a query's first range in its probability; that of the second is the rest.
        share = torch.ones_like(lse)
        kept = q.new_empty(plan.num_kept * groups)
        for key_set in plan.key_sets:
            shape = (key_set.batch, key_set.extent, head_dim)
            keys = space.gather("keys", k_rows, key_set.rows).view(shape)
            values = space.gather("values", v_rows, key_set.rows).view(shape)
            for tile in key_set.tiles:
                for piece in _pieces(key_set, tile, groups, sizes):
                    rows, entries = piece.rows(tile), slice(piece.start, piece.end)
                    queries = space.gather("q", q_rows, rows).view(piece.batch, -1, head_dim)
                    visible = keys[entries, : tile.width]
                    probabilities = _scores(space, kept, queries, visible, tile, piece, groups)
                    part_lse = _softmax_and_lse_(probabilities).view(-1, groups)
                    part = space.get("out", *queries.shape)
                    torch.bmm(probabilities, values[entries, : tile.width], out=part)
                    if key_set.second:
                        first_lse = space.gather("lse", lse, rows)
                        part_share = torch.sigmoid(first_lse.sub_(part_lse))
                        rows.put(share, part_share)
                        first = space.gather("q", out, rows).view(-1, groups, head_dim)
                        weight = part_share.to(q.dtype).unsqueeze(-1)
                        part = part.view(first.shape).lerp_(first, weight)
                    else:
                        rows.put(lse, part_lse)
                    rows.put(out, part.view(len(rows.index), -1))
        out = out.view(q.shape)
        ctx.save_for_backward(q, k, v, out, share, kept)
        ctx.plan, ctx.sizes = plan, sizes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, share, kept = ctx.saved_tensors
        num_kv_heads, head_dim = k.shape[1:]
        groups, scale = q.shape[1] // num_kv_heads, head_dim**-0.5
        space = _Workspace(q)
        q_rows, upstream_rows = (x.reshape(-1, groups * head_dim) for x in (q, grad_out))
        k_rows, v_rows = k.reshape(-1, head_dim), v.reshape(-1, head_dim)
        delta = _row_products(out, grad_out).view(share.shape)
        grad_q = torch.empty_like(q_rows, memory_format=torch.contiguous_format)
        grad_q.index_fill_(0, ctx.plan.second_only.index, 0)
        grad_k, grad_v = (x.new_zeros(x.shape, dtype=_wide(q.dtype)) for x in (k_rows, v_rows))
        for key_set in ctx.plan.key_sets:
            shape = (key_set.batch, key_set.extent, head_dim)
            keys = space.gather("keys", k_rows, key_set.rows).view(shape)
            values = space.gather("values", v_rows, key_set.rows).view(shape)
            sum_k = _KeyGradient(space, "sum_k", key_set, grad_k)
            sum_v = _KeyGradient(space, "sum_v", key_set, grad_v)
            for number, tile in enumerate(key_set.tiles):
                for piece in _pieces(key_set, tile, groups, ctx.sizes):
                    rows, entries = piece.rows(tile), slice(piece.start, piece.end)
                    # The first tile covers all keys, so it need not find zeros in the sums.
                    fresh = number == 0 and piece.first_query == 0
                    queries = space.gather("q", q_rows, rows).view(piece.batch, -1, head_dim)
                    visible = keys[entries, : tile.width]
                    if tile.kept is None:
                        probabilities = _softmax_(
                            _scores(space, kept, queries, visible, tile, piece, groups)
                        )
                    else:
                        probabilities = _kept(kept, tile, piece, groups)
                    # With s the share of this range, and P its own probabilities, the gradient
                    # of the scores is P * (s * grad_P - s * delta): s goes into the small factors.
                    part_share = space.gather("share", share, rows)
                    part_share = 1 - part_share if key_set.second else part_share
                    upstream = space.gather("upstream", upstream_rows, rows)
                    upstream.view(-1, groups, head_dim).mul_(part_share.to(q.dtype).unsqueeze(-1))
                    upstream = upstream.view(queries.shape)
                    part_delta = space.gather("delta", delta, rows).mul_(part_share).to(q.dtype)
                    sum_v.add(probabilities, upstream, piece, scale=1.0, fresh=fresh)
                    grad_s = space.get("grad_scores", *probabilities.shape)
                    torch.bmm(upstream, values[entries, : tile.width].transpose(1, 2), out=grad_s)
                    grad_s.sub_(part_delta.view(piece.batch, -1, 1)).mul_(probabilities)
                    sum_k.add(grad_s, queries, piece, scale=scale, fresh=fresh)
                    part = upstream.baddbmm_(grad_s, visible, beta=0, alpha=scale)
                    part = part.view(len(rows.index), -1)
                    if key_set.second:
                        rows.add(grad_q, part)
                    else:
                        rows.put(grad_q, part)
            sum_k.add_to(grad_k, key_set.rows)
            sum_v.add_to(grad_v, key_set.rows)
        grads = (grad_q.view(q.shape), grad_k.view(k.shape), grad_v.view(v.shape))
        return (*(grad.to(q.dtype) for grad in grads), None, None)


def _row_products(left: Tensor, right: Tensor) -> Tensor:
    """Sum of products over the last dim, [T, N], in fp32 or wider."""
    out = left.new_empty(left.shape[:-1], dtype=_wide(left.dtype))
    # In steps that stay in cache: a product of full size would cost more than the sum.
    for start in range(0, left.shape[0], 256):
        part = slice(start, start + 256)
        torch.sum(left[part].to(out.dtype) * right[part], -1, out=out[part])
    return out
