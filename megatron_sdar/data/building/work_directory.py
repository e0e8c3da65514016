"""PREFIX.parts: the finished parts of a build that is not complete yet.

Owns what may be continued: parts are kept only while the recipe and the division into parts stay
the same. One build at a time works in it.
"""

import fcntl
import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_sdar.data.building.part import PartReport, read_report, report_path

_PLAN_NAME = "plan"


class WorkDirectory:
    """The folder of a build of PREFIX that KEY describes (plain JSON values).

    Entering takes its lock and forgets the parts of another build; leaving lets go of it.
    Raises ValueError when another process is building PREFIX.
    """

    def __init__(self, prefix: str | Path, key: dict[str, Any]) -> None:
        self.path = Path(f"{prefix}.parts")
        self._key = key

    def __enter__(self) -> Self:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ValueError(
                f"{self.path}: another process is building this dataset; wait for it, or choose "
                "another prefix"
            ) from error
        plan = self.path / _PLAN_NAME
        known = None
        with suppress(OSError, ValueError):
            known = json.loads(plan.read_text(encoding="utf-8"))
        if known != self._key:
            for file in self.path.iterdir():
                if file.name != "lock":
                    file.unlink()
            plan.write_text(json.dumps(self._key), encoding="utf-8")
        return self

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
        return str(self.path / f"{index:06d}")

    def finished(self, indices: Iterable[int]) -> dict[int, PartReport]:
        """Reports of those parts that are complete, by index."""
        prefixes = {index: self.part_prefix(index) for index in indices}
        return {i: read_report(p) for i, p in prefixes.items() if report_path(p).exists()}

    def remove(self) -> None:
        """Delete the folder: its parts are in the dataset now."""
        shutil.rmtree(self.path)
