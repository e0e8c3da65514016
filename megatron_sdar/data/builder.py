"""Datasets to token files: read, write in the template, tokenise, store.

Owns the build of a TokenizedDataset and the decision whether one that exists may be reused.
Memory does not grow with the data: conversations pass through in chunks, and chunks are
tokenised in background threads (all cores) while the next are read. The files are the same
bytes for every number of workers.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from megatron_sdar.data.metadata import (
    Recipe,
    TokenizedMetadata,
    hash_file,
    metadata_path,
    read_metadata,
    write_metadata,
)
from megatron_sdar.data.records import RecordError, SkipReport
from megatron_sdar.data.sources import DatasetSpec, iter_conversations
from megatron_sdar.data.summary import BuildSummary, summarize, summarize_dataset
from megatron_sdar.data.template import (
    Piece,
    TemplateOptions,
    conversation_pieces,
    join_pieces,
)
from megatron_sdar.data.tokenizer import SdarTokenizer
from megatron_sdar.data.tokens import IndexedWriter, token_dtype

_CHUNK_DOCUMENTS = 512
_CHUNK_CHARACTERS = 1_000_000


class _Chunk(NamedTuple):
    """Documents on their way through the tokeniser: their pieces, and how many each has."""

    pieces: list[Piece]
    counts: list[int]


class _EncodedChunk(NamedTuple):
    """Documents end to end: ids and labels int32, and their lengths."""

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    lengths: list[int]


def build_dataset(
    specs: Sequence[DatasetSpec],
    prefix: str | Path,
    tokenizer: SdarTokenizer,
    options: TemplateOptions,
    *,
    num_workers: int = 1,
    max_samples: int | None = None,
    on_error: str = "raise",
    overwrite: bool = False,
    progress: bool = True,
) -> BuildSummary:
    """Tokenise the first MAX_SAMPLES records of every dataset of SPECS into token files.

    NUM_WORKERS chunks are tokenised at a time; each uses all cores, so 1 or 2 are enough.
    A bad record raises ValueError naming file and line, or is counted with on_error "skip".
    Raises ValueError when PREFIX exists (unless OVERWRITE) and when no document results. A
    failed build leaves what was there before untouched.
    """
    _check_arguments(specs, num_workers, max_samples)
    if metadata_path(prefix).exists() and not overwrite:
        raise ValueError(
            f"{metadata_path(prefix)} exists already; choose another prefix or ask to overwrite it"
        )
    started = time.perf_counter()
    recipe = _make_recipe(specs, tokenizer, options, max_samples)
    report = SkipReport()
    num_tokens = num_label_tokens = num_mask_documents = 0
    label_prefix = f"{prefix}.labels"
    with (
        IndexedWriter(prefix, token_dtype(tokenizer.vocab_size), overwrite=overwrite) as tokens,
        IndexedWriter(label_prefix, np.int32, overwrite=overwrite) as labels,
        _ProgressBar(specs, progress) as bar,
    ):
        chunks = _iter_chunks(specs, options, max_samples, on_error, report, bar)
        for chunk in _encode_chunks(tokenizer, chunks, num_workers):
            tokens.add_documents(chunk.ids, chunk.lengths)
            labels.add_documents(chunk.labels, chunk.lengths)
            num_tokens += len(chunk.ids)
            num_label_tokens += int(np.count_nonzero(chunk.labels >= 0))
            masks = np.flatnonzero(chunk.ids == tokenizer.mask_token_id)
            ends = np.cumsum(chunk.lengths)
            num_mask_documents += len(np.unique(np.searchsorted(ends, masks, side="right")))
        lengths = tokens.lengths
        if not lengths.size:
            names = ", ".join(spec.name for spec in specs)
            left_out = "; ".join(f"{count} {reason}" for reason, count in report.counts.items())
            why = f"every record was skipped ({left_out})" if left_out else "the files are empty"
            raise ValueError(f"{names}: no document was read: {why}; correct the dataset")
        # From here until the metadata is written the dataset counts as incomplete.
        metadata_path(prefix).unlink(missing_ok=True)
        tokens.finalize()
        labels.finalize()
    metadata = TokenizedMetadata(
        num_documents=len(lengths),
        num_tokens=num_tokens,
        num_label_tokens=num_label_tokens,
        num_mask_documents=num_mask_documents,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        vocab_size=tokenizer.vocab_size,
        recipe=recipe,
        skipped=dict(report.counts),
    )
    write_metadata(prefix, metadata)
    summary = summarize(prefix, metadata, lengths)
    return replace(
        summary, seconds=time.perf_counter() - started, skipped_locations=report.locations
    )


def ensure_dataset(
    specs: Sequence[DatasetSpec],
    prefix: str | Path,
    tokenizer: SdarTokenizer,
    options: TemplateOptions,
    *,
    num_workers: int = 1,
    max_samples: int | None = None,
    on_error: str = "raise",
    overwrite: bool = False,
    rebuild_stale: bool = False,
    progress: bool = True,
) -> BuildSummary:
    """Like `build_dataset`, but reuse PREFIX when it was made from exactly the same inputs.

    When PREFIX holds another dataset, it is replaced with REBUILD_STALE (a cache of the
    caller's own); otherwise, and without OVERWRITE, ValueError says what differs. The folder of
    the source files may differ; their names and contents may not.
    """
    _check_arguments(specs, num_workers, max_samples)
    recipe = _make_recipe(specs, tokenizer, options, max_samples)
    if metadata_path(prefix).exists() and not overwrite:
        metadata = read_metadata(prefix)
        differences = metadata.recipe.differences(recipe)
        if metadata.skipped and on_error == "raise":
            differences.append(
                f"it was built leaving out {sum(metadata.skipped.values())} bad records"
            )
        if not differences:
            return summarize_dataset(prefix)
        if not rebuild_stale:
            raise ValueError(
                f"{prefix}.json: the token files were made differently: {'; '.join(differences)}; "
                "build again with overwrite (overwrite_cache: true, or preprocess_data.py "
                "--overwrite), or choose another prefix"
            )
        overwrite = True
    return build_dataset(
        specs,
        prefix,
        tokenizer,
        options,
        num_workers=num_workers,
        max_samples=max_samples,
        on_error=on_error,
        overwrite=overwrite,
        progress=progress,
    )


def _check_arguments(
    specs: Sequence[DatasetSpec], num_workers: int, max_samples: int | None
) -> None:
    if not specs:
        raise ValueError("no dataset is given; name at least one")
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {num_workers}")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples must be at least 1 (or absent for all), got {max_samples}")


def _make_recipe(
    specs: Sequence[DatasetSpec],
    tokenizer: SdarTokenizer,
    options: TemplateOptions,
    max_samples: int | None,
) -> Recipe:
    sources = []
    for spec in specs:
        files = []
        for file in spec.files:
            size, digest = hash_file(file)
            files.append({"name": file.name, "size": size, "sha256": digest})
        sources.append({"name": spec.name, "layout": asdict(spec.layout), "files": files})
    return Recipe(tokenizer.fingerprint(), asdict(options), sources, max_samples)


def _iter_chunks(
    specs: Sequence[DatasetSpec],
    options: TemplateOptions,
    max_samples: int | None,
    on_error: str,
    report: SkipReport,
    bar: "_ProgressBar",
) -> Iterator[_Chunk]:
    pieces: list[Piece] = []
    counts: list[int] = []
    num_characters = 0
    for spec in specs:
        for conversation in iter_conversations(
            spec, on_error, skipped=report, max_samples=max_samples, on_read=bar.advance
        ):
            try:
                new = conversation_pieces(conversation, options)
            except RecordError as error:
                if on_error == "raise":
                    raise
                report.add(error)
                continue
            pieces += new
            counts.append(len(new))
            num_characters += sum(len(piece.text) for piece in new)
            if len(counts) == _CHUNK_DOCUMENTS or num_characters >= _CHUNK_CHARACTERS:
                yield _Chunk(pieces, counts)
                pieces, counts, num_characters = [], [], 0
    if counts:
        yield _Chunk(pieces, counts)


def _encode_chunks(
    tokenizer: SdarTokenizer, chunks: Iterator[_Chunk], num_workers: int
) -> Iterator[_EncodedChunk]:
    """Encoded chunks in order; NUM_WORKERS are in the tokeniser while the next are read."""
    pending: deque[Future[_EncodedChunk]] = deque()
    with ThreadPoolExecutor(num_workers) as executor:
        for chunk in chunks:
            pending.append(executor.submit(_encode_chunk, tokenizer, chunk))
            if len(pending) > num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _encode_chunk(tokenizer: SdarTokenizer, chunk: _Chunk) -> _EncodedChunk:
    # The empty think block and system prompts recur in every document: encode each text once.
    texts = list(dict.fromkeys(piece.text for piece in chunk.pieces))
    encoded = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    piece_ids = [encoded[piece.text] for piece in chunk.pieces]
    ids, labels = join_pieces(piece_ids, [piece.trained for piece in chunk.pieces])
    piece_ends = np.cumsum([len(part) for part in piece_ids])
    document_ends = piece_ends[np.cumsum(chunk.counts) - 1]
    return _EncodedChunk(ids, labels, np.diff(document_ends, prepend=0).tolist())


class _ProgressBar:
    """A bar over the bytes of the source files, on a terminal only."""

    def __init__(self, specs: Sequence[DatasetSpec], shown: bool) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("tokenising"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        total = sum(file.stat().st_size for spec in specs for file in spec.files)
        self._task: TaskID = self._progress.add_task("tokenising", total=total)

    def advance(self, length: int) -> None:
        """Move on by LENGTH bytes of source."""
        if not self._progress.disable:
            self._progress.advance(self._task, length)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
