"""Files that a run writes into output_dir besides checkpoints, and what is told when it cannot.

Owns the words for a disk that refuses, the replacing of a JSON file in one step, and the log that
is appended to as long as the run lives.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Around the writing of a file.

    Raises:
        ValueError: names the file and the remedy, for an OSError within.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if not path.parent.is_dir():
            reason = f"the folder {path.parent} is gone, removed or renamed while it was in use"
        raise ValueError(
            f"{path}: cannot write it: {reason}; mend this (make room, or put the folder back) and "
            "start again: a run goes on from its newest complete checkpoint"
        ) from error


def replace_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the file in one step, so that a kill leaves the old or the new one.

    ValueError names the file when the disk refuses; the old one stays.
    """
    replace_text(path, json.dumps(dict(content), indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """As `replace_json`, for any text."""
    temporary = path.with_name(f"{path.name}.tmp")
    with written(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)  # on a full disk even half a file is in the way
            raise


class LogFile:
    """A JSONL file that records are appended to, each on disk (or in the system's cache) at once.

    A file that was removed or replaced meanwhile is begun anew: records are never written to one
    that nobody sees any more.

    Args:
        say: told when that happens.

    Raises:
        ValueError: it cannot be written; a part of a line may be there, which `read_log` leaves
            out.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path = path
        self._say = say
        self._file = self._open()

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line."""
        line = memoryview(json.dumps(record).encode() + b"\n")
        with written(self.path):
            if not self._is_there():
                self._file.close()
                self._file = self._open()
                self._say(f"{self.path}: was removed or replaced; a new one is begun")
            while line:  # a disk that is almost full takes a part
                line = line[self._file.write(line) :]

    def close(self) -> None:
        """Nothing more will be written."""
        self._file.close()

    def _open(self) -> Any:
        with written(self.path):
            return self.path.open("ab", buffering=0)

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False
