"""Parts of data files that can be read on their own, in any process and in any order.

Owns which formats there are and how each is cut. Reading all spans of a file one after the
other gives every record of it, with its exact place, whatever the size of the spans; nothing
larger than one record and a buffer is held.

Formats, by suffix: .jsonl and .txt (cut between lines), .json (a list, cut between records, or
lines), .parquet (row groups), .arrow (record batches of a file; a stream is not cut), .csv. A
.csv file and one that is compressed (.gz or .zst behind a text format) cannot be entered in the
middle: each is one span, so that several files are needed to read it in parallel.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from megatron_sdar.data.readers.csv_files import read_csv
from megatron_sdar.data.readers.json_list import (
    Element,
    is_list,
    iter_elements,
    read_list,
    split_list,
)
from megatron_sdar.data.readers.line_files import count_lines, read_lines, split_lines
from megatron_sdar.data.readers.records import Record
from megatron_sdar.data.readers.streams import COMPRESSED_SUFFIXES, ByteStream, Line, iter_lines

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".txt")
TABLE_SUFFIXES = (".parquet", ".arrow")
_TABLE_KINDS = ("parquet", "arrow_file", "arrow_stream")


@dataclass(frozen=True)
class Span:
    """Part of one file.

    Attributes:
        kind: the format: jsonl, txt, json_list, csv, parquet, arrow_file or arrow_stream.
        start, stop: its bytes; of a table, its row groups or record batches.
        first_line: the line that `start` is in; of a table, its first row. Both from 1.
        num_bytes: its share of the bytes of the file, for progress.
        num_rows: of a table, how many rows it has.
    """

    file: Path
    kind: str
    start: int
    stop: int
    first_line: int
    num_bytes: int
    num_rows: int = 0


def data_suffix(file: Path) -> str | None:
    """The suffix that says how FILE is read, without .gz or .zst; None: it cannot be read."""
    if file.suffix in COMPRESSED_SUFFIXES:
        inner = file.with_suffix("").suffix
        return inner if inner in TEXT_SUFFIXES else None
    return file.suffix if file.suffix in (*TEXT_SUFFIXES, *TABLE_SUFFIXES) else None


def split_file(file: Path, target_bytes: int) -> list[Span]:
    """Spans of about TARGET_BYTES of FILE, in order; none if the file is empty.

    Raises ValueError naming FILE when it is damaged so that it cannot be cut.
    """
    assert target_bytes > 0
    kind = _kind(file)
    if kind in _TABLE_KINDS:
        return _split_table(file, kind, target_bytes)
    if kind == "csv" or file.suffix in COMPRESSED_SUFFIXES:
        return [_whole_text(file, kind)]
    cut = split_list if kind == "json_list" else split_lines
    return [
        Span(file, kind, start, stop, line, num_bytes=stop - start)
        for start, stop, line in cut(file, target_bytes)
    ]


def read_span(span: Span) -> Iterator[Record]:
    """The records of SPAN in order; a bad one is there as its RecordError.

    Raises ValueError naming the file when it is damaged so that the rest cannot be read.
    """
    if span.kind in _TABLE_KINDS:
        parts = range(span.start, span.stop)
        yield from _tables().read_table(
            span.kind, span.file, parts, span.first_line, span.num_rows, span.num_bytes
        )
        return
    with ByteStream(span.file) as stream:
        stream.skip_to(span.start)
        if span.kind == "csv":
            yield from read_csv(stream)
        elif span.kind == "json_list":
            yield from read_list(stream, _elements(stream, span))
        else:
            yield from read_lines(span.kind, stream, _lines(stream, span))


def read_file(file: Path) -> Iterator[Record]:
    """All records of FILE in order, from its beginning on and without cutting it first."""
    kind = _kind(file)
    spans = _split_table(file, kind, 1) if kind in _TABLE_KINDS else [_whole_text(file, kind)]
    for span in spans:
        yield from read_span(span)


def count_records(span: Span) -> int:
    """How many records `read_span` yields, without parsing JSON."""
    if span.kind in _TABLE_KINDS:
        return span.num_rows
    with ByteStream(span.file) as stream:
        stream.skip_to(span.start)
        if span.kind == "csv":
            return sum(1 for _ in read_csv(stream))
        if span.kind == "json_list":
            return sum(1 for _ in _elements(stream, span))
        return count_lines(_lines(stream, span))


def _tables() -> ModuleType:
    # Arrow takes 50 MB in every process that imports it, and text files do not need it.
    from megatron_sdar.data.readers import tables

    return tables


def _kind(file: Path) -> str:
    suffix = data_suffix(file)
    assert suffix is not None, "files are checked when a dataset is named"
    if suffix == ".json":
        with ByteStream(file) as stream:
            return "json_list" if is_list(stream) else "jsonl"
    return _tables().arrow_kind(file) if suffix == ".arrow" else suffix[1:]


def _whole_text(file: Path, kind: str) -> Span:
    size = file.stat().st_size
    return Span(file, kind, 0, size, 1, num_bytes=size)


def _lines(stream: ByteStream, span: Span) -> Iterator[Line]:
    stop = None if stream.is_compressed else span.stop
    return iter_lines(stream, span.start, stop, span.first_line)


def _elements(stream: ByteStream, span: Span) -> Iterator[Element]:
    # No element begins at byte 0, where the list is opened: that span is the whole file.
    stop = span.stop if span.start else None
    return iter_elements(stream, span.start, stop, span.first_line)


def _split_table(file: Path, kind: str, target_bytes: int) -> list[Span]:
    # A part's bytes are taken to be in proportion to its rows: enough for even spans.
    sizes = list(_tables().iter_sizes(kind, file))
    total_rows, total_bytes = sum(sizes), file.stat().st_size
    if not total_rows:
        return []
    spans: list[Span] = []
    start = first = row = 0
    for stop, size in enumerate(sizes, start=1):
        row += size
        num_bytes = total_bytes * row // total_rows - total_bytes * first // total_rows
        if num_bytes >= target_bytes or stop == len(sizes):
            spans.append(Span(file, kind, start, stop, first + 1, num_bytes, row - first))
            start, first = stop, row
    return spans
