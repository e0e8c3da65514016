"""Where a conversion writes: beside its destination, which appears only when it is whole.

Owns the working directory, which survives a kill together with the journal of what is finished in
it, and what may be replaced: with `overwrite`, a directory that is itself a model or a checkpoint;
never one that merely contains such, nor the source of the conversion.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_sdar.checkpoint.hf_assets import ADAPTER_CONFIG_NAME, CONFIG_NAME
from megatron_sdar.checkpoint.journal import Journal
from megatron_sdar.checkpoint.run_directory import MARKER_NAME


@contextmanager
def working_directory(
    source: Path, destination: Path, overwrite: bool, plan: Mapping[str, Any]
) -> Iterator[tuple[Path, Journal]]:
    """Yield a directory that becomes `destination` when the block succeeds, and its journal.

    Files of the journal are there from an earlier try, still to be checked; all else is gone.
    Without finished files nothing survives an error.

    Args:
        plan: everything that the bytes to be written depend on (JSON-able).

    Raises:
        ValueError: the destination may not be written or replaced, another process is writing
            it, or the disk refused.
    """
    check_replaceable(source, destination, overwrite)
    destination = destination.absolute()
    working = destination.with_name(f".{destination.name}.converting")
    with _explained(destination):
        working.mkdir(parents=True, exist_ok=True)
        with _locked(working, destination):
            journal = Journal(working.with_name(f"{working.name}.json"), plan)
            _tidy(working, journal)
            try:
                yield working, journal
            except BaseException as error:
                if not journal.finished:
                    shutil.rmtree(working, ignore_errors=True)
                    journal.remove()
                elif isinstance(error, ValueError | OSError):
                    raise _with_hint(error, destination, working, journal) from error
                raise
            _sync_tree(working)
            _swap(working, destination)
            journal.remove()


def _tidy(working: Path, journal: Journal) -> None:
    """Remove whatever is not a finished file of this plan."""
    for path in sorted(working.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(working).as_posix() not in journal.finished:
            path.unlink()


def _with_hint(error: Exception, destination: Path, working: Path, journal: Journal) -> ValueError:
    reason = str(error)
    if isinstance(error, OSError):
        reason = f"{destination}: cannot write there: {_reason(error, destination)}"
    return ValueError(
        f"{reason}. {len(journal.finished)} finished files are kept in {working}: the same command "
        f"goes on from there; remove it and {journal.path.name} if you give up"
    )


@contextmanager
def _explained(destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{destination}: cannot write there: {_reason(error, destination)}"
        ) from error


def _reason(error: OSError, destination: Path) -> str:
    return f"{error.strerror or error} ({error.filename or destination})"


@contextmanager
def _locked(working: Path, destination: Path) -> Iterator[None]:
    """Hold the working directory for this process; the system lets go when it dies."""
    descriptor = os.open(working, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{destination}: another conversion is writing it (in {working}); wait for it or "
                "stop it"
            ) from error
        except OSError as error:  # some network file systems have no locks; the rest works there
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield
    finally:
        os.close(descriptor)


def _sync_tree(directory: Path) -> None:
    for path in (*directory.rglob("*"), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(working: Path, destination: Path) -> None:
    """Give the finished directory its name; what had it before is removed last."""
    retired = destination.with_name(f".{destination.name}.replaced")
    if retired.exists():  # a kill between the renames below left it
        shutil.rmtree(retired)
    if destination.exists():
        destination.rename(retired)
    working.rename(destination)
    descriptor = os.open(destination.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if retired.exists():
        shutil.rmtree(retired)


@contextmanager
def scratch_directory(parent: Path, name: str) -> Iterator[Path]:
    """Yield an empty directory inside `parent` that is gone afterwards, whatever happens.

    Raises:
        ValueError: the disk refused.
    """
    scratch = parent / name
    with _explained(parent):
        if scratch.exists():
            shutil.rmtree(scratch)
        scratch.mkdir(parents=True)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def check_replaceable(source: Path, destination: Path, overwrite: bool) -> None:
    """ValueError when `destination` exists and is not ours to replace."""
    inside = destination.resolve() in (source.resolve(), *source.resolve().parents)
    if inside:
        raise ValueError(f"{destination}: holds the source {source}; choose another destination")
    if not destination.exists():
        return
    if not destination.is_dir():
        raise ValueError(f"{destination}: is a file; choose another destination")
    entries = list(destination.iterdir())
    if not entries:
        return
    if not overwrite:
        raise ValueError(
            f"{destination}: exists and is not empty; choose another destination or pass "
            "--overwrite (overwrite=True)"
        )
    names = {entry.name for entry in entries}
    holds_runs = any(entry.name.startswith("checkpoint-") for entry in entries)
    if holds_runs or not names & {CONFIG_NAME, MARKER_NAME, ADAPTER_CONFIG_NAME}:
        raise ValueError(
            f"{destination}: is neither a model nor a checkpoint directory, so it is not replaced "
            "as a whole; choose another destination"
        )


def replace_by(finished: Path, destination: Path) -> None:
    """Give a finished directory beside the destination its name; what had it before is removed.

    OSError is the caller's to explain.
    """
    _sync_tree(finished)
    _swap(finished, destination)


def move_in(finished: Path, directory: Path, last: str) -> None:
    """Put finished files into a directory that holds others, over those of the same names.

    Args:
        last: the file without which nobody takes what is there for whole.

    OSError is the caller's to explain.
    """
    (directory / last).unlink(missing_ok=True)
    files = [path for path in sorted(finished.rglob("*")) if path.is_file()]
    for path in sorted(files, key=lambda path: path.name == last):
        target = directory / path.relative_to(finished)
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
