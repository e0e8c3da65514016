"""Plans of tiled attention: every allowed pair once, documents batched, little computed in vain."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sdar_kernels import reference
from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.self_check import document_intervals
from sdar_kernels.tile_groups import TileSizes
from sdar_kernels.tile_plan import KeySet, QueryTile, Section, TilePlan, make_tile_plan, waste
from unit.intervals import queries_without_a_document, random_intervals, some_queries
from unit.packings import random_packing

# Cuts everything that can be cut: tiles, batches of documents and blocks, and sections.
SMALL = TileSizes(3, 5, 16, batch_keys=8, section_rows=40)
LARGE = TileSizes(64, 128, 48, batch_keys=4096)
ALL_SIZES = [TileSizes(), SMALL, LARGE]


def _masks() -> list[AttentionMask]:
    """Packings, any intervals, and some of the queries of both."""
    masks = [random_packing(seed, 4).mask() for seed in range(4)]
    masks += [AttentionMask.build(random_intervals(seed, 40)) for seed in range(4)]
    masks += [mask.select(some_queries(seed, mask)) for seed, mask in enumerate(masks)]
    masks.append(masks[0].select(queries_without_a_document(masks[0])))
    return masks


def _key_sets(section: Section) -> list[KeySet]:
    return list(dict.fromkeys(tile.keys for tile in section.tiles))


def _first_tiles(section: Section) -> list[QueryTile]:
    return [tile for tile in section.tiles if tile.start < section.num_first]


def _covered(mask: AttentionMask, plan: TilePlan, num_kv_heads: int) -> NDArray[np.int64]:
    """How often each (query, key) pair is computed and not hidden, per key head; [K, T, S]."""
    times = np.zeros((num_kv_heads, mask.num_tokens, mask.num_keys), dtype=np.int64)
    for section, tile in ((each, tile) for each in plan.sections for tile in each.tiles):
        batch, extent = tile.keys.batch, tile.keys.extent
        keys = section.keys[tile.keys.start :][: batch * extent].view(batch, extent).numpy()
        rows = section.queries[tile.start :][: batch * tile.num_tokens].view(batch, -1).numpy()
        seen = np.full(rows.shape, tile.masked)
        if tile.seen is not None:
            seen = tile.seen.reshape(rows.shape)
        for entry, query in np.ndindex(*rows.shape):
            visible = tile.width - tile.masked + seen[entry, query]
            tokens, heads = np.divmod(keys[entry, :visible], num_kv_heads)
            query_token, head = divmod(int(rows[entry, query]), num_kv_heads)
            assert (heads == head).all(), "a key head is read by its own queries"
            np.add.at(times[head, query_token], tokens, 1)
    return times


@pytest.mark.parametrize("sizes", ALL_SIZES)
def test_a_plan_computes_every_allowed_pair_once(sizes: TileSizes) -> None:
    for mask in _masks():
        plan = make_tile_plan(mask, 2, sizes)
        allowed = reference.dense_mask(mask.key_intervals, mask.num_keys).numpy()
        assert (_covered(mask, plan, 2) == allowed).all()
        assert plan.num_pairs >= mask.num_pairs


@pytest.mark.parametrize("sizes", ALL_SIZES)
def test_both_parts_of_a_query_meet_in_one_section(sizes: TileSizes) -> None:
    for mask in _masks():
        low, high, low2, high2 = mask.host_intervals.T
        wanted = np.repeat((high > low).astype(int) + (high2 > low2), 2)
        plan = make_tile_plan(mask, 2, sizes)
        found = np.zeros(mask.num_tokens * 2, dtype=np.int64)
        for section in plan.sections:
            rows = section.queries.numpy()
            outputs = np.arange(found.size) if section.outputs is None else section.outputs.numpy()
            assert (rows[section.results.numpy()] == outputs).all()
            assert (np.bincount(rows, minlength=found.size)[outputs] == wanted[outputs]).all()
            found[outputs] += 1
            second, partner = rows[section.num_first :], section.partner.numpy()
            has_partner = partner < section.num_rows
            assert (partner[has_partner] < section.num_first).all()
            assert (rows[partner[has_partner]] == second[has_partner]).all()
            assert (has_partner == (wanted[second] == 2)).all()
            # The result is in the row of the second range, where there is one.
            from_second = section.results.numpy() >= section.num_first
            assert (from_second == np.isin(outputs, second)).all()
        assert (found == 1).all()
        assert plan.num_rows == sum(section.num_rows + 1 for section in plan.sections)
        places = [section.at for section in plan.sections]
        assert places == [
            sum(s.num_rows + 1 for s in plan.sections[:i]) for i in range(len(places))
        ]


@pytest.mark.parametrize("sizes", ALL_SIZES)
def test_where_the_gradient_of_a_key_lies(sizes: TileSizes) -> None:
    several = 0
    for mask in _masks():
        plan = make_tile_plan(mask, 2, sizes)
        if plan.key_results is None:
            several += 1
            continue
        (section,) = plan.sections
        read = _covered(mask, plan, 2).sum(1).T.ravel() > 0
        results = plan.key_results.numpy()
        assert (results[~read] == section.keys.numel()).all()
        assert (section.keys.numpy()[results[read]] == np.flatnonzero(read)).all()
    # Any intervals overlap; small sections are many.
    assert several >= 4


@pytest.mark.parametrize("sizes", ALL_SIZES)
def test_the_first_tile_of_a_key_set_reads_all_of_its_keys(sizes: TileSizes) -> None:
    for seed in range(6):
        for section in make_tile_plan(random_packing(seed, 4).mask(), 2, sizes).sections:
            sets = _key_sets(section)
            for key_set in sets:
                tiles = [tile for tile in section.tiles if tile.keys == key_set]
                widths = [tile.width for tile in tiles]
                assert widths[0] == key_set.extent
                assert widths == sorted(widths, reverse=True)
                fresh = [piece for tile in tiles for piece in tile.pieces if piece.fresh]
                covered = [entry for piece in fresh for entry in range(piece.start, piece.end)]
                assert covered == list(range(key_set.batch))
                assert all(piece in tiles[0].pieces for piece in fresh)
            assert sum(each.batch * each.extent for each in sets) == section.keys.numel()


def test_equal_documents_share_batches() -> None:
    mask = AttentionMask.build(document_intervals([40] * 8, 4))
    (section,) = make_tile_plan(mask, 2, TileSizes()).sections
    assert {tile.keys.batch for tile in _first_tiles(section)} == {16}


def test_documents_stay_whole_and_sections_small() -> None:
    mask = AttentionMask.build(document_intervals([40, 80, 12, 40, 8, 24], 4))
    plan = make_tile_plan(mask, 2, TileSizes(section_rows=300))
    assert len(plan.sections) > 2
    longest = 2 * (80 * 2 + 80)
    assert max(section.num_rows for section in plan.sections) <= 300 + longest


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
    # 6 clean queries see 1 to 6 keys and 5 of 6 noisy ones 1 to 5: two tiles of 3, not of 4 and 2.
    mask = AttentionMask.build(document_intervals([6], 1))
    computed = (3 * 3 + 3 * 6) + (3 * 3 + 2 * 6) + 6
    assert waste(mask, TileSizes(4, 4)) == computed / (21 + 15 + 6)


def test_probabilities_of_narrow_tiles_of_first_ranges_are_kept() -> None:
    mask = AttentionMask.build(document_intervals([40, 40, 200], 4, padding=3))
    plan = make_tile_plan(mask, 2, TileSizes(16, 16, 64, kept_keys=48))
    (section,) = plan.sections
    kept = 0
    for tile in section.tiles:
        assert tile.kept == (tile.start < section.num_first and tile.width <= 48)
        kept += tile.kept * tile.keys.batch * tile.num_tokens * tile.width
    assert 0 < kept == plan.num_kept
    assert make_tile_plan(mask, 2, TileSizes(kept_keys=0)).num_kept == 0


def test_more_queries_than_keys() -> None:
    """Sizes of ranges and numbers of queries are packed into one number, which must hold both."""
    mask = AttentionMask.build(document_intervals([8], 4)).select(np.full(300, 12))
    plan = make_tile_plan(mask, 1, TileSizes())
    allowed = reference.dense_mask(mask.key_intervals, mask.num_keys).numpy()
    assert (_covered(mask, plan, 1) == allowed).all()
