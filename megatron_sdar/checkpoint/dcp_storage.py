"""Storage of torch's distributed checkpoint (DCP) over our shard files: no pickle on disk.

DCP plans who writes what, drops replicas and reshards on load; `shards` owns the format. torch's
own Hugging Face storage was not taken: it buffers a rank's whole file in memory and leaves
weights untouched without a word when a shard is missing. Invariant: DCP only ever plans against
an index that covers every tensor exactly once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_sdar.checkpoint.checksums import FileRecord
from megatron_sdar.checkpoint.safetensors_files import TensorInfo, row_blocks
from megatron_sdar.checkpoint.shards import (
    SHARE_OUTPUT_DIR,
    Chunk,
    ShardedTensors,
    StoredChunk,
    shard_name,
    write_index,
    write_shard,
)

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class WrittenShard:
    """What a rank tells the coordinator of its file; no record where it wrote none."""

    file: str
    record: FileRecord | None


class ShardStorageWriter(StorageWriter):
    """Writes a state dict of tensors as one streamed shard per rank, and their index.

    Args:
        directory: the checkpoint id; made by the coordinator, must be empty.

    Attributes:
        records: on the coordinator, after a save: every shard by its file name, with the
            checksum that its rank took while writing.
    """

    def __init__(self, directory: PathLike) -> None:
        self.directory = Path(directory)
        self.records: dict[str, FileRecord] = {}

    def reset(self, checkpoint_id: PathLike | None = None) -> None:
        """Write to another directory from now on."""
        if checkpoint_id is not None:
            self.directory = Path(checkpoint_id)

    # Without "kwargs" in the signature DCP does not offer use_collectives=False, under which
    # every rank would name its shard as rank 0 does.
    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        if is_coordinator:
            self.directory.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell every rank the name of its file."""
        return [replace(plan, storage_data=shard_name(rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's shard, one tensor after the other.

        ValueError when this rank does not see the directory that the coordinator made; OSError
        when the disk is full.
        """
        if not self.directory.is_dir():
            raise ValueError(f"{self.directory}: not there on every machine; {SHARE_OUTPUT_DIR}")
        items = {item.index.fqn: item for item in plan.items}
        chunks = [_chunk(item) for item in plan.items]

        def values(chunk: Chunk) -> Tensor:
            tensor = planner.resolve_data(items[chunk.name])
            assert isinstance(tensor, Tensor), f"{chunk.name} is not a tensor"
            return tensor.detach()

        record = write_shard(self.directory / plan.storage_data, chunks, values)
        shard = WrittenShard(plan.storage_data, record)
        written: Future[list[WriteResult]] = Future()
        written.set_result(
            [
                WriteResult(item.index, chunk.local.num_bytes, shard)
                for item, chunk in zip(plan.items, chunks, strict=True)
            ]
        )
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, from what the coordinator finds on disk: ranks may have other disks.

        ValueError when a tensor of the plan is not there as a whole.
        """
        expected = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), f"{name} is not a tensor"
            expected[name] = TensorInfo(tuple(entry.size), entry.properties.dtype)
        write_index(self.directory, expected)
        shards = {result.storage_data for rank in results for result in rank}
        self.records = {s.file: s.record for s in shards if s.record is not None}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: PathLike) -> bool:
        return _is_path(checkpoint_id)


def _chunk(item: WriteItem) -> Chunk:
    data = item.tensor_data
    assert data is not None, f"{item.index.fqn} is not a tensor"
    return Chunk(
        item.index.fqn,
        tuple(data.size),
        tuple(data.chunk.offsets),
        TensorInfo(tuple(data.chunk.sizes), data.properties.dtype),
    )


class ShardStorageReader(StorageReader):
    """Reads slices of the shards, block by block, into a state dict's local tensors.

    A value is cast to the dtype of the tensor that it is read into.

    Args:
        directory: the checkpoint id.

    Attributes:
        stored: what the directory holds.

    Raises:
        ValueError: the index is absent or damaged. It is read here and not in `read_metadata`,
            for DCP would log a traceback of that and carry on to an AssertionError.
    """

    def __init__(self, directory: PathLike) -> None:
        self.stored = ShardedTensors(Path(directory))
        self._chunks: dict[MetadataIndex, StoredChunk] = {}

    def reset(self, checkpoint_id: PathLike | None = None) -> None:
        """Read another directory from now on; ValueError as for the first."""
        if checkpoint_id is not None:
            self.stored = ShardedTensors(Path(checkpoint_id))

    def read_metadata(self) -> Metadata:
        """The index in DCP's words; `storage_data` says which file has which chunk."""
        tensors: dict[str, Any] = {}
        files: dict[MetadataIndex, StoredChunk] = {}
        for name, info in self.stored.tensors.items():
            chunks = self.stored.chunks[name]
            tensors[name] = TensorStorageMetadata(
                TensorProperties(dtype=info.dtype),
                torch.Size(info.shape),
                [ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.shape)) for c in chunks],
            )
            files |= {MetadataIndex(name, chunk.offset): chunk for chunk in chunks}
        return Metadata(tensors, storage_data=files)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        self._chunks = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every planned slice into place.

        ValueError when a shard is unreadable, or is not what the index says.
        """
        for item in plan.items:
            target = planner.resolve_tensor(item).detach()
            self._fill(target, item.storage_index, item.storage_offsets)
            planner.commit_tensor(item, target)
        read: Future[None] = Future()
        read.set_result(None)
        return read

    def _fill(self, target: Tensor, index: MetadataIndex, offsets: Sequence[int]) -> None:
        """Copy the slice of a chunk that begins at `offsets` and has the target's shape.

        The blocks are of whole rows of the chunk, which is how they are read.
        """
        chunk, name = self._chunks[index], index.fqn
        rows = TensorInfo((target.shape[0], *chunk.shape[1:]), self.stored.tensors[name].dtype)
        columns = [
            slice(start, start + size)
            for start, size in zip(offsets[1:], target.shape[1:], strict=True)
        ]
        for block, *_ in row_blocks(rows):
            first = slice(offsets[0] + block.start, offsets[0] + block.stop)
            target[block].copy_(self.stored.read_chunk(name, chunk, (first, *columns)))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: PathLike) -> bool:
        return _is_path(checkpoint_id)


def _is_path(checkpoint_id: PathLike) -> bool:
    """Whether it names a local directory rather than a URL."""
    return "://" not in os.fspath(checkpoint_id)
