"""run.lock: two runs do not write into one output_dir at the same time.

A POSIX record lock: the kernel drops it with the process that holds it, however that ends, child
processes do not inherit it, and NFS and Lustre carry it to other hosts. The file stays; what
counts is the lock on it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import TextIO

RUN_LOCK_NAME = "run.lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)


class RunLock:
    """The lock of one output_dir, from `take` until the process ends or the object is dropped."""

    def __init__(self, output_dir: Path) -> None:
        self._path = output_dir / RUN_LOCK_NAME
        self._file: TextIO | None = None

    def take(self, job: str) -> str | None:
        """Take the lock, and note who has it (rank 0).

        A job that begins again is not held up by what is left of itself: on some file systems a
        host that died keeps its locks.

        Args:
            job: see job_id.

        Returns: why it was not taken though the run may go on; None: it was taken.

        Raises:
            ValueError: another run writes there.
            OSError: the file cannot be written.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        file = os.fdopen(os.open(self._path, flags, 0o666), "r+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with file:
                holder = _read_holder(file)
            if error.errno not in _TAKEN:
                return (
                    f"{self._path} cannot be locked ({error.strerror}): nothing keeps a second "
                    "run from writing into the same output_dir"
                )
            if holder.get("job") == job:
                return f"{self._path} is still held by this job itself ({_in_words(holder)})"
            raise ValueError(
                f"output_dir: another run writes into {self._path.parent} ({_in_words(holder)}); "
                "wait until it has ended, or choose another output_dir (if that process is gone "
                f"for certain, remove {self._path})"
            ) from None
        self._file = file
        file.truncate()
        holder = {
            "job": job,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        file.write(json.dumps(holder) + "\n")
        file.flush()
        return None


def _read_holder(file: TextIO) -> dict[str, object]:
    """Who noted itself last; empty: it has not yet, or the note is damaged."""
    try:
        content = json.loads(file.read(10_000))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _in_words(holder: dict[str, object]) -> str:
    if not holder:
        return "which did not note its name"
    return "process {pid} on {host}, since {since}".format_map(
        {name: holder.get(name, "?") for name in ("pid", "host", "since")}
    )
