"""Writing a model's weight files, several at a time, each block by block.

Owns the plan of a file (which tensors, in which order and dtype) and the cast that may not lose
a value's magnitude. Invariant: a file that is reported as finished is whole and on disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_sdar.checkpoint.checksums import FileRecord, file_record
from megatron_sdar.checkpoint.io_threads import Advance, ahead, run_jobs
from megatron_sdar.checkpoint.page_cache import forget_pages
from megatron_sdar.checkpoint.safetensors_files import (
    Ranges,
    SafetensorsReader,
    SafetensorsWriter,
    TensorInfo,
    row_blocks,
)

THREADS = 4
ReadSlice = Callable[[str, Ranges], Tensor]


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file to be written.

    Attributes:
        name: path relative to the directory.
        tensors: what it holds, in order.
        metadata: text entries for its header.
    """

    name: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(info.num_bytes for info in self.tensors.values())


def group_by_size(tensors: Mapping[str, TensorInfo], limit: int) -> list[dict[str, TensorInfo]]:
    """Consecutive tensors, as many as fit into `limit` bytes; a larger one stands alone."""
    groups: list[dict[str, TensorInfo]] = []
    size = 0
    for name, info in tensors.items():
        if not groups or size + info.num_bytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = info
        size += info.num_bytes
    return groups


def write_weight_files(
    directory: Path,
    files: Sequence[WeightFile],
    read: ReadSlice,
    threads: int,
    advance: Advance,
) -> Generator[tuple[WeightFile, FileRecord], None, None]:
    """Write the files and yield each, with its size and checksum, as it is finished.

    Args:
        read: gives slices in the dtype that the file has; called from several threads.

    Raises:
        ValueError: of `read`.
        OSError: the disk refuses.
    """

    def write(file: WeightFile, report: Advance) -> FileRecord:
        blocks = [(name, r) for name, info in file.tensors.items() for r in row_blocks(info)]
        values = ahead(lambda block: read(*block), blocks)
        with SafetensorsWriter(directory / file.name, file.tensors, file.metadata) as writer:
            for (name, _), block in zip(blocks, values, strict=True):
                report(writer.write(name, block))
        return writer.checksum.record()

    jobs = [partial(write, file) for file in files]
    with closing(run_jobs(jobs, threads, advance)) as finished:  # no thread outlives this
        for index, record in finished:
            yield files[index], record


def compare_weight_files(
    directory: Path,
    files: Sequence[WeightFile],
    read: ReadSlice,
    threads: int,
    advance: Advance,
) -> None:
    """Read the files back from disk and compare every tensor bitwise with what was to be written.

    Raises:
        ValueError: one differs, or a file is unreadable.
    """

    def compare(file: WeightFile, report: Advance) -> None:
        path = directory / file.name
        with path.open("rb") as file_on_disk:
            forget_pages(file_on_disk.fileno())  # what is compared comes from the disk
        written = SafetensorsReader(path, keep_cached=False)
        if written.tensors != dict(file.tensors):
            raise ValueError(f"{path}: does not hold the tensors that were to be written")
        for name, info in file.tensors.items():
            for ranges in row_blocks(info):
                found = written.read(name, ranges)
                if not _same_bits(found, read(name, ranges)):
                    raise ValueError(
                        f"{path}: {name} differs from the source in rows {ranges[0].start} to "
                        f"{ranges[0].stop - 1}; the disk or the memory is faulty"
                    )
                report(found.nbytes)

    deque(run_jobs([partial(compare, file) for file in files], threads, advance), maxlen=0)


def check_records(
    directory: Path, records: Mapping[str, FileRecord], threads: int, advance: Advance
) -> list[str]:
    """Names of files that are absent or not what the records say."""

    def check(name: str, wanted: FileRecord, report: Advance) -> bool:
        path = directory / name
        return path.is_file() and file_record(path, report) == wanted

    names = list(records)
    jobs = [partial(check, name, records[name]) for name in names]
    return [names[index] for index, good in run_jobs(jobs, threads, advance) if not good]


def cast(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in `dtype`; ValueError when a finite one becomes infinite."""
    converted = values.to(dtype)
    if values.dtype != dtype and not torch.equal(converted.isfinite(), values.isfinite()):
        raise ValueError(f"{name}: has values too large for {dtype}; use bfloat16")
    return converted


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Also where a value is not a number."""
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and torch.equal(_as_bytes(one), _as_bytes(other))


def _as_bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(-1).view(torch.uint8)
