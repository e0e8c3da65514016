"""The block length grows at a row: rows, resume, counting and layouts across the change."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from unit.token_lists import CUTOFF, MASK_ID, OPTIONS, PAD_ID, TokenList, make_loader, same

from megatron_sdar.data.loading import grouped_stream
from megatron_sdar.data.loading.documents import DocumentStore
from megatron_sdar.data.loading.loader import RowLoader
from megatron_sdar.data.loading.packing import pack_documents
from megatron_sdar.data.loading.row_options import RowOptions
from megatron_sdar.diffusion.rows import Row

# Rows at which the length changes are no multiple of a step of 4 nor of a group of 6.
PHASES = ((0, 4), (14, 8), (27, 16))
PAPER = replace(OPTIONS, block_length=16, block_lengths=PHASES)
EXACT = replace(PAPER, semantics="exact")


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_stream, "GROUP_ROWS", 6)


def loader_of(options: RowOptions, **changes: object) -> RowLoader:
    """Over 90 documents whose lengths fit no block."""
    rng = np.random.default_rng(1)
    dataset = TokenList(rng.integers(3, 40, size=(90, 2)).tolist())
    store = DocumentStore([dataset])
    index = pack_documents(store.lengths, CUTOFF, options.block_length, truncate_mode="cut")
    settings = {"rows_per_micro_batch": 1, "num_micro_batches": 4, "dp_rank": 0, "dp_size": 1}
    return RowLoader(store, index, options, **(settings | changes))


def block_length_of(row: Row) -> int:
    """Of the noisy copies in a row: every noisy query sees its block, all of it."""
    used = row.num_tokens - row.num_padding
    sizes = (row.key_intervals[:used, 3] - row.key_intervals[:used, 2]).tolist()
    (size,) = set(sizes) - {0}
    return int(size)


def rows_of(loader: RowLoader, count: int) -> list[Row]:
    at = loader.stream.row_at if loader.grouped is None else loader.grouped.row_at
    return [at(place) for place in range(count)]


@pytest.mark.parametrize("options", [PAPER, EXACT], ids=["paper", "exact"])
def test_the_length_changes_exactly_at_its_row(options: RowOptions) -> None:
    rows = rows_of(loader_of(options), 40)
    assert [block_length_of(row) for row in rows] == [4] * 14 + [8] * 13 + [16] * 13
    assert {row.num_tokens for row in rows} == {2 * CUTOFF}, "one shape throughout"


def test_a_phase_has_the_rows_of_a_run_with_its_length_alone() -> None:
    rows = rows_of(loader_of(PAPER), 40)
    for first, length in PHASES:
        alone = loader_of(replace(PAPER, block_lengths=((0, length),)))
        end = next((start for start, _ in PHASES if start > first), 40)
        for place in range(first, end):
            assert same(rows[place], alone.stream.row_at(place)), place


def test_every_document_is_taken_once_an_epoch_across_the_changes() -> None:
    """Label tokens without padding, by document, of the rows that an epoch becomes."""
    loader = loader_of(replace(EXACT, block_padding_labels="ignore"))
    assert loader.grouped is not None
    per_epoch = loader.count_rows(1)
    assert per_epoch == round(per_epoch), "this epoch ends with a group"
    seen: Counter[tuple[int, int]] = Counter()
    start = loader.grouped.start_at(0)
    while start.num_source_rows < loader.num_rows:
        group = loader.grouped._built(start)
        seen.update((item.document_id, item.place) for item in group.items)
        start = loader.grouped._after(start, group)
    assert start.first_row == round(per_epoch)
    assert sorted(document for document, _ in seen) == list(range(90))
    assert sorted(place for _, place in seen) == list(range(90))
    assert set(seen.values()) == {1}


def test_counting_agrees_with_walking_and_is_one_workers_work() -> None:
    loader = loader_of(EXACT)
    assert loader.count_rows(2.0, 1, 3) == loader.count_rows(2.0, 2, 3) == 0.0
    total = loader.count_rows(2.0, 0, 3)
    assert total == loader.count_rows(2.0) > 1.7 * loader.count_rows(1.0)
    assert loader.grouped is not None
    assert loader.grouped.start_at(round(total)).num_source_rows == 2 * loader.num_rows


@pytest.mark.parametrize("options", [PAPER, EXACT], ids=["paper", "exact"])
@pytest.mark.parametrize(
    "ahead", [{}, {"prefetch": True}, {"num_workers": 2}], ids=["none", "thread", "processes"]
)
def test_resume_is_bitwise_across_a_change(options: RowOptions, ahead: dict[str, object]) -> None:
    straight = loader_of(options)
    steps = [straight.next_step() for _ in range(12)]
    for stop in (0, 2, 3, 4, 7):
        stopped = loader_of(options, **ahead)
        for _ in range(stop):
            stopped.next_step()
        state = json.loads(json.dumps(stopped.state_dict()))
        stopped.close()
        resumed = loader_of(options, **ahead)
        resumed.load_state_dict(state)
        for expected in steps[stop:]:
            found = resumed.next_step()
            assert all(same(a, b) for a, b in zip(expected, found, strict=True)), stop
        assert resumed.epoch == straight.epoch
        resumed.close()


def test_data_parallel_ranks_split_the_same_steps() -> None:
    whole = loader_of(EXACT)
    shares = [loader_of(EXACT, num_micro_batches=2, dp_rank=rank, dp_size=2) for rank in range(2)]
    for _ in range(9):
        one, two = (loader.next_step() for loader in shares)
        dealt = [one[0], two[0], one[1], two[1]]
        assert all(same(a, b) for a, b in zip(whole.next_step(), dealt, strict=True))


def test_later_phases_may_be_changed_and_begun_ones_not() -> None:
    stopped = loader_of(EXACT)
    for _ in range(5):
        stopped.next_step()
    state = json.loads(json.dumps(stopped.state_dict()))
    later = loader_of(replace(EXACT, block_lengths=(*PHASES[:2], (33, 16))))
    later.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(stopped.next_step(), later.next_step(), strict=True))
    begun = loader_of(replace(EXACT, block_lengths=((0, 4), (15, 8), (27, 16))))
    with pytest.raises(ValueError, match=r"block_lengths was \[\[0, 4\], \[14, 8\]\], now \[\["):
        begun.load_state_dict(state)


def test_pads_fill_the_block_of_the_phase_only() -> None:
    rows = rows_of(loader_of(PAPER), 40)
    for row, length in ((rows[3], 4), (rows[30], 16)):
        starts = row.segment_starts.tolist()
        half = len(starts) // 2
        for begin, end in pairwise(starts[:half]):
            pads = int((row.input_ids[begin:end] == PAD_ID).sum())
            assert pads < length
            assert (end - begin) % length == 0
        assert (row.input_ids == MASK_ID).any()


def test_short_rows_with_a_changing_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one block length \(no block_length_schedule\)"):
        loader_of(replace(EXACT, row_length=160))
    assert make_loader(options=replace(OPTIONS, semantics="exact", row_length=252)).row_length
