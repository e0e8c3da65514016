"""Where a conversion writes: beside its destination, which appears only when it is whole.

Owns what may be replaced: with `overwrite`, a directory that is itself a model or a checkpoint;
never one that merely contains such, nor the source of the conversion.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_sdar.checkpoint.hf_assets import CONFIG_NAME
from megatron_sdar.checkpoint.run_directory import MARKER_NAME, put_in_place


@contextmanager
def new_directory(source: Path, destination: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary directory that becomes `destination` when the block succeeds.

    Raises:
        ValueError: the destination may not be written or replaced, or the disk refused.
    """
    check_replaceable(source, destination, overwrite)
    destination = destination.absolute()
    temporary = destination.with_name(f".{destination.name}.converting")
    with writing(destination, temporary):
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        yield temporary
        put_in_place(temporary, destination)


@contextmanager
def writing(destination: Path, temporary: Path) -> Iterator[None]:
    """Explain an OSError as a ValueError; nothing of `temporary` survives an error."""
    try:
        yield
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = f"{error.strerror or error} ({error.filename or destination})"
        raise ValueError(f"{destination}: cannot write there: {reason}") from error
    except ValueError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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
    if holds_runs or not names & {CONFIG_NAME, MARKER_NAME}:
        raise ValueError(
            f"{destination}: is neither a model nor a checkpoint directory, so it is not replaced "
            "as a whole; choose another destination"
        )
