"""Records of a .jsonl or .json file, each with its place in the file.

Owns reading: bytes to JSON objects. One bad record never hides another: it is handed on as a
RecordError that names file, line and reason, and the reader goes on with the next line. A
.jsonl file is streamed; a .json list is held as text while its objects are decoded one by one.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

RECORD_SUFFIXES = (".jsonl", ".json")


class RecordError(ValueError):
    """One record that cannot be used: `location` is file:line, `reason` a short fixed phrase."""

    def __init__(self, location: str, reason: str, detail: str) -> None:
        super().__init__(
            f"{location}: {reason}: {detail} (fix the record, or leave bad records out and "
            "counted with on-error 'skip')"
        )
        self.location = location
        self.reason = reason


@dataclass
class SkipReport:
    """What was left out: how many records per reason, and where the first of them are."""

    max_locations: int = 5
    counts: dict[str, int] = field(default_factory=dict)
    locations: dict[str, list[str]] = field(default_factory=dict)

    def add(self, error: RecordError) -> None:
        """Count ERROR's record."""
        self.counts[error.reason] = self.counts.get(error.reason, 0) + 1
        places = self.locations.setdefault(error.reason, [])
        if len(places) < self.max_locations:
            places.append(error.location)


class Record(NamedTuple):
    """One record: its file:line, its length in the file, and the object or what is wrong.

    `length` is in bytes for a line and in characters in a list: enough to show progress.
    """

    location: str
    length: int
    value: dict[str, Any] | RecordError


def read_records(file: Path) -> Iterator[Record]:
    """Every record of FILE in order; blank lines are not records.

    Raises ValueError when a .json list is damaged: unlike a line, its rest cannot be read.
    """
    if file.suffix == ".json" and _first_byte(file) == b"[":
        yield from _read_list(file)
        return
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                location = f"{file}:{number}"
                yield Record(location, len(line), _parse_line(location, line))


def _parse_line(location: str, line: bytes) -> dict[str, Any] | RecordError:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return RecordError(
            location,
            "invalid UTF-8",
            f"byte {error.start + 1} of the line is {line[error.start]:#x}",
        )
    try:
        # A newline left at the end would move an error there to column 1 of the next line.
        value = json.loads(text.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        return RecordError(location, "invalid JSON", f"{error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return RecordError(location, "invalid JSON", str(error))
    return _require_object(location, value)


def _require_object(location: str, value: object) -> dict[str, Any] | RecordError:
    if isinstance(value, dict):
        return value
    return RecordError(
        location, "not an object", f"a record must be a JSON object, got {type(value).__name__}"
    )


def _first_byte(file: Path) -> bytes:
    with file.open("rb") as stream:
        head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return head[:1]


def _read_list(file: Path) -> Iterator[Record]:
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file}:{line}: invalid UTF-8: byte {raw[error.start]:#x}; save the file as UTF-8"
        ) from error
    del raw
    decoder = json.JSONDecoder()
    position = _skip_space(text, _skip_space(text, 0) + 1)
    line, counted = 1, 0
    closed = text[position : position + 1] == "]"
    while not closed:
        start = position
        line += text.count("\n", counted, start)
        counted = start
        try:
            value, position = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise _list_error(file, error.lineno, error.msg) from error
        except (ValueError, RecursionError) as error:
            raise _list_error(file, line, str(error)) from error
        location = f"{file}:{line}"
        yield Record(location, position - start, _require_object(location, value))
        position = _skip_space(text, position)
        separator = text[position : position + 1]
        if separator not in (",", "]"):
            line = text.count("\n", 0, position) + 1
            raise _list_error(file, line, "',' or ']' expected after a record")
        closed = separator == "]"
        if not closed:
            position = _skip_space(text, position + 1)
    position = _skip_space(text, position + 1)
    if position != len(text):
        line = text.count("\n", 0, position) + 1
        raise _list_error(file, line, "text after the closing ']'")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _list_error(file: Path, line: int, what: str) -> ValueError:
    return ValueError(
        f"{file}:{line}: invalid JSON: {what}; the rest of a damaged list cannot be read: repair "
        "it, or store one object per line as .jsonl"
    )
