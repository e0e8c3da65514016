"""What a rank writes of its own state, and from the states of all to who is missing, in words."""

from __future__ import annotations

import faulthandler
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_sdar.parallel.flight_recorder import recorded_collectives

_SHOWN = 16


@dataclass(frozen=True)
class RankState:
    """What a rank's training thread was doing.

    Attributes:
        place: in the mesh.
        host, pid: where it runs.
        step, phase: what it said last.
        since: seconds ago.
        waits_in: the collective that it is in, None if it is in none.
        last_collective: the latest that it began.
    """

    place: str
    host: str
    pid: int
    step: int
    phase: str
    since: float
    waits_in: str | None
    last_collective: str | None


def missing_ranks(states: Mapping[int, RankState], world_size: int) -> list[int]:
    """The ranks that the others wait for.

    Those that did not answer; else those that are in no collective while another is; else those
    that are furthest behind, unless all are at the same place (then none can be named).
    """
    silent = [rank for rank in range(world_size) if rank not in states]
    if silent:
        return silent
    outside = [rank for rank, state in states.items() if state.waits_in is None]
    if outside and len(outside) < len(states):
        return outside
    first = min(state.step for state in states.values())
    behind = [rank for rank, state in states.items() if state.step == first]
    return behind if len(behind) < len(states) else []


def describe_hang(
    why: str, states: Mapping[int, RankState], silent_for: Mapping[int, float | None]
) -> str:
    """The report of rank 0.

    Args:
        why: what was noticed.
        states: by rank, of those that answered.
        silent_for: seconds since each rank's thread was heard of, by rank; None: never.
    """
    missing = missing_ranks(states, len(silent_for))
    lines = [f"error: training stalled: {why}"]
    for rank in missing[:_SHOWN]:
        if rank in states:
            lines.append(f"  missing: rank {rank}: {_in_words(states[rank])}")
            continue
        seconds = silent_for[rank]
        heard = "was never heard of" if seconds is None else f"is silent for {seconds:.0f} s"
        lines.append(f"  missing: rank {rank} {heard}: its process is stopped or gone, or its host")
    if len(missing) > _SHOWN:
        lines.append(f"  missing: {len(missing) - _SHOWN} more ranks")
    if not missing:
        lines.append("  no rank can be named: all are at the same place")
    others = [rank for rank in sorted(states) if rank not in missing]
    lines += [f"  rank {rank}: {_in_words(states[rank])}" for rank in others[:_SHOWN]]
    if len(others) > _SHOWN:
        lines.append(f"  and {len(others) - _SHOWN} more ranks, see their files")
    return "\n".join(lines)


def _in_words(state: RankState) -> str:
    doing = "in no collective" if state.waits_in is None else f"waits in {state.waits_in}"
    last = f"; last collective: {state.last_collective}" if state.last_collective else ""
    return (
        f"({state.place}; {state.host}, pid {state.pid}) step {state.step}, {state.phase} for "
        f"{state.since:.0f} s, {doing}{last}"
    )


def write_state(path: Path, state: RankState) -> None:
    """Write what this rank does, all its stacks and the flight recorder's trace (OSError)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for name, value in asdict(state).items():
            file.write(f"{name}: {value}\n")
        file.write("\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        file.write(f"\nflight recorder: {recorded_collectives().trace}\n")


def ranks_text(ranks: Sequence[int]) -> str:
    """Their numbers, the first eight of them."""
    shown = ", ".join(str(rank) for rank in ranks[:8])
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {shown}{more}"
