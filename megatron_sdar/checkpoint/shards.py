"""Tensors cut into shards: one safetensors file per rank, offsets in its header, one index.

The files are those of torch's distributed Hugging Face storage (DCP_SHARDING_INFO in the
header), which DCP can read; they are written and read here because DCP buffers a rank's whole
file in memory and, worse, leaves weights untouched without a word when a shard is missing.
Invariant: the chunks in an index cover every tensor exactly once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

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

INDEX_NAME = "index.json"
_OFFSETS, _SHAPES = "DCP_SHARDING_INFO", "GLOBAL_SHAPES"


@dataclass(frozen=True)
class Chunk:
    """One rank's piece of a global tensor."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    values: Tensor


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


def write_shard(path: Path, chunks: Sequence[Chunk]) -> None:
    """Write a rank's chunks, one at a time through memory; no file when there are none."""
    chunks = [chunk for chunk in chunks if chunk.values.numel() > 0]
    if not chunks:
        return
    metadata = shard_metadata(
        {chunk.name: chunk.offset for chunk in chunks},
        {chunk.name: chunk.global_shape for chunk in chunks},
    )
    infos = {c.name: TensorInfo(tuple(c.values.shape), c.values.dtype) for c in chunks}
    assert len(infos) == len(chunks), "a rank holds one chunk of a tensor"
    with SafetensorsWriter(path, infos, metadata) as writer:
        for chunk in chunks:
            for ranges in row_blocks(infos[chunk.name]):
                writer.write(chunk.name, chunk.values[ranges[0]])


def write_index(directory: Path) -> None:
    """Collect the headers of all shards in `directory` into its index file.

    ValueError when the shards do not cover every tensor, as happens when the ranks wrote to
    different disks.
    """
    infos: dict[str, TensorInfo] = {}
    chunks: dict[str, list[StoredChunk]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        shard = SafetensorsReader(path)
        offsets, shapes = json.loads(shard.metadata[_OFFSETS]), json.loads(shard.metadata[_SHAPES])
        for name, local in shard.tensors.items():
            info = TensorInfo(tuple(shapes[name]), local.dtype)
            assert infos.setdefault(name, info) == info, f"{name}: ranks disagree"
            offset = tuple(offsets[name]["saved_offsets"])
            chunks.setdefault(name, []).append(StoredChunk(path.name, offset, local.shape))
    for name, info in infos.items():
        stored = sum(volume(chunk.shape) for chunk in chunks[name])
        distinct = len({chunk.offset for chunk in chunks[name]}) == len(chunks[name])
        if stored != volume(info.shape) or not distinct:
            raise ValueError(
                f"{directory}: {name} has {stored} of {volume(info.shape)} elements there; every "
                "process must see the same output_dir, put it on a shared file system"
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


class ShardedTensors:
    """A directory of shards, read by global name and ranges whatever layout wrote it.

    Only the files that hold a requested piece are opened.

    Raises:
        ValueError: the index is absent or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, TensorInfo] = {}
        self._chunks: dict[str, list[StoredChunk]] = {}
        self._files: dict[str, SafetensorsReader] = {}
        path = directory / INDEX_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            for name, entry in content.items():
                self.tensors[name] = TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]])
                self._chunks[name] = [
                    StoredChunk(chunk["file"], tuple(chunk["offset"]), tuple(chunk["shape"]))
                    for chunk in entry["chunks"]
                ]
        except OSError as error:
            raise ValueError(f"{path}: cannot read it: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not an index of shards: {error!r}") from error

    def read(self, name: str, ranges: Ranges) -> Tensor:
        """A slice of the global tensor; a view of the file when one chunk holds it all.

        ValueError when a shard is unreadable, or is not what the index says.
        """
        wanted = tuple(piece.stop - piece.start for piece in ranges)
        values: Tensor | None = None
        filled = 0
        for chunk in self._chunks[name]:
            overlap = [
                slice(max(piece.start, start), min(piece.stop, start + size))
                for piece, start, size in zip(ranges, chunk.offset, chunk.shape, strict=True)
            ]
            if any(piece.stop <= piece.start for piece in overlap):
                continue
            source = _shifted(overlap, chunk.offset)
            part = self._open(chunk.file, name, chunk.shape).read(name, source)
            if tuple(part.shape) == wanted:
                return part
            if values is None:
                values = torch.empty(wanted, dtype=self.tensors[name].dtype)
            values[_shifted(overlap, [piece.start for piece in ranges])] = part
            filled += part.numel()
        if values is None:
            values = torch.empty(wanted, dtype=self.tensors[name].dtype)
        if filled != volume(wanted):
            raise ValueError(
                f"{self.directory / INDEX_NAME}: the chunks of {name} leave a gap; the checkpoint "
                "is damaged, use another one"
            )
        return values

    def _open(self, file: str, name: str, shape: tuple[int, ...]) -> SafetensorsReader:
        if file not in self._files:
            self._files[file] = SafetensorsReader(contained_file(self.directory, file))
        reader = self._files[file]
        if reader.tensors.get(name) != TensorInfo(shape, self.tensors[name].dtype):
            raise ValueError(
                f"{self.directory / file}: its {name} is not what {INDEX_NAME} says; the "
                "checkpoint is damaged, use another one"
            )
        return reader


def _shifted(ranges: Sequence[slice], origin: Sequence[int]) -> Ranges:
    return tuple(
        slice(piece.start - start, piece.stop - start)
        for piece, start in zip(ranges, origin, strict=True)
    )
