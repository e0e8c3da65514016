"""Megatron-LM's indexed dataset (PREFIX.bin + PREFIX.idx): the format and its reader.

`IndexedDataset` maps the index and reads tokens where they lie. Opening takes the same time for
any size, and damage is a ValueError when what it hits is read, never a wrong token. That holds for
a file that is cut short while it is open, too: a page of a memory map that is gone kills the
process without a word, so tokens are not mapped, and the index is looked at before it is read.
"""

import mmap
import os
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
    """Sequences of PREFIX.bin, of which only what is asked for is read.

    Opening costs the same for every size: only header, file sizes and both ends of the index are
    checked. A sequence is checked when it is read, everything at once by `verify`.

    `lengths` is int32 [S], tokens per sequence; `document_indices` int64 [D+1]: document d is
    sequences document_indices[d] to document_indices[d+1]; `pointers` int64 [S], the byte at
    which a sequence begins. All are views of the index, and not aligned to their item size.
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
        self._map, index = _map(self.idx_path)
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
        self._lengths: NDArray[np.int32] = lengths.view("<i4")
        self._pointers: NDArray[np.int64] = pointers.view("<i8")
        self._ends: NDArray[np.int64] = ends.view("<i8")
        self._num_sequences = num_sequences
        self._bin = self.bin_path.open("rb", buffering=0)
        self._num_bytes = os.fstat(self._bin.fileno()).st_size
        self._check_ends()

    def __len__(self) -> int:
        return self._num_sequences

    @property
    def lengths(self) -> NDArray[np.int32]:
        """See the class."""
        self._check_map()
        return self._lengths

    @property
    def pointers(self) -> NDArray[np.int64]:
        """See the class."""
        self._check_map()
        return self._pointers

    @property
    def document_indices(self) -> NDArray[np.int64]:
        """See the class."""
        self._check_map()
        return self._ends

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return self._num_bytes // self.dtype.itemsize

    def __getitem__(self, index: int) -> NDArray[Any]:
        """Sequence INDEX, read-only [lengths[INDEX]] of the file's dtype.

        Raises IndexError outside the dataset, ValueError where the index file is damaged.
        """
        if not 0 <= index < self._num_sequences:
            raise IndexError(f"{self.prefix}: sequence {index} of {len(self)}")
        self._check_map()
        start, length = int(self._pointers[index]), int(self._lengths[index])
        stop = start + length * self.dtype.itemsize
        after = int(self._pointers[index + 1]) if index + 1 < self._num_sequences else stop
        if length < 0 or start < 0 or stop != after or stop > self._num_bytes:
            raise self._damaged(f"sequence {index} does not end where the next one begins")
        try:
            content = os.pread(self._bin.fileno(), stop - start, start)
        except OSError as error:
            raise ValueError(
                f"{self.bin_path}: cannot read sequence {index}: {error.strerror or error}; mend "
                "the disk, then start again"
            ) from error
        if len(content) != stop - start:
            raise self._cut(self.bin_path)
        return np.frombuffer(content, self.dtype)

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
        if self._num_bytes != num_bytes:
            raise ValueError(
                f"{self.bin_path}: {self._num_bytes} bytes, but {self.idx_path.name} "
                f"describes {num_bytes}; {REBUILD}"
            )
        documents = self.document_indices
        if not documents.size or documents[0] != 0 or documents[-1] != len(self):
            raise self._damaged(f"document indices must run from 0 to {len(self)}")

    def _check_map(self) -> None:
        if self._map is not None and self._map.size() < len(self._map):
            raise self._cut(self.idx_path)

    def _cut(self, path: Path) -> ValueError:
        return ValueError(
            f"{path}: it was cut short while it was in use; put the whole file back, or build it "
            "again, then start again"
        )

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.idx_path}: {what}; {REBUILD}")


def _map(path: Path) -> tuple[mmap.mmap | None, NDArray[np.uint8]]:
    """The map of a whole file, and its bytes."""
    with path.open("rb") as stream:
        # A file of 0 bytes cannot be mapped.
        if os.fstat(stream.fileno()).st_size == 0:
            return None, np.empty(0, dtype=np.uint8)
        try:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ValueError(
                f"{path}: cannot map it ({error.strerror or error}); see `ulimit -v`"
            ) from error
    return mapped, np.frombuffer(mapped, np.uint8)
