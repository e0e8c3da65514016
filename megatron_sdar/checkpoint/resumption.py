"""Which checkpoints a run may go on from, best first.

LLaMA-Factory's rules, with one addition: what turns out to be damaged is passed over for the
next older one. Invariant: a run never starts afresh where checkpoints lie that cannot be read.
"""

from __future__ import annotations

from pathlib import Path

from megatron_sdar.checkpoint.run_directory import (
    DamagedCheckpointError,
    checkpoint_directories,
    complete_checkpoints,
    incomplete_checkpoints,
    read_marker,
)
from megatron_sdar.checkpoint.run_mark import checkpoints_since, read_run_mark


def resume_candidates(
    output_dir: str | Path,
    resume_from_checkpoint: bool | str | None,
    overwrite_output_dir: bool,
    job: str | None = None,
) -> list[Path]:
    """The checkpoints to try in turn; none: start afresh.

    A path: that checkpoint alone. True: those in output_dir, newest first. None or False: the
    same if there are any, unless overwrite_output_dir. In a job that begins again, whichever of
    these it was, what it saved since comes first. A run that began afresh never goes on from what
    lay in output_dir before, unless that is asked for by True or by path.

    Args:
        job: see job_id.

    Raises:
        ValueError: what was asked for does not exist or is not complete; output_dir holds
            checkpoints of which none is complete or none is of the run it holds, or a model but
            no checkpoint, and may not be overwritten.
    """
    directory = Path(output_dir)
    mark = read_run_mark(directory)
    is_again = mark is not None and mark.job == job
    since = [] if mark is None else checkpoints_since(directory, mark)[::-1]
    if isinstance(resume_from_checkpoint, str):
        path = Path(resume_from_checkpoint)
        if is_again and since:
            return [*since, path]
        try:
            read_marker(path)
        except DamagedCheckpointError as error:
            raise ValueError(refusal(path, error)) from error
        return [path]
    if overwrite_output_dir and not resume_from_checkpoint:
        return since if is_again else []
    if mark is not None and mark.is_fresh and since:
        return since
    complete = complete_checkpoints(directory)[::-1]
    if complete and (resume_from_checkpoint or mark is None or not mark.is_fresh):
        return complete
    if complete:
        if is_again:
            return []
        raise ValueError(
            f"output_dir: {directory} holds a run that began afresh and saved nothing, and "
            f"{complete[0]} of an earlier one; to go on from the latter set "
            f"resume_from_checkpoint: {complete[0]}, to start afresh overwrite_output_dir: true"
        )
    incomplete = incomplete_checkpoints(directory)
    if resume_from_checkpoint:
        found = "; ".join(incomplete) or "no checkpoint-N there"
        raise ValueError(
            f"resume_from_checkpoint: true, but {directory} has no complete checkpoint "
            f"({found}); set it to null to start afresh"
        )
    if checkpoint_directories(directory):
        raise ValueError(none_left(directory, incomplete))
    if directory.is_dir() and any(directory.glob("*.safetensors")):
        raise ValueError(
            f"output_dir: {directory} holds a model but no checkpoint to resume from; choose "
            "another directory, or set overwrite_output_dir: true"
        )
    return []


def none_left(output_dir: Path, problems: list[str]) -> str:
    """The message of a run that finds checkpoints, and none that it can go on from."""
    return (
        f"{output_dir}: none of its checkpoints can be resumed:\n  "
        + "\n  ".join(problems)
        + "\nset overwrite_output_dir: true to start afresh, or choose another output_dir"
    )


def refusal(path: Path, error: DamagedCheckpointError) -> str:
    """The message about the one checkpoint that was asked for, naming the newest other one."""
    others = [other for other in complete_checkpoints(path.parent) if other != path]
    advice = f"{others[-1]} is complete" if others else "there is no other complete one beside it"
    return f"resume_from_checkpoint: {error}; {advice}"
