"""Tiled attention for CPU: only keys that some query of a tile may see are computed.

Every query's two ranges are attended to apart and joined by their log-sum-exp, so a noisy query
pays for its own block exactly. Query heads of one key head are folded into matmul rows. Saves
O(T) tensors and recomputes the probabilities in backward; gradients of keys and values, which
many queries add to, are summed in fp32 or wider.

Shape legend: T queries, S keys, N query heads, K key heads, G = N // K, H head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.tile_groups import TileSizes
from sdar_kernels.tile_views import PieceViews, SectionViews
from sdar_kernels.tile_workspace import TileWorkspace, make_workspace, wide

# torch.softmax takes as long for a row of 4 as for one of 100.
_NARROW = 16
# Rows of a product of full size: more would leave the cache.
_CACHED_ROWS = 512


def tiled_attention(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    mask: AttentionMask,
    sizes: TileSizes | None = None,
) -> Tensor:
    """Attention under `mask`; same contract as `reference.attention`."""
    num_kv_heads, head_dim = k_SKH.shape[1:]
    groups = q_TNH.shape[1] // num_kv_heads
    sizes = sizes or default_sizes()
    space = mask.plan(make_workspace, num_kv_heads, groups, head_dim, q_TNH.dtype, sizes)
    out: Tensor = _TiledAttention.apply(q_TNH, k_SKH, v_SKH, space)
    return out


def default_sizes() -> TileSizes:
    """Measured sizes. With several threads fewer and larger tiles: calls from Python are serial."""
    return TileSizes() if torch.get_num_threads() == 1 else TileSizes(short_tile=64)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, space: TileWorkspace) -> Tensor:
        plan, head_dim = space.plan, k.shape[-1]
        groups = q.shape[1] // k.shape[1]
        q_rows = q.reshape(-1, groups * head_dim)
        k_rows, v_rows = k.reshape(-1, head_dim), v.reshape(-1, head_dim)
        # Share of a row's range in its query's probability.
        share = q.new_ones(plan.num_rows, groups, dtype=wide(q.dtype))
        kept = _kept(q, sum(space.kept_sizes))
        parts = iter(kept.split_with_sizes(space.kept_sizes))
        out = torch.empty_like(q_rows, memory_format=torch.contiguous_format)
        for views in space.sections:
            section = views.section
            _gather(views, q_rows, k_rows, v_rows)
            for piece in views.pieces:
                scores = _scores(piece, _place(piece, parts))
                _softmax_with_largest_(piece, scores)
                torch.bmm(scores, piece.values, out=piece.results)
            if section.partner.numel():
                _join(views, _share(share, views))
            if section.outputs is None:
                torch.index_select(views.results, 0, section.results, out=out)
            else:
                out.index_copy_(0, section.outputs, views.results[section.results])
        out = out.view(q.shape)
        ctx.save_for_backward(q, k, v, out, share, kept)
        ctx.space = space
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, share, kept = ctx.saved_tensors
        space: TileWorkspace = ctx.space
        plan, head_dim = space.plan, k.shape[-1]
        groups = q.shape[1] // k.shape[1]
        q_rows, upstream = (x.reshape(-1, groups * head_dim) for x in (q, grad_out))
        k_rows, v_rows = k.reshape(-1, head_dim), v.reshape(-1, head_dim)
        delta = _row_products(out, grad_out).view(-1, groups)
        parts = iter(kept.split_with_sizes(space.kept_sizes))
        grad_q = torch.empty_like(q_rows, memory_format=torch.contiguous_format)
        grad_k = grad_v = None
        if plan.key_results is None:
            grad_k, grad_v = (x.new_zeros(x.shape, dtype=wide(q.dtype)) for x in (k_rows, v_rows))
        for views in space.sections:
            section = views.section
            _gather(views, q_rows, k_rows, v_rows)
            torch.index_select(upstream, 0, section.queries, out=views.results)
            # With s the share of a range, and P its own probabilities, the gradient of its scores
            # is P * (s * grad_P - s * delta): s goes into the small factors.
            mine = _share(share, views)[: section.num_rows]
            heads = views.results.view(-1, groups, head_dim)
            heads.mul_(mine.to(q.dtype).unsqueeze(-1))
            torch.mul(delta.index_select(0, section.queries), mine, out=views.delta)
            for piece in views.pieces:
                _piece_backward(piece, _place(piece, parts))
            if section.partner.numel():
                views.second.add_(_partners(views))
            if section.outputs is None:
                torch.index_select(views.results, 0, section.results, out=grad_q)
            else:
                grad_q.index_copy_(0, section.outputs, views.results[section.results])
            for total, turned in views.turned:
                total.copy_(turned)
            if grad_k is not None and grad_v is not None:
                grad_k.index_add_(0, section.keys, views.sum_keys[:-1])
                grad_v.index_add_(0, section.keys, views.sum_values[:-1])
        if plan.key_results is not None:
            grad_k, grad_v = _only_sums(space.sections[0], plan.key_results)
        assert grad_k is not None, "there is a section"
        assert grad_v is not None, "there is a section"
        grads = (grad_q.view(q.shape), grad_k.view(k.shape), grad_v.view(v.shape))
        return (*(grad.to(q.dtype) for grad in grads), None)


def _gather(views: SectionViews, q_rows: Tensor, k_rows: Tensor, v_rows: Tensor) -> None:
    """Copy what a section's tiles read into their order."""
    section = views.section
    torch.index_select(q_rows, 0, section.queries, out=views.queries)
    torch.index_select(k_rows, 0, section.keys, out=views.keys)
    torch.index_select(v_rows, 0, section.keys, out=views.values)


def _kept(q: Tensor, size: int) -> Tensor:
    """Room for what is kept for backward.

    Micro-batches keep a little more or less than the one before. In steps of an eighth or less it
    fits, as a rule, where that one's was, and the heap does not grow.
    """
    step = 1 << max(0, size.bit_length() - 4)
    return q.new_empty(-(-size // step) * step)[:size]


def _place(piece: PieceViews, kept: Iterator[Tensor]) -> Tensor:
    """Where the piece's probabilities lie, [b, r, w]."""
    return next(kept).view(piece.shape) if piece.scores is None else piece.scores


def _scores(piece: PieceViews, scores: Tensor) -> Tensor:
    """q k^T / sqrt(H), hidden keys at -inf; returns its argument."""
    scale = piece.queries.shape[-1] ** -0.5
    scores.baddbmm_(piece.queries, piece.keys_t, beta=0, alpha=scale)
    if piece.hidden is not None:
        batch, _, width = piece.shape
        last = scores[..., width - piece.hidden.shape[-1] :]
        last.view(batch, piece.hidden.shape[1], -1, piece.hidden.shape[-1]).add_(piece.hidden)
    return scores


def _softmax_(scores: Tensor) -> None:
    """In place, over the last dim."""
    if scores.shape[-1] > _NARROW:
        torch.softmax(scores, -1, out=scores)
    else:
        scores.sub_(scores.amax(-1, keepdim=True)).exp_()
        scores.div_(scores.sum(-1, keepdim=True))


def _softmax_with_largest_(piece: PieceViews, scores: Tensor) -> None:
    """The same; writes down the largest score and the largest probability of every row."""
    for largest in (piece.top, piece.largest):
        if largest.dtype == scores.dtype:
            torch.amax(scores, -1, out=largest)
        else:
            largest.copy_(scores.amax(-1))
        if largest is piece.top:
            _softmax_(scores)


def _share(share: Tensor, views: SectionViews) -> Tensor:
    """The section's rows and the one to spare."""
    section = views.section
    return share[section.at : section.at + section.num_rows + 1]


def _partners(views: SectionViews) -> Tensor:
    """For every row of a second range, what the row of the first has in `results`, or zero."""
    views.padded[-1:].zero_()
    return torch.index_select(views.padded, 0, views.section.partner, out=views.partners)


def _join(views: SectionViews, share: Tensor) -> None:
    """Rows of second ranges become their query's result; shares are written down."""
    section, groups = views.section, share.shape[1]
    # The largest probability is exp(top - lse), and not small.
    torch.sub(views.top, views.largest.log_(), out=views.lse[:-1])
    views.lse[-1:].fill_(float("-inf"))
    first = views.lse.index_select(0, section.partner)
    first = first.sub_(views.lse[section.num_first : -1]).sigmoid_()
    torch.sub(1, first, out=share[section.num_first : -1])
    share.index_copy_(0, section.partner, first)
    second = views.second.view(first.shape[0], groups, -1)
    second.lerp_(_partners(views).view(second.shape), first.to(second.dtype).unsqueeze(-1))


def _piece_backward(piece: PieceViews, probabilities: Tensor) -> None:
    """Adds to the sums of keys and values; the upstream gradient becomes that of the queries."""
    if piece.scores is not None:
        _scores(piece, probabilities)
        _softmax_(probabilities)
    upstream, grad_scores = piece.results, piece.grad_scores
    piece.sum_values.add(probabilities, upstream, 1.0)
    torch.bmm(upstream, piece.values_t, out=grad_scores)
    grad_scores.sub_(piece.delta).mul_(probabilities)
    scale = piece.queries.shape[-1] ** -0.5
    piece.sum_keys.add(grad_scores, piece.queries, scale)
    upstream.baddbmm_(grad_scores, piece.keys, beta=0, alpha=scale)


def _only_sums(views: SectionViews, key_results: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of k and v, [S * K, H]; nobody reads the keys that have the row to spare."""
    for sums in (views.sum_keys, views.sum_values):
        sums[-1:].zero_()
    return (
        views.sum_keys.index_select(0, key_results),
        views.sum_values.index_select(0, key_results),
    )


def _row_products(left: Tensor, right: Tensor) -> Tensor:
    """Sum of products over the last dim, [T, N], in fp32 or wider."""
    out = left.new_empty(left.shape[:-1], dtype=wide(left.dtype))
    for start in range(0, left.shape[0], _CACHED_ROWS):
        part = slice(start, start + _CACHED_ROWS)
        torch.sum(left[part].to(out.dtype) * right[part], -1, out=out[part])
    return out
