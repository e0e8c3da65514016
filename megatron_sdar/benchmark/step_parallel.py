"""Parallel overhead: CPU time of all ranks of a layout over that of one process, same work.

On a machine with few cores the wall clock of several ranks says little; the CPU time that they
spend beyond one process's is what parallelism costs (copies, smaller products, repeated work,
waiting that spins). All worlds stay alive and take their step in turn, one thread per rank.

Two busy cores may each be slower than one alone: they share caches, memory and often a physical
core. So two processes that share nothing also take half of the micro-batches each: what a layout
costs beyond them is its own.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from megatron_sdar.benchmark.step_clock import StepTime
from megatron_sdar.benchmark.step_data import Document, save_documents
from megatron_sdar.benchmark.step_options import StepOptions
from megatron_sdar.benchmark.step_own import ONE_PROCESS, Layout
from megatron_sdar.benchmark.step_rows import choose_documents

APART = Layout("apart2", apart=2)
LAYOUTS = (Layout("tp2", tp=2), Layout("pp2", pp=2), Layout("dp2", dp=2))
_LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class LayoutFigures:
    """One layout.

    Attributes:
        cpu_ratio: CPU seconds of all ranks over those of one process; median over the rounds.
        over_apart: the same over those of two processes that share nothing.
        cpu_seconds, seconds: all ranks' CPU time and the slowest rank's clock, medians.
        one_process_seconds: CPU time of the one process, median.
    """

    layout: str
    cpu_ratio: float
    over_apart: float
    cpu_seconds: float
    seconds: float
    one_process_seconds: float


class _World:
    """The ranks of one layout, waiting for steps."""

    def __init__(self, layout: Layout, arguments: Sequence[str]) -> None:
        self.layout = layout
        self._ranks = [
            subprocess.Popen(
                [
                    # env(1) adds to what we inherit what torchrun would set.
                    "env", f"RANK={rank}", f"LOCAL_RANK={rank}", f"WORLD_SIZE={layout.world}",
                    "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={port}", "OMP_NUM_THREADS=1",
                    sys.executable, "-m", "megatron_sdar.benchmark.step_rank",
                    *arguments, json.dumps(asdict(layout)), str(group),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for group, port in enumerate(_free_ports(layout.apart))
            for rank in range(layout.world)
        ]  # fmt: skip

    def step(self) -> list[StepTime]:
        """One step on every rank."""
        for process in self._ranks:
            assert process.stdin is not None
            process.stdin.write("step\n")
            process.stdin.flush()
        return [self._answer(process) for process in self._ranks]

    def _answer(self, process: subprocess.Popen[str]) -> StepTime:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise ValueError(f"a rank of {self.layout.name} ended; its message is above")
        return StepTime(**json.loads(line))

    def close(self) -> None:
        """End the ranks; one that does not end by itself is killed."""
        for process in self._ranks:
            if process.stdin is not None:
                process.stdin.close()
        for process in self._ranks:
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
            if process.stdout is not None:
                process.stdout.close()


def _free_ports(count: int) -> list[int]:
    # All held until the last is known, so that none is given twice.
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def measure_layouts(
    options: StepOptions, corpus: Sequence[Document], say: Callable[[str], None]
) -> list[LayoutFigures]:
    """Measure every layout, and two processes that share nothing, beside one process.

    Raises:
        ValueError: the layouts' losses differ, or a rank failed.
    """
    shape = options.shape(options.lengths[0])
    documents = choose_documents(
        corpus, [shape.kept_sizes], options.parallel_rows, shape.longest(1)
    )
    say(
        f"parallel overhead: {options.parallel_rows} micro-batches of {shape.kept_row_length} "
        f"tokens, one thread per rank, {options.parallel_rounds} rounds in turn"
    )
    with tempfile.TemporaryDirectory(prefix="sdar-benchmark-") as folder:
        options_file, documents_file = Path(folder, "options.json"), Path(folder, "documents.npz")
        options_file.write_text(json.dumps(options.to_json()), encoding="utf-8")
        save_documents(documents, documents_file)
        arguments = (str(options_file), str(documents_file))
        worlds: list[_World] = []
        losses: dict[str, float] = {}
        try:
            for layout in (ONE_PROCESS, APART, *LAYOUTS):
                worlds.append(_World(layout, arguments))
                # Its first step now, which is not timed.
                _check_loss(worlds[-1].step(), losses, layout)
            rounds = [
                _round([world.step for world in worlds], first)
                for first in range(options.parallel_rounds)
            ]
        finally:
            for world in worlds:
                world.close()
    return [_figures(world.layout, rounds, place) for place, world in enumerate(worlds) if place]


def _round(steps: Sequence[Callable[[], list[StepTime]]], first: int) -> list[list[StepTime]]:
    # Each round begins with the next world: a machine that slows down, or that others leave, does
    # not meet the same one each time.
    order = [(first + turn) % len(steps) for turn in range(len(steps))]
    taken = {place: steps[place]() for place in order}
    return [taken[place] for place in range(len(steps))]


def _check_loss(ranks: Sequence[StepTime], losses: dict[str, float], layout: Layout) -> None:
    found = sorted(rank.loss for rank in ranks)
    one = losses.setdefault(ONE_PROCESS.name, found[0])
    # The whole loss is a weighted mean of those of the groups that share nothing.
    allowed = _LOSS_TOLERANCE * abs(one)
    if not found[0] - allowed <= one <= found[-1] + allowed or (
        layout.apart == 1 and found[-1] - found[0] > allowed
    ):
        raise ValueError(f"{layout.name} has loss {found}, one process {one}: not the same work")


def _figures(
    layout: Layout, rounds: Sequence[Sequence[list[StepTime]]], place: int
) -> LayoutFigures:
    cpu = [[sum(rank.cpu_seconds for rank in world) for world in each] for each in rounds]
    return LayoutFigures(
        layout=layout.name,
        cpu_ratio=median(each[place] / each[0] for each in cpu),
        over_apart=median(each[place] / each[1] for each in cpu),
        cpu_seconds=median(each[place] for each in cpu),
        seconds=median(max(rank.seconds for rank in each[place]) for each in rounds),
        one_process_seconds=median(each[0] for each in cpu),
    )
