"""The row stream: prefix-stable, layout-independent, exactly resumable."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from unit.token_lists import (
    OPTIONS,
    TokenList,
    make_loader,
    pack,
    random_documents,
    same,
)

from megatron_sdar.data.loading.documents import DocumentStore, split_documents
from megatron_sdar.data.loading.loader import RowLoader, RowOptions
from megatron_sdar.data.loading.packing import PackedIndex
from megatron_sdar.diffusion.noise import epoch_order
from megatron_sdar.diffusion.rows import Row


def one_by_one(
    store: DocumentStore, index: PackedIndex, options: RowOptions = OPTIONS
) -> RowLoader:
    """A loader with one row a step."""
    return RowLoader(
        store, index, options, rows_per_micro_batch=1, num_micro_batches=1, dp_rank=0, dp_size=1
    )


def test_every_epoch_holds_every_row_once_in_its_own_order() -> None:
    stream = make_loader().stream
    assert stream.num_rows > 10
    epochs = [
        [stream.place(epoch * stream.num_rows + place) for place in range(stream.num_rows)]
        for epoch in range(3)
    ]
    for epoch, places in enumerate(epochs):
        assert {place[:2] for place in places} == {(0, epoch)}
        rows = [row for _, _, row in places]
        assert rows == epoch_order(stream.num_rows, OPTIONS.seed, epoch).tolist()
        assert sorted(rows) == list(range(stream.num_rows))


def test_without_shuffling_rows_come_in_pack_order() -> None:
    stream = make_loader(options=replace(OPTIONS, shuffle=False)).stream
    rows = stream.num_rows
    assert [stream.place(p)[2] for p in range(2 * rows)] == [*range(rows)] * 2


def test_data_parallel_ranks_split_the_same_global_batch() -> None:
    whole = make_loader(num_micro_batches=8)
    split = {rank: make_loader(num_micro_batches=2, dp_rank=rank, dp_size=4) for rank in range(4)}
    for _ in range(3):
        step = whole.next_step()
        dealt_to = {rank: loader.next_step() for rank, loader in split.items()}
        dealt = [dealt_to[rank][micro] for micro in range(2) for rank in range(4)]
        assert all(same(a, b) for a, b in zip(step, dealt, strict=True))


def test_rows_per_micro_batch_only_regroups() -> None:
    singles = make_loader().next_step()
    pairs = make_loader(rows_per_micro_batch=2, num_micro_batches=2).next_step()
    for group, pair in enumerate(pairs):
        ids = np.concatenate([row.input_ids for row in singles[2 * group : 2 * group + 2]])
        assert np.array_equal(pair.input_ids, ids)
        labels = [row.num_label_tokens for row in singles[2 * group : 2 * group + 2]]
        assert pair.num_label_tokens == sum(labels)


def test_noise_changes_between_epochs_but_not_between_packings() -> None:
    stream = make_loader(random_documents(longest=20)).stream
    document = np.array([5])
    alone, again = stream.make_row(document, 0), stream.make_row(document, 0)
    assert same(alone, again)
    assert not same(alone, stream.make_row(document, 1))
    together = stream.make_row(np.array([4, 5]), 0)
    assert alone.loss_positions.size > 0
    assert masked(alone) <= masked(together)
    assert same(alone, make_loader(random_documents(longest=20)).make_row(document, 0))


def masked(row: Row) -> set[tuple[int, int]]:
    """(place in its document, token) of every masked token."""
    places = row.position_ids[row.loss_positions]
    return set(zip(places.tolist(), row.target_ids.tolist(), strict=True))


def test_a_document_keeps_its_noise_in_a_selection_and_a_repetition_has_other_noise() -> None:
    base = DocumentStore([random_documents(longest=20)])
    chosen = base.select(np.array([7, base.total + 7, 9]))
    whole, part = make_loader(random_documents(longest=20)), one_by_one(chosen, pack(chosen))
    assert part.num_rows == 1
    expected = whole.make_row(np.array([7, base.total + 7, 9]), 0)
    assert same(part.next_step()[0], expected)
    first, again = (whole.make_row(np.array([number]), 0) for number in (7, base.total + 7))
    length = int(base.lengths[7])
    assert np.array_equal(first.input_ids[:length], again.input_ids[:length])
    assert masked(first) != masked(again)


# State.


def test_resume_continues_bitwise() -> None:
    straight = make_loader()
    steps = [straight.next_step() for _ in range(12)]
    stopped = make_loader()
    for _ in range(5):
        stopped.next_step()
    resumed = make_loader()
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    for expected in steps[5:]:
        assert all(same(a, b) for a, b in zip(expected, resumed.next_step(), strict=True))
    assert resumed.epoch == straight.epoch > 1, "the test must cross an epoch border"


def test_the_state_is_small() -> None:
    loader = make_loader(random_documents(3000, longest=20))
    loader.next_step()
    assert len(json.dumps(loader.state_dict())) < 600


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 4}, "seed was 3, now 4"),
        ({"noise_eps": 0.01}, "noise_eps was 0.001, now 0.01"),
        ({"shuffle": False}, "shuffle was True, now False"),
        ({"block_length": 8}, "block_length was 4, now 8"),
    ],
)
def test_resume_with_other_options_is_refused(changes: dict[str, object], named: str) -> None:
    stopped = make_loader()
    stopped.next_step()
    other = make_loader(options=replace(OPTIONS, **changes))
    with pytest.raises(ValueError, match=f"cannot resume: .*{named}.*resume with the same data"):
        other.load_state_dict(stopped.state_dict())
    assert other.position == 0


def test_resume_on_other_documents_is_refused() -> None:
    base = DocumentStore([random_documents()])
    selections = [range(60), range(59), split_documents(60, 5, 0)[0]]
    stores = [base.select(selection) for selection in selections]
    loader, fewer, kept = (one_by_one(store, pack(store)) for store in stores)
    loader.load_state_dict(one_by_one(base, pack(base)).state_dict())
    for other in (fewer, kept):
        with pytest.raises(ValueError, match=r"cannot resume: .*documents was '0:60', now"):
            other.load_state_dict(loader.state_dict())
    assert fewer.state_dict() != kept.state_dict()
    renamed = make_loader(random_documents(name="else"))
    with pytest.raises(ValueError, match=r"cannot resume: .*datasets was \['datadata"):
        renamed.load_state_dict(loader.state_dict())


def test_resume_on_another_pack_is_refused() -> None:
    store = DocumentStore([random_documents(longest=100)])
    loaders = {mode: one_by_one(store, pack(store, mode)) for mode in ("drop", "cut", "split")}
    states = {mode: loader.state_dict() for mode, loader in loaders.items()}
    for mode, loader in loaders.items():
        loader.load_state_dict(states[mode])
        for other in states.keys() - {mode}:
            with pytest.raises(ValueError, match=rf"truncate_mode was '{other} at 128', now"):
                loader.load_state_dict(states[other])
    index = pack(store)
    for change in (
        {"doc_ids": index.doc_ids[::-1].copy()},
        {"pieces": np.zeros(len(index.doc_ids), dtype=np.int32)},
        {"row_offsets": np.arange(len(index.doc_ids) + 1)},
    ):
        repacked = one_by_one(store, replace(index, **change))
        with pytest.raises(ValueError, match=r"cannot resume: .*packing was"):
            repacked.load_state_dict(states["cut"])


def test_another_data_parallel_size_goes_on() -> None:
    stopped = make_loader()
    stopped.next_step()
    wider = make_loader(num_micro_batches=2, dp_size=2)
    wider.load_state_dict(stopped.state_dict())
    assert wider.position == stopped.position == 4
    assert same(wider.next_step()[0], stopped.next_step()[0])


# Truncation.


def long_store() -> DocumentStore:
    """Three turns of 40 + 60, 10 + 20 and 90 + 30 tokens; one of 100 + 300; a short one."""
    return DocumentStore([TokenList([[40, 60, 10, 20, 90, 30], [100, 300], [5, 6]])])


def clean_tokens(row: Row, length: int) -> list[int]:
    return row.input_ids[:length].tolist()


@pytest.mark.parametrize(
    ("mask_history", "ranges"),
    [
        # The first pair fits (40 + 60 tokens); 10 + 20 of the next share the 28 that are left.
        (False, [(0, 110), (110, 128)]),
        # The last pair fits (90 + 30 tokens); 10 + 20 before it share the 8 that are left.
        (True, [(100, 103), (110, 115), (130, 250)]),
    ],
)
def test_long_documents_are_cut_turn_by_turn(
    mask_history: bool, ranges: list[tuple[int, int]]
) -> None:
    store = long_store()
    store.datasets[0].metadata.recipe.template["mask_history"] = mask_history
    index = pack(store)
    assert index.num_cut == 2
    loader = one_by_one(store, index)
    row = loader.make_row(np.array([0]), 0)
    kept = [place for start, stop in ranges for place in range(start, stop)]
    ids, labels = store.get(0)
    assert clean_tokens(row, 128) == ids[kept].tolist()
    assert row.num_label_tokens == int((labels[kept] != -100).sum())


def test_split_documents_lose_nothing_and_each_piece_has_its_own_noise() -> None:
    store = long_store()
    index = pack(store, "split")
    loader = one_by_one(store, index)
    pieces = [loader.stream.make_row(np.array([1]), 0, np.array([k])) for k in range(4)]
    sizes = [128, 128, 128, 16]
    tokens = [clean_tokens(row, size) for row, size in zip(pieces, sizes, strict=True)]
    assert [token for piece in tokens for token in piece] == store.get(1)[0].tolist()
    assert sum(row.num_label_tokens for row in pieces) == 300
    probabilities = {float(row.loss_weights[0]) for row in pieces if row.loss_weights.size}
    assert len(probabilities) == 4
    first = loader.make_row(np.array([1]), 0)
    assert same(first, pieces[0])
    items = [
        (int(document), int(piece))
        for row in range(len(index))
        for document, piece in zip(index.row(row), index.row_pieces(row), strict=True)
    ]
    assert sorted(items) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]
    masked_in_stream = sum(loader.stream.row_at(p).loss_positions.size for p in range(len(index)))
    alone = [loader.stream.make_row(np.array([d]), 0, np.array([k])) for d, k in items]
    assert masked_in_stream == sum(row.loss_positions.size for row in alone)


def test_a_dropped_document_cannot_be_made_a_row() -> None:
    store = long_store()
    loader = one_by_one(store, pack(store, "drop"))
    with pytest.raises(ValueError, match=r"document 1 has 400 tokens, .*drop leaves out .* 128"):
        loader.make_row(np.array([1]), 0)
