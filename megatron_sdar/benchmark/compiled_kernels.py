"""Compiles kernels in parallel processes, without a GPU, and shows what each of them uses.

Nothing is skipped: a kernel that does not compile is a problem as one that spills is.
"""

import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from sdar_kernels.ahead_of_time import CompiledKernel, compile_spec, problems
from sdar_kernels.triton_runtime import KernelSpec, interpreting

_FILE_WIDTH = 140
# Kernels of an architecture: a function of a module, since every process calls it by its name.
Kernels = Callable[[str], list[KernelSpec]]


@dataclass(frozen=True)
class Outcome:
    """One kernel on one architecture: its report, or None and what went wrong instead."""

    name: str
    arch: str
    report: CompiledKernel | None
    problems: tuple[str, ...]


def compile_kernels(
    kernels: Kernels, architectures: Sequence[str], *, name_part: str, num_workers: int
) -> list[Outcome]:
    """Compile every kernel whose name contains NAME_PART, for every architecture.

    Draws a bar on standard error if it is a terminal. Raises ValueError where nothing is shipped
    for an architecture, no name contains NAME_PART, or kernels are interpreted.
    """
    if interpreting():
        raise ValueError("kernels are interpreted here: unset TRITON_INTERPRET to compile them")
    if num_workers < 1:
        raise ValueError(f"{num_workers} processes cannot compile; give one at least")
    chosen = [
        (name, arch)
        for arch in dict.fromkeys(architectures)
        for name in _names(kernels, arch)
        if name_part in name
    ]
    if not chosen:
        raise ValueError(
            f"no kernel's name contains {name_part!r}; names: "
            f"{', '.join(_names(kernels, architectures[0]))}"
        )
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(num_workers, len(chosen)), mp_context=context)
    try:
        futures = [pool.submit(_compile, kernels, name, arch) for name, arch in chosen]
        _watch(futures)
    finally:
        pool.shutdown(cancel_futures=True)
    return [_outcome(name, arch, done) for (name, arch), done in zip(chosen, futures, strict=True)]


def show_kernels(outcomes: Sequence[Outcome], console: Console | None = None) -> bool:
    """Print a table of OUTCOMES and what is wrong with them; True if nothing is."""
    console = console or _wide_console()
    table = Table()
    table.add_column("kernel", no_wrap=True)
    table.add_column("arch", no_wrap=True)
    for heading in (
        "registers", "spills", "shared memory", "SASS", "full loop", "masked loop", "masked/full",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    for outcome in outcomes:
        style = "red" if outcome.problems else None
        table.add_row(outcome.name, outcome.arch, *_cells(outcome.report), style=style)
    console.print(table)
    found = [problem for outcome in outcomes for problem in outcome.problems]
    for problem in found:
        console.print(problem, style="red", markup=False, soft_wrap=True)
    counted = f"{len(outcomes)} configurations, {len({o.arch for o in outcomes})} architectures"
    verdict = f"{len(found)} problems" if found else "no spills, shared memory within limits"
    console.print(f"{counted}: {verdict}", soft_wrap=True)
    return not found


def write_kernels(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write OUTCOMES to PATH as a JSON list, one object for each kernel and architecture."""
    path.write_text(json.dumps([asdict(o) for o in outcomes], indent=2) + "\n", encoding="utf-8")


def _names(kernels: Kernels, arch: str) -> list[str]:
    names = [spec.name for spec in kernels(arch)]
    if not names:
        raise ValueError(f"no kernel is shipped for {arch}")
    return names


def _compile(kernels: Kernels, name: str, arch: str) -> CompiledKernel:
    """What a process does: kernels cannot be sent to it, so it looks its own up by name."""
    spec = next(spec for spec in kernels(arch) if spec.name == name)
    return compile_spec(spec, arch)


def _watch(futures: Sequence[Future[CompiledKernel]]) -> None:
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("compiling"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("compiling", total=len(futures))
        for _ in as_completed(futures):
            bar.advance(task)


def _outcome(name: str, arch: str, done: Future[CompiledKernel]) -> Outcome:
    error = done.exception()
    if error is None:
        return Outcome(name, arch, done.result(), tuple(problems(done.result())))
    told = " ".join(f"{type(error).__name__}: {error}".split())
    return Outcome(name, arch, None, (f"{name} on {arch}: does not compile: {told}",))


def _cells(report: CompiledKernel | None) -> list[str]:
    if report is None:
        return ["-"] * 7
    counts = (
        report.registers,
        report.spill_bytes,
        report.shared_bytes,
        report.instructions,
        report.full_loop,
        report.masked_loop,
    )
    ratio = report.masked_ratio
    return [
        *("-" if count is None else f"{count:,}" for count in counts),
        "-" if ratio is None else f"{ratio:.2f}",
    ]


def _wide_console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=_FILE_WIDTH, highlight=False)
