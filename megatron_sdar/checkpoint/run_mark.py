"""run.json: which checkpoints of an output_dir belong to the run that it holds.

A run that starts afresh where an earlier one left checkpoints (overwrite_output_dir), or goes on
from a checkpoint that was named, notes which job it is and how many checkpoints were there before.
So a job that is started again, by torchrun after a rank was killed or by a scheduler, goes on from
what it saved itself, and the checkpoints of two runs are never mixed up.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_sdar.checkpoint.hf_assets import read_json_object
from megatron_sdar.checkpoint.run_directory import complete_checkpoints, read_marker

RUN_MARK_NAME = "run.json"


@dataclass(frozen=True)
class RunMark:
    """Content of run.json.

    Attributes:
        job: who began the run, see job_id.
        first_sequence: of the run's own checkpoints (`Marker.sequence`).
        is_fresh: it began without a checkpoint, so that none of the earlier ones belongs to it.
    """

    job: str
    first_sequence: int
    is_fresh: bool


def read_run_mark(output_dir: Path) -> RunMark | None:
    """The mark of the run in output_dir, None if it has none; ValueError if it is damaged."""
    path = output_dir / RUN_MARK_NAME
    if not path.exists():
        return None
    content = read_json_object(path)
    kinds = {"job": str, "first_sequence": int, "is_fresh": bool}
    if {name: type(value) for name, value in content.items()} != kinds:
        raise ValueError(
            f"{path}: not a mark of a run: {content!r:.200}; remove it, and the newest checkpoint "
            "counts as the run's"
        )
    return RunMark(**content)


def begin_run(output_dir: Path, job: str, is_fresh: bool) -> None:
    """Mark what is saved from now on as another run's, unless `job` did so before (rank 0).

    Raises:
        ValueError, OSError: the mark cannot be read or written.
    """
    mark = read_run_mark(output_dir)
    if mark is not None and mark.job == job:
        return
    new = RunMark(job, next_sequence(output_dir), is_fresh)
    temporary = output_dir / f"{RUN_MARK_NAME}.tmp"
    temporary.write_text(json.dumps(asdict(new), indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, output_dir / RUN_MARK_NAME)


def checkpoints_since(output_dir: Path, mark: RunMark) -> list[Path]:
    """The complete checkpoints that were saved since the mark was set, in that order."""
    return [
        path
        for path in complete_checkpoints(output_dir)
        if read_marker(path).sequence >= mark.first_sequence
    ]


def next_sequence(output_dir: Path) -> int:
    """The sequence number of the next checkpoint saved there: none of them comes twice, whatever
    was removed since."""
    mark = read_run_mark(output_dir)
    complete = complete_checkpoints(output_dir)
    after_newest = read_marker(complete[-1]).sequence + 1 if complete else 0
    return max(after_newest, mark.first_sequence if mark is not None else 0)
