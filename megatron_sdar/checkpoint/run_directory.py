"""Checkpoints of one output_dir: which are complete, which is newest, which may go.

A checkpoint-N is complete when its COMMITTED marker, written last, lists files that are all
there in their size. Invariant: nothing here trusts a directory without such a marker, and the
order of checkpoints is the order in which they were saved, whatever N or the clock says.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_sdar.checkpoint.hf_assets import read_json_object, write_json

MODEL_DIR, OPTIMIZER_DIR, HF_DIR = "model", "optimizer", "hf"
STATE_NAME, RESOLVED_CONFIG_NAME, MARKER_NAME = "trainer_state.json", "config.yaml", "COMMITTED"
FORMAT_VERSION = 1
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_LEFTOVER = re.compile(r"checkpoint-\d+\.(tmp|old)")


@dataclass(frozen=True)
class Marker:
    """Content of COMMITTED.

    Attributes:
        step: optimizer steps done.
        sequence: how many checkpoints were saved in this output_dir before.
        has_optimizer: False for save_only_model and for imports.
        tied: the head is the embedding, stored once.
        layout: sizes of tp, pp and dp that wrote it (for people; any layout loads it).
        files: size in bytes of every other file, by path relative to the checkpoint.
    """

    step: int
    sequence: int
    has_optimizer: bool
    tied: bool
    layout: Mapping[str, int]
    files: Mapping[str, int]
    format_version: int = FORMAT_VERSION


def read_marker(checkpoint: Path) -> Marker:
    """The marker of a complete checkpoint; ValueError says why it is not one."""
    path = checkpoint / MARKER_NAME
    if not path.is_file():
        raise ValueError(f"{checkpoint}: not a complete checkpoint: it has no {MARKER_NAME} file")
    content = read_json_object(path)
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version is {version!r}, this program reads {FORMAT_VERSION}; use the "
            "version of megatron_sdar that wrote it"
        )
    try:
        marker = Marker(**content)
        wanted = dict(marker.files)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a marker of a checkpoint: {error}") from error
    damaged = [
        f"{name} ({'missing' if size is None else f'{size} bytes'}, should have {wanted[name]})"
        for name, size in ((name, _size(checkpoint / name)) for name in wanted)
        if size != wanted[name]
    ]
    if damaged:
        raise ValueError(f"{checkpoint}: not a complete checkpoint: {', '.join(damaged)}")
    return marker


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def commit(
    directory: Path,
    *,
    step: int,
    sequence: int,
    has_optimizer: bool,
    tied: bool,
    layout: Mapping[str, int],
) -> None:
    """Sync everything in `directory` to disk, then write the marker that says so."""
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            files[path.relative_to(directory).as_posix()] = path.stat().st_size
        _sync(path)
    marker = Marker(step, sequence, has_optimizer, tied, layout, files)
    write_json(directory / MARKER_NAME, asdict(marker))
    _sync(directory / MARKER_NAME)
    _sync(directory)


def put_in_place(temporary: Path, final: Path) -> None:
    """Rename a finished directory to its name, replacing an older one of that name."""
    retired = final.with_name(f"{final.name}.old") if final.exists() else None
    if retired is not None:
        final.rename(retired)
    temporary.rename(final)
    _sync(final.parent)
    if retired is not None:
        shutil.rmtree(retired)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _scan(output_dir: Path) -> tuple[list[tuple[Path, Marker]], list[str]]:
    """Complete checkpoints in the order they were saved, and why others are not complete."""
    complete, incomplete = [], []
    for path in sorted(output_dir.iterdir()) if output_dir.is_dir() else ():
        if _CHECKPOINT.fullmatch(path.name):
            try:
                complete.append((path, read_marker(path)))
            except ValueError as error:
                incomplete.append(str(error))
        elif _LEFTOVER.fullmatch(path.name):
            incomplete.append(f"{path}: left over from a save that was interrupted")
    return sorted(complete, key=lambda item: (item[1].sequence, item[1].step)), incomplete


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint-N saved last, of those that are complete."""
    complete, _ = _scan(Path(output_dir))
    return complete[-1][0] if complete else None


def incomplete_checkpoints(output_dir: str | Path) -> list[str]:
    """One line for every checkpoint that `latest_checkpoint` passed over, saying why."""
    return _scan(Path(output_dir))[1]


def next_sequence(output_dir: Path) -> int:
    """The sequence number of the next checkpoint saved there."""
    complete, _ = _scan(output_dir)
    return complete[-1][1].sequence + 1 if complete else 0


def remove_leftovers(output_dir: Path) -> None:
    """Remove what interrupted saves left behind; a run is alone in its output_dir."""
    for path in sorted(output_dir.iterdir()):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)


def prune_checkpoints(output_dir: str | Path, save_total_limit: int) -> list[Path]:
    """Remove all but the `save_total_limit` last saved complete checkpoints; returns them.

    Incomplete ones are left for the user to look at. OSError when one cannot be removed.
    """
    assert save_total_limit >= 1, "validated"
    complete, _ = _scan(Path(output_dir))
    removed = [path for path, _ in complete[:-save_total_limit]]
    for path in removed:
        # First the marker, so that an interrupted removal leaves nothing that looks complete.
        (path / MARKER_NAME).unlink()
        shutil.rmtree(path)
    return removed


def resolve_resume(
    output_dir: str | Path, resume_from_checkpoint: bool | str | None, overwrite_output_dir: bool
) -> Path | None:
    """The checkpoint to go on from, None to start afresh; LLaMA-Factory's rules.

    A path: that checkpoint. True: the newest in output_dir. None or False: the newest if there
    is one, unless overwrite_output_dir.

    Raises:
        ValueError: what was asked for does not exist or is not complete; or output_dir holds a
            model but no checkpoint, and may not be overwritten.
    """
    directory = Path(output_dir)
    if isinstance(resume_from_checkpoint, str):
        try:
            read_marker(Path(resume_from_checkpoint))
        except ValueError as error:
            raise ValueError(f"resume_from_checkpoint: {error}") from error
        return Path(resume_from_checkpoint)
    complete, incomplete = _scan(directory)
    if resume_from_checkpoint:
        if not complete:
            found = "; ".join(incomplete) or "no checkpoint-N there"
            raise ValueError(
                f"resume_from_checkpoint: true, but {directory} has no complete checkpoint "
                f"({found}); set it to null to start afresh"
            )
        return complete[-1][0]
    if overwrite_output_dir:
        return None
    if complete:
        return complete[-1][0]
    if directory.is_dir() and any(directory.glob("*.safetensors")):
        raise ValueError(
            f"output_dir: {directory} holds a model but no checkpoint to resume from; choose "
            "another directory, or set overwrite_output_dir: true"
        )
    return None
