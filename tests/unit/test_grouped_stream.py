"""Rows packed by what the noise leaves: every document once an epoch, at any layout, resumable."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from unit.token_lists import (
    BLOCK,
    CUTOFF,
    MASK_ID,
    OPTIONS,
    TokenList,
    make_loader,
    pack,
    random_documents,
    same,
)

from megatron_sdar.data.loading import grouped_stream
from megatron_sdar.data.loading.blend import BlendSchedule
from megatron_sdar.data.loading.documents import DocumentStore
from megatron_sdar.data.loading.grouped_stream import GroupedStream, GroupStart
from megatron_sdar.data.loading.loader import RowLoader
from megatron_sdar.data.loading.row_stream import RowPart, RowStream
from megatron_sdar.diffusion.rows import Row

EXACT = replace(OPTIONS, semantics="exact")


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_stream, "GROUP_ROWS", 6)


def targets(rows: list[Row]) -> Counter[tuple[int, int, float]]:
    """(token, its place in the document, weight) of every masked token."""
    return Counter(
        (int(target), int(row.position_ids[place]), float(weight))
        for row in rows
        for place, target, weight in zip(
            row.loss_positions, row.target_ids, row.loss_weights, strict=True
        )
    )


def epoch_of(stream: GroupedStream) -> list[Row]:
    return [stream.row_at(place) for place in range(round(stream.count_rows(stream.num_rows)))]


def test_an_epoch_holds_the_masked_tokens_of_the_published_rows_in_fewer_rows() -> None:
    published, exact = make_loader(), make_loader(options=EXACT)
    whole = [published.stream.row_at(place) for place in range(published.num_rows)]
    less = epoch_of(exact.grouped)
    assert targets(less) == targets(whole)
    assert sum(row.num_label_tokens for row in less) == sum(row.num_label_tokens for row in whole)
    assert len(less) < 0.85 * len(whole)
    assert {row.num_tokens for row in less} == {2 * CUTOFF} == {exact.row_length}
    assert sum(row.num_padding for row in less) < 0.15 * sum(row.num_tokens for row in less)


def test_no_kept_noisy_block_is_without_a_masked_token() -> None:
    for row in epoch_of(make_loader(options=EXACT).grouped):
        noisy = np.flatnonzero(row.key_intervals[:, 3] > row.key_intervals[:, 2])
        noisy = noisy[noisy < row.num_tokens - row.num_padding].reshape(-1, BLOCK)
        assert (row.input_ids[noisy] == MASK_ID).any(axis=1).all()


def test_epochs_differ_and_rows_of_a_group_are_shuffled() -> None:
    stream = make_loader(options=EXACT).grouped
    per_epoch = round(stream.count_rows(stream.num_rows))
    first, second = epoch_of(stream), [stream.row_at(per_epoch + i) for i in range(per_epoch)]
    assert targets(first) != targets(second)
    ordered = make_loader(options=replace(EXACT, shuffle=False)).grouped
    assert stream.start_at(per_epoch).num_source_rows == stream.num_rows
    assert not all(same(a, b) for a, b in zip(first, epoch_of(ordered), strict=False))


def test_two_views_share_a_clean_copy() -> None:
    options = replace(EXACT, num_views=2, complementary_views=True)
    loader = make_loader(options=options)
    rows = epoch_of(loader.grouped)
    once = sum(row.num_label_tokens for row in epoch_of(make_loader(options=EXACT).grouped))
    assert loader.row_length == 3 * CUTOFF == rows[0].num_tokens
    assert sum(row.num_label_tokens for row in rows) == 2 * once
    assert sum(row.loss_positions.size for row in rows) == once, "each label token in one view"


def test_data_parallel_ranks_split_the_same_steps() -> None:
    whole = make_loader(options=EXACT, num_micro_batches=8)
    split = {
        rank: make_loader(options=EXACT, num_micro_batches=2, dp_rank=rank, dp_size=4)
        for rank in range(4)
    }
    for _ in range(4):
        step = whole.next_step()
        dealt_to = {rank: loader.next_step() for rank, loader in split.items()}
        dealt = [dealt_to[rank][micro] for micro in range(2) for rank in range(4)]
        assert all(same(a, b) for a, b in zip(step, dealt, strict=True))
    assert len({json.dumps(loader.state_dict()) for loader in [whole, *split.values()]}) == 1


@pytest.mark.parametrize(
    "ahead", [{}, {"prefetch": True}, {"num_workers": 2}], ids=["none", "thread", "processes"]
)
def test_resume_continues_bitwise_across_groups_and_epochs(ahead: dict[str, object]) -> None:
    straight = make_loader(options=EXACT)
    steps = [straight.next_step() for _ in range(12)]
    assert straight.epoch > 1.5
    for stop in (0, 1, 5, 11):
        stopped = make_loader(options=EXACT, **ahead)
        for _ in range(stop):
            stopped.next_step()
        state = json.loads(json.dumps(stopped.state_dict()))
        stopped.close()
        resumed = make_loader(options=EXACT, **ahead)
        resumed.load_state_dict(state)
        assert resumed.epoch == pytest.approx(stopped.epoch)
        for expected in steps[stop:]:
            found = resumed.next_step()
            assert all(same(a, b) for a, b in zip(expected, found, strict=True)), stop
        assert resumed.epoch == straight.epoch
        resumed.close()


def test_a_resumed_run_walks_from_its_group() -> None:
    stopped = make_loader(options=EXACT)
    for _ in range(9):
        stopped.next_step()
    resumed = make_loader(options=EXACT)
    resumed.load_state_dict(stopped.state_dict())
    built = []
    build = resumed.grouped._build
    resumed.grouped._built = lambda start: built.append(start.number) or build(start)
    resumed.next_step()
    assert min(built) > 2


def test_a_state_of_the_other_semantics_is_refused() -> None:
    exact, paper = make_loader(options=EXACT), make_loader()
    with pytest.raises(ValueError, match=r"cannot resume: .*semantics was 'paper', now 'exact'"):
        exact.load_state_dict(paper.state_dict())


def test_counting_is_shared_by_ranks_and_cut_in_proportion() -> None:
    stream = make_loader(options=EXACT).grouped
    rows = stream.num_rows
    for source_rows in (rows, 3 * rows, rows // 2 + 1):
        parts = [stream.count_rows(source_rows, worker, 3) for worker in range(3)]
        assert sum(parts) == pytest.approx(stream.count_rows(source_rows))
    assert stream.count_rows(2 * rows) > stream.count_rows(rows) > stream.count_rows(rows - 1)
    walked = 0
    start = stream.start_at(0)
    while start.num_source_rows < 3 * rows:
        walked = stream._after(start, stream._built(start)).first_row
        start = stream.start_at(walked)
    assert walked == round(stream.count_rows(3 * rows))


def test_without_packing_every_document_keeps_its_row() -> None:
    store = DocumentStore([random_documents()])
    loader = RowLoader(
        store, pack(store), EXACT, rows_per_micro_batch=1, num_micro_batches=1, dp_rank=0,
        dp_size=1, repack=False,
    )  # fmt: skip
    for place in range(loader.num_rows):
        published, exact = loader.stream.row_at(place), loader.grouped.row_at(place)
        assert targets([published]) == targets([exact])
    assert loader.packed_rows_per_row == 1.0


def test_documents_that_nothing_was_masked_of_still_count() -> None:
    # A label token each: often no token of a document is masked.
    store = DocumentStore([TokenList([[3, 1]] * 400)])
    loader = RowLoader(
        store, pack(store), EXACT, rows_per_micro_batch=1, num_micro_batches=1, dp_rank=0, dp_size=1
    )
    rows = epoch_of(loader.grouped)
    assert sum(row.num_label_tokens for row in rows) == 400
    assert sum(row.loss_positions.size for row in rows) < 300


def test_a_group_without_any_masked_token_is_one_row_of_padding() -> None:
    store = DocumentStore([TokenList([[8]] * 40)])
    loader = RowLoader(
        store, pack(store), EXACT, rows_per_micro_batch=1, num_micro_batches=1, dp_rank=0, dp_size=1
    )
    (row,) = epoch_of(loader.grouped)
    assert row.num_padding == row.num_tokens
    assert row.loss_positions.size == row.num_label_tokens == 0


# Blends.


def blend(segments: list[tuple[int, list[float]]]) -> GroupedStream:
    store = DocumentStore([random_documents(40), random_documents(90, seed=1, name="else")])
    stores = [store.select(np.array(store.ids_of(number))) for number in range(2)]
    parts = [RowPart(each, pack(each)) for each in stores]
    return GroupedStream(RowStream(parts, EXACT, BlendSchedule(segments)))


def shares(stream: GroupedStream, rows: range) -> list[int]:
    """Label tokens of each dataset in these rows, told by the store's document ids."""
    totals = [0, 0]
    for position in rows:
        start = stream.start_at(position)
        group = stream._built(start)
        for number in group.rows[position - start.first_row]:
            item = group.items[number]
            totals[item.part] += stream.source.parts[item.part].store.get(item.document_id)[0].size
    return totals


def test_a_blend_changes_exactly_at_the_row_of_its_segment() -> None:
    stream = blend([(0, [1.0, 0.0]), (17, [0.0, 1.0]), (40, [1.0, 3.0])])
    assert shares(stream, range(17))[1] == 0
    assert shares(stream, range(17, 40))[0] == 0
    later = shares(stream, range(40, 140))
    assert later[1] / sum(later) == pytest.approx(0.75, abs=0.05)


def test_a_blend_resumes_from_any_group_and_later_weights_change_nothing_earlier() -> None:
    segments = [(0, [2.0, 1.0]), (25, [1.0, 4.0])]
    stream, other = blend(segments), blend([segments[0], (25, [1.0, 0.0])])
    rows = [stream.row_at(place) for place in range(60)]
    assert all(same(rows[place], other.row_at(place)) for place in range(25))
    for position in (3, 24, 25, 31, 55):
        state = json.loads(json.dumps(stream.start_at(position).to_json()))
        resumed = blend(segments)
        resumed.restart(GroupStart.from_json(state))
        assert all(same(rows[p], resumed.row_at(p)) for p in range(position, 60))


def test_an_earlier_position_than_the_start_is_found_again() -> None:
    stream = make_loader(options=EXACT).grouped
    first = stream.row_at(0)
    stream.restart(stream.start_at(20))
    assert same(stream.row_at(0), first)


# Short rows.


def test_short_rows_hold_the_same_documents() -> None:
    documents = random_documents(longest=14)
    whole = make_loader(documents, options=EXACT)
    short = make_loader(documents, options=replace(EXACT, row_length=64))
    few, many = epoch_of(whole.grouped), epoch_of(short.grouped)
    assert {row.num_tokens for row in many} == {64} == {short.row_length}
    assert len(many) > 2 * len(few)
    assert targets(many) == targets(few)
    assert sum(row.num_label_tokens for row in many) == sum(row.num_label_tokens for row in few)


def test_a_row_length_that_noise_could_exceed_is_refused() -> None:
    options = replace(EXACT, row_length=64)
    with pytest.raises(ValueError, match=r"row_length 64 is too short: .* may take 216 .*cutoff"):
        make_loader(options=options)
    store = DocumentStore([random_documents(longest=14)])
    with pytest.raises(ValueError, match=r"needs packing .* leave row_length out"):
        GroupedStream(RowStream([RowPart(store, pack(store))], options), repack=False)
