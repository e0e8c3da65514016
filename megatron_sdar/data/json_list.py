"""A .json file that holds one list of records, read in a bounded buffer.

Owns where one element of the list ends and the next begins. Elements are found by their
brackets and quotes alone, which are single bytes in UTF-8, and parsed only when they are read;
so a list can be cut into byte ranges, and no more than one element and a chunk are held.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_sdar.data.line_files import decode_utf8, nested_too_deep, require_object
from megatron_sdar.data.records import Record, RecordError
from megatron_sdar.data.streams import MAX_RECORD_BYTES, UTF8_BOM, ByteStream

_CHUNK_BYTES = 2**20
_SPACE = b" \t\r\n"
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_GAP = re.compile(rb"[ \t\r\n]*+")
# Everything up to a bracket (or, between elements, a comma), passing over whole strings. Where
# a string is cut off by the end of the buffer, the match ends before its quote.
_INSIDE = re.compile(rb'(?:[^"{}\[\]]++|' + _STRING + rb")*+", re.DOTALL)
_OUTSIDE = re.compile(rb'(?:[^"{}\[\],]++|' + _STRING + rb")*+", re.DOTALL)


class Element(NamedTuple):
    """One element of the list: its byte range in the file, the line it begins in, its bytes."""

    start: int
    stop: int
    line: int
    data: bytes


def is_list(stream: ByteStream) -> bool:
    """Whether the first byte of STREAM that is no white space opens a list."""
    head = stream.read(_CHUNK_BYTES).removeprefix(UTF8_BOM)
    while head and not head.strip():
        head = stream.read(_CHUNK_BYTES)
    return head.lstrip()[:1] == b"["


def split_list(file: Path, target_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first line) of ranges of about TARGET_BYTES that hold whole elements."""
    first: Element | None = None
    stop = 0
    with ByteStream(file) as stream:
        for element in iter_elements(stream):
            first = first or element
            stop = element.stop
            if stop - first.start >= target_bytes:
                yield first.start, stop, first.line
                first = None
    if first is not None:
        yield first.start, stop, first.line


def iter_elements(
    stream: ByteStream, start: int = 0, stop: int | None = None, first_line: int = 1
) -> Iterator[Element]:
    """The elements of the list in STREAM, or, with STOP, those in bytes [START, STOP) of it.

    STREAM stands at START. Raises ValueError where the list is damaged: unlike a line, its rest
    cannot be read.
    """
    return _Scanner(stream, start, stop, first_line).elements()


class _Scanner:
    """The bytes [base, base + len(buffer)) of the file, and how far they have been used."""

    def __init__(self, stream: ByteStream, start: int, stop: int | None, line: int) -> None:
        self._stream = stream
        self._base = start
        self._stop = stop
        self._buffer = b""
        self._used = 0
        self._line = line

    def elements(self) -> Iterator[Element]:
        if self._stop is None:
            self._open_list()
            if self._peek() == b"]":
                self._close_list()
                return
        while True:
            yield self._take_element()
            if self._stop is not None and self._base + self._used >= self._stop:
                return
            separator = self._peek()
            if separator == b"]":
                self._close_list()
                return
            if separator != b",":
                raise self._error("the list is not closed: ',' or ']' expected after a record")
            self._advance(1)

    def _open_list(self) -> None:
        self._fill()
        if self._buffer.startswith(UTF8_BOM):
            self._advance(len(UTF8_BOM))
        opening = self._peek()
        assert opening == b"[", "the kind of file was found by this bracket"
        self._advance(1)

    def _close_list(self) -> None:
        self._advance(1)
        if self._peek():
            raise self._error("text after the closing ']'")

    def _take_element(self) -> Element:
        self._peek()
        depth, scanned = 0, self._used
        while True:
            found = (_INSIDE if depth else _OUTSIDE).match(self._buffer, scanned)
            assert found is not None, "the pattern matches the empty string"
            scanned = found.end()
            byte = self._buffer[scanned : scanned + 1]
            if byte in (b"", b'"'):
                length = scanned - self._used
                if not self._fill():
                    raise self._error("the list is not closed: a record is cut off")
                scanned = self._used + length
            elif depth == 0 and byte in (b",", b"]", b"}"):
                break
            else:
                depth += 1 if byte in (b"[", b"{") else -1
                scanned += 1
        data = self._buffer[self._used : scanned].rstrip(_SPACE)
        if not data:
            raise self._error("a record expected")
        start = self._base + self._used
        element = Element(start, start + len(data), self._line, data)
        self._advance(len(data))
        return element

    def _peek(self) -> bytes:
        """The next byte that is no white space, b"" at the end."""
        while True:
            found = _GAP.match(self._buffer, self._used)
            assert found is not None, "the pattern matches the empty string"
            self._advance(found.end() - self._used)
            if self._used < len(self._buffer):
                return self._buffer[self._used : self._used + 1]
            if not self._fill():
                return b""

    def _advance(self, length: int) -> None:
        self._line += self._buffer.count(b"\n", self._used, self._used + length)
        self._used += length

    def _fill(self) -> bool:
        """Read on; False at the end of the stream. What has been used is let go."""
        rest = self._buffer[self._used :]
        if len(rest) > MAX_RECORD_BYTES:
            raise self._error(
                f"a record has more than {MAX_RECORD_BYTES} bytes (or a quote is missing)"
            )
        # At least as much again, so that a long string is not searched once per chunk.
        new = self._stream.read(max(_CHUNK_BYTES, len(rest)))
        self._base += self._used
        self._buffer, self._used = rest + new, 0
        return bool(new)

    def _error(self, what: str) -> ValueError:
        return list_error(self._stream.file, self._line, what)


def read_list(stream: ByteStream, elements: Iterator[Element]) -> Iterator[Record]:
    """The records of ELEMENTS, which come from STREAM."""
    consumed, compressed = stream.consumed, stream.is_compressed
    end: int | None = None
    for element in elements:
        length = element.stop - (element.start if end is None else end)
        end = element.stop
        if compressed:
            length, consumed = stream.consumed - consumed, stream.consumed
        location = f"{stream.file}:{element.line}"
        yield Record(location, length, _parse_element(stream.file, location, element))


def list_error(file: Path, line: int, what: str) -> ValueError:
    """The error of a list that is damaged in LINE."""
    return ValueError(
        f"{file}:{line}: invalid JSON: {what}; the rest of a damaged list cannot be read: repair "
        "it, or store one object per line as .jsonl"
    )


def _parse_element(file: Path, location: str, element: Element) -> dict[str, Any] | RecordError:
    try:
        value = json.loads(decode_utf8(location, element.data))
    except RecordError as error:
        return error
    except json.JSONDecodeError as error:
        what = error.msg
        if what == "Extra data":
            what = "',' or ']' expected after a record"
        raise list_error(file, element.line + error.lineno - 1, what) from error
    except RecursionError:
        return nested_too_deep(location)
    except ValueError as error:
        return RecordError(location, "invalid JSON", str(error))
    return require_object(location, value)
