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

BLOCK_BYTES = 64 * 2**20

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
        """The slice, in its stored dtype on the CPU; may be a view of the file: never write."""
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
    if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
        raise ValueError(
            f"{directory}: {name!r} is not a plain file name; every file must lie in the directory"
        )
    root = directory.resolve()
    allowed = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    target = (directory / name).resolve()
    if target.parent not in allowed:
        raise ValueError(
            f"{directory / name}: links to {target}, outside of the directory; copy the file there"
        )
    return directory / name


class SafetensorsReader:
    """One open file. Tensors are read through a memory map, so opening costs no memory.

    Raises:
        ValueError: the file cannot be read, is damaged, or holds a dtype other than DTYPES.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(str(path), framework="pt")
        except OSError as error:
            raise ValueError(f"{path}: cannot read it: {error.strerror or error}") from error
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file: {error}") from error
        self.metadata: dict[str, str] = self._file.metadata() or {}
        self.tensors: dict[str, TensorInfo] = {}
        # safe_open is not a mapping: it has keys() but cannot be iterated.
        for name in self._file.keys():  # noqa: SIM118
            piece = self._file.get_slice(name)
            code = piece.get_dtype()
            if code not in DTYPES:
                raise ValueError(
                    f"{path}: {name} has dtype {code}; use weights in bf16, fp16, fp32 or fp64 "
                    "(quantised models cannot be trained)"
                )
            self.tensors[name] = TensorInfo(tuple(piece.get_shape()), DTYPES[code])

    def read(self, name: str, ranges: Ranges) -> Tensor:
        """A slice as a view of the mapped file: never write to it."""
        values: Tensor = self._file.get_slice(name)[ranges]
        return values


class SafetensorsWriter:
    """A new file, written tensor by tensor in the order of `tensors`, each in row blocks.

    Use as a context manager: a clean exit checks that everything was written and syncs the file
    to disk. OSError is the caller's to explain.
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
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, block: Tensor) -> int:
        """Append the next rows of `name`, cast to its dtype; returns the number of bytes."""
        data = block.detach().to("cpu", self._dtypes[name]).contiguous().view(-1)
        raw = data.view(torch.uint8).numpy()
        self._file.write(raw.data)
        self._written += raw.size
        assert self._written <= self._ends[name], f"{name}: more data than its shape holds"
        return int(raw.size)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if kind is None:
                assert self._written == self._total, "a declared tensor was not written"
                self._file.flush()
                os.fsync(self._file.fileno())
