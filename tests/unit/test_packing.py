"""Packing: every document once, best-fit decreasing exactly, and nothing lost uncounted."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sdar.data.packing import PackedIndex, pack_documents
from megatron_sdar.data.summary import format_fill


def best_fit_decreasing(sizes: list[int], capacity: int) -> list[int]:
    """Free space of every row, sorted: the textbook algorithm, one item at a time."""
    free: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [space for space in free if space >= size]
        if fitting:
            free.remove(min(fitting))
            free.append(min(fitting) - size)
        else:
            free.append(capacity - size)
    return sorted(free)


def occupied(packed: PackedIndex, lengths: np.ndarray, capacity: int, block: int) -> list[int]:
    slots = -(-np.minimum(lengths, capacity) // block) * block
    return [int(slots[packed.row(r)].sum()) for r in range(len(packed))]


@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=60),
    block=st.sampled_from([1, 2, 4, 8]),
    blocks_per_row=st.integers(1, 8),
    mode=st.sampled_from(["cut", "drop"]),
)
@settings(max_examples=300, deadline=None)
def test_packing_is_best_fit_decreasing_and_complete(lengths, block, blocks_per_row, mode):
    capacity = block * blocks_per_row
    sizes = np.array(lengths, dtype=np.int32)
    kept = [i for i, n in enumerate(lengths) if mode == "cut" or n <= capacity]
    if not kept:
        with pytest.raises(ValueError, match="no document is left"):
            pack_documents(sizes, capacity, block, truncate_mode=mode)
        return
    packed = pack_documents(sizes, capacity, block, truncate_mode=mode)
    assert sorted(packed.doc_ids.tolist()) == kept
    used = occupied(packed, sizes, capacity, block)
    assert min(used) > 0
    oracle = best_fit_decreasing(
        [-(-min(lengths[i], capacity) // block) for i in kept], blocks_per_row
    )
    assert sorted((capacity - n) // block for n in used) == oracle
    assert packed.fill == pytest.approx(sum(used) / (len(used) * capacity))
    too_long = sum(n > capacity for n in lengths)
    assert (packed.num_dropped, packed.num_cut) == (
        (too_long, 0) if mode == "drop" else (0, too_long)
    )
    assert packed.num_tokens == sum(min(lengths[i], capacity) for i in kept)
    assert packed.num_tokens + packed.num_lost_tokens == sum(lengths)
    rows = [packed.row(r).tolist() for r in range(len(packed))]
    assert all(row == sorted(row) for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert packed.row_offsets.dtype == packed.doc_ids.dtype == np.int64


def test_small_case_by_hand():
    # In blocks of 4: 2, 3, 1, 4, 1 of 5. 4+1 first, then 3+2; 1 is left over.
    packed = pack_documents([8, 9, 4, 16, 2], 20, 4, truncate_mode="drop")
    rows = [packed.row(r).tolist() for r in range(len(packed))]
    assert rows == [[0, 1], [2, 3], [4]]
    assert packed.fill == pytest.approx(44 / 60)


def test_a_document_takes_whole_blocks():
    # 5 + 3 tokens would fit 8 positions, but they take 8 + 4.
    packed = pack_documents([5, 3], 8, 4, truncate_mode="drop")
    assert len(packed) == 2


@pytest.mark.parametrize(("mode", "ids"), [("cut", [0, 1, 2]), ("drop", [0, 2])])
def test_long_documents(mode, ids):
    packed = pack_documents([16, 17, 3], 16, 8, truncate_mode=mode)
    assert sorted(packed.doc_ids.tolist()) == ids
    assert packed.num_lost_tokens == {"cut": 1, "drop": 17}[mode]


def test_without_packing_every_document_has_its_row():
    packed = pack_documents([3, 99, 4], 8, 4, truncate_mode="drop", packing=False)
    assert packed.row_offsets.tolist() == [0, 1, 2]
    assert packed.doc_ids.tolist() == [0, 2]
    assert packed.fill == pytest.approx(0.5)


def test_result_is_the_same_every_time():
    lengths = np.random.default_rng(3).integers(1, 500, 5000)
    first, second = (pack_documents(lengths, 512, 4, truncate_mode="cut") for _ in range(2))
    assert np.array_equal(first.doc_ids, second.doc_ids)
    assert np.array_equal(first.row_offsets, second.row_offsets)


def test_hundred_thousand_documents_are_quick_and_tight():
    lengths = np.random.default_rng(0).integers(1, 2000, 100_000)
    started = time.process_time()
    packed = pack_documents(lengths, 4096, 4, truncate_mode="drop")
    assert time.process_time() - started < 5
    assert packed.fill > 0.99
    assert np.array_equal(np.sort(packed.doc_ids), np.arange(100_000))


@pytest.mark.parametrize(
    ("lengths", "capacity", "block", "mode", "message"),
    [
        ([1], 10, 4, "cut", "cutoff_len 10 is not a multiple of block_length 4; use 8 or 12"),
        ([1], 3, 4, "cut", "block_length 4; use 4$"),
        ([1], 0, 4, "cut", "cutoff_len 0 is not a multiple"),
        ([1], 8, 0, "cut", "block_length must be at least 1, got 0"),
        ([1], 8, 4, "truncate", "must be 'cut' or 'drop', got 'truncate'"),
        ([1, 0], 8, 4, "cut", "document 1 has length 0"),
        ([3, -1], 8, 4, "cut", "document 1 has length -1"),
        ([], 8, 4, "cut", "no document is left to pack: 0 documents"),
        ([9, 12], 8, 4, "drop", "2 documents, 2 longer than cutoff_len 8, the longest has 12"),
    ],
)
def test_bad_arguments(lengths, capacity, block, mode, message):
    with pytest.raises(ValueError, match=message):
        pack_documents(lengths, capacity, block, truncate_mode=mode)


def test_fill_report_counts_what_is_lost():
    lengths = np.array([8, 8, 20], dtype=np.int32)
    first, second = format_fill(lengths, [16, 32], 4, "drop").splitlines()
    expected = (
        "rows of 16      1 rows, 100.00% full at block_length 4; "
        "0 documents cut, 1 dropped (20 tokens lost)"
    )
    assert first == expected
    assert "2 rows, 56.25% full" in second
