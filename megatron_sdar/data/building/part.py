"""One part of a build: records of a few spans to token files of their own.

Owns the hot loop: read, lay out in the template, tokenise, write. Memory does not grow with the
part. The report is written last, so a part with a report is complete.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_sdar.data.building.plan import Part
from megatron_sdar.data.readers.records import Record, RecordError, SkipReport
from megatron_sdar.data.readers.spans import read_span
from megatron_sdar.data.sources.datasets import Conversation, DatasetSpec, PlainText, read_document
from megatron_sdar.data.storage.indexed import token_dtype
from megatron_sdar.data.storage.indexed_writer import IndexedWriter
from megatron_sdar.data.storage.metadata import write_text
from megatron_sdar.data.storage.tokens import COMPANIONS
from megatron_sdar.data.templates.template import Piece, TemplateOptions, document_pieces
from megatron_sdar.data.tokenization.tokenizer import SdarTokenizer
from megatron_sdar.diffusion.rows import IGNORED_LABEL

_CHUNK_CHARACTERS = 1 << 18


@dataclass
class PartReport:
    """What a part holds, as plain JSON values.

    unseen_columns: optional columns that dataset_info.json names and none of its records has.
    left_out: records of which a part was left out, by what it was.
    """

    num_records: int = 0
    num_documents: int = 0
    num_tokens: int = 0
    num_label_tokens: int = 0
    num_mask_documents: int = 0
    unseen_columns: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_locations: dict[str, list[str]] = field(default_factory=dict)


class _Encoded(NamedTuple):
    """Documents end to end: ids and labels int32, their lengths; turns and how many each has."""

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    lengths: NDArray[np.int64]
    turns: NDArray[np.int64]
    turn_counts: NDArray[np.int64]


class _Chunk:
    """Documents on their way through the tokeniser."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.starts: list[int] = []
        self.num_characters = 0
        self.num_bytes = 0

    def add(self, pieces: Sequence[Piece]) -> None:
        self.starts.append(len(self.pieces))
        self.pieces += pieces
        for piece in pieces:
            self.num_characters += len(piece.text)


def dtypes(vocab_size: int) -> tuple[np.dtype[Any], ...]:
    """How ids, labels and turns are stored, in the order of tokens.COMPANIONS."""
    return token_dtype(vocab_size), np.dtype("<i4"), np.dtype("<i4")


def report_path(prefix: str) -> Path:
    """Where the report of the part at PREFIX lies."""
    return Path(f"{prefix}.json")


def read_report(prefix: str) -> PartReport:
    """The report of a complete part."""
    return PartReport(**json.loads(report_path(prefix).read_text(encoding="utf-8")))


def build_part(
    part: Part,
    spec: DatasetSpec,
    prefix: str,
    tokenizer: SdarTokenizer,
    options: TemplateOptions,
    on_error: str,
    on_progress: Callable[[int, int], None],
) -> PartReport:
    """Tokenise PART of SPEC into token files at PREFIX, replacing what is there.

    ON_PROGRESS hears of (source bytes, tokens) as they pass. A bad record raises RecordError,
    or is counted with ON_ERROR "skip". An operating-system error is raised as it is.
    """
    report, skipped = PartReport(), SkipReport()
    unseen = set(spec.explicit_columns)
    report_path(prefix).unlink(missing_ok=True)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(IndexedWriter(f"{prefix}{suffix}", dtype, overwrite=True))
            for suffix, dtype in zip(COMPANIONS, dtypes(tokenizer.vocab_size), strict=True)
        ]
        tokens, labels, turns = writers
        chunks = _iter_chunks(part, spec, options, on_error, report, skipped, unseen)
        for chunk in chunks:
            num_tokens = 0
            if chunk.starts:
                encoded = _encode(tokenizer, chunk)
                lengths = encoded.lengths.tolist()
                tokens.add_documents(encoded.ids, lengths)
                labels.add_documents(encoded.labels, lengths)
                turns.add_documents(encoded.turns, encoded.turn_counts.tolist())
                _count(report, encoded, tokenizer.mask_token_id)
                num_tokens = len(encoded.ids)
            on_progress(chunk.num_bytes, num_tokens)
    report.unseen_columns = sorted(unseen)
    report.skipped, report.skipped_locations = skipped.counts, skipped.locations
    write_text(report_path(prefix), json.dumps(vars(report)))
    return report


def part_pieces(spec: DatasetSpec, record: Record, options: TemplateOptions) -> list[Piece]:
    """The pieces of RECORD, a record of SPEC. Raises RecordError when it cannot be used."""
    return document_pieces(_read(spec, record), options)


def _read(spec: DatasetSpec, record: Record) -> Conversation | PlainText:
    if isinstance(record.value, RecordError):
        raise record.value
    return read_document(record.value, spec.layout, record.location)


def _iter_chunks(
    part: Part,
    spec: DatasetSpec,
    options: TemplateOptions,
    on_error: str,
    report: PartReport,
    skipped: SkipReport,
    unseen: set[str],
) -> Iterator[_Chunk]:
    chunk = _Chunk()
    for span, take in zip(part.spans, part.takes, strict=True):
        for number, record in enumerate(read_span(span)):
            if take is not None and number >= len(take):
                break
            chunk.num_bytes += record.length
            times = 1 if take is None else int(take[number])
            if not times:
                continue
            report.num_records += times
            if unseen and isinstance(record.value, dict):
                unseen.difference_update(record.value)
            try:
                document = _read(spec, record)
                pieces = document_pieces(document, options)
            except RecordError as error:
                if on_error == "raise":
                    raise
                for _ in range(times):
                    skipped.add(error)
                continue
            for what in document.left_out:
                report.left_out[what] = report.left_out.get(what, 0) + 1
            for _ in range(times):
                chunk.add(pieces)
                if chunk.num_characters >= _CHUNK_CHARACTERS:
                    yield chunk
                    chunk = _Chunk()
    yield chunk


def _encode(tokenizer: SdarTokenizer, chunk: _Chunk) -> _Encoded:
    piece_ids = tokenizer.encode_pieces([piece.text for piece in chunk.pieces])
    sizes = np.fromiter(map(len, piece_ids), dtype=np.int64, count=len(piece_ids))
    ids = np.concatenate(piece_ids)
    trained = np.fromiter((piece.trained for piece in chunk.pieces), dtype=bool)
    answer = np.fromiter((piece.answer for piece in chunk.pieces), dtype=bool)
    starts = np.array(chunk.starts)
    labels = np.where(np.repeat(trained, sizes), ids, np.int32(IGNORED_LABEL))
    turns, turn_counts = _turns(sizes, answer, starts)
    return _Encoded(ids, labels, np.add.reduceat(sizes, starts), turns, turn_counts)


def _turns(
    sizes: NDArray[np.int64], answer: NDArray[np.bool_], starts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(lengths of prompts and answers in turn, how many per document) from the pieces' SIZES."""
    begins = np.ones(len(sizes), dtype=bool)
    begins[1:] = answer[1:] != answer[:-1]
    begins[starts] = True
    groups = np.flatnonzero(begins)
    lengths = np.add.reduceat(sizes, groups)
    firsts = np.searchsorted(groups, starts)
    counts = np.diff(firsts, append=len(groups))
    # A document that opens with an answer (plain text) has an empty prompt before it, and one
    # that closes with a prompt has an empty answer behind it.
    opens = answer[starts].astype(np.int64)
    closes = (counts + opens) % 2
    places = np.concatenate([firsts[opens == 1], (firsts + counts)[closes == 1]])
    return np.insert(lengths, places, 0), counts + opens + closes


def _count(report: PartReport, encoded: _Encoded, mask_token_id: int) -> None:
    report.num_documents += len(encoded.lengths)
    report.num_tokens += len(encoded.ids)
    report.num_label_tokens += int(np.count_nonzero(encoded.labels != IGNORED_LABEL))
    masks = np.flatnonzero(encoded.ids == mask_token_id)
    if masks.size:
        ends = np.cumsum(encoded.lengths)
        report.num_mask_documents += len(np.unique(np.searchsorted(ends, masks, side="right")))
