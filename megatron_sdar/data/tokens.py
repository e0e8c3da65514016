"""Token files: Megatron-LM's indexed dataset (PREFIX.bin + PREFIX.idx), byte for byte.

`IndexedWriter` streams sequences into temporary files and renames them when complete, so a
reader never meets half a file. `IndexedDataset` maps the files and checks everything it later
relies on when it opens them: damage is a ValueError then, not a wrong token later.
`TokenizedDataset` is tokens, labels and a JSON of what they are; the JSON is written last.
"""

import os
import struct
import uuid
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from megatron_sdar.data.metadata import TokenizedMetadata, read_metadata

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_CODES = {np.dtype(name): code for code, name in _DTYPES.items()}
_MAX_LENGTH = 2**31 - 1
_REBUILD = "the file is damaged or was cut short: build it again"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype Megatron-LM stores ids of a vocabulary in: uint16 below 65500, else int32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def index_paths(prefix: str | Path) -> tuple[Path, Path]:
    """(PREFIX.bin, PREFIX.idx)."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


class IndexedWriter:
    """Streams sequences to PREFIX.bin and PREFIX.idx.

    Memory grows by 12 bytes a sequence. Used as a context manager it finalizes at the end and
    removes its temporary files when an error passes through. Raises ValueError when the files
    exist already (unless OVERWRITE), for an unsupported DTYPE and for values it cannot hold.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike, *, overwrite: bool = False) -> None:
        self._dtype = np.dtype(dtype).newbyteorder("<")
        if self._dtype not in _CODES:
            raise ValueError(
                f"dtype {np.dtype(dtype)} cannot be stored in {prefix}.bin; use one of "
                f"{', '.join(str(d) for d in _CODES)}"
            )
        if str(prefix).endswith("/"):
            raise ValueError(f"{prefix}: a prefix must end in a file name, such as {prefix}train")
        self._paths = index_paths(prefix)
        self._overwrite = overwrite
        self._refuse_existing()
        self._paths[0].parent.mkdir(parents=True, exist_ok=True)
        suffix = f".{uuid.uuid4().hex[:12]}.tmp"
        self._partial = tuple(path.with_name(path.name + suffix) for path in self._paths)
        self._bin = self._partial[0].open("xb")
        self._lengths = array("i")
        self._document_ends = array("q", [0])

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of every sequence written so far, int32 [S]."""
        return np.array(self._lengths, dtype=np.int32)

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
        if tokens.ndim != 1 or sum(lengths) != tokens.size:
            raise ValueError(
                f"{self._paths[0]}: tokens of shape {tokens.shape} given for {sum(lengths)} "
                "positions; give one flat array that holds every sequence"
            )
        if max(lengths, default=0) > _MAX_LENGTH:
            raise ValueError(f"{self._paths[0]}: a sequence has {max(lengths)} tokens, over 2^31-1")
        stored = tokens.astype(self._dtype)
        if tokens.size and not np.array_equal(stored, tokens):
            raise ValueError(
                f"{self._paths[0]}: values from {tokens.min()} to {tokens.max()} do not fit "
                f"{self._dtype}; choose a wider dtype"
            )
        self._bin.write(stored.tobytes())
        self._lengths.extend(lengths)

    def finalize(self) -> None:
        """Write the index and give both files their names."""
        _sync_and_close(self._bin)
        lengths = self.lengths
        ends = np.array(self._document_ends, dtype="<i8")
        pointers = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= self._dtype.itemsize
        with self._partial[1].open("xb") as stream:
            code = _CODES[self._dtype]
            stream.write(_HEADER.pack(_MAGIC, _VERSION, code, len(lengths), len(ends)))
            for part in (lengths.astype("<i4"), pointers, ends):
                stream.write(part.tobytes())
            _sync_and_close(stream)
        self._refuse_existing()
        for partial, path in zip(self._partial, self._paths, strict=True):
            os.replace(partial, path)

    def abort(self) -> None:
        """Remove the temporary files; files that were there before stay as they are."""
        self._bin.close()
        for partial in self._partial:
            partial.unlink(missing_ok=True)

    def _refuse_existing(self) -> None:
        for path in self._paths:
            if path.exists() and not self._overwrite:
                raise ValueError(
                    f"{path} exists already; choose another prefix or ask to overwrite it"
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None and not self._bin.closed:
                self.finalize()
        finally:
            self.abort()


class IndexedDataset:
    """Sequences of PREFIX.bin, mapped into memory and never copied.

    `lengths` is int32 [S], tokens per sequence; `document_indices` int64 [D+1]: document d is
    sequences document_indices[d] to document_indices[d+1]. Raises ValueError, naming the file,
    unless header, sizes, offsets and document order are exactly right.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self._bin_path, self._idx_path = index_paths(prefix)
        for path in (self._bin_path, self._idx_path):
            if not path.is_file():
                raise ValueError(
                    f"{path}: no such file; {prefix!s} must be the prefix of a .bin and an .idx"
                )
        index = _map(self._idx_path)
        if len(index) < _HEADER.size:
            raise self._damaged(f"{len(index)} bytes are too few for a header")
        magic, version, code, num_sequences, num_ends = _HEADER.unpack(
            index[: _HEADER.size].tobytes()
        )
        if magic != _MAGIC:
            raise ValueError(
                f"{self._idx_path}: not an index file (it begins {magic!r}, not {_MAGIC!r}); "
                "make it with tools/preprocess_data.py"
            )
        if version != _VERSION:
            raise ValueError(
                f"{self._idx_path}: index version {version} is not supported, only {_VERSION}; "
                "build it again"
            )
        if code not in _DTYPES:
            raise self._damaged(f"unknown dtype code {code}")
        self.dtype = np.dtype(_DTYPES[code])
        # Compared as Python integers before anything is read: a wrong count allocates nothing.
        body = 12 * num_sequences + 8 * num_ends
        if len(index) == _HEADER.size + body + num_sequences and num_sequences:
            raise ValueError(
                f"{self._idx_path}: it has multimodal modes, which are not supported; "
                "make a text-only dataset"
            )
        if len(index) != _HEADER.size + body:
            raise self._damaged(
                f"{num_sequences} sequences and {num_ends} document indices need "
                f"{_HEADER.size + body} bytes, the file has {len(index)}"
            )
        lengths, pointers, ends = np.split(
            index[_HEADER.size :], [4 * num_sequences, 12 * num_sequences]
        )
        # Copies, because the file's arrays are not aligned to their item size.
        self.lengths: NDArray[np.int32] = lengths.view("<i4").astype(np.int32)
        self._pointers = pointers.view("<i8").astype(np.int64)
        self.document_indices: NDArray[np.int64] = ends.view("<i8").astype(np.int64)
        self._tokens = _map(self._bin_path)
        self._check_index()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> NDArray[Any]:
        """Sequence INDEX as a read-only view [lengths[INDEX]] of the file's dtype."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.prefix}: sequence {index} of {len(self)}")
        start = int(self._pointers[index])
        stop = start + int(self.lengths[index]) * self.dtype.itemsize
        return self._tokens[start:stop].view(self.dtype)

    def _check_index(self) -> None:
        if self.lengths.size and self.lengths.min() < 0:
            raise self._damaged(f"sequence {int(self.lengths.argmin())} has a negative length")
        ends = np.cumsum(self.lengths, dtype=np.int64) * self.dtype.itemsize
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(self)]
        wrong = np.flatnonzero(self._pointers != starts)
        if wrong.size:
            raise self._damaged(f"sequence {wrong[0]} does not begin where the one before ends")
        num_bytes = int(ends[-1]) if len(self) else 0
        if len(self._tokens) != num_bytes:
            raise ValueError(
                f"{self._bin_path}: {len(self._tokens)} bytes, but {self._idx_path.name} "
                f"describes {num_bytes}; {_REBUILD}"
            )
        documents = self.document_indices
        if not documents.size or documents[0] != 0 or documents[-1] != len(self):
            raise self._damaged(f"document indices must run from 0 to {len(self)}")
        if np.any(documents[1:] < documents[:-1]):
            raise self._damaged("document indices go backwards")

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self._idx_path}: {what}; {_REBUILD}")


class TokenizedDataset:
    """Documents with labels: PREFIX (tokens), PREFIX.labels, and PREFIX.json (metadata).

    `lengths` is int32 [N], tokens per document. Raises ValueError when the three do not belong
    together or the metadata is missing, which means that a build did not finish.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.metadata: TokenizedMetadata = read_metadata(prefix)
        self._tokens = IndexedDataset(prefix)
        self._labels = IndexedDataset(f"{prefix}.labels")
        remedy = "the files do not belong together: build the dataset again"
        if not np.array_equal(self._tokens.lengths, self._labels.lengths):
            raise ValueError(f"{prefix}: tokens and labels differ in length; {remedy}")
        each = np.arange(len(self._tokens) + 1)
        for part in (self._tokens, self._labels):
            if part.dtype.kind not in "iu":
                raise ValueError(f"{part.prefix}.idx: dtype {part.dtype} is not an integer one")
            if not np.array_equal(part.document_indices, each):
                raise ValueError(f"{part.prefix}.idx: not one sequence per document; {remedy}")
        counted = (self.metadata.num_documents, self.metadata.num_tokens)
        actual = (len(self), int(self.lengths.sum(dtype=np.int64)))
        if counted != actual:
            raise ValueError(
                f"{prefix}.json: it counts {counted[0]} documents and {counted[1]} tokens, the "
                f"files have {actual[0]} and {actual[1]}; {remedy}"
            )

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of every document, int32 [N]."""
        return self._tokens.lengths

    def __len__(self) -> int:
        return len(self._tokens)

    def get(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(ids, labels) of document INDEX, int32 [lengths[INDEX]] each; read-only when stored so.

        Labels are the id where it is trained on and -100 elsewhere. Raises ValueError when a
        label is neither or an id is outside the vocabulary.
        """
        ids = self._tokens[index].astype(np.int32, copy=False)
        labels = self._labels[index].astype(np.int32, copy=False)
        if not np.all((labels == ids) | (labels == -100)):
            raise ValueError(
                f"{self.prefix}.labels.bin: document {index} has a label that is neither its "
                "token nor -100; build the dataset again"
            )
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.metadata.vocab_size:
            raise ValueError(
                f"{self.prefix}.bin: document {index} has an id outside the vocabulary of "
                f"{self.metadata.vocab_size}; build the dataset again"
            )
        return ids, labels


def _map(path: Path) -> NDArray[np.uint8]:
    # A file of 0 bytes cannot be mapped.
    if path.stat().st_size == 0:
        return np.empty(0, dtype=np.uint8)
    # A plain view: slicing a np.memmap costs several times as much.
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))


def _sync_and_close(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
