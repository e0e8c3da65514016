"""Key intervals and tile lists: equal to the attention rule in words and to torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sdar_kernels.block_mask import AttentionMask, tile_counts
from sdar_kernels.flex_attention import (
    interval_block_mask,
    interval_mask_mod,
    make_block_mask,
)
from sdar_kernels.reference import dense_mask
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from unit.intervals import random_intervals, some_queries
from unit.packings import Packing, concatenated, random_packing, rule_mask

BLOCK_LENGTHS = (1, 2, 3, 4, 8)


def _dense(packing: Packing) -> torch.Tensor:
    return dense_mask(torch.from_numpy(packing.row.key_intervals))


@pytest.mark.parametrize("block_length", BLOCK_LENGTHS)
def test_intervals_are_the_rule_in_words(block_length: int) -> None:
    for seed in range(12):
        packing = random_packing(seed, block_length, max_documents=3, max_blocks=4)
        assert torch.equal(_dense(packing), rule_mask(packing.tokens)), f"seed {seed}"


def test_intervals_of_a_long_block_are_the_rule_in_words() -> None:
    packing = random_packing(5, 64, max_documents=2, max_blocks=2)
    assert torch.equal(_dense(packing), rule_mask(packing.tokens))


def test_intervals_of_concatenated_rows_are_the_rule_in_words() -> None:
    row, tokens = concatenated([random_packing(seed, 4, max_blocks=3) for seed in (1, 2, 3)])
    assert torch.equal(dense_mask(torch.from_numpy(row.key_intervals)), rule_mask(tokens))


@pytest.fixture(params=range(20))
def packing(request: pytest.FixtureRequest) -> Packing:
    return random_packing(request.param, BLOCK_LENGTHS[request.param % 5])


def _pairs(packing: Packing) -> list[tuple[int, int]]:
    return [(int(q), int(k)) for q, k in _dense(packing).nonzero()]


def test_every_query_sees_a_key(packing: Packing) -> None:
    assert _dense(packing).any(dim=1).all()


def test_clean_tokens_never_see_noisy_ones(packing: Packing) -> None:
    tokens = packing.tokens
    seen = {tokens[k].copy for q, k in _pairs(packing) if tokens[q].copy == "clean"}
    assert seen <= {"clean"}


def test_nothing_crosses_documents(packing: Packing) -> None:
    tokens = packing.tokens
    assert all(tokens[q].document == tokens[k].document for q, k in _pairs(packing))


def test_padding_sees_itself_only_and_nobody_else_sees_it(packing: Packing) -> None:
    tokens = packing.tokens
    pairs = [p for p in _pairs(packing) if "padding" in (tokens[p[0]].copy, tokens[p[1]].copy)]
    assert len(pairs) == packing.row.num_padding
    assert all(query == key for query, key in pairs)


def test_noisy_views_of_a_document_do_not_see_each_other(packing: Packing) -> None:
    tokens = packing.tokens
    noisy = [p for p in _pairs(packing) if tokens[p[1]].copy == "noisy"]
    assert all(tokens[q] == tokens[k] for q, k in noisy)


def test_a_noisy_block_never_sees_its_own_clean_block(packing: Packing) -> None:
    tokens = packing.tokens
    for query, key in _pairs(packing):
        if tokens[query].copy == "noisy" and tokens[key].copy == "clean":
            assert tokens[key].block < tokens[query].block


def test_attention_is_bidirectional_inside_a_block(packing: Packing) -> None:
    dense, tokens = _dense(packing), packing.tokens
    for i, first in enumerate(tokens):
        for j in range(i + 1, min(i + packing.block_length, len(tokens))):
            if first == tokens[j] and first.copy != "padding":
                assert dense[i, j]
                assert dense[j, i]


@pytest.mark.parametrize(("query_block", "key_block"), [(1, 1), (16, 16), (7, 5), (64, 16)])
def test_tile_counts_are_the_sums_of_the_dense_mask(query_block: int, key_block: int) -> None:
    for seed in range(15):
        packing = random_packing(seed, 1 + seed % 6)
        dense = _dense(packing).numpy()
        total = dense.shape[0]
        rows, columns = -(-total // query_block), -(-total // key_block)
        padded = np.zeros((rows * query_block, columns * key_block), dtype=np.int64)
        padded[:total, :total] = dense
        expected = padded.reshape(rows, query_block, columns, key_block).sum(axis=(1, 3))
        assert np.array_equal(
            tile_counts(packing.row.key_intervals, query_block, key_block), expected
        )


def test_tile_counts_stay_exact_for_a_long_row() -> None:
    # One document of 200k tokens: 2e10 pairs, past what int32 could count.
    ends = (np.arange(200_000) // 4 + 1) * 4
    intervals = np.zeros((200_000, 4), dtype=np.int32)
    intervals[:, 1] = ends
    counts = tile_counts(intervals, 128, 128)
    assert counts.sum() == ends.sum()
    assert counts.min() == 0
    assert counts.max() == 128 * 128


LISTS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)


def _assert_torchs_own(
    intervals: np.ndarray, tile: tuple[int, int], case: str, num_keys: int | None = None
) -> BlockMask:
    """`interval_block_mask` against `create_block_mask`, every tensor; returns ours."""
    device_intervals = torch.from_numpy(intervals)
    num_rows = intervals.shape[0] if intervals.ndim == 3 else 1
    num_tokens = intervals.shape[-2]
    ours = interval_block_mask(intervals, device_intervals, tile, num_keys)
    theirs = create_block_mask(
        interval_mask_mod(device_intervals), num_rows, 1, num_tokens, num_keys or num_tokens,
        "cpu", BLOCK_SIZE=tile,
    )  # fmt: skip
    assert ours.seq_lengths == theirs.seq_lengths
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for name in LISTS:
        left, right = getattr(ours, name), getattr(theirs, name)
        assert left.dtype == right.dtype, f"{case}: {name}"
        assert torch.equal(left, right), f"{case}: {name}"
    return ours


@pytest.mark.parametrize("tile", [(16, 16), (32, 32), (64, 64), (128, 64), (32, 128)])
def test_block_mask_is_torchs_tensor_for_tensor(tile: tuple[int, int]) -> None:
    """With the two tests below 500 cases: 84 rows for each of five tiles, 60 batches, 20 others."""
    ragged, num_full = set(), 0
    for seed in range(84):
        block_length = (1, 4, 16, 48)[seed % 4]
        max_blocks = (60, 20, 8, 4)[seed % 4]
        packing = random_packing(100 * tile[0] + seed, block_length, max_blocks=max_blocks)
        ours = _assert_torchs_own(packing.row.key_intervals, tile, f"seed {seed}")
        ragged.add(packing.row.num_tokens % tile[0] == 0)
        num_full += int(ours.full_kv_num_blocks.sum())
    assert False in ragged, "some lengths must not be multiples of the tile"
    assert num_full > 0, "some tiles must be full"


def test_block_mask_of_batched_rows_is_torchs() -> None:
    for seed in range(60):
        rows = [random_packing(1000 + 3 * seed + row, 4).row.key_intervals for row in range(3)]
        length = max(row.shape[0] for row in rows) + seed % 2
        padded = np.zeros((3, length, 4), dtype=np.int32)
        for place, row in zip(padded, rows, strict=True):
            place[: row.shape[0]] = row
            tail = np.arange(row.shape[0], length)
            place[tail, 2], place[tail, 3] = tail, tail + 1
        _assert_torchs_own(padded, (16, 16), f"seed {seed}")


def test_block_mask_of_any_two_ranges_is_torchs() -> None:
    for seed in range(20):
        _assert_torchs_own(random_intervals(seed, 70 + seed), (16, 16), f"seed {seed}")


def test_block_mask_of_one_row_on_the_front_side() -> None:
    mask = random_packing(3, 4).mask()
    ours = make_block_mask(mask, 32)
    theirs = interval_block_mask(mask.host_intervals, mask.key_intervals, (32, 32))
    for name in LISTS:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_the_flex_mask_function_is_the_dense_mask() -> None:
    packing = random_packing(3, 4)
    intervals = torch.from_numpy(packing.row.key_intervals)
    places = torch.arange(intervals.shape[0])
    zero = torch.zeros((), dtype=torch.int64)
    mod = interval_mask_mod(intervals)(zero, zero, places[:, None], places[None, :])
    assert torch.equal(mod, _dense(packing))


def test_a_mask_makes_each_plan_once() -> None:
    mask = random_packing(3, 4).mask()
    assert mask.plan(make_block_mask) is mask.plan(make_block_mask)
    assert mask.plan(make_block_mask, 32) is not mask.plan(make_block_mask, 64)


def test_the_number_of_pairs_is_that_of_the_dense_mask(packing: Packing) -> None:
    assert packing.mask().num_pairs == int(_dense(packing).sum())


@pytest.mark.parametrize(
    ("intervals", "what"),
    [
        ([[0, 1, 0, 0], [0, 0, 0, 0]], "at least one key"),
        ([[0, 2, 1, 2], [0, 1, 0, 0]], "overlap"),
        ([[0, 2, 2, 1], [0, 1, 0, 0]], "ends before it begins"),
        (np.zeros((0, 4)), "at least one token"),
    ],
)
def test_impossible_intervals_are_refused(intervals: list[list[int]], what: str) -> None:
    with pytest.raises(AssertionError, match=what):
        AttentionMask.build(np.array(intervals, dtype=np.int32))


def test_selected_queries_see_the_keys_they_saw(packing: Packing) -> None:
    mask, dense = packing.mask(), _dense(packing)
    for seed in range(4):
        positions = some_queries(seed, mask)
        chosen = mask.select(positions)
        assert (chosen.num_tokens, chosen.num_keys) == (positions.size, mask.num_tokens)
        assert torch.equal(dense_mask(chosen.key_intervals, chosen.num_keys), dense[positions])
        assert torch.equal(chosen.key_intervals, torch.from_numpy(chosen.host_intervals))
        assert chosen.num_pairs == int(dense[positions].sum())
        again = chosen.select(np.arange(positions.size)[::-1].copy())
        assert torch.equal(
            dense_mask(again.key_intervals, again.num_keys), dense[positions].flip(0)
        )


def test_a_selection_makes_its_own_plans() -> None:
    mask = random_packing(3, 4).mask()
    chosen = mask.select(np.arange(mask.num_tokens))
    assert chosen.plan(make_block_mask) is not mask.plan(make_block_mask)


def test_keys_beyond_the_axis_are_refused() -> None:
    intervals = np.array([[0, 3, 0, 0]], dtype=np.int32)
    assert AttentionMask.build(intervals, num_keys=3).num_keys == 3
    with pytest.raises(AssertionError, match="behind the last key"):
        AttentionMask.build(intervals, num_keys=2)


@pytest.mark.parametrize("tile", [(16, 16), (7, 5), (64, 16)])
def test_tile_counts_of_selected_queries(tile: tuple[int, int]) -> None:
    for seed in range(16):
        mask = random_packing(seed, 1 + seed % 6).mask()
        chosen = mask.select(some_queries(seed, mask))
        dense = dense_mask(chosen.key_intervals, chosen.num_keys).numpy()
        rows, columns = (-(-size // step) for size, step in zip(dense.shape, tile, strict=True))
        padded = np.zeros((rows * tile[0], columns * tile[1]), dtype=np.int64)
        padded[: dense.shape[0], : dense.shape[1]] = dense
        expected = padded.reshape(rows, tile[0], columns, tile[1]).sum(axis=(1, 3))
        assert np.array_equal(tile_counts(chosen.host_intervals, *tile, chosen.num_keys), expected)


def test_block_mask_of_selected_queries_is_torchs() -> None:
    for seed in range(40):
        mask = random_packing(2000 + seed, (1, 4, 16)[seed % 3], max_blocks=20).mask()
        chosen = mask.select(some_queries(seed, mask))
        tile = ((16, 16), (32, 64))[seed % 2]
        _assert_torchs_own(chosen.host_intervals, tile, f"seed {seed}", chosen.num_keys)
