"""Buffers of tiled attention, and the views of them that every tile computes with.

All layers of a micro-batch run the same tiles, so the views are made once for all of them: the
tiles are small, and making a view takes as long as some of the sums. Of very long documents, whose
pieces are many and large, they are made anew: their number grows with the square of the length.
A workspace belongs to one plan and one thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from weakref import ref

import torch
from torch import Tensor

from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.shared_buffers import shared_buffer
from sdar_kernels.tile_groups import TileSizes
from sdar_kernels.tile_plan import KeySet, Piece, QueryTile, Section, TilePlan, make_tile_plan
from sdar_kernels.tile_views import KeyGradient, PieceViews, SectionViews

# Up to this many keys a product with transposed probabilities is as fast as any; beyond, MKL
# takes 1.4 times as long, unless the transpose of the product is computed.
_FEW_KEYS = 256
# Views of more pieces than this are not stored.
_MOST_STORED = 1024


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which sums are kept."""
    return torch.promote_types(dtype, torch.float32)


class TileWorkspace:
    """The buffers that one plan computes in, and its views of them.

    Attributes:
        plan: it.
        kept_sizes: elements that each piece with kept probabilities keeps, in order.
        buffers: flat, by name; other workspaces use the same ones.
        sections: the views.
    """

    def __init__(
        self, plan: TilePlan, groups: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.plan = plan
        self._groups, self._head_dim, self._dtype = groups, head_dim, dtype
        self._device = device
        self.buffers: dict[str, Tensor] = {}
        self._allocate()
        self.sections = tuple(self._section(section) for section in plan.sections)
        self.kept_sizes = [
            (piece.last - piece.first) * groups * tile.width
            for section in plan.sections
            for tile in section.tiles
            if tile.kept
            for piece in tile.pieces
        ]

    def _allocate(self) -> None:
        """Every buffer as large as its largest use: fresh memory costs page faults."""
        rows = max(section.num_rows for section in self.plan.sections)
        second = max(section.partner.numel() for section in self.plan.sections)
        keys = max(section.keys.numel() for section in self.plan.sections)
        scores = grad_scores = part = turned = 0
        for section in self.plan.sections:
            transposed = 0
            for tile in section.tiles:
                for piece in tile.pieces:
                    size = (piece.last - piece.first) * self._groups * tile.width
                    grad_scores = max(grad_scores, size)
                    scores = max(scores, 0 if tile.kept else size)
                    part = max(part, (piece.end - piece.start) * tile.width)
                if tile.pieces[0].fresh and tile.keys.extent > _FEW_KEYS:
                    transposed += tile.keys.batch * tile.keys.extent
            turned = max(turned, transposed)
        columns, sums = self._groups * self._head_dim, wide(self._dtype)
        sizes = {
            "queries": (rows * columns, self._dtype),
            "results": ((rows + 1) * columns, self._dtype),
            "partners": (second * columns, self._dtype),
            "keys": (keys * self._head_dim, self._dtype),
            "values": (keys * self._head_dim, self._dtype),
            "sum_keys": ((keys + 1) * self._head_dim, sums),
            "sum_values": ((keys + 1) * self._head_dim, sums),
            "turned_keys": (turned * self._head_dim, sums),
            "turned_values": (turned * self._head_dim, sums),
            "part": (part * self._head_dim, self._dtype),
            "scores": (scores, self._dtype),
            "grad_scores": (grad_scores, self._dtype),
            "lse": ((rows + 1) * self._groups, sums),
            "top": (rows * self._groups, sums),
            "largest": (rows * self._groups, sums),
            "delta": (rows * self._groups, self._dtype),
        }
        for name, (size, dtype) in sizes.items():
            self.buffers[name] = shared_buffer(name, size, dtype, self._device)

    def _view(
        self, name: str, *shape: int, at: int = 0, strides: tuple[int, ...] | None = None
    ) -> Tensor:
        """From element `at` on, contiguous by default: one call, where slices would be several."""
        if strides is None:
            strides = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
        return self.buffers[name].as_strided(shape, strides, at)

    def _section(self, section: Section) -> SectionViews:
        rows, num_keys = section.num_rows, section.keys.numel()
        columns, num_second = self._groups * self._head_dim, section.partner.numel()
        padded = self._view("results", rows + 1, columns)
        results = padded[:rows]
        keys, values = (self._view(name, num_keys, self._head_dim) for name in ("keys", "values"))
        sum_keys, sum_values = (
            self._view(name, num_keys + 1, self._head_dim) for name in ("sum_keys", "sum_values")
        )
        turned: list[tuple[Tensor, Tensor]] = []
        # Where the sums of a key set begin that are computed transposed.
        places: dict[KeySet, int] = {}
        used = 0
        for key_set in dict.fromkeys(tile.keys for tile in section.tiles):
            if key_set.extent > _FEW_KEYS:
                places[key_set] = used
                shape = (key_set.batch, self._head_dim, key_set.extent)
                for name in ("keys", "values"):
                    target = self._view(
                        f"sum_{name}",
                        *(shape[0], shape[2], shape[1]),
                        at=key_set.start * self._head_dim,
                    )
                    source = self._view(f"turned_{name}", *shape, at=used)
                    turned.append((target, source.transpose(1, 2)))
                used += prod(shape)
        return SectionViews(
            section,
            queries=self._view("queries", rows, columns),
            results=results,
            padded=padded,
            keys=keys,
            values=values,
            sum_keys=sum_keys,
            sum_values=sum_values,
            second=results[section.num_first :],
            partners=self._view("partners", num_second, columns),
            lse=self._view("lse", rows + 1, self._groups),
            top=self._view("top", rows, self._groups),
            largest=self._view("largest", rows, self._groups),
            delta=self._view("delta", rows, self._groups),
            turned=tuple(turned),
            pieces=_Pieces(self, section, places),
        )

    def pieces(self, section: Section, places: Mapping[KeySet, int]) -> Iterator[PieceViews]:
        """Views of a section's pieces, made now; `places` as in `_section`."""
        for tile in section.tiles:
            hidden = self._hidden(tile)
            for piece in tile.pieces:
                yield self._piece(tile, piece, places.get(tile.keys), hidden)

    def _hidden(self, tile: QueryTile) -> Tensor | None:
        """[batch * num_tokens, 1, masked]: 0 for keys that are seen, then -inf."""
        if tile.seen is None:
            return None
        seen = torch.from_numpy(tile.seen).to(self._device)[:, None, None]
        columns = torch.arange(tile.masked, device=self._device)
        zeros = torch.zeros(1, dtype=self._dtype, device=self._device)
        return zeros.masked_fill(columns >= seen, float("-inf"))

    def _piece(
        self, tile: QueryTile, piece: Piece, turned: int | None, hidden: Tensor | None
    ) -> PieceViews:
        """The views of a piece; `turned` is where its key set's transposed sums begin, if any."""
        batch, rows = piece.end - piece.start, piece.last - piece.first
        each = rows // batch * self._groups
        start = (tile.start + piece.first) * self._groups
        extent, head_dim = tile.keys.extent, self._head_dim
        first_key = (tile.keys.start + piece.start * extent) * head_dim

        def queries(name: str) -> Tensor:
            return self._view(name, batch, each, head_dim, at=start * head_dim)

        def keys(name: str) -> Tensor:
            strides = (extent * head_dim, head_dim, 1)
            return self._view(name, batch, tile.width, head_dim, at=first_key, strides=strides)

        def gradient(name: str) -> KeyGradient:
            if turned is None:
                total = keys(f"sum_{name}")
            else:
                strides = (extent * head_dim, extent, 1)
                at = turned + piece.start * extent * head_dim
                total = self._view(
                    f"turned_{name}", batch, head_dim, tile.width, at=at, strides=strides
                )
            direct = total.dtype == self._dtype and (tile.width == extent or batch == 1)
            part = None if direct else self._view("part", *total.shape)
            return KeyGradient(total, part, turned is not None, piece.fresh)

        shape = (batch, each, tile.width)
        keys_view, values_view = keys("keys"), keys("values")
        if hidden is not None:
            hidden = hidden[piece.first : piece.last].view(batch, -1, 1, tile.masked)
        return PieceViews(
            queries=queries("queries"),
            results=queries("results"),
            keys=keys_view,
            keys_t=keys_view.transpose(1, 2),
            values=values_view,
            values_t=values_view.transpose(1, 2),
            hidden=hidden,
            scores=None if tile.kept else self._view("scores", *shape),
            shape=shape,
            grad_scores=self._view("grad_scores", *shape),
            top=self._view("top", batch, each, at=start),
            largest=self._view("largest", batch, each, at=start),
            delta=self._view("delta", batch, each, 1, at=start),
            sum_keys=gradient("keys"),
            sum_values=gradient("values"),
        )


class _Pieces:
    """All pieces of a section, stored if they are few."""

    def __init__(
        self, space: TileWorkspace, section: Section, places: Mapping[KeySet, int]
    ) -> None:
        self._arguments = (section, places)
        self._space = ref(space)
        number = sum(len(tile.pieces) for tile in section.tiles)
        self._stored = tuple(space.pieces(*self._arguments)) if number <= _MOST_STORED else None

    def __iter__(self) -> Iterator[PieceViews]:
        if self._stored is not None:
            return iter(self._stored)
        space = self._space()
        assert space is not None, "who iterates holds the workspace"
        return space.pieces(*self._arguments)


def make_workspace(
    mask: AttentionMask,
    num_kv_heads: int,
    groups: int,
    head_dim: int,
    dtype: torch.dtype,
    sizes: TileSizes,
) -> TileWorkspace:
    """For q [T, K * groups, head_dim]; plans are shared by head dims and dtypes."""
    plan = mask.plan(make_tile_plan, num_kv_heads, sizes, groups)
    # The workspace serves inference and training: tensors made in inference mode would not.
    with torch.inference_mode(False), torch.no_grad():
        return TileWorkspace(plan, groups, head_dim, dtype, mask.key_intervals.device)
