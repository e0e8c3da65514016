"""Plans of tiled attention: every allowed pair once, documents batched, little computed in vain."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sdar_kernels import reference
from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.self_check import document_intervals
from sdar_kernels.tile_groups import TilePlan, TileSizes, make_tile_plan, waste
from unit.intervals import queries_without_a_document, random_intervals, some_queries
from unit.packings import random_packing

# Cuts everything that can be cut: tiles, and batches of documents and blocks.
SMALL = TileSizes(3, 5, 16, batch_keys=8)
LARGE = TileSizes(64, 128, 48, batch_keys=4096)


def _covered(mask: AttentionMask, plan: TilePlan, num_kv_heads: int) -> NDArray[np.int64]:
    """How often each (query, key) pair is computed and not hidden, per key head; [K, T, S]."""
    times = np.zeros((num_kv_heads, mask.num_tokens, mask.num_keys), dtype=np.int64)
    for key_set in plan.key_sets:
        keys = key_set.index.view(key_set.batch, key_set.extent).numpy()
        for chunk, tile in ((each, tile) for each in key_set.chunks for tile in each.tiles):
            end = tile.start + key_set.batch * tile.num_tokens
            rows = chunk.index[tile.start : end].view(key_set.batch, tile.num_tokens).numpy()
            seen = np.full(rows.shape, tile.masked)
            if tile.seen is not None:
                seen = tile.seen.view(rows.shape).numpy()
            for entry, query in np.ndindex(*rows.shape):
                visible = tile.width - tile.masked + seen[entry, query]
                tokens, heads = np.divmod(keys[entry, :visible], num_kv_heads)
                query_token, head = divmod(int(rows[entry, query]), num_kv_heads)
                assert (heads == head).all(), "a key head is read by its own queries"
                np.add.at(times[head, query_token], tokens, 1)
    return times


@pytest.mark.parametrize("sizes", [TileSizes(), SMALL, LARGE])
def test_a_plan_computes_every_allowed_pair_once(sizes: TileSizes) -> None:
    masks = [random_packing(seed, 4).mask() for seed in range(4)]
    masks += [AttentionMask.build(random_intervals(seed, 40)) for seed in range(4)]
    masks += [mask.select(some_queries(seed, mask)) for seed, mask in enumerate(masks)]
    masks.append(masks[0].select(queries_without_a_document(masks[0])))
    for mask in masks:
        plan = make_tile_plan(mask, 2, sizes)
        allowed = reference.dense_mask(mask.key_intervals, mask.num_keys).numpy()
        assert (_covered(mask, plan, 2) == allowed).all()
        assert plan.num_pairs >= mask.num_pairs


@pytest.mark.parametrize("sizes", [TileSizes(), SMALL, LARGE])
def test_the_first_tile_of_a_key_set_reads_all_of_its_keys(sizes: TileSizes) -> None:
    for seed in range(6):
        for key_set in make_tile_plan(random_packing(seed, 4).mask(), 2, sizes).key_sets:
            widths = [tile.width for tile in key_set.tiles]
            assert widths[0] == key_set.extent
            assert widths == sorted(widths, reverse=True)
            assert key_set.index.numel() == key_set.batch * key_set.extent


def test_equal_documents_share_batches() -> None:
    mask = AttentionMask.build(document_intervals([40] * 8, 4))
    first = [s for s in make_tile_plan(mask, 2, TileSizes()).key_sets if not s.second]
    assert [key_set.batch for key_set in first] == [16]


def test_first_ranges_run_before_second_ones() -> None:
    seconds = [s.second for s in make_tile_plan(random_packing(3, 4).mask(), 1, SMALL).key_sets]
    assert seconds == sorted(seconds)
    assert set(seconds) == {False, True}


def test_a_plan_is_made_once() -> None:
    mask = random_packing(1, 4).mask()
    assert mask.plan(make_tile_plan, 2, TileSizes()) is mask.plan(make_tile_plan, 2, TileSizes())


@pytest.mark.parametrize(
    ("lengths", "most"),
    [((2048,), 1.04), ((20480,), 1.02), ((512,) * 4, 1.13), ((128,) * 16, 1.25), ((4,) * 9, 1.0)],
)
def test_waste(lengths: tuple[int, ...], most: float) -> None:
    mask = AttentionMask.build(document_intervals(lengths, 4))
    assert 1 <= waste(mask) <= most


def test_waste_counts_whole_tiles() -> None:
    # 6 clean queries see 1 to 6 keys and none of the 6 noisy ones more than 5, in tiles of 4.
    mask = AttentionMask.build(document_intervals([6], 1))
    computed = (4 * 4 + 2 * 8) + (4 * 4 + 1 * 8) + 6
    assert waste(mask, TileSizes(4, 4)) == computed / (21 + 15 + 6)


def test_narrow_tiles_of_first_ranges_are_kept_one_behind_the_other() -> None:
    mask = AttentionMask.build(document_intervals([40, 40, 200], 4, padding=3))
    plan = make_tile_plan(mask, 2, TileSizes(16, 16, 64, kept_keys=48))
    at = 0
    for key_set in plan.key_sets:
        for tile in key_set.tiles:
            kept = not key_set.second and tile.width <= 48
            assert tile.kept == (at if kept else None)
            at += kept * key_set.batch * tile.num_tokens * tile.width
    assert 0 < at == plan.num_kept
    assert make_tile_plan(mask, 2, TileSizes(kept_keys=0)).num_kept == 0


def test_more_queries_than_keys() -> None:
    """Sizes of ranges and numbers of queries are packed into one number, which must hold both."""
    mask = AttentionMask.build(document_intervals([8], 4)).select(np.full(300, 12))
    plan = make_tile_plan(mask, 1, TileSizes())
    allowed = reference.dense_mask(mask.key_intervals, mask.num_keys).numpy()
    assert (_covered(mask, plan, 1) == allowed).all()
