"""PREFIX.parts: the finished parts of a build that is not complete yet.

Owns what may be continued: a part counts only for the build whose key is in its name, when its
report is there and its files agree with it. One build at a time works in the folder.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from megatron_sdar.data.building.part import PartReport, read_report
from megatron_sdar.data.storage.indexed import IndexedDataset
from megatron_sdar.data.storage.metadata import metadata_path
from megatron_sdar.data.storage.tokens import COMPANIONS

_LOCK, _PLAN, _COMMIT = "lock", "plan", "commit"


class WorkDirectory:
    """The folder of a build of PREFIX that KEY describes (plain JSON values).

    Entering takes its lock and forgets the parts of another build; leaving lets go of it.
    Raises ValueError when another process is building PREFIX, or the folder is somebody else's.
    """

    def __init__(self, prefix: str | Path, key: dict[str, Any]) -> None:
        self.path = work_path(prefix)
        self._plan = json.dumps(key, sort_keys=True)
        # In the names of the parts, so that a stray process of another build cannot add to ours.
        self._name = hashlib.sha256(self._plan.encode()).hexdigest()[:12]

    def __enter__(self) -> Self:
        self._lock = self._take_lock()
        plan = self.path / _PLAN
        known = None
        with suppress(OSError, ValueError):
            known = plan.read_text(encoding="utf-8")
        others = [file for file in self.path.iterdir() if file.name != _LOCK]
        if known is None and others:
            self._lock.close()
            raise ValueError(
                f"{self.path}: the folder is needed for the parts of this build but holds "
                f"{others[0].name}; move it away, or choose another prefix"
            )
        if known != self._plan:
            for file in others:
                file.unlink()
            plan.write_text(self._plan, encoding="utf-8")
        return self

    def _take_lock(self) -> TextIO:
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            path = self.path / _LOCK
            lock = path.open("w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock.fileno()).st_ino == path.stat().st_ino:
                    return lock
            except FileNotFoundError:
                lock.close()  # the build before has just removed its folder
            except OSError as error:
                lock.close()
                raise ValueError(
                    f"{self.path}: another process is building this dataset; wait for it, or "
                    "choose another prefix"
                ) from error
            else:
                lock.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and not list(self.path.glob("*.json")):
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()

    def part_prefix(self, index: int) -> str:
        """Prefix of the token files of part INDEX."""
        return str(self.path / f"{index:06d}-{self._name}")

    def finished(self, indices: Iterable[int]) -> dict[int, PartReport]:
        """Reports of those parts that are complete and undamaged, by index."""
        reports = {index: _read_complete(self.part_prefix(index)) for index in indices}
        return {index: report for index, report in reports.items() if report is not None}

    def begin_commit(self) -> None:
        """Note that files of PREFIX are being replaced by finished ones from here on."""
        (self.path / _COMMIT).touch()

    def remove(self) -> None:
        """Delete the folder: its parts are in the dataset now."""
        # Unlinked while open, a file on NFS keeps its folder from being removed.
        self._lock.close()
        shutil.rmtree(self.path)


def work_path(prefix: str | Path) -> Path:
    """PREFIX.parts."""
    return Path(f"{prefix}.parts")


def is_interrupted_commit(prefix: str | Path) -> bool:
    """Whether what lies at PREFIX is the torn result of a build that may be given again."""
    return (work_path(prefix) / _COMMIT).exists() and not metadata_path(prefix).exists()


def _read_complete(prefix: str) -> PartReport | None:
    try:
        report = read_report(prefix)
        parts = [IndexedDataset(f"{prefix}{suffix}") for suffix in COMPANIONS]
    except (ValueError, TypeError, OSError):
        return None
    documents = {len(part) for part in parts}
    tokens = {part.num_tokens for part in parts[:2]}
    is_whole = documents == {report.num_documents} and tokens == {report.num_tokens}
    return report if is_whole else None
