"""Tensors cut into shards: one safetensors file per rank, offsets in its header, one index.

The files are those of torch's distributed Hugging Face storage (DCP_SHARDING_INFO in the
header), so torch's own reader understands them too. What is cut where is DCP's to plan; here is
the format on disk. Invariant: the chunks in an index cover every tensor exactly once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from megatron_sdar.checkpoint.checksums import FileRecord, file_record
from megatron_sdar.checkpoint.safetensors_files import (
    DTYPES,
    Ranges,
    SafetensorsReader,
    SafetensorsWriter,
    TensorInfo,
    contained_file,
    row_blocks,
    volume,
)
from megatron_sdar.regular_files import IrregularFileError, read_json

INDEX_NAME = "index.json"
_INDEX_BYTES = 2**30  # it has a line for each chunk of each tensor: of a large run, 100 MB
SHARE_OUTPUT_DIR = "every process must see the same output_dir, put it on a shared file system"
_OFFSETS, _SHAPES = "DCP_SHARDING_INFO", "GLOBAL_SHAPES"


@dataclass(frozen=True)
class Chunk:
    """One rank's piece of a global tensor, still to be written."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    local: TensorInfo


@dataclass(frozen=True)
class StoredChunk:
    """Where a piece of a global tensor lies."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def shard_name(rank: int) -> str:
    """File name of a rank's shard."""
    return f"shard-{rank:05d}.safetensors"


def shard_metadata(
    offsets: Mapping[str, Sequence[int]], shapes: Mapping[str, Sequence[int]]
) -> dict[str, str]:
    """The header entries that place a shard's tensors in the global ones."""
    return {
        "DCP_VERSION": "1.0",
        _OFFSETS: json.dumps({n: {"saved_offsets": list(o)} for n, o in offsets.items()}),
        _SHAPES: json.dumps({n: list(shape) for n, shape in shapes.items()}),
    }


def write_shard(
    path: Path, chunks: Sequence[Chunk], values: Callable[[Chunk], Tensor]
) -> FileRecord | None:
    """Write a rank's chunks, one block at a time through memory; no file when all are empty.

    Returns the file's size and checksum, None when there is no file.

    Args:
        chunks: at most one of each tensor.
        values: gives a chunk's tensor, on any device; asked for one chunk after the other.
    """
    chunks = [chunk for chunk in chunks if volume(chunk.local.shape) > 0]
    if not chunks:
        return None
    metadata = shard_metadata(
        {chunk.name: chunk.offset for chunk in chunks},
        {chunk.name: chunk.global_shape for chunk in chunks},
    )
    infos = {chunk.name: chunk.local for chunk in chunks}
    assert len(infos) == len(chunks), "a rank holds one chunk of a tensor"
    with SafetensorsWriter(path, infos, metadata) as writer:
        for chunk in chunks:
            tensor = values(chunk)
            for ranges in row_blocks(chunk.local):
                writer.write(chunk.name, tensor[ranges[0]])
    return writer.checksum.record()


def write_index(directory: Path, expected: Mapping[str, TensorInfo] | None = None) -> None:
    """Collect the headers of all shards in `directory` into its index file.

    Args:
        expected: tensors that must be there; None for those of which there is a shard.

    ValueError when the shards do not cover every tensor, as happens when the ranks wrote to
    different disks.
    """
    infos = dict(expected or {})
    chunks: dict[str, list[StoredChunk]] = {name: [] for name in infos}
    for path in sorted(directory.glob("*.safetensors")):
        shard = SafetensorsReader(path)
        offsets, shapes = json.loads(shard.metadata[_OFFSETS]), json.loads(shard.metadata[_SHAPES])
        for name, local in shard.tensors.items():
            info = TensorInfo(tuple(shapes[name]), local.dtype)
            assert infos.setdefault(name, info) == info, f"{name}: ranks disagree"
            offset = tuple(offsets[name]["saved_offsets"])
            chunks.setdefault(name, []).append(StoredChunk(path.name, offset, local.shape))
    for name, info in infos.items():
        if not _cover(chunks[name], info.shape):
            stored = sum(volume(chunk.shape) for chunk in chunks[name])
            raise ValueError(
                f"{directory}: {name} has {stored} of {volume(info.shape)} elements there; "
                f"{SHARE_OUTPUT_DIR}"
            )
    codes = {dtype: code for code, dtype in DTYPES.items()}
    content = {
        name: {
            "dtype": codes[info.dtype],
            "shape": info.shape,
            "chunks": [vars(chunk) for chunk in chunks[name]],
        }
        for name, info in infos.items()
    }
    (directory / INDEX_NAME).write_text(json.dumps(content), encoding="utf-8")


def _cover(chunks: Sequence[StoredChunk], shape: tuple[int, ...]) -> bool:
    """Whether the chunks are the cells of a grid over the tensor, as a DTensor's shards are."""
    if any(not len(chunk.offset) == len(chunk.shape) == len(shape) for chunk in chunks):
        return False
    cells = 1
    for dim, size in enumerate(shape):
        spans = sorted({(c.offset[dim], c.offset[dim] + c.shape[dim]) for c in chunks})
        if [start for start, _ in spans] + [size] != [0] + [stop for _, stop in spans]:
            return False
        cells *= len(spans)
    return len(chunks) == len({chunk.offset for chunk in chunks}) == cells


class ShardedTensors:
    """A directory of shards, read by global name whatever layout wrote it.

    Only the files that hold a requested piece are opened. Threads may share it.

    Args:
        records: what the files should be, by name. A file listed here is read once as a whole
            and compared before anything of it is used.
        keep_cached: see `safetensors_files.SafetensorsReader`.

    Attributes:
        tensors: shape and dtype of every tensor by name.
        chunks: its pieces; they cover it exactly once.

    Raises:
        ValueError: the index is absent or damaged.
    """

    def __init__(
        self,
        directory: Path,
        records: Mapping[str, FileRecord] | None = None,
        keep_cached: bool = True,
    ) -> None:
        self.directory = directory
        self._keep_cached = keep_cached
        self._records = records or {}
        self._lock = Lock()
        self._opening: dict[str, Lock] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.chunks: dict[str, list[StoredChunk]] = {}
        self._files: dict[str, SafetensorsReader] = {}
        path = directory / INDEX_NAME
        try:
            content = read_json(path, _INDEX_BYTES)
            for name, entry in content.items():
                self.tensors[name] = TensorInfo(_sizes(entry["shape"]), DTYPES[entry["dtype"]])
                self.chunks[name] = [
                    StoredChunk(chunk["file"], _sizes(chunk["offset"]), _sizes(chunk["shape"]))
                    for chunk in entry["chunks"]
                ]
                if not all(isinstance(chunk.file, str) for chunk in self.chunks[name]):
                    raise TypeError(f"{name}: a chunk's file must be a name")
        except OSError as error:
            raise ValueError(f"{path}: cannot read it: {error.strerror or error}") from error
        except IrregularFileError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not an index of shards: {error!r}") from error
        for name, chunks in self.chunks.items():
            if not _cover(chunks, self.tensors[name].shape):
                for chunk in chunks:  # a file that contradicts the index tells more than the gap
                    self._open(name, chunk)
                raise ValueError(
                    f"{path}: the chunks of {name} leave a gap or overlap; the checkpoint is "
                    "damaged, use another one"
                )

    def read(self, name: str, ranges: Ranges) -> Tensor:
        """A slice of the global tensor.

        ValueError when a shard is unreadable, or is not what the index says.
        """
        wanted = tuple(piece.stop - piece.start for piece in ranges)
        values: Tensor | None = None
        for chunk in self.chunks[name]:
            overlap = [
                slice(max(piece.start, start), min(piece.stop, start + size))
                for piece, start, size in zip(ranges, chunk.offset, chunk.shape, strict=True)
            ]
            if any(piece.stop <= piece.start for piece in overlap):
                continue
            part = self.read_chunk(name, chunk, _shifted(overlap, chunk.offset))
            if tuple(part.shape) == wanted:
                return part
            if values is None:
                values = torch.empty(wanted, dtype=self.tensors[name].dtype)
            values[_shifted(overlap, [piece.start for piece in ranges])] = part
        if values is None:
            assert volume(wanted) == 0, "the chunks cover the tensor"
            values = torch.empty(wanted, dtype=self.tensors[name].dtype)
        return values

    def read_chunk(self, name: str, chunk: StoredChunk, ranges: Ranges) -> Tensor:
        """A slice of one chunk; ranges count from its start.

        ValueError when the shard is unreadable, or is not what the index says.
        """
        return self._open(name, chunk).read(name, ranges)

    def _open(self, name: str, chunk: StoredChunk) -> SafetensorsReader:
        with self._lock:
            opening = self._opening.setdefault(chunk.file, Lock())
        with opening:
            if chunk.file not in self._files:
                self._files[chunk.file] = self._checked_reader(chunk.file)
            reader = self._files[chunk.file]
        if reader.tensors.get(name) != TensorInfo(chunk.shape, self.tensors[name].dtype):
            raise ValueError(
                f"{self.directory / chunk.file}: its {name} is not what {INDEX_NAME} says; the "
                "checkpoint is damaged, use another one"
            )
        return reader

    def _checked_reader(self, file: str) -> SafetensorsReader:
        path = contained_file(self.directory, file)
        reader = SafetensorsReader(path, self._keep_cached)
        wanted = self._records.get(file)
        if wanted is not None and file_record(path) != wanted:
            raise ValueError(
                f"{path}: damaged, its checksum is not the one that was written down when it was "
                "saved; use another checkpoint"
            )
        return reader


def _sizes(values: Sequence[int]) -> tuple[int, ...]:
    # torch.Size raises TypeError for anything but whole numbers.
    sizes = tuple(torch.Size(values))
    if any(size < 0 for size in sizes):
        raise ValueError(f"{list(sizes)} has a negative size")
    return sizes


def _shifted(ranges: Sequence[slice], origin: Sequence[int]) -> Ranges:
    return tuple(
        slice(piece.start - start, piece.stop - start)
        for piece, start in zip(ranges, origin, strict=True)
    )
