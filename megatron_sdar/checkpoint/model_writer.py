"""One conversion from end to end: plan, free space, write, go on after a kill, check, put in place.

Knows neither format: a `ModelTarget` says which files there are, gives their bytes and adds what
stands beside them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.filesize import decimal
from torch import Tensor

from megatron_sdar.checkpoint.checksums import FileRecord
from megatron_sdar.checkpoint.destination import check_replaceable, working_directory
from megatron_sdar.checkpoint.journal import Journal
from megatron_sdar.checkpoint.model_source import ModelSource
from megatron_sdar.checkpoint.progress import byte_progress
from megatron_sdar.checkpoint.safetensors_files import Ranges
from megatron_sdar.checkpoint.weight_files import (
    THREADS,
    WeightFile,
    check_records,
    compare_weight_files,
    write_weight_files,
)

_ROOM_FOR_SMALL_FILES = 64 * 10**6
Say = Callable[[str], None]


class ModelTarget(Protocol):
    """A format to write a source in.

    Attributes:
        source: the model.
        files: the weight files, in order.
        plan: what the bytes depend on beside the source's files and the weight files' plan.
    """

    @property
    def source(self) -> ModelSource: ...

    @property
    def files(self) -> Sequence[WeightFile]: ...

    @property
    def plan(self) -> Mapping[str, Any]: ...

    def read(self, name: str, ranges: Ranges) -> Tensor:
        """A slice of a tensor of `files`, in the dtype it has there. ValueError as the source."""
        ...

    def finish(self, directory: Path, records: Mapping[str, FileRecord]) -> None:
        """Write everything but the weights; `records` are those of the weight files."""
        ...

    def problems(self, directory: Path) -> list[str]:
        """What is wrong with the finished directory, one line each."""
        ...


@dataclass(frozen=True)
class WriteOptions:
    """How to write.

    Attributes:
        overwrite: replace a destination that is a model or a checkpoint.
        verify: before the destination appears, check the finished directory against its format
            and compare every tensor on disk bitwise with the source.
        dry_run: plan and check only; nothing is written.
        threads: files that are worked on at the same time.
        progress: draw bars when stderr is a terminal.
    """

    overwrite: bool = False
    verify: bool = False
    dry_run: bool = False
    threads: int = THREADS
    progress: bool = True


def write_model(
    target: ModelTarget, destination: Path, options: WriteOptions, say: Say = lambda _: None
) -> None:
    """Write the target's model to `destination`, which appears when it is whole.

    Args:
        say: told what happens, line by line.

    Raises:
        ValueError: the source is damaged; a value does not fit its dtype; the destination may
            not be written or replaced; the disk is full; what was written fails its checks.
    """
    total = sum(file.num_bytes for file in target.files)
    say(f"{decimal(total)} in {len(target.files)} files")
    if options.dry_run:
        check_replaceable(target.source.directory, destination, options.overwrite)
        _check_free_space(destination, total)
        say(f"dry run: nothing was written to {destination}")
        return
    with working_directory(
        target.source.directory, destination, options.overwrite, _plan(target)
    ) as (working, journal):
        if journal.is_foreign:
            say("an interrupted conversion with other options or another source is dropped")
        missing = _missing(target, working, journal, options, say)
        _check_free_space(destination, sum(file.num_bytes for file in missing))
        _write(target, working, missing, journal, options, say)
        target.finish(working, journal.finished)
        if options.verify:
            _verify(target, working, options, say)


def _plan(target: ModelTarget) -> dict[str, Any]:
    """Everything the bytes depend on, JSON-able."""
    sources = []
    for path in target.source.files:
        status = path.stat()
        sources.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    files = {
        file.name: {
            name: [list(info.shape), str(info.dtype)] for name, info in file.tensors.items()
        }
        for file in target.files
    }
    return {"sources": sources, "files": files, **target.plan}


def _missing(
    target: ModelTarget, working: Path, journal: Journal, options: WriteOptions, say: Say
) -> list[WeightFile]:
    """Files still to be written: those that an earlier try did not finish, or are damaged."""
    if journal.finished:
        total = sum(record.num_bytes for record in journal.finished.values())
        with byte_progress("check finished files", total, options.progress) as advance:
            damaged = check_records(working, journal.finished, options.threads, advance)
        for name in damaged:
            del journal.finished[name]
        say(
            f"going on: {len(journal.finished)} files were finished before"
            + (f", {len(damaged)} are damaged and written again" if damaged else "")
        )
    return [file for file in target.files if file.name not in journal.finished]


def _check_free_space(destination: Path, needed: int) -> None:
    parent = destination.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed + _ROOM_FOR_SMALL_FILES:
        raise ValueError(
            f"{destination}: needs {decimal(needed + _ROOM_FOR_SMALL_FILES)} and its disk has "
            f"{decimal(free)} free; free some, or choose a destination on another disk"
        )


def _write(
    target: ModelTarget,
    working: Path,
    missing: Sequence[WeightFile],
    journal: Journal,
    options: WriteOptions,
    say: Say,
) -> None:
    for folder in {(working / file.name).parent for file in target.files}:
        folder.mkdir(parents=True, exist_ok=True)
    total = sum(file.num_bytes for file in missing)
    started = time.monotonic()
    with (
        byte_progress("write", total, options.progress) as advance,
        closing(
            write_weight_files(working, missing, target.read, options.threads, advance)
        ) as written,
    ):
        for file, record in written:
            journal.add(file.name, record)
    say(f"wrote {_rate(total, time.monotonic() - started)}")


def _verify(target: ModelTarget, working: Path, options: WriteOptions, say: Say) -> None:
    problems = target.problems(working)
    if problems:
        raise ValueError("what was written breaks its format:\n  " + "\n  ".join(problems))
    total = sum(file.num_bytes for file in target.files)
    started = time.monotonic()
    with byte_progress("verify", total, options.progress) as advance:
        compare_weight_files(working, target.files, target.read, options.threads, advance)
    tensors = sum(len(file.tensors) for file in target.files)
    say(
        f"verified: format, and {tensors} tensors bitwise, "
        f"{_rate(total, time.monotonic() - started)}"
    )


def _rate(num_bytes: int, seconds: float) -> str:
    per_second = decimal(int(num_bytes / max(seconds, 1e-9)))
    return f"{decimal(num_bytes)} in {seconds:.1f} s ({per_second}/s)"
