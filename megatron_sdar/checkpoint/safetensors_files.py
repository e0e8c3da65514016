"""safetensors files: writing them tensor block by tensor block, reading slices of them.

Owns the byte layout (8-byte little-endian header length, JSON header, raw little-endian data)
and the rule that every file is a plain name inside its directory. Invariant: neither direction
holds more than one block of one tensor in memory, and a file that was closed without error is
whole and on disk.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_sdar.checkpoint.checksums import Checksum
from megatron_sdar.checkpoint.io_threads import Flusher
from megatron_sdar.checkpoint.page_cache import forget_pages
from megatron_sdar.regular_files import check_regular, cut

BLOCK_BYTES = 8 * 2**20
_NAME_BYTES = 255  # of a file, on the file systems in use
_FORGET_BYTES = 2**20  # less is not worth a call; what shares pages with it is read next anyway

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}

Ranges = tuple[slice, ...]


@dataclass(frozen=True)
class TensorInfo:
    """Global shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return volume(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """Tensors by name, of which any slice can be read."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str, ranges: Ranges) -> Tensor:
        """The slice, in its stored dtype on the CPU."""
        ...


def volume(shape: tuple[int, ...]) -> int:
    """Number of elements."""
    product = 1
    for size in shape:
        product *= size
    return product


def full_ranges(shape: tuple[int, ...]) -> Ranges:
    """The ranges of the whole tensor."""
    return tuple(slice(0, size) for size in shape)


def row_blocks(info: TensorInfo) -> Iterator[Ranges]:
    """Ranges that cut a tensor along dim 0 into blocks of about BLOCK_BYTES, in file order."""
    row_bytes = volume(info.shape[1:]) * info.dtype.itemsize
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, info.shape[0], step):
        stop = min(start + step, info.shape[0])
        yield (slice(start, stop), *full_ranges(info.shape[1:]))


def contained_file(directory: Path, name: str) -> Path:
    """The path of a plain file name in `directory`.

    Links may point inside the directory, or from a snapshot of the Hugging Face cache to the
    blobs beside it; ValueError for any other way out of the directory.
    """
    is_plain = name not in ("", ".", "..") and Path(name).name == name and "\\" not in name
    if not is_plain or len(name.encode(errors="replace")) > _NAME_BYTES:
        raise ValueError(
            f"{directory}: {name[:_NAME_BYTES]!r} is not a plain file name of at most "
            f"{_NAME_BYTES} bytes; every file must lie in the directory"
        )
    root = directory.resolve()
    target = (directory / name).resolve()
    if target.parent not in (root, *_blobs(root)):
        raise ValueError(
            f"{directory / name}: links to {target}, outside of the directory; copy the file there"
        )
    return directory / name


def _blobs(root: Path) -> list[Path]:
    """Where the Hugging Face cache keeps the files of a snapshot, or of a folder in one."""
    return [
        snapshot.parent.parent / "blobs"
        for snapshot in (root, root.parent)
        if snapshot.parent.name == "snapshots"
    ]


class SafetensorsReader:
    """One open file, of which slices are read into memory of their own.

    Not through a memory map, whose pages count as the process's own: whoever reads a whole
    model that way appears to hold a whole model. Threads may share a reader.

    Args:
        keep_cached: False when nobody will read the file again: its pages leave the system's
            cache once read.

    Attributes:
        metadata: text entries of the header.
        tensors: what the file holds.

    Raises:
        ValueError: the file cannot be read, is damaged, or holds a dtype other than DTYPES.
    """

    def __init__(self, path: Path, keep_cached: bool = True) -> None:
        self.path = path
        self._keep_cached = keep_cached
        try:
            check_regular(path)
            with safe_open(str(path), framework="pt"):  # checks the whole header
                self._file = path.open("rb", buffering=0)
            (length,) = struct.unpack("<Q", self._file.read(8))
            header: dict[str, Any] = json.loads(self._file.read(length))
        except OSError as error:
            raise ValueError(f"{path}: cannot read it: {error.strerror or error}") from error
        except MemoryError as error:  # safe_open maps the file, however large
            raise ValueError(
                f"{path}: cannot map its {path.stat().st_size} bytes; see `ulimit -v`"
            ) from error
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file: {cut(str(error))}") from error
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.tensors: dict[str, TensorInfo] = {}
        self._starts: dict[str, int] = {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(
                    f"{path}: {name} has dtype {entry['dtype']}; use weights in bf16, fp16, fp32 "
                    "or fp64 (quantised models cannot be trained)"
                )
            self.tensors[name] = TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]])
            self._starts[name] = 8 + length + entry["data_offsets"][0]

    def read(self, name: str, ranges: Ranges) -> Tensor:
        """A slice. Beyond it, at most a block of whole rows is in memory.

        Raises:
            ValueError: the disk does not give the bytes.
        """
        info = self.tensors[name]
        first, *others = ranges or (slice(0, 1),)
        row_shape = info.shape[1:]
        if tuple(others) == full_ranges(row_shape):
            return self._rows(name, first.start, first.stop).view(_sizes_of(ranges))
        values = torch.empty(_sizes_of(ranges), dtype=info.dtype)
        row_bytes = max(1, volume(row_shape) * info.dtype.itemsize)
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(first.start, first.stop, step):
            stop = min(start + step, first.stop)
            block = self._rows(name, start, stop)
            values[start - first.start : stop - first.start] = block[(slice(None), *others)]
        return values

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        """Whole rows, which lie together in the file."""
        info = self.tensors[name]
        shape = (max(0, stop - start), *info.shape[1:])
        values = torch.empty(shape, dtype=info.dtype)
        row_bytes = volume(info.shape[1:]) * info.dtype.itemsize
        buffer = values.view(-1).view(torch.uint8).numpy().data
        begin = offset = self._starts[name] + start * row_bytes
        while buffer:
            try:
                num_bytes = os.preadv(self._file.fileno(), [buffer], offset)
            except OSError as error:
                raise ValueError(f"{self.path}: cannot read it: {error.strerror}") from error
            if num_bytes == 0:
                raise ValueError(f"{self.path}: ends within {name}; it was cut while being read")
            buffer, offset = buffer[num_bytes:], offset + num_bytes
        if not self._keep_cached and offset - begin >= _FORGET_BYTES:
            forget_pages(self._file.fileno(), begin, offset - begin)
        return values


def _sizes_of(ranges: Ranges) -> tuple[int, ...]:
    return tuple(max(0, piece.stop - piece.start) for piece in ranges)


class SafetensorsWriter:
    """A new file, written tensor by tensor in the order of `tensors`, each in row blocks.

    Use as a context manager: a clean exit checks that everything was written and syncs the file
    to disk. OSError is the caller's to explain.

    Attributes:
        checksum: of everything written so far.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
    ) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
        self._ends: dict[str, int] = {}
        offset = 0
        for name, info in tensors.items():
            end = offset + info.num_bytes
            header[name] = {
                "dtype": _CODES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, end],
            }
            self._ends[name] = offset = end
        self._dtypes = {name: info.dtype for name, info in tensors.items()}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._written = 0
        self._total = offset
        self.checksum = Checksum()
        self._file = path.open("wb", buffering=0)
        self._flusher = Flusher(self._file.fileno())
        self._put(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, block: Tensor) -> int:
        """Append the next rows of `name`, cast to its dtype; returns the number of bytes."""
        data = block.detach().to("cpu", self._dtypes[name]).contiguous().view(-1)
        raw = data.view(torch.uint8).numpy().data
        self._put(raw)
        self._written += raw.nbytes
        assert self._written <= self._ends[name], f"{name}: more data than its shape holds"
        return raw.nbytes

    def _put(self, data: bytes | memoryview) -> None:
        self.checksum.update(data)
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._flusher.add(len(data))

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            self._flusher.close()
            if kind is None:
                assert self._written == self._total, "a declared tensor was not written"
                os.fsync(self._file.fileno())
                forget_pages(self._file.fileno())
