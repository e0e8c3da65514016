"""Rows bit for bit: the plain computation, a document and a token at a time.

What the loader computes for all documents of a row at once must stay what this file says, or a
resumed run goes on with other noise.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from unit.token_lists import MASK_ID, OPTIONS, PAD_ID, pack, random_documents, same

from megatron_sdar.data.loading.documents import DocumentStore
from megatron_sdar.data.loading.loader import RowLoader, RowOptions
from megatron_sdar.diffusion.rows import Row


def plain_row(
    store: DocumentStore, document_ids: list[int], epoch: int, options: RowOptions
) -> Row:
    """A row of whole documents: numpy's own generator per document, loops over tokens."""
    block, length = options.block_length, 2 * options.cutoff_len
    documents = []
    for number in document_ids:
        ids, labels = (part.tolist() for part in store.get(number))
        pads = [PAD_ID] * (-len(ids) % block)
        words = np.random.Philox(
            key=np.array([options.seed, epoch], dtype=np.uint64),
            counter=np.array([0, 0, number, 0], dtype=np.uint64),
        ).random_raw(1 + len(ids) + len(pads))
        t, *levels = [(word >> 11) / 2**53 for word in words.tolist()]
        documents.append((ids + pads, labels + pads, (1 - options.noise_eps) * t, levels))
    input_ids: list[int] = []
    positions: list[int] = []
    intervals: list[list[int]] = []
    segments: list[int] = []
    loss, targets, weights, clean_starts = [], [], [], []
    for ids, _, _, _ in documents:
        start = len(input_ids)
        clean_starts.append(start)
        segments.append(start)
        for place, token in enumerate(ids):
            input_ids.append(token)
            positions.append(place)
            intervals.append([start, start + (place // block + 1) * block, 0, 0])
    for (ids, labels, scaled, levels), start in zip(documents, clean_starts, strict=True):
        segments.append(len(input_ids))
        probability = scaled + options.noise_eps
        for place, token in enumerate(ids):
            masked = labels[place] != -100 and levels[place] < probability
            if masked:
                loss.append(len(input_ids))
                targets.append(token)
                weights.append(1.0 / probability)
            before = start + place // block * block
            own = len(input_ids) - place % block
            intervals.append([start, before, own, own + block])
            input_ids.append(MASK_ID if masked else token)
            positions.append(place)
    end = len(input_ids)
    if end < length:
        segments.append(end)
    return Row(
        input_ids=np.array(input_ids + [PAD_ID] * (length - end), dtype=np.int64),
        position_ids=np.array(positions + [0] * (length - end), dtype=np.int64),
        key_intervals=np.array(
            intervals + [[end, end, place, place + 1] for place in range(end, length)],
            dtype=np.int32,
        ),
        segment_starts=np.array(segments, dtype=np.int64),
        loss_positions=np.array(loss, dtype=np.int64),
        target_ids=np.array(targets, dtype=np.int64),
        loss_weights=np.array(weights, dtype=np.float64),
        num_label_tokens=sum(label != -100 for _, labels, _, _ in documents for label in labels),
        num_padding=length - end,
    )


@pytest.mark.parametrize("block_length", [1, 2, 4, 8])
def test_every_row_of_an_epoch_is_the_plain_one(block_length: int) -> None:
    store = DocumentStore([random_documents(30, seed=1), random_documents(20, seed=2)])
    options = replace(OPTIONS, block_length=block_length, seed=2**40 + block_length)
    index = pack(store)
    loader = RowLoader(
        store, index, options, rows_per_micro_batch=1, num_micro_batches=1, dp_rank=0, dp_size=1
    )
    rows = [row for row in range(len(index)) if fits(store, index.row(row), block_length)]
    assert len(rows) > 10
    for row in rows:
        for epoch in (0, 3):
            plain = plain_row(store, index.row(row).tolist(), epoch, options)
            assert same(loader.make_row(index.row(row), epoch), plain)
    masked = [loader.make_row(index.row(row), 0).loss_positions.size for row in rows]
    assert sum(masked) > 100


def fits(store: DocumentStore, document_ids: np.ndarray, block_length: int) -> bool:
    """The pack is made for blocks of 4; larger blocks may need more room."""
    lengths = [-(-int(store.lengths[number]) // block_length) for number in document_ids]
    return sum(lengths) * block_length <= OPTIONS.cutoff_len


def test_the_comparison_notices_a_single_bit() -> None:
    store = DocumentStore([random_documents(30, seed=1)])
    row = plain_row(store, [0, 1], 0, OPTIONS)
    assert same(row, plain_row(store, [0, 1], 0, OPTIONS))
    nudged = row.loss_weights.copy()
    nudged[0] = np.nextafter(nudged[0], 2)
    assert not same(row, replace(row, loss_weights=nudged))
    assert not same(row, replace(row, key_intervals=row.key_intervals.astype(np.int64)))
