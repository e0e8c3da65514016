"""The endless stream of packed rows, a pure function of the position.

One packed dataset gives the concatenation of one permutation per epoch, each keyed by (seed,
epoch), so asking for more epochs changes nothing earlier. A blend deals positions to datasets
by its schedule, and each runs through epochs of its own. Noise is drawn here, by counter, from
(seed, epoch, document, piece). The block length may grow at a row; rows are packed for the
largest, so which documents share a row never depends on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sdar.data.loading.blend import BlendSchedule
from megatron_sdar.data.loading.documents import DocumentStore
from megatron_sdar.data.loading.packing import PackedIndex, pad_to_block
from megatron_sdar.data.loading.row_options import RowOptions
from megatron_sdar.diffusion.noise import NoiseKey, epoch_order
from megatron_sdar.diffusion.noise_schedule import NoisyDocuments, draw_views
from megatron_sdar.diffusion.rows import IGNORED_LABEL, Row, build_row, full_copies

_LONGEST_IDENTITY = 100


@dataclass(frozen=True)
class RowPart:
    """Packed documents: the rows of `index` hold positions of the store's selection."""

    store: DocumentStore
    index: PackedIndex

    def identity(self) -> dict[str, object]:
        """What the part's rows depend on besides tokens and options, as JSON; O(N)."""
        digest = hashlib.sha256()
        for array in (self.index.row_offsets, self.index.doc_ids, self.index.pieces):
            if array is not None:
                digest.update(f"{array.dtype.str}{array.size}".encode())
                digest.update(np.ascontiguousarray(array).data)
        return {
            "num_rows": len(self.index),
            "packing": digest.hexdigest()[:16],
            "documents": self.store.selection_digest(),
            "truncate_mode": f"{self.index.truncate_mode} at {self.index.limit}",
        }


class RowStream:
    """Rows by position.

    Args:
        parts: one packed dataset, or those of a blend: selections of one store, so that no two
            documents have the same id and noise.
        options: how rows are made.
        schedule: which part gives each row; needed for several parts.

    Raises:
        ValueError: the schedule is not for this number of datasets.
    """

    def __init__(
        self,
        parts: Sequence[RowPart],
        options: RowOptions,
        schedule: BlendSchedule | None = None,
    ) -> None:
        self.parts = list(parts)
        self.options = options
        self.noise = options.noise
        self.schedule = schedule
        weighed = 1 if schedule is None else schedule.num_datasets
        if weighed != len(self.parts):
            raise ValueError(
                f"blend: {len(self.parts)} datasets but weights for {weighed}; give one weight "
                "per dataset"
            )
        shared = self.parts[0].store.datasets
        assert all(part.store.datasets == shared for part in parts), "parts number documents apart"
        self._order = lru_cache(maxsize=2 * len(self.parts))(self._make_order)
        self._first_places = lru_cache(maxsize=2 * len(self.parts))(self._make_first_places)

    @property
    def num_rows(self) -> int:
        """Rows of all parts: what one epoch has."""
        return sum(len(part.index) for part in self.parts)

    def identity(self, position: int) -> dict[str, object]:
        """What the rows before and at a position depend on, as JSON of a few hundred bytes.

        Of a schedule, only the segments that have begun: later ones may be changed.
        """
        segments = None if self.schedule is None else self.schedule.until(position)
        begun = [
            [first, length]
            for first, length in self.options.block_lengths
            if first < position or not first
        ]
        changing = {"blend": _brief(segments), "block_lengths": _brief(begun)}
        return {**self._fixed_identity, **changing}

    @cached_property
    def _fixed_identity(self) -> dict[str, object]:
        datasets = [dataset.metadata.fingerprint[:16] for dataset in self.parts[0].store.datasets]
        parts = [part.identity() for part in self.parts]
        by_key = {
            key: _brief([part[key] for part in parts]) if len(parts) > 1 else parts[0][key]
            for key in parts[0]
        }
        return {**asdict(self.options), **by_key, "datasets": _brief(datasets)}

    def place(self, position: int) -> tuple[int, int, int]:
        """(part, its epoch, its row) at a position."""
        part, count = self._locate(position)
        return (part, *self.row_of(part, count))

    def row_of(self, part: int, count: int) -> tuple[int, int]:
        """(epoch, row) of one part's row with this number, counted over all epochs."""
        epoch, place = divmod(count, len(self.parts[part].index))
        return epoch, int(self._order(part, epoch)[place]) if self.options.shuffle else place

    def documents_before(self, part: int, count: int) -> int:
        """Documents in the rows of the same epoch before one part's row with this number."""
        epoch, place = divmod(count, len(self.parts[part].index))
        return int(self._first_places(part, epoch)[place])

    def row_at(self, position: int) -> Row:
        """The row at a position of the stream."""
        number, count = self._locate(position)
        epoch, row = self.row_of(number, count)
        part = self.parts[number]
        return self.make_row(
            part.store.ids_at(part.index.row(row)),
            epoch,
            part.index.row_pieces(row),
            part=number,
            first_place=self.documents_before(number, count),
            block_length=self.options.block_length_at(position),
        )

    def documents_at(self, position: int) -> list[tuple[int, int]]:
        """(document id, which piece of it) of the row at a position."""
        number, count = self._locate(position)
        _, row = self.row_of(number, count)
        part = self.parts[number]
        ids = part.store.ids_at(part.index.row(row))
        return list(zip(ids.tolist(), part.index.row_pieces(row).tolist(), strict=True))

    def make_row(
        self,
        document_ids: NDArray[np.int64],
        epoch: int,
        pieces: NDArray[np.int32] | None = None,
        *,
        part: int = 0,
        first_place: int = 0,
        block_length: int | None = None,
    ) -> Row:
        """Truncate, pad, noise and lay out documents as one row.

        Args:
            document_ids: int64 [D], ids of the store (not positions of its selection).
            epoch: of the noise.
            pieces: int32 [D], which part of its document each is; None: the first.
            part: whose truncation applies.
            first_place: of the first document in the order of its epoch (`documents_before`);
                stratified noise follows from it.
            block_length: None: that of the options.

        Raises:
            ValueError: damaged token files; documents that do not fit in a row.
        """
        options, block = self.options, block_length or self.options.block_length
        numbers = document_ids.tolist()
        piece_numbers = [0] * len(numbers) if pieces is None else pieces.tolist()
        padded = [
            self.tokens(part, number, piece, block)
            for number, piece in zip(numbers, piece_numbers, strict=True)
        ]
        views = draw_views(
            self.noise,
            NoiseKey(options.seed, epoch),
            NoisyDocuments(
                numbers,
                piece_numbers,
                [part] * len(numbers),
                range(first_place, first_place + len(numbers)),
                [ids.size for ids, _ in padded],
                np.concatenate([labels for _, labels in padded]) != IGNORED_LABEL,
            ),
            block,
        )
        documents = [
            full_copies(ids, labels, block, noise)
            for (ids, labels), (noise,) in zip(padded, views, strict=True)
        ]
        return build_row(
            documents, 2 * options.cutoff_len, block, options.mask_token_id, options.pad_token_id
        )

    def tokens(
        self, part: int, document_id: int, piece: int, block_length: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """ids and labels of a document (of one piece of it), truncated and padded to blocks."""
        options = self.options
        return pad_to_block(
            *self.kept(self.parts[part], document_id, piece),
            block_length,
            options.pad_token_id,
            options.block_padding_labels,
        )

    def kept(
        self, part: RowPart, document_id: int, piece: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """ids and labels of what truncation leaves of a document (of one piece of it)."""
        ids, labels = part.store.get(document_id)
        limit, mode = part.index.limit, part.index.truncate_mode
        if ids.size <= limit:
            return ids, labels
        if mode == "split":
            span = slice(piece * limit, (piece + 1) * limit)
            return ids[span], labels[span]
        if mode == "drop":
            raise ValueError(
                f"document {document_id} has {ids.size} tokens, and truncate_mode drop leaves "
                f"out what has over {limit}; raise cutoff_len or use truncate_mode cut"
            )
        ranges = part.store.cut_ranges(document_id, limit)
        kept = np.concatenate([np.arange(start, stop) for start, stop in ranges])
        return ids[kept], labels[kept]

    def _locate(self, position: int) -> tuple[int, int]:
        """(part, which of its rows over all epochs) at a position."""
        return (0, position) if self.schedule is None else self.schedule.locate(position)

    def _make_first_places(self, part: int, epoch: int) -> NDArray[np.int64]:
        """Documents before each row of an epoch, int64 [rows]."""
        sizes = np.diff(self.parts[part].index.row_offsets)
        if self.options.shuffle:
            sizes = sizes[self._order(part, epoch)]
        return np.cumsum(sizes) - sizes

    def _make_order(self, part: int, epoch: int) -> NDArray[np.int64]:
        return epoch_order(len(self.parts[part].index), self.options.seed, epoch, part)


def _brief(value: Any) -> Any:
    """The JSON value itself when it is short, else its digest."""
    text = json.dumps(value)
    if len(text) <= _LONGEST_IDENTITY:
        return json.loads(text)
    return f"{len(value)} of sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
