"""Which rank is slow: the decision, what lasts, and the clock, all without real time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from megatron_sdar.training import rank_times
from megatron_sdar.training.rank_times import MOVING, UPDATING, WAITING, PhaseClock
from megatron_sdar.training.slow_ranks import (
    PRODUCTS,
    Persistence,
    RankExcess,
    RankTimes,
    own_excess,
    products_excess,
    slow_ranks,
)

STEP = 1.0
USUAL = (0.01, 0.01, 0.02)


def named(
    parts: Sequence[Sequence[float]],
    products: Sequence[float] | None = None,
    stages: Sequence[int] | None = None,
    *,
    factor: float = 2.0,
    step: float = STEP,
) -> list[tuple[int, str]]:
    """Ranks that are named at one line, and for what."""
    alike = products or [1.0] * len(parts)
    times = [RankTimes(*each) for each in zip(parts, alike, strict=True)]
    own = own_excess(times, stages or [0] * len(parts))
    slow = slow_ranks(own, products_excess(times), factor, step)
    return [(each.rank, each.what) for each in slow]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_nobody_is_named_when_all_are_alike(size: int) -> None:
    assert named([USUAL] * size) == []
    nearly = [tuple(part * (1 + 0.9 * rank / size) for part in USUAL) for rank in range(size)]
    assert named(nearly, [1 + 0.9 * rank / size for rank in range(size)]) == []


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize(("part", "what"), list(enumerate([WAITING, MOVING, UPDATING])))
def test_the_slow_one_is_named_with_its_phase(size: int, part: int, what: str) -> None:
    for rank in range(size):
        times = [list(USUAL) for _ in range(size)]
        times[rank][part] += 0.2
        assert named(times) == [(rank, what)]
        products = [1.0] * size
        products[rank] = 2.1
        assert named([USUAL] * size, products) == [(rank, PRODUCTS)]


def test_half_of_the_ranks_may_be_slow() -> None:
    slow, fast = (0.3, 0.01, 0.02), USUAL
    assert named([slow, fast, slow, fast]) == [(0, WAITING), (2, WAITING)]
    assert named([slow, slow, slow, fast]) == [], "the fast one is the odd one"


def test_what_costs_little_is_not_named() -> None:
    def one(seconds: float, step: float) -> list[tuple[int, str]]:
        return named([USUAL, USUAL, (0.01 + seconds, 0.01, 0.02)], step=step)

    assert one(0.049, 0.5) == []
    assert one(0.051, 0.5) == [(2, WAITING)]
    assert one(0.051, 2.0) == [], "5 percent of a step"
    assert one(0.101, 2.0) == [(2, WAITING)]


def test_the_factor_is_of_all_own_time() -> None:
    heavy = (0.01, 0.01, 0.5)  # what all take for their update
    assert named([heavy, heavy, (0.3, 0.01, 0.5)]) == []
    assert named([heavy, heavy, (0.3, 0.01, 0.5)], factor=1.5) == [(2, WAITING)]


def test_stages_are_compared_within_themselves() -> None:
    first, last = (0.01, 0.01, 0.02), (0.01, 0.01, 0.4)  # the last one holds the head
    stages = [0, 0, 1, 1]
    assert named([first, first, last, last], stages=stages) == []
    assert named([first, first, last, (0.01, 0.01, 1.0)], stages=stages) == [(3, UPDATING)]
    assert named([(0.5, 0.01, 0.02), first, last, last], stages=stages) == [(0, WAITING)]
    alone = [first, first, first, (0.3, 0.01, 0.02)]
    assert named(alone, stages=[0, 1, 2, 3]) == [(3, WAITING)], "without peers all are compared"


def test_products_that_were_not_measured_say_nothing() -> None:
    assert named([USUAL] * 2, [math.nan] * 2) == []


def lines(persistence: Persistence, *slow: Sequence[tuple[int, str]]) -> list[list[int]]:
    """Ranks that are said at each of these lines."""
    return [
        [each.rank for each in persistence.lasting([RankExcess(*key, 1.0, 0.1) for key in line])]
        for line in slow
    ]


def test_only_what_lasts_is_said_and_ever_more_rarely() -> None:
    slow = (3, WAITING)
    said = lines(Persistence(), *[[slow]] * 20)
    assert [number for number, ranks in enumerate(said, 1) if ranks] == [2, 4, 8, 16]
    assert said[1] == [3]
    assert lines(Persistence(), *[[slow], []] * 20) == [[]] * 40, "never twice in a row"
    products = lines(Persistence(), *[[(0, PRODUCTS)]] * 20)
    assert [number for number, ranks in enumerate(products, 1) if ranks] == [4, 8, 16]
    flickering = lines(Persistence(), *[[slow], [slow], []] * 8)
    assert [number for number, ranks in enumerate(flickering, 1) if ranks] == [2, 5, 11, 23]


def test_each_rank_and_kind_is_counted_alone() -> None:
    assert lines(Persistence(), [(1, WAITING)], [(2, WAITING)], [(2, WAITING), (1, WAITING)]) == [
        [], [], [2],
    ]  # fmt: skip
    both = [(1, WAITING), (1, PRODUCTS)]
    assert lines(Persistence(), [(1, WAITING)], [(1, PRODUCTS)], both, both) == [[], [], [], [1]]
    assert lines(Persistence(), [(1, WAITING)], [(1, UPDATING)]) == [[], [1]], "own work, twice"


def test_the_clock_counts_own_phases_alone() -> None:
    now = [100.0]
    clock = PhaseClock(lambda: now[0])

    def spend(phase: str, seconds: float) -> None:
        clock.begin(phase)
        now[0] += seconds

    spend("an evaluation", 50.0)
    for _ in range(2):
        spend(WAITING, 1.0)
        spend("count of labels", 10.0)
        spend(MOVING, 2.0)
        spend("forward of micro-batch 0", 20.0)
        spend("sums of gradients", 10.0)
        spend(UPDATING, 4.0)
    spend("logging", 7.0)
    assert clock.take() == (2, [1.0, 2.0, 4.0])
    now[0] += 9.0
    spend(WAITING, 3.0)
    spend("count of labels", 1.0)
    assert clock.take() == (1, [3.0, 0.0, 0.0])
    assert clock.take() == (0, [0.0, 0.0, 0.0])


def test_products_take_the_median_of_three_bursts(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 5.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(rank_times.time, "perf_counter", lambda: next(ticks))
    assert rank_times.measure_products(torch.device("cpu"), torch.bfloat16) == 2.0
