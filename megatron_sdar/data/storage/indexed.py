"""Megatron-LM's indexed dataset (PREFIX.bin + PREFIX.idx): the format and its reader.

`IndexedDataset` maps the files. Opening takes the same time for any size, and damage is a
ValueError when what it hits is read, never a wrong token.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
CODES = {np.dtype(name): code for code, name in DTYPES.items()}
_CHUNK = 1 << 20
REBUILD = "the file is damaged or was cut short: build it again"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype Megatron-LM stores ids of a vocabulary in: uint16 below 65500, else int32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def index_paths(prefix: str | Path) -> tuple[Path, Path]:
    """(PREFIX.bin, PREFIX.idx)."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


class IndexedDataset:
    """Sequences of PREFIX.bin, mapped into memory and never copied.

    Opening costs the same for every size: only header, file sizes and both ends of the index are
    checked. A sequence is checked when it is read, everything at once by `verify`.

    `lengths` is int32 [S], tokens per sequence; `document_indices` int64 [D+1]: document d is
    sequences document_indices[d] to document_indices[d+1]; `pointers` int64 [S], the byte at
    which a sequence begins. All are views of the file, and not aligned to their item size.
    Raises ValueError that names the file and what is wrong.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.bin_path, self.idx_path = index_paths(prefix)
        for path in (self.bin_path, self.idx_path):
            if not path.is_file():
                raise ValueError(
                    f"{path}: no such file; {prefix!s} must be the prefix of a .bin and an .idx"
                )
        index = _map(self.idx_path)
        if len(index) < HEADER.size:
            raise self._damaged(f"{len(index)} bytes are too few for a header")
        magic, version, code, num_sequences, num_ends = HEADER.unpack(
            index[: HEADER.size].tobytes()
        )
        if magic != MAGIC:
            raise ValueError(
                f"{self.idx_path}: not an index file (it begins {magic!r}, not {MAGIC!r}); "
                "make it with tools/preprocess_data.py"
            )
        if version != VERSION:
            raise ValueError(
                f"{self.idx_path}: index version {version} is not supported, only {VERSION}; "
                "build it again"
            )
        if code not in DTYPES:
            raise self._damaged(f"unknown dtype code {code}")
        self.dtype = np.dtype(DTYPES[code])
        # Compared as Python integers before anything is read: a wrong count allocates nothing.
        body = 12 * num_sequences + 8 * num_ends
        if len(index) == HEADER.size + body + num_sequences and num_sequences:
            raise ValueError(
                f"{self.idx_path}: it has multimodal modes, which are not supported; "
                "make a text-only dataset"
            )
        if len(index) != HEADER.size + body:
            raise self._damaged(
                f"{num_sequences} sequences and {num_ends} document indices need "
                f"{HEADER.size + body} bytes, the file has {len(index)}"
            )
        lengths, pointers, ends = np.split(
            index[HEADER.size :], [4 * num_sequences, 12 * num_sequences]
        )
        self.lengths: NDArray[np.int32] = lengths.view("<i4")
        self.pointers: NDArray[np.int64] = pointers.view("<i8")
        self.document_indices: NDArray[np.int64] = ends.view("<i8")
        self._tokens = _map(self.bin_path)
        self._check_ends()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return len(self._tokens) // self.dtype.itemsize

    def __getitem__(self, index: int) -> NDArray[Any]:
        """Sequence INDEX as a read-only view [lengths[INDEX]] of the file's dtype.

        Raises IndexError outside the dataset, ValueError where the index file is damaged.
        """
        if not 0 <= index < len(self.lengths):
            raise IndexError(f"{self.prefix}: sequence {index} of {len(self)}")
        start, length = int(self.pointers[index]), int(self.lengths[index])
        stop = start + length * self.dtype.itemsize
        after = int(self.pointers[index + 1]) if index + 1 < len(self.lengths) else stop
        if length < 0 or start < 0 or stop != after or stop > len(self._tokens):
            raise self._damaged(f"sequence {index} does not end where the next one begins")
        return self._tokens[start:stop].view(self.dtype)

    def verify(self) -> None:
        """Check the whole index, a piece at a time. Raises ValueError naming the first fault."""
        end = 0
        for first in range(0, len(self), _CHUNK):
            lengths = self.lengths[first : first + _CHUNK].astype(np.int64)
            if lengths.min() < 0:
                raise self._damaged(
                    f"sequence {first + int(lengths.argmin())} has a negative length"
                )
            stops = end + np.cumsum(lengths) * self.dtype.itemsize
            starts = np.concatenate([np.full(1, end), stops[:-1]])
            wrong = np.flatnonzero(self.pointers[first : first + _CHUNK] != starts)
            if wrong.size:
                raise self._damaged(
                    f"sequence {first + int(wrong[0])} does not begin where the one before ends"
                )
            end = int(stops[-1])
        for first in range(0, len(self.document_indices), _CHUNK):
            part = self.document_indices[first : first + _CHUNK + 1]
            if np.any(part[1:] < part[:-1]):
                raise self._damaged("document indices go backwards")

    def _check_ends(self) -> None:
        num_bytes = 0
        if len(self):
            num_bytes = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize
        if len(self) and self.pointers[0] != 0:
            raise self._damaged("the first sequence does not begin at 0")
        if len(self._tokens) != num_bytes:
            raise ValueError(
                f"{self.bin_path}: {len(self._tokens)} bytes, but {self.idx_path.name} "
                f"describes {num_bytes}; {REBUILD}"
            )
        documents = self.document_indices
        if not documents.size or documents[0] != 0 or documents[-1] != len(self):
            raise self._damaged(f"document indices must run from 0 to {len(self)}")

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.idx_path}: {what}; {REBUILD}")


def _map(path: Path) -> NDArray[np.uint8]:
    # A file of 0 bytes cannot be mapped.
    if path.stat().st_size == 0:
        return np.empty(0, dtype=np.uint8)
    # A plain view: slicing a np.memmap costs several times as much.
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
