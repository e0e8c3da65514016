"""Pipeline schedules are complete, cannot deadlock, and hold few activations."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import pytest

from megatron_sdar.parallel.schedule import (
    BACKWARD,
    FORWARD,
    Action,
    Schedule,
    is_feasible,
    make_schedule,
)

RANKS = range(1, 7)


def _finishes(schedule: Schedule, num_chunks: int) -> bool:
    """Whether the dependency graph has no cycle: an independent form of is_feasible."""
    last = len(schedule) * num_chunks - 1
    graph: TopologicalSorter[tuple[str, int, int]] = TopologicalSorter()
    for rank, actions in enumerate(schedule):
        previous = None
        for action in actions:
            stage, micro_batch = action.chunk * len(schedule) + rank, action.micro_batch
            node = (action.kind, stage, micro_batch)
            graph.add(node)
            if previous is not None:
                graph.add(node, previous)
            if action.kind == FORWARD and stage > 0:
                graph.add(node, (FORWARD, stage - 1, micro_batch))
            if action.kind == BACKWARD:
                graph.add(node, (FORWARD, stage, micro_batch))
            if action.kind == BACKWARD and stage < last:
                graph.add(node, (BACKWARD, stage + 1, micro_batch))
            previous = node
    try:
        graph.prepare()
    except CycleError:
        return False
    return True


def _most_in_flight(actions: list[Action]) -> int:
    most = held = 0
    for action in actions:
        held += 1 if action.kind == FORWARD else -1
        most = max(most, held)
    return most


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 4])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_every_schedule_is_complete_and_finishes(num_ranks: int, num_chunks: int) -> None:
    for num_micro_batches in range(1, 18):
        schedule = make_schedule(num_ranks, num_chunks, num_micro_batches)
        assert len(schedule) == num_ranks
        expected = {
            Action(kind, chunk, micro_batch)
            for kind in (FORWARD, BACKWARD)
            for chunk in range(num_chunks)
            for micro_batch in range(num_micro_batches)
        }
        for actions in schedule:
            assert len(actions) == len(expected)
            assert set(actions) == expected, "each forward and backward exactly once"
            place = {action: index for index, action in enumerate(actions)}
            for action in actions:
                if action.kind == BACKWARD:
                    forward = Action(FORWARD, action.chunk, action.micro_batch)
                    assert place[forward] < place[action]
        assert is_feasible(schedule, num_chunks)
        assert _finishes(schedule, num_chunks)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_plain_1f1b_holds_at_most_the_stages_behind_it(num_ranks: int) -> None:
    for num_micro_batches in range(1, 18):
        for rank, actions in enumerate(make_schedule(num_ranks, 1, num_micro_batches)):
            assert _most_in_flight(actions) == min(num_ranks - rank, num_micro_batches)


@pytest.mark.parametrize("num_chunks", [2, 3, 4])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_interleaved_1f1b_of_whole_groups_has_megatrons_warm_up(
    num_ranks: int, num_chunks: int
) -> None:
    for groups in (1, 2, 3):
        num_micro_batches = groups * num_ranks
        schedule = make_schedule(num_ranks, num_chunks, num_micro_batches)
        for rank, actions in enumerate(schedule):
            warm_up = 2 * (num_ranks - rank - 1) + (num_chunks - 1) * num_ranks
            total = num_chunks * num_micro_batches
            assert _most_in_flight(actions) == min(warm_up + 1, total)


@pytest.mark.parametrize("num_chunks", [1, 2, 3])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_neighbours_send_and_receive_in_the_same_order(num_ranks: int, num_chunks: int) -> None:
    # Messages carry no tag: the receiver must want them in the order they are sent.
    for num_micro_batches in range(1, 10):
        schedule = make_schedule(num_ranks, num_chunks, num_micro_batches)
        for kind in (FORWARD, BACKWARD):
            orders = [
                [(a.chunk, a.micro_batch) for a in actions if a.kind == kind]
                for actions in schedule
            ]
            assert all(order == orders[0] for order in orders)


def test_the_first_micro_batches_of_a_two_rank_pipeline() -> None:
    forward = [Action(FORWARD, 0, i) for i in range(3)]
    backward = [Action(BACKWARD, 0, i) for i in range(3)]
    assert make_schedule(2, 1, 3) == [
        [forward[0], forward[1], backward[0], forward[2], backward[1], backward[2]],
        [forward[0], backward[0], forward[1], backward[1], forward[2], backward[2]],
    ]


def test_a_deadlock_is_seen() -> None:
    # Rank 0 waits for the gradient of micro-batch 0 before it sends micro-batch 1, rank 1
    # wants both activations first.
    waits = [
        Action(FORWARD, 0, 0),
        Action(BACKWARD, 0, 0),
        Action(FORWARD, 0, 1),
        Action(BACKWARD, 0, 1),
    ]
    wants_both = [
        Action(FORWARD, 0, 0),
        Action(FORWARD, 0, 1),
        Action(BACKWARD, 0, 0),
        Action(BACKWARD, 0, 1),
    ]
    assert not is_feasible([waits, wants_both], 1)
    assert not _finishes([waits, wants_both], 1)
    assert is_feasible([wants_both, waits], 1)


def test_a_backward_before_its_forward_is_seen() -> None:
    assert not is_feasible([[Action(BACKWARD, 0, 0), Action(FORWARD, 0, 0)]], 1)


def test_a_ragged_last_group_gets_a_wider_warm_up_only_where_it_must() -> None:
    widened = 0
    for num_ranks in RANKS:
        for num_micro_batches in range(1, 18):
            for rank, actions in enumerate(make_schedule(num_ranks, 2, num_micro_batches)):
                usual = min(2 * (num_ranks - rank - 1) + num_ranks + 1, 2 * num_micro_batches)
                most = _most_in_flight(actions)
                assert most >= usual
                if most > usual:
                    assert num_micro_batches % num_ranks, "whole groups need no more"
                    widened += 1
    assert widened > 0


def test_a_step_without_micro_batches_is_refused() -> None:
    with pytest.raises(AssertionError, match="at least one micro-batch"):
        make_schedule(2, 1, 0)
