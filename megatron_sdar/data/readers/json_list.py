"""A .json file that holds one list of records, read in a bounded buffer.

Owns where one element of the list ends and the next begins. Elements are found in the bytes
read as Latin-1, where a character is a byte, so that a list can be cut into byte ranges in one
pass at the speed of the JSON parser. No more than one element and a chunk are held.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_sdar.data.readers import streams
from megatron_sdar.data.readers.line_files import parse_object, require_object
from megatron_sdar.data.readers.records import Record, RecordError
from megatron_sdar.data.readers.streams import UTF8_BOM, ByteStream

_CHUNK_BYTES = 2**20
_GAP = re.compile(r"[ \t\r\n]*+")
# Longer than what the parser may complain about where a buffer ends: a literal or an escape.
_CUT_OFF = 16


class Element(NamedTuple):
    """One element of the list: its byte range, the line it begins in, its bytes as Latin-1.

    `value` is the element parsed from `text`: right as it is if that is ASCII.
    """

    start: int
    stop: int
    line: int
    text: str
    value: object


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
    scanner = _Scanner(stream, start, first_line)
    if stop is None:
        scanner.take("[", "")
        if scanner.peek() == "]":
            scanner.close()
            return
    while True:
        element = scanner.take_element()
        yield element
        if stop is not None and element.stop >= stop:
            return
        if scanner.peek() == "]":
            scanner.close()
            return
        scanner.take(",", "',' or ']' expected after a record")


def read_list(stream: ByteStream, elements: Iterator[Element]) -> Iterator[Record]:
    """The records of ELEMENTS, which come from STREAM."""
    consumed, compressed = stream.consumed, stream.is_compressed
    for element in elements:
        length = element.stop - element.start
        if compressed:
            length, consumed = stream.consumed - consumed, stream.consumed
        location = f"{stream.file}:{element.line}"
        yield Record(location, length, _parse_element(location, element))


class _Scanner:
    """Characters [base, base + len(text)) of a file, of which `used` have been passed."""

    def __init__(self, stream: ByteStream, start: int, line: int) -> None:
        self._stream = stream
        self._base = start
        self._text = ""
        self._used = 0
        self._line = line
        self._decoder = json.JSONDecoder()
        if start == 0 and self._fill() and self._text.startswith(UTF8_BOM.decode("latin-1")):
            self._used = len(UTF8_BOM)

    def peek(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            found = _GAP.match(self._text, self._used)
            assert found is not None, "the pattern matches the empty string"
            self._advance(found.end())
            if self._used < len(self._text):
                return self._text[self._used]
            if not self._fill():
                return ""

    def take(self, character: str, otherwise: str) -> None:
        """Pass CHARACTER, the next one; where it is another, that is what is wrong."""
        if self.peek() != character:
            raise self._error(otherwise)
        self._used += 1

    def close(self) -> None:
        """Pass the end of the list, after which nothing may follow."""
        self.take("]", "")
        if self.peek():
            raise self._error("text after the closing ']'")

    def take_element(self) -> Element:
        """Pass one element, the next thing in the text."""
        self.peek()
        value, stop = self._parse()
        element = Element(
            self._base + self._used,
            self._base + stop,
            self._line,
            self._text[self._used : stop],
            value,
        )
        self._advance(stop)
        return element

    def _parse(self) -> tuple[object, int]:
        """The element at `used`, and where it ends in the text."""
        while True:
            try:
                value, stop = self._decoder.raw_decode(self._text, self._used)
            except json.JSONDecodeError as error:
                cut_off = (
                    error.msg.startswith("Unterminated string")
                    or error.pos > len(self._text) - _CUT_OFF
                )
                if not (cut_off and self._fill()):
                    self._advance(min(error.pos, len(self._text)))
                    raise self._error(error.msg) from error
            except RecursionError as error:
                raise self._error("a record has more levels of lists than are read") from error
            except ValueError as error:
                raise self._error(str(error)) from error
            else:
                # A number that ends where the buffer does may go on behind it.
                if stop < len(self._text) or not self._fill():
                    return value, stop

    def _advance(self, to: int) -> None:
        self._line += self._text.count("\n", self._used, to)
        self._used = to

    def _fill(self) -> bool:
        """Read on; False at the end of the stream. What has been passed is let go."""
        rest = self._text[self._used :]
        if len(rest) > streams.MAX_RECORD_BYTES:
            raise self._error(
                f"a record has more than {streams.MAX_RECORD_BYTES} bytes, or a quote is missing"
            )
        # At least as much again, so that a long record is not parsed once per chunk.
        new = self._stream.read(max(_CHUNK_BYTES, len(rest)))
        self._base += self._used
        self._text, self._used = rest + new.decode("latin-1"), 0
        return bool(new)

    def _error(self, what: str) -> ValueError:
        return ValueError(
            f"{self._stream.file}:{self._line}: invalid JSON: {what}; the rest of a damaged list "
            "cannot be read: repair it, or store one object per line as .jsonl"
        )


def _parse_element(location: str, element: Element) -> dict[str, Any] | RecordError:
    if element.text.isascii():
        return require_object(location, element.value)
    return parse_object(location, element.text.encode("latin-1"))
