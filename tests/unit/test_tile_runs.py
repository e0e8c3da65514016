"""Document-anchored tiles: what a kernel would compute from them is the mask, pair by pair."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.reference import dense_mask
from sdar_kernels.self_check import document_intervals
from sdar_kernels.tile_runs import make_key_tiles, make_query_tiles
from unit.intervals import queries_without_a_document, random_intervals, some_queries
from unit.packings import random_packing

SIZES = [(8, 16, 8), (3, 16, 4), (32, 8, 8), (1, 1, 1), (64, 64, 32)]


def _masks() -> Iterator[AttentionMask]:
    for seed in range(24):
        yield random_packing(seed, (1, 4, 3, 8, 16)[seed % 5], max_blocks=12).mask()
    for seed in range(12):
        yield AttentionMask.build(random_intervals(seed, 40 + seed))
    for seed in range(24):
        mask = random_packing(100 + seed, (1, 4, 3, 8, 16)[seed % 5], max_blocks=12).mask()
        yield mask.select(some_queries(seed, mask))
    for seed in range(8):
        mask = AttentionMask.build(random_intervals(seed, 40 + seed))
        yield mask.select(some_queries(seed, mask))
    mask = AttentionMask.build(document_intervals([40, 24], block=4, padding=3))
    yield mask.select(queries_without_a_document(mask))


@pytest.fixture(scope="module")
def masks() -> list[AttentionMask]:
    return list(_masks())


def _dense(mask: AttentionMask) -> NDArray[np.int64]:
    return dense_mask(mask.key_intervals, mask.num_keys).numpy().astype(np.int64)


@pytest.mark.parametrize("sizes", SIZES)
def test_query_tiles_compute_the_mask(
    masks: list[AttentionMask], sizes: tuple[int, int, int]
) -> None:
    query_block, key_block, masked_block = sizes
    for mask in masks:
        total = mask.num_tokens
        intervals = mask.host_intervals
        computed = np.zeros((total, mask.num_keys), dtype=np.int64)
        queries = np.zeros(total, dtype=np.int64)
        plan = make_query_tiles(mask, *sizes)
        pairs = 0
        for start, end, lo, open_end, hi, lo2, hi2 in plan.tiles.tolist():
            assert 0 < end - start <= query_block
            queries[start:end] += 1
            assert (open_end - lo) % key_block == 0
            computed[start:end, lo:open_end] += 1
            pairs += query_block * (open_end - lo)
            for columns, begin, stop in ((slice(0, 2), open_end, hi), (slice(2, 4), lo2, hi2)):
                keys = np.arange(begin, stop)
                low, high = intervals[start:end, columns].T[..., None]
                computed[start:end, begin:stop] += (keys >= low) & (keys < high)
                pairs += query_block * masked_block * max(0, -(-(stop - begin) // masked_block))
        assert (queries == 1).all()
        assert np.array_equal(computed, _dense(mask))
        assert plan.num_pairs == pairs


@pytest.mark.parametrize("sizes", SIZES)
def test_key_tiles_compute_the_mask(
    masks: list[AttentionMask], sizes: tuple[int, int, int]
) -> None:
    query_block, key_block, masked_block = sizes
    for mask in masks:
        total = mask.num_tokens
        intervals = mask.host_intervals
        computed = np.zeros((total, mask.num_keys), dtype=np.int64)
        keys = np.zeros(mask.num_keys, dtype=np.int64)
        plan = make_key_tiles(mask, *sizes)
        runs = plan.runs.tolist()
        pairs = 0
        for start, end, first_run, last_run in plan.tiles.tolist():
            assert 0 < end - start <= key_block
            keys[start:end] += 1
            place = np.arange(start, end)
            for begin, open_start, stop, which in runs[first_run:last_run]:
                assert begin <= open_start <= stop
                low, high = intervals[begin:open_start, 2 * which : 2 * which + 2].T[..., None]
                computed[begin:open_start, start:end] += (place >= low) & (place < high)
                computed[open_start:stop, start:end] += 1
                masked_steps = -(-(open_start - begin) // masked_block)
                open_steps = -(-(stop - open_start) // query_block)
                pairs += key_block * (masked_steps * masked_block + open_steps * query_block)
        assert (keys == 1).all()
        assert np.array_equal(computed, _dense(mask))
        assert plan.num_pairs == pairs


def test_heavy_tiles_come_first() -> None:
    mask = AttentionMask.build(document_intervals([200, 40], block=4, padding=9))
    tiles = make_query_tiles(mask, 16, 16, 16).tiles
    work = (tiles[:, 4] - tiles[:, 2]) + (tiles[:, 6] - tiles[:, 5])
    assert work[0] == work.max()
    assert work[-1] <= 16


def test_padding_is_a_few_tiles_of_one_step() -> None:
    mask = AttentionMask.build(document_intervals([8], block=4, padding=640))
    tiles = make_query_tiles(mask, 64, 64, 64).tiles
    padding = tiles[tiles[:, 0] >= 16]
    assert len(padding) == 10
    assert ((padding[:, 6] - padding[:, 5]) <= 64).all()
    assert torch.equal(padding[:, 2], padding[:, 4]), "padding has no first range"


@pytest.mark.parametrize(
    ("lengths", "goal"), [((128, 1024), 1.25), ((256, 2048), 1.12), ((20480, 20480), 1.02)]
)
def test_little_more_is_computed_than_allowed(lengths: tuple[int, int], goal: float) -> None:
    """Computed / allowed pairs, the three kernels weighted by their matmuls: 2, 3 and 4."""
    rng = np.random.default_rng(0)
    documents: list[int] = []
    while sum(documents) < 20480:
        drawn = int(rng.integers(lengths[0], lengths[1] + 1)) // 4 * 4
        documents.append(min(drawn, 20480 - sum(documents)))
    mask = AttentionMask.build(document_intervals(documents, block=4))
    queries = make_query_tiles(mask, 32, 64, 32).num_pairs
    keys = make_key_tiles(mask, 16, 64, 8).num_pairs
    assert (5 * queries + 4 * keys) / 9 / mask.num_pairs <= goal


def test_key_tiles_of_selected_queries_begin_where_copies_begin() -> None:
    """A document's masked tokens: its keys are cut as for all queries, with no tile in vain."""
    mask = AttentionMask.build(document_intervals([200, 60], block=4))
    chosen = mask.select(np.arange(260, 520))
    starts = make_key_tiles(chosen, 16, 64, 8).tiles[:, 0].sort().values.tolist()
    all_starts = make_key_tiles(mask, 16, 64, 8).tiles[:, 0].sort().values.tolist()
    assert {0, 200, 260, 460} <= set(starts)
    assert starts == all_starts


def test_keys_that_nobody_reads_have_tiles_without_runs() -> None:
    mask = AttentionMask.build(document_intervals([40, 24], block=4))
    plan = make_key_tiles(mask.select(queries_without_a_document(mask)), 16, 16, 8)
    unread = plan.tiles[plan.tiles[:, 2] == plan.tiles[:, 3]]
    keys = [key for start, end, _, _ in unread.tolist() for key in range(start, end)]
    # The clean and, but for what shares a tile with the next document, the noisy copy.
    assert set(keys) == {*range(40), *range(72, 104)}
