"""Writing Megatron-LM's indexed dataset (PREFIX.bin + PREFIX.idx), byte for byte.

Everything is written under temporary names and renamed when complete, so a reader never meets
half a file and a failure leaves what was there before untouched.
"""

import os
import shutil
import uuid
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from megatron_sdar.data.storage.indexed import (
    CODES,
    HEADER,
    MAGIC,
    REBUILD,
    VERSION,
    IndexedDataset,
    index_paths,
)

_MAX_LENGTH = 2**31 - 1
_COPY_BYTES = 1 << 23
_CHUNK = 1 << 20


class _Files:
    """The two files of a prefix on their way: written under other names, named when complete."""

    def __init__(self, prefix: str | Path, dtype: DTypeLike, overwrite: bool) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES:
            raise ValueError(
                f"dtype {np.dtype(dtype)} cannot be stored in {prefix}.bin; use one of "
                f"{', '.join(str(d) for d in CODES)}"
            )
        if str(prefix).endswith("/"):
            raise ValueError(f"{prefix}: a prefix must end in a file name, such as {prefix}train")
        self.paths = index_paths(prefix)
        self.overwrite = overwrite
        self._refuse_existing()
        self.paths[0].parent.mkdir(parents=True, exist_ok=True)
        suffix = f".{uuid.uuid4().hex[:12]}.tmp"
        self._partial = tuple(path.with_name(path.name + suffix) for path in self.paths)
        self.bin = self._partial[0].open("xb")

    def write_index(
        self, num_sequences: int, num_documents: int, body: Iterable[NDArray[Any]]
    ) -> None:
        """Write the index from the arrays of BODY in order, then give both files their names."""
        _sync_and_close(self.bin)
        with self._partial[1].open("xb") as stream:
            code = CODES[self.dtype]
            header = HEADER.pack(MAGIC, VERSION, code, num_sequences, num_documents + 1)
            stream.write(header)
            for part in body:
                stream.write(part.tobytes())
            _sync_and_close(stream)
        self._refuse_existing()
        for partial, path in zip(self._partial, self.paths, strict=True):
            os.replace(partial, path)

    def discard(self) -> None:
        """Remove the temporary files; files that were there before stay as they are."""
        with suppress(OSError):  # what is still buffered cannot be written to a full disk
            self.bin.close()
        for partial in self._partial:
            partial.unlink(missing_ok=True)

    def _refuse_existing(self) -> None:
        for path in self.paths:
            if path.exists() and not self.overwrite:
                raise ValueError(
                    f"{path} exists already; choose another prefix or ask to overwrite it"
                )


class IndexedWriter:
    """Streams sequences to PREFIX.bin and PREFIX.idx.

    Memory grows by 12 bytes a sequence. Used as a context manager it finalizes at the end and
    removes its temporary files when an error passes through. Raises ValueError when the files
    exist already (unless OVERWRITE), for an unsupported DTYPE and for values it cannot hold.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike, *, overwrite: bool = False) -> None:
        self._files = _Files(prefix, dtype, overwrite)
        self._dtype = self._files.dtype
        self._lengths = array("i")
        self._document_ends = array("q", [0])

    def add_sequence(self, tokens: ArrayLike) -> None:
        """Append one sequence to the current document."""
        self._append(np.asarray(tokens), [np.asarray(tokens).size])

    def end_document(self) -> None:
        """Close the current document; one without sequences is an empty document."""
        self._document_ends.append(len(self._lengths))

    def add_documents(self, tokens: ArrayLike, lengths: Sequence[int]) -> None:
        """Append len(LENGTHS) documents of one sequence each, given end to end in TOKENS."""
        start = len(self._lengths)
        self._append(np.asarray(tokens), lengths)
        self._document_ends.extend(range(start + 1, len(self._lengths) + 1))

    def _append(self, tokens: NDArray[Any], lengths: Sequence[int]) -> None:
        path = self._files.paths[0]
        if tokens.ndim != 1 or sum(lengths) != tokens.size:
            raise ValueError(
                f"{path}: tokens of shape {tokens.shape} given for {sum(lengths)} "
                "positions; give one flat array that holds every sequence"
            )
        if max(lengths, default=0) > _MAX_LENGTH:
            raise ValueError(f"{path}: a sequence has {max(lengths)} tokens, over 2^31-1")
        stored = tokens.astype(self._dtype, copy=False)
        if stored is not tokens and not np.array_equal(stored, tokens):
            raise ValueError(
                f"{path}: values from {tokens.min()} to {tokens.max()} do not fit "
                f"{self._dtype}; choose a wider dtype"
            )
        self._files.bin.write(np.ascontiguousarray(stored).data)
        self._lengths.extend(lengths)

    def finalize(self) -> None:
        """Write the index and give both files their names."""
        lengths = np.array(self._lengths, dtype="<i4")
        ends = np.array(self._document_ends, dtype="<i8")
        pointers = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= self._dtype.itemsize
        self._files.write_index(len(lengths), len(ends) - 1, (lengths, pointers, ends))

    def abort(self) -> None:
        """Remove the temporary files; files that were there before stay as they are."""
        self._files.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None and not self._files.bin.closed:
                self.finalize()
        finally:
            self.abort()


def concatenate(
    parts: Sequence[str | Path], prefix: str | Path, dtype: DTypeLike, *, overwrite: bool = False
) -> None:
    """Write the datasets PARTS (prefixes) behind each other as PREFIX, ids stored as DTYPE.

    The same bytes as one IndexedWriter would write; a part at a time, so memory does not grow
    with the data. Raises ValueError when a part is damaged or of another dtype.
    """
    files = _Files(prefix, dtype, overwrite)
    try:
        num_sequences = num_documents = 0
        for part in parts:
            dataset = IndexedDataset(part)
            if dataset.dtype != files.dtype:
                raise ValueError(
                    f"{dataset.idx_path}: dtype {dataset.dtype}, expected {files.dtype}; {REBUILD}"
                )
            num_sequences += len(dataset)
            num_documents += len(dataset.document_indices) - 1
            with dataset.bin_path.open("rb") as stream:
                shutil.copyfileobj(stream, files.bin, _COPY_BYTES)
        files.write_index(num_sequences, num_documents, _joined_index(parts))
    finally:
        files.discard()


def _joined_index(parts: Sequence[str | Path]) -> Iterator[NDArray[Any]]:
    """Lengths, then offsets, then document indices of PARTS as if they were one dataset."""
    for part in parts:
        lengths = IndexedDataset(part).lengths
        for first in range(0, len(lengths), _CHUNK):
            yield lengths[first : first + _CHUNK]
    num_bytes = 0
    for part in parts:
        dataset = IndexedDataset(part)
        for first in range(0, len(dataset), _CHUNK):
            yield dataset.pointers[first : first + _CHUNK] + num_bytes
        num_bytes += dataset.num_tokens * dataset.dtype.itemsize
    yield np.zeros(1, dtype="<i8")
    num_sequences = 0
    for part in parts:
        dataset = IndexedDataset(part)
        for first in range(1, len(dataset.document_indices), _CHUNK):
            yield dataset.document_indices[first : first + _CHUNK] + num_sequences
        num_sequences += len(dataset)


def _sync_and_close(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
