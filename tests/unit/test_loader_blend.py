"""Blends in the loader: each dataset runs through its own epochs in the scheduled shares."""

from __future__ import annotations

import json

import numpy as np
import pytest
from unit.token_lists import OPTIONS, make_loader, pack, random_documents, same

from megatron_sdar.data.loading.blend import BlendSchedule
from megatron_sdar.data.loading.documents import DocumentStore
from megatron_sdar.data.loading.loader import RowLoader
from megatron_sdar.diffusion.noise import epoch_order

FIRST_WEIGHTS = [(0, [3.0, 1.0, 0.0])]


def blended(
    segments: list[tuple[int, list[float]]] = FIRST_WEIGHTS, num_documents: int = 30
) -> RowLoader:
    """Three datasets of about 9, 3 and 6 rows."""
    sizes = (num_documents, num_documents // 3, 20)
    base = DocumentStore([random_documents(n, name=f"data{n}", seed=n) for n in sizes])
    stores = [base.select(base.ids_of(dataset)) for dataset in range(3)]
    return RowLoader(
        stores,
        [pack(store) for store in stores],
        OPTIONS,
        rows_per_micro_batch=1,
        num_micro_batches=4,
        dp_rank=0,
        dp_size=1,
        schedule=BlendSchedule(segments),
    )


def places(loader: RowLoader, num_rows: int) -> list[tuple[int, int, int]]:
    return [loader.stream.place(position) for position in range(num_rows)]


def test_every_dataset_has_its_share_and_its_own_epochs() -> None:
    loader = blended()
    found = places(loader, 96)
    assert [sum(part == number for part, _, _ in found) for number in range(3)] == [72, 24, 0]
    for number in range(2):
        rows = len(loader.stream.parts[number].index)
        mine = [(epoch, row) for part, epoch, row in found if part == number]
        expected = [
            (epoch, int(row))
            for epoch in range(len(mine) // rows + 1)
            for row in epoch_order(rows, OPTIONS.seed, epoch, number)
        ]
        assert mine == expected[: len(mine)]
        assert len(mine) > 2 * rows, "the test must cross epoch borders"


def test_a_row_holds_the_documents_of_its_dataset_with_their_ids_of_the_whole_list() -> None:
    loader = blended()
    stream = loader.stream
    for position in range(20):
        part, epoch, row = stream.place(position)
        ids = stream.parts[part].index.row(row) + stream.parts[0].store.starts[part]
        assert same(stream.row_at(position), stream.make_row(ids, epoch))
    assert {stream.place(position)[0] for position in range(20)} == {0, 1}


def test_one_dataset_with_a_schedule_is_that_dataset() -> None:
    alone = make_loader()
    scheduled = make_loader(schedule=BlendSchedule([(0, [0.3]), (7, [5.0])]))
    for _ in range(8):
        for ours, theirs in zip(scheduled.next_step(), alone.next_step(), strict=True):
            assert same(ours, theirs)


def test_weights_that_change_later_change_nothing_earlier_and_may_change_on_resume() -> None:
    before = blended()
    steps = [before.next_step() for _ in range(5)]
    state = json.loads(json.dumps(before.state_dict()))
    after = blended([*FIRST_WEIGHTS, (20, [0.0, 0.0, 1.0]), (28, [1.0, 1.0, 1.0])])
    for step in steps:
        assert all(same(a, b) for a, b in zip(step, after.next_step(), strict=True))
    assert all(part == 2 for part, _, _ in places(after, 28)[20:])
    resumed = blended([*FIRST_WEIGHTS, (20, [0.0, 0.0, 1.0]), (28, [1.0, 1.0, 1.0])])
    resumed.load_state_dict(state)
    for _ in range(4):
        for ours, theirs in zip(resumed.next_step(), after.next_step(), strict=True):
            assert same(ours, theirs)


@pytest.mark.parametrize(
    "segments",
    [[(0, [3.0, 1.0, 1.0])], [*FIRST_WEIGHTS, (19, [1.0, 1.0, 1.0])]],
    ids=["other weights", "a change before the checkpoint"],
)
def test_resume_with_another_past_is_refused(segments: list[tuple[int, list[float]]]) -> None:
    stopped = blended()
    for _ in range(5):
        stopped.next_step()
    with pytest.raises(
        ValueError, match=r"cannot resume: .*blend was \[\[0, \[3.0, 1.0, 0.0\]\]\]"
    ):
        blended(segments).load_state_dict(stopped.state_dict())
    with pytest.raises(ValueError, match=r"cannot resume: .*packing was .*datasets was"):
        blended(num_documents=31).load_state_dict(stopped.state_dict())


def test_the_state_stays_small_with_many_datasets() -> None:
    base = DocumentStore([random_documents(5, name=f"data{n}", seed=n) for n in range(40)])
    stores = [base.select(base.ids_of(dataset)) for dataset in range(40)]
    loaders = [
        RowLoader(
            stores,
            [pack(store) for store in stores],
            OPTIONS,
            rows_per_micro_batch=1,
            num_micro_batches=1,
            dp_rank=0,
            dp_size=1,
            schedule=BlendSchedule([(0, [1.0] * 39 + [last])]),
        )
        for last in (1.0, 2.0)
    ]
    state = loaders[0].state_dict()
    assert len(json.dumps(state)) < 900
    with pytest.raises(ValueError, match=r"blend was '1 of sha256 .*', now '1 of sha256"):
        loaders[1].load_state_dict(state)


def test_an_epoch_of_a_blend_is_as_long_as_all_its_datasets() -> None:
    loader = blended()
    assert loader.num_rows == sum(len(part.index) for part in loader.stream.parts)
    loader.next_step()
    assert loader.epoch == 4 / loader.num_rows


def test_weights_for_another_number_of_datasets_are_refused() -> None:
    with pytest.raises(ValueError, match="blend: 1 datasets but weights for 2; give one weight"):
        make_loader(schedule=BlendSchedule([(0, [1.0, 1.0])]))
    base = DocumentStore([random_documents(), random_documents()])
    stores = [base.select(base.ids_of(dataset)) for dataset in range(2)]
    with pytest.raises(ValueError, match="blend: 2 datasets but weights for 1"):
        RowLoader(
            stores,
            [pack(store) for store in stores],
            OPTIONS,
            rows_per_micro_batch=1,
            num_micro_batches=1,
            dp_rank=0,
            dp_size=1,
        )


def test_stores_that_number_documents_apart_are_refused() -> None:
    """Two stores of their own would give two documents one id, and so the same noise."""
    stores = [DocumentStore([random_documents(seed=n)]) for n in range(2)]
    with pytest.raises(AssertionError, match="number documents apart"):
        RowLoader(
            stores,
            [pack(store) for store in stores],
            OPTIONS,
            rows_per_micro_batch=1,
            num_micro_batches=1,
            dp_rank=0,
            dp_size=1,
            schedule=BlendSchedule([(0, [1.0, 1.0])]),
        )


def test_documents_of_different_datasets_have_different_noise() -> None:
    loader = blended()
    (first, second) = (
        loader.stream.make_row(np.array([loader.stream.parts[0].store.starts[part]]), 0)
        for part in range(2)
    )
    assert set(first.loss_weights.tolist()) != set(second.loss_weights.tolist())
