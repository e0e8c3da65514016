"""What a conversion has finished, so that the same command goes on after it was killed.

A JSON file beside the directory being written: the plan of the conversion, everything its bytes
depend on, and each finished weight file with its checksum. Invariant: a file is in the journal
only once it is on disk as a whole; a journal of another plan counts for nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sdar.checkpoint.checksums import FileRecord
from megatron_sdar.regular_files import read_json


class Journal:
    """The journal at `path` for `plan` (JSON-able).

    Attributes:
        finished: records of weight files by name.
        is_foreign: there was a journal of another plan, or one that cannot be read.
    """

    def __init__(self, path: Path, plan: Mapping[str, Any]) -> None:
        self.path = path
        self._plan = json.loads(json.dumps(plan))
        self.finished: dict[str, FileRecord] = {}
        self.is_foreign = False
        if path.is_file():
            try:
                content = read_json(path)
                if content["plan"] == self._plan:
                    records = content["finished"].items()
                    self.finished = {name: FileRecord(**record) for name, record in records}
                else:
                    self.is_foreign = True
            except (ValueError, KeyError, TypeError, AttributeError):
                self.is_foreign = True

    def add(self, name: str, record: FileRecord) -> None:
        """Note a finished file; on disk when this returns. OSError is the caller's to explain."""
        records = {file: vars(entry) for file, entry in (self.finished | {name: record}).items()}
        text = json.dumps({"plan": self._plan, "finished": records})
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self.finished[name] = record

    def remove(self) -> None:
        """The conversion is over."""
        self.path.unlink(missing_ok=True)
