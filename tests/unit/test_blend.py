"""Blends: closed form equals counting row by row; shares hold in every prefix."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sdar.data.loading.blend import BlendSchedule

WEIGHTS = st.lists(
    st.one_of(st.just(0.0), st.integers(1, 20).map(float), st.floats(1e-6, 1e6)),
    min_size=1,
    max_size=12,
).filter(any)


def take(schedule: BlendSchedule, num_rows: int, first: int = 0) -> list[tuple[int, int]]:
    return [schedule.locate(position) for position in range(first, first + num_rows)]


def test_equal_weights_take_turns_and_unequal_ones_are_spread() -> None:
    assert [d for d, _ in take(BlendSchedule([(0, [1, 1, 1, 1])]), 8)] == [0, 2, 1, 3] * 2
    assert [d for d, _ in take(BlendSchedule([(0, [3, 1])]), 8)] == [0, 0, 1, 0] * 2
    assert [d for d, _ in take(BlendSchedule([(0, [0.2, 0.8])]), 10)] == [1, 1, 0, 1, 1] * 2


@given(WEIGHTS)
@settings(max_examples=100, deadline=None)
def test_each_dataset_gives_its_rows_in_order_and_counts_agree(weights: list[float]) -> None:
    schedule = BlendSchedule([(0, weights)])
    seen = [0] * len(weights)
    for position, (dataset, row) in enumerate(take(schedule, 150)):
        assert schedule.counts(position) == seen
        assert row == seen[dataset]
        seen[dataset] += 1
    assert all(count == 0 for count, weight in zip(seen, weights, strict=True) if not weight)


@given(WEIGHTS, st.lists(st.integers(0, 10**12), max_size=10))
@settings(max_examples=100, deadline=None)
def test_every_prefix_holds_each_share_to_within_two_rows(
    weights: list[float], positions: list[int]
) -> None:
    schedule = BlendSchedule([(0, weights)])
    total = sum(map(Fraction, weights))
    limit = Fraction(1, 2) if sum(map(bool, weights)) <= 2 else 2
    for position in [*range(100), *positions]:
        counts = schedule.counts(position)
        assert sum(counts) == position
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - position * Fraction(weight) / total) <= limit


def test_small_datasets_beside_a_large_one_do_not_come_in_bursts() -> None:
    """Half the weight on one of 101 datasets: rounding each on its own would be 25 rows off."""
    schedule = BlendSchedule([(0, [100.0] + [1.0] * 100)])
    errors = [
        max(abs(schedule.counts(p)[0] - p / 2), *(abs(c - p / 200) for c in schedule.counts(p)[1:]))
        for p in range(400)
    ]
    assert max(errors) < 1.5


@given(WEIGHTS, st.integers(0, 2**50))
@settings(max_examples=100, deadline=None)
def test_random_access_far_away_is_exact(weights: list[float], position: int) -> None:
    schedule = BlendSchedule([(0, weights)])
    before, after = schedule.counts(position), schedule.counts(position + 1)
    dataset, row = schedule.locate(position)
    assert row == before[dataset]
    before[dataset] += 1
    assert before == after


@given(st.lists(st.integers(1, 40), max_size=3), st.data())
@settings(max_examples=60, deadline=None)
def test_a_segment_goes_on_where_the_last_one_stopped(
    lengths: list[int], data: st.DataObject
) -> None:
    num_datasets = data.draw(st.integers(1, 4))
    weights = st.lists(
        st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=num_datasets, max_size=num_datasets
    ).filter(any)
    firsts = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
    segments = [(first, data.draw(weights)) for first in firsts]
    schedule = BlendSchedule(segments)
    seen = [0] * num_datasets
    for position, (dataset, row) in enumerate(take(schedule, firsts[-1] + 30)):
        assert row == seen[dataset]
        assert schedule.counts(position) == seen
        number = max(n for n, first in enumerate(firsts) if first <= position)
        alone = BlendSchedule([(0, segments[number][1])])
        assert dataset == alone.locate(position - firsts[number])[0]
        seen[dataset] += 1


def test_later_weights_change_nothing_earlier() -> None:
    short = BlendSchedule([(0, [1, 2, 3])])
    long = BlendSchedule([(0, [1, 2, 3]), (50, [3, 0, 1]), (70, [0, 1, 0])])
    assert take(short, 50) == take(long, 50)
    assert take(short, 10, first=50) != take(long, 10, first=50)
    assert {dataset for dataset, _ in take(long, 20, first=50)} == {0, 2}, "dataset 1 rests"
    assert take(long, 1, first=70) == [(1, short.counts(50)[1])]
    assert [first for first, _ in long.until(0)] == [0]
    assert [first for first, _ in long.until(50)] == [0]
    assert [first for first, _ in long.until(51)] == [0, 50]


def test_only_the_proportions_of_weights_matter() -> None:
    ours, theirs = BlendSchedule([(0, [1, 2, 4])]), BlendSchedule([(0, [0.125, 0.25, 0.5])])
    assert take(ours, 100) == take(theirs, 100)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], r"segments begin at rows \[\]; the first must begin at 0"),
        ([(5, [1.0])], r"begin at rows \[5\]; the first must begin at 0"),
        ([(0, [1.0]), (9, [1.0]), (9, [2.0])], r"first rows \[0, 9, 9\] must ascend"),
        ([(0, [1.0, 2.0]), (9, [1.0])], "1 weights from row 9 on, 2 from row 0 on; give one"),
        ([(0, [1.0, -0.5])], r"weights \[1.0, -0.5\] from row 0 on; give finite numbers"),
        ([(0, [1.0]), (3, [math.nan])], "from row 3 on; give finite numbers of at least 0"),
        ([(0, [math.inf])], "give finite numbers"),
        ([(0, [0.0, 0.0])], "not all 0"),
        ([(0, [])], "not all 0"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(
    segments: list[tuple[int, list[float]]], message: str
) -> None:
    with pytest.raises(ValueError, match=f"blend: .*{message}"):
        BlendSchedule(segments)
