"""Packing: every document once, few rows, and nothing lost uncounted."""

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sdar.data.building.summary import format_fill
from megatron_sdar.data.loading.packing import PackedIndex, pack_documents

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"


def first_fit_decreasing(sizes: list[int], capacity: int) -> int:
    """Rows of the textbook algorithm, one item at a time."""
    free: list[int] = []
    for size in sorted(sizes, reverse=True):
        place = next((i for i, space in enumerate(free) if space >= size), None)
        if place is None:
            free.append(capacity - size)
        else:
            free[place] -= size
    return len(free)


def fewest_rows(sizes: list[int], capacity: int) -> int:
    """The optimum, by trying every subset as the last row (for up to a dozen items)."""
    full = (1 << len(sizes)) - 1
    fits = [
        subset
        for subset in range(1, full + 1)
        if sum(size for i, size in enumerate(sizes) if subset >> i & 1) <= capacity
    ]
    rows = {0: 0}
    for done in range(full + 1):
        if done in rows:
            for subset in fits:
                if not done & subset:
                    rows[done | subset] = min(rows.get(done | subset, 99), rows[done] + 1)
    return rows[full]


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
def test_packing_is_complete_and_no_worse_than_first_fit_decreasing(
    lengths, block, blocks_per_row, mode
):
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
    assert max(used) <= capacity
    oracle = first_fit_decreasing(
        [-(-min(lengths[i], capacity) // block) for i in kept], blocks_per_row
    )
    assert len(packed) <= oracle
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
    assert packed.pieces is None


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=7), capacity=st.integers(12, 24))
@settings(max_examples=60, deadline=None)
def test_packing_is_optimal_or_a_row_from_it_on_small_cases(sizes, capacity):
    packed = pack_documents(sizes, capacity, 1, truncate_mode="drop")
    assert len(packed) <= fewest_rows(sizes, capacity) + 1


def test_exact_ends_are_found_where_first_fit_decreasing_misses_them():
    # Two rows of 4 + 3 + 3; decreasing first fit puts 4 + 4 together and needs three.
    sizes = [4, 4, 3, 3, 3, 3]
    assert first_fit_decreasing(sizes, 10) == 3
    assert len(pack_documents(sizes, 10, 1, truncate_mode="drop")) == 2


@pytest.mark.parametrize(("capacity", "goal"), [(1024, 0.995), (2048, 0.998), (4096, 0.998)])
def test_rows_of_similar_documents_are_full(capacity, goal):
    # Lengths like a chat dataset's: nothing small to fill the ends with.
    random = np.random.default_rng(5)
    lengths = np.clip(random.gamma(7.0, 28.0, 40_000), 78, 600).astype(int)
    assert pack_documents(lengths, capacity, 4, truncate_mode="cut").fill > goal


@pytest.mark.parametrize("capacity", [1024, 2048, 4096, 20480])
def test_rows_of_gsm8k_are_full(capacity):
    if not GSM8K.exists():
        pytest.skip("GSM8K is not beside the repository")
    # Characters / 3.4 + 20 is close to the tokens of the chat form.
    lengths = np.array([len(line) / 3.4 + 20 for line in GSM8K.open()], dtype=int)
    packed = pack_documents(lengths, capacity, 4, truncate_mode="cut")
    blocks = (-(-lengths // 4)).sum()
    goal = {1024: 0.995, 2048: 0.998, 4096: 0.998, 20480: 0.999}[capacity]
    assert packed.fill >= goal or len(packed) == -(-blocks * 4 // capacity)


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=40),
    block=st.sampled_from([1, 4]),
    blocks_per_row=st.integers(1, 6),
)
@settings(max_examples=100, deadline=None)
def test_split_documents_are_all_there_once(lengths, block, blocks_per_row):
    capacity = block * blocks_per_row
    packed = pack_documents(lengths, capacity, block, truncate_mode="split")
    found = sorted(
        (document, piece)
        for r in range(len(packed))
        for document, piece in zip(packed.row(r), packed.row_pieces(r), strict=True)
    )
    expected = [
        (document, piece)
        for document, length in enumerate(lengths)
        for piece in range(-(-length // capacity))
    ]
    assert found == expected
    assert packed.num_split == sum(n > capacity for n in lengths)
    assert packed.num_tokens == sum(lengths)
    assert packed.num_lost_tokens == packed.num_dropped == packed.num_cut == 0


def test_cut_documents_are_as_long_as_the_turns_allow():
    def cut(ids: np.ndarray, limit: int) -> np.ndarray:
        assert limit == 16
        return np.array([{1: 9, 3: 12}[i] for i in ids.tolist()])

    packed = pack_documents([4, 40, 7, 50], 16, 4, truncate_mode="cut", cut_lengths=cut)
    assert [packed.row(r).tolist() for r in range(len(packed))] == [[0, 1], [2], [3]]
    assert (packed.num_cut, packed.num_lost_tokens) == (2, 31 + 38)


def test_published_rows_keep_one_position_free_and_drop_what_padding_overshoots():
    # 63 of 64 tokens are usable; a document cut to 63 is padded to 64 and then dropped.
    lengths = [20, 28, 36, 44, 28, 32, 40, 24, 99]
    for mode in ("cut", "drop"):
        packed = pack_documents(lengths, 64, 4, truncate_mode=mode, algorithm="llamafactory")
        rows = [sorted(lengths[i] for i in packed.row(r)) for r in range(len(packed))]
        assert sorted(rows) == sorted([[44], [20, 40], [24, 36], [28, 32], [28]])
        assert (packed.num_dropped, packed.num_cut) == (1, 0)
        assert packed.limit == 63
    alone = pack_documents(
        [64, 65], 64, 4, truncate_mode="cut", algorithm="llamafactory", packing=False
    )
    assert (len(alone), alone.num_cut, alone.limit) == (2, 1, 64)


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
        ([1], 8, 4, "truncate", "must be 'cut', 'drop' or 'split', got 'truncate'"),
        ([1, 0], 8, 4, "cut", "document 1 has length 0"),
        ([3, -1], 8, 4, "cut", "document 1 has length -1"),
        ([], 8, 4, "cut", "no document is left to pack: 0 documents"),
        ([9, 12], 8, 4, "drop", "2 documents, 2 longer than cutoff_len 8, the longest has 12"),
    ],
)
def test_bad_arguments(lengths, capacity, block, mode, message):
    with pytest.raises(ValueError, match=message):
        pack_documents(lengths, capacity, block, truncate_mode=mode)


def test_bad_algorithms():
    with pytest.raises(ValueError, match="packing_algorithm must be one of exact_fill, llama"):
        pack_documents([1], 8, 4, truncate_mode="cut", algorithm="greedy")
    with pytest.raises(ValueError, match="cut and drop only, not split"):
        pack_documents([1], 8, 4, truncate_mode="split", algorithm="llamafactory")


def test_fill_report_counts_what_is_lost():
    lengths = np.array([8, 8, 20], dtype=np.int32)
    first, second = format_fill(lengths, [16, 32], 4, "drop").splitlines()
    expected = (
        "rows of 16      1 rows, 100.00% full at block_length 4; "
        "0 documents cut, 0 split, 1 dropped (20 tokens lost)"
    )
    assert first == expected
    assert "2 rows, 56.25% full" in second
