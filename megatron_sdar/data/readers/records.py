"""What a reader hands on: one record with its place, or what is wrong with it.

Owns the error of a single record and the count of those left out. One bad record never hides
another: it is handed on as a RecordError that names file, line and reason, and its reader goes
on with the next one.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class RecordError(ValueError):
    """One record that cannot be used: `location` is file:line, `reason` a short fixed phrase."""

    def __init__(self, location: str, reason: str, detail: str) -> None:
        super().__init__(
            f"{location}: {reason}: {detail} (fix the record, or leave bad records out and "
            "counted with on-error 'skip')"
        )
        self.location = location
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["RecordError"], tuple[str, str, str]]:
        # Exceptions are pickled with their message alone; a worker process sends these back.
        return type(self), (self.location, self.reason, self.detail)


@dataclass
class SkipReport:
    """What was left out: how many records per reason, and where the first of them are."""

    max_locations: int = 5
    counts: dict[str, int] = field(default_factory=dict)
    locations: dict[str, list[str]] = field(default_factory=dict)

    def add(self, error: RecordError) -> None:
        """Count ERROR's record."""
        self._count(error.reason, 1, [error.location])

    def merge(self, other: "SkipReport") -> None:
        """Add what OTHER counted, whose records come after those counted here."""
        for reason, count in other.counts.items():
            self._count(reason, count, other.locations[reason])

    def _count(self, reason: str, count: int, locations: list[str]) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count
        places = self.locations.setdefault(reason, [])
        places += locations[: self.max_locations - len(places)]


class Record(NamedTuple):
    """One record: its place, its share of the file in bytes, and the object or what is wrong.

    `location` is file:line, or file:row (from 1) in a .parquet or .arrow table. The lengths of
    a file's records add up to about the file: enough to show progress.
    """

    location: str
    length: int
    value: dict[str, Any] | RecordError
