"""Files with one record per line: .jsonl (an object) and .txt (a document of plain text).

Owns where such a file may be split and what a line means. Blank lines are not records. A bad
line never hides the next one.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sdar.data.readers import streams
from megatron_sdar.data.readers.records import Record, RecordError
from megatron_sdar.data.readers.streams import ByteStream, Line

TEXT_COLUMN = "text"

_CHUNK_BYTES = 2**20


def split_lines(file: Path, target_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first line) of ranges of about TARGET_BYTES that end where a line ends."""
    start = position = 0
    first_line = line = 1
    with ByteStream(file) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            counted = 0
            # A range ends with the line that holds its byte number `target_bytes`.
            while (wanted := start + target_bytes - 1 - position) < len(chunk):
                newline = chunk.find(b"\n", max(0, wanted))
                if newline < 0:
                    break
                line += chunk.count(b"\n", counted, newline + 1)
                counted = newline + 1
                yield start, position + counted, first_line
                start, first_line = position + counted, line
            line += chunk.count(b"\n", counted)
            position += len(chunk)
    if start < position:
        yield start, position, first_line


def read_lines(kind: str, stream: ByteStream, lines: Iterator[Line]) -> Iterator[Record]:
    """The records of LINES, which come from STREAM. KIND: jsonl or txt."""
    parse = parse_object if kind == "jsonl" else _parse_text
    consumed = stream.consumed
    compressed = stream.is_compressed
    for line in lines:
        length = line.length
        if compressed:
            length, consumed = stream.consumed - consumed, stream.consumed
        location = f"{stream.file}:{line.number}"
        if line.data is None:
            yield Record(location, length, line_too_long(location, line.length))
        elif line.data.strip():
            yield Record(location, length, parse(location, line.data))


def count_lines(lines: Iterator[Line]) -> int:
    """How many of LINES are records."""
    return sum(1 for line in lines if line.data is None or line.data.strip())


def line_too_long(location: str, length: int) -> RecordError:
    """The error of a line of LENGTH bytes."""
    return RecordError(
        location,
        "line too long",
        f"the line has {length} bytes, and at most {streams.MAX_RECORD_BYTES} are read into "
        "memory at once; split it into several records",
    )


def invalid_utf8(location: str, error: UnicodeDecodeError) -> RecordError:
    """The error of a line that cannot be decoded because of ERROR."""
    byte = error.object[error.start]
    return RecordError(location, "invalid UTF-8", f"byte {error.start + 1} of it is {byte:#x}")


def parse_object(location: str, data: bytes) -> dict[str, Any] | RecordError:
    """The JSON object in DATA, one line, or what is wrong with it."""
    try:
        # A newline left at the end would move an error there to column 1 of the next line.
        value = json.loads(data.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return invalid_utf8(location, error)
    except json.JSONDecodeError as error:
        return RecordError(location, "invalid JSON", f"{error.msg} at column {error.colno}")
    except RecursionError:
        return nested_too_deep(location)
    except ValueError as error:
        return RecordError(location, "invalid JSON", str(error))
    return require_object(location, value)


def nested_too_deep(location: str) -> RecordError:
    """The error of JSON with more levels than can be read."""
    return RecordError(
        location, "nested too deep", "the JSON has more levels of lists and objects than are read"
    )


def require_object(location: str, value: object) -> dict[str, Any] | RecordError:
    """VALUE, which must be a JSON object."""
    if isinstance(value, dict):
        return value
    return RecordError(
        location, "not an object", f"a record must be a JSON object, got {type(value).__name__}"
    )


def _parse_text(location: str, data: bytes) -> dict[str, Any] | RecordError:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return invalid_utf8(location, error)
    return {TEXT_COLUMN: text.removesuffix("\n").removesuffix("\r")}
