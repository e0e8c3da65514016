"""Reading a checkpoint's files once over all ranks to compare their checksums.

Runs before anything of a checkpoint is used, so that a flipped bit is reported as such, whatever
it would have broken. Invariant: every rank comes to the same verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_sdar.checkpoint.checksums import FileRecord
from megatron_sdar.checkpoint.progress import byte_progress
from megatron_sdar.checkpoint.run_directory import DamagedCheckpointError, damaged_files
from megatron_sdar.parallel.launch import gather_from_world
from megatron_sdar.parallel.mesh import place_in_world


def verify_files(checkpoint: Path, files: Mapping[str, FileRecord]) -> None:
    """Compare the checksums of these files, each rank those of its share.

    Args:
        files: records by path relative to the checkpoint, the same on every rank.

    On a terminal rank 0 shows the progress of its own share.

    Raises:
        DamagedCheckpointError: on every rank, with a line for every damaged file.

    Collective: all_gather_object (world).
    """
    rank, world_size = place_in_world()
    mine = share_of_files(files, rank, world_size)
    total = sum(record.num_bytes for record in mine.values())
    with byte_progress(f"checking {checkpoint.name}", total, enabled=rank == 0) as advance:
        found = damaged_files(checkpoint, mine, advance)
    damaged = [line for lines in gather_from_world(found) for line in lines]
    if damaged:
        raise DamagedCheckpointError("\n".join(damaged))


def share_of_files(
    files: Mapping[str, FileRecord], rank: int, world_size: int
) -> dict[str, FileRecord]:
    """This rank's files: the largest first, each to the rank that has the fewest bytes so far."""
    loads = [0] * world_size
    share = {}
    for name, record in sorted(files.items(), key=lambda item: (-item[1].num_bytes, item[0])):
        owner = loads.index(min(loads))
        loads[owner] += record.num_bytes
        if owner == rank:
            share[name] = record
    return share
