"""Pipeline schedules as action lists: 1F1B and interleaved 1F1B, for any number of micro-batches.

A schedule is data: for every pipeline rank the order in which it runs forward and backward of
its (chunk, micro-batch) pairs. Each list is checked by simulating all ranks together, so with
sends that do not block it cannot deadlock (pipeline.connect opens NCCL's channels, whose first
message would). Source: Narayanan et al. 2021 (arXiv 2104.04473), 2.2.1 (1F1B), 2.2.2
(interleaved).
"""

from __future__ import annotations

from dataclasses import dataclass

FORWARD, BACKWARD = "F", "B"


@dataclass(frozen=True)
class Action:
    """Run `kind` (FORWARD or BACKWARD) of micro-batch `micro_batch` on local chunk `chunk`."""

    kind: str
    chunk: int
    micro_batch: int


Schedule = list[list[Action]]


def make_schedule(num_ranks: int, num_chunks: int, num_micro_batches: int) -> Schedule:
    """Action lists of all pipeline ranks.

    Args:
        num_ranks: pipeline ranks.
        num_chunks: virtual stages per rank; 1 is plain 1F1B.
        num_micro_batches: at least 1; need not divide by num_ranks.

    With interleaving and a ragged last group of micro-batches the usual warm-up can wait for
    work that is behind it; it is then widened by the least that works.
    """
    assert num_micro_batches >= 1, "a step has at least one micro-batch"
    order = _forward_order(num_ranks, num_chunks, num_micro_batches)
    for extra_warmup in range(len(order) + 1):
        schedule = [
            _rank_actions(rank, num_ranks, num_chunks, order, extra_warmup)
            for rank in range(num_ranks)
        ]
        if is_feasible(schedule, num_chunks):
            return schedule
    raise AssertionError("all forwards before all backwards is always feasible")


def _forward_order(
    num_ranks: int, num_chunks: int, num_micro_batches: int
) -> list[tuple[int, int]]:
    """(chunk, micro-batch) in forward order, the same on every rank: groups of num_ranks."""
    if num_chunks == 1:
        return [(0, micro_batch) for micro_batch in range(num_micro_batches)]
    return [
        (chunk, micro_batch)
        for group in range(0, num_micro_batches, num_ranks)
        for chunk in range(num_chunks)
        for micro_batch in range(group, min(group + num_ranks, num_micro_batches))
    ]


def _rank_actions(
    rank: int,
    num_ranks: int,
    num_chunks: int,
    order: list[tuple[int, int]],
    extra_warmup: int,
) -> list[Action]:
    behind = num_ranks - rank - 1
    warmup = behind if num_chunks == 1 else 2 * behind + (num_chunks - 1) * num_ranks
    warmup = min(warmup + extra_warmup, len(order))
    forwards = [Action(FORWARD, chunk, micro_batch) for chunk, micro_batch in order]
    backwards = [
        Action(BACKWARD, num_chunks - 1 - chunk, micro_batch) for chunk, micro_batch in order
    ]
    actions = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        actions += [forward, backward]
    return actions + backwards[len(order) - warmup :]


def is_feasible(schedule: Schedule, num_chunks: int) -> bool:
    """Whether all ranks, each running its list in order, finish without waiting forever."""
    num_ranks = len(schedule)
    last_stage = num_ranks * num_chunks - 1
    done: set[tuple[str, int, int]] = set()
    cursors = [0] * num_ranks
    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(schedule):
            while cursors[rank] < len(actions):
                action = actions[cursors[rank]]
                stage = action.chunk * num_ranks + rank
                if not _inputs_ready(action, stage, last_stage, done):
                    break
                done.add((action.kind, stage, action.micro_batch))
                cursors[rank] += 1
                progress = True
    return all(cursor == len(actions) for cursor, actions in zip(cursors, schedule, strict=True))


def _inputs_ready(
    action: Action, stage: int, last_stage: int, done: set[tuple[str, int, int]]
) -> bool:
    if action.kind == FORWARD:
        return stage == 0 or (FORWARD, stage - 1, action.micro_batch) in done
    own_forward = (FORWARD, stage, action.micro_batch) in done
    later = stage == last_stage or (BACKWARD, stage + 1, action.micro_batch) in done
    return own_forward and later
