"""A .csv file: one record per row, with the names of the header and values that are text.

Owns what a row is. A field may go over several lines, so the file is read from the start. A bad
row never hides the next one; only a quote that is not closed takes what follows with it, up to
the limit of one record.
"""

import csv
from collections.abc import Iterator
from typing import Any, NamedTuple

from megatron_sdar.data.readers import streams
from megatron_sdar.data.readers.line_files import invalid_utf8, line_too_long
from megatron_sdar.data.readers.records import Record, RecordError
from megatron_sdar.data.readers.streams import ByteStream, iter_lines


class _Row(NamedTuple):
    """A row: the line it begins in, and its fields or what is wrong with it."""

    line: int
    fields: list[str] | RecordError


class _Lines:
    """The lines of a file as text, for csv.reader; what was odd in them since last asked."""

    def __init__(self, stream: ByteStream) -> None:
        self._lines = iter_lines(stream)
        self._file = stream.file
        self.number = 0
        self.length = 0
        self.error: RecordError | None = None

    def __iter__(self) -> Iterator[str]:
        for number, length, data in self._lines:
            self.number = number
            self.length += length
            if data is None:
                self.error = line_too_long(f"{self._file}:{number}", length)
                yield "\n"
                continue
            try:
                yield data.decode("utf-8")
            except UnicodeDecodeError as error:
                self.error = invalid_utf8(f"{self._file}:{number}", error)
                # The row keeps its shape, so the rows after it are read as they are.
                yield data.decode("utf-8", errors="replace")


def read_csv(stream: ByteStream) -> Iterator[Record]:
    """The records of STREAM in order. Raises ValueError when it has no usable header."""
    consumed, compressed = 0, stream.is_compressed
    header: list[str] | None = None
    lines = _Lines(stream)
    for row in _read_rows(stream, lines):
        location = f"{stream.file}:{row.line}"
        if header is None:
            header = _check_header(location, row.fields)
            continue
        length, lines.length = lines.length, 0
        if compressed:
            length, consumed = stream.consumed - consumed, stream.consumed
        yield Record(location, length, _make_record(location, header, row.fields))
    if header is None:
        raise ValueError(f"{stream.file}: the file is empty; a .csv file begins with a header line")


def _read_rows(stream: ByteStream, lines: _Lines) -> Iterator[_Row]:
    # The default of 128 KiB is for the whole process, and too short for documents.
    csv.field_size_limit(streams.MAX_RECORD_BYTES)
    reader = csv.reader(iter(lines), strict=True)
    while True:
        first = lines.number + 1
        try:
            fields: list[str] | RecordError = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fields = RecordError(f"{stream.file}:{first}", "invalid CSV", _explain(error))
        if lines.error is not None:
            fields, lines.error = lines.error, None
        if fields:
            yield _Row(first, fields)


def _explain(error: csv.Error) -> str:
    text = str(error)
    if text == "unexpected end of data":
        return "a quote is opened and not closed before the end of the file"
    return text


def _check_header(location: str, fields: list[str] | RecordError) -> list[str]:
    if isinstance(fields, RecordError):
        raise ValueError(f"{location}: the header cannot be read: {fields.reason}: {fields.detail}")
    repeated = sorted({name for name in fields if fields.count(name) > 1})
    if repeated:
        raise ValueError(
            f"{location}: the header names {', '.join(map(repr, repeated))} more than once; give "
            "every column a name of its own"
        )
    return fields


def _make_record(
    location: str, header: list[str], fields: list[str] | RecordError
) -> dict[str, Any] | RecordError:
    if isinstance(fields, RecordError):
        return fields
    if len(fields) != len(header):
        return RecordError(
            location,
            "wrong number of fields",
            f"the row has {len(fields)} fields and the header {len(header)}",
        )
    return dict(zip(header, fields, strict=True))
