"""Small files of strangers, read whole: regular files only, and none larger than is sane.

Opening a named pipe waits for a writer that may never come, a device has no end, and a sparse file
of terabytes costs its author nothing. Owns what is told of them. Links are followed: who may link
where is contained_file's to know.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

MIB = 2**20
JSON_BYTES = 64 * MIB  # no configuration or list of names comes near it
_SHOWN = 200


class IrregularFileError(ValueError):
    """Not a regular file, or too large for what it should be; the message is complete."""


def check_regular(path: Path, limit: int | None = None) -> None:
    """Check a file that a library is going to open by its name.

    Raises:
        IrregularFileError: it is a folder, pipe, device or socket, or has more than `limit` bytes.
        OSError: it is not there.
    """
    _check(path, path.stat(), limit)


def read_regular(path: Path, limit: int = JSON_BYTES) -> bytes:
    """The content of a file of at most `limit` bytes. Raises as `check_regular`."""
    # Without O_NONBLOCK a named pipe would wait before there is anything to look at.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        _check(path, status, limit)
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            return stream.read(status.st_size)  # of what grows, no more than was there
    finally:
        os.close(descriptor)


def read_regular_text(path: Path, limit: int = JSON_BYTES) -> str:
    """UTF-8 text. Raises as `check_regular`, and ValueError that names the file for other text."""
    try:
        return read_regular(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); copy it again") from error


def read_json(path: Path, limit: int = JSON_BYTES) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: names the file, which is not valid JSON or as `check_regular`.
        OSError: it cannot be read.
    """
    content = read_regular(path, limit)
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error


def shown(value: object) -> str:
    """A value of such a file in a message: its repr, cut where it would fill the screen."""
    return cut(repr(value))


def cut(text: str) -> str:
    """What a library says of such a file, without what it quotes of it at length."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _check(path: Path, status: os.stat_result, limit: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise IrregularFileError(
            f"{path}: is {_kind(status.st_mode)}, not a regular file; put the file itself there"
        )
    if limit is not None and status.st_size > limit:
        raise _too_large(path, status.st_size, limit)


def _too_large(path: Path, size: int, limit: int) -> IrregularFileError:
    return IrregularFileError(
        f"{path}: {size} bytes, larger than the {limit} that are read of such a file; it is "
        "damaged or something else, copy it again"
    )


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")
