"""Which rank do the others wait for? Compared at every log line, said when it lasts.

What is usual among n ranks is their lower median: the faster one of two, and up to half of the
ranks may be slow without hiding it. Invariant: all ranks look at the same numbers, so one
collective per log line is all that it takes, and nothing of it reaches a weight.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

import torch

from megatron_sdar.parallel.launch import gather_from_all
from megatron_sdar.parallel.mesh import ParallelMesh
from megatron_sdar.parallel.world_numbers import gather_numbers
from megatron_sdar.training.rank_times import (
    MOVING,
    OWN_PHASES,
    UPDATING,
    WAITING,
    PhaseClock,
    measure_products,
)

LEAST_EXCESS = 0.05  # seconds of a step
LEAST_SHARE = 0.05  # of a step
PRODUCTS = "matrix products"
# Products take milliseconds: where processes share cores, chance makes one three times as slow.
LINES_IN_A_ROW, PRODUCTS_IN_A_ROW = 2, 4
_WHY = {
    WAITING: "waiting for rows: its disk, its loader processes, or the cores that they share",
    MOVING: "moving rows to the device: its host",
    UPDATING: "update of weights and host work: its host",
}
_SHOWN = 4
_SMALLEST = 1e-9


@dataclass(frozen=True)
class RankTimes:
    """One rank's times between two log lines.

    Attributes:
        parts: mean seconds of a step in each of OWN_PHASES.
        products: seconds of a burst of matrix products; nan: not measured yet.
    """

    parts: Sequence[float]
    products: float

    @property
    def own(self) -> float:
        """Seconds of a step in which this rank waits for no other."""
        return sum(self.parts)


@dataclass(frozen=True)
class RankExcess:
    """What a rank takes and what is usual.

    Attributes:
        what: one of OWN_PHASES, the one that differs most, or PRODUCTS.
        seconds, usual: of all OWN_PHASES per step, or of PRODUCTS.
    """

    rank: int
    what: str
    seconds: float
    usual: float

    @property
    def factor(self) -> float:
        return self.seconds / max(self.usual, _SMALLEST)


@dataclass(frozen=True)
class RankSpread:
    """What a log line says of the ranks.

    Attributes:
        numbers: by name in trainer_log.jsonl.
        warning: lines for the user, None: nothing to say.
    """

    numbers: Mapping[str, float]
    warning: str | None


def own_excess(times: Sequence[RankTimes], stages: Sequence[int]) -> list[RankExcess]:
    """Of every rank, compared with the other ranks of its pipeline stage where there are any.

    Stages hold different weights, so their updates take different times.

    Args:
        stages: pipeline stage by rank.
    """
    found = []
    for rank, theirs in enumerate(times):
        peers = [times[other] for other, stage in enumerate(stages) if stage == stages[rank]]
        peers = peers if len(peers) > 1 else list(times)
        parts = [median_low(peer.parts[part] for peer in peers) for part in range(len(OWN_PHASES))]
        above = [seconds - usual for seconds, usual in zip(theirs.parts, parts, strict=True)]
        usual = median_low(peer.own for peer in peers)
        found.append(RankExcess(rank, OWN_PHASES[above.index(max(above))], theirs.own, usual))
    return found


def products_excess(times: Sequence[RankTimes]) -> list[RankExcess]:
    """Of every rank, compared with all; empty before the first measurement."""
    if any(math.isnan(theirs.products) for theirs in times):
        return []
    usual = median_low(theirs.products for theirs in times)
    return [RankExcess(rank, PRODUCTS, theirs.products, usual) for rank, theirs in enumerate(times)]


def slow_ranks(
    own: Sequence[RankExcess], products: Sequence[RankExcess], factor: float, step_seconds: float
) -> list[RankExcess]:
    """Those that are more than `factor` times slower than usual.

    Time of its own counts only where it costs LEAST_EXCESS and LEAST_SHARE of every step.
    """
    least = max(LEAST_EXCESS, LEAST_SHARE * step_seconds)
    found = [each for each in own if each.factor > factor and each.seconds - each.usual >= least]
    return found + [each for each in products if each.factor > factor]


class Persistence:
    """Passes on what lasts: seen at several log lines in a row, then each time as often again."""

    def __init__(self) -> None:
        self._in_a_row: dict[tuple[int, str], int] = {}
        self._seen: dict[tuple[int, str], int] = {}
        self._next: dict[tuple[int, str], int] = {}

    def lasting(self, slow: Sequence[RankExcess]) -> list[RankExcess]:
        """Those of this line that are to be said now."""
        now = {_kind(each): each for each in slow}
        self._in_a_row = {key: self._in_a_row.get(key, 0) + 1 for key in now}
        said = []
        for key, each in now.items():
            self._seen[key] = self._seen.get(key, 0) + 1
            enough = PRODUCTS_IN_A_ROW if each.what == PRODUCTS else LINES_IN_A_ROW
            if self._in_a_row[key] >= enough and self._seen[key] >= self._next.get(key, 0):
                self._next[key] = 2 * self._seen[key]
                said.append(each)
        return said


class SlowRanks:
    """Compares the ranks of a run.

    Args:
        mesh: of several ranks.
        factor: slow_rank_factor, above 0.
        dtype: of matrix products.
        clock: told of phases by the main thread.

    Collective: all_gather_object (world).
    """

    def __init__(
        self, mesh: ParallelMesh, factor: float, dtype: torch.dtype, clock: PhaseClock
    ) -> None:
        self._device, self._dtype = mesh.device, dtype
        self._factor, self._clock = factor, clock
        own = (mesh.pp_rank, f"rank {{}} ({mesh.place}; {socket.gethostname()})")
        everyones = gather_from_all(own, mesh)
        self._stages = [stage for stage, _ in everyones]
        self._names = [name.format(rank) for rank, (_, name) in enumerate(everyones)]
        self._products = math.nan
        self._persistence = Persistence()

    def compare(self, seconds: float) -> RankSpread:
        """The ranks since the last call.

        Products are those measured at the last call, right behind its collective, where all ranks
        begin together.

        Args:
            seconds: since the last call.

        Collective: all_gather_single (world).
        """
        steps, parts = self._clock.take()
        rows = gather_numbers([*parts, self._products], self._device)
        times = [RankTimes(row[:-1], row[-1]) for row in rows]
        self._products = measure_products(self._device, self._dtype)
        own, products = own_excess(times, self._stages), products_excess(times)
        slow = slow_ranks(own, products, self._factor, seconds / max(1, steps))
        lasting = self._persistence.lasting(slow)
        return RankSpread(_numbers(own, products), self._describe(lasting) if lasting else None)

    def _describe(self, slow: Sequence[RankExcess]) -> str:
        lines = [f"slow: {self._names[each.rank]}: {_in_words(each)}" for each in slow[:_SHOWN]]
        if len(slow) > _SHOWN:
            lines.append(f"slow: {len(slow) - _SHOWN} more ranks")
        return "\n".join(lines)


def _kind(excess: RankExcess) -> tuple[int, str]:
    return excess.rank, PRODUCTS if excess.what == PRODUCTS else "own"


def _numbers(own: Sequence[RankExcess], products: Sequence[RankExcess]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, excesses in (("own_time", own), ("products", products)):
        if excesses:
            slowest = max(excesses, key=lambda each: each.seconds - each.usual)
            numbers[f"{name}_slowest_rank"] = slowest.rank
            numbers[f"{name}_s"] = round(slowest.seconds, 6)
            numbers[f"{name}_factor"] = round(slowest.factor, 2)
    return numbers


def _in_words(each: RankExcess) -> str:
    if each.what == PRODUCTS:
        return (
            f"{PRODUCTS} take {1e3 * each.seconds:.1f} ms, {each.factor:.1f} times the usual "
            f"{1e3 * each.usual:.1f} ms: a throttled device, or cores that other programs use"
        )
    return (
        f"the others wait for it {each.seconds - each.usual:.2f} s of every step; its own work "
        f"takes {each.factor:.1f} times the usual {each.usual:.2f} s, most of the difference: "
        f"{_WHY[each.what]}"
    )
