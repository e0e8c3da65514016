"""Checkpoints of one output_dir: which are complete, which is newest, which may go.

A checkpoint-N is complete when its COMMITTED marker, written last, lists files that are all
there in their size; it is undamaged when their checksums agree too (`damaged_files`). The marker
carries a checksum of itself. Invariant: nothing here trusts a directory without such a marker, and
the order of checkpoints is the order in which they were saved, whatever N or the clock says.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_sdar.checkpoint.checksums import Checksum, FileRecord, file_record
from megatron_sdar.checkpoint.hf_assets import read_json_object
from megatron_sdar.regular_files import read_regular, shown

MODEL_DIR, OPTIMIZER_DIR, HF_DIR = "model", "optimizer", "hf"
STATE_NAME, RESOLVED_CONFIG_NAME, MARKER_NAME = "trainer_state.json", "config.yaml", "COMMITTED"
FORMAT_VERSION = 2
_OWN_CHECKSUM = "checksum"
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_LEFTOVER = re.compile(r"checkpoint-\d+\.(tmp|old)")


class DamagedCheckpointError(ValueError):
    """A checkpoint is not what was saved; another one may be."""


@dataclass(frozen=True)
class Marker:
    """Content of COMMITTED, beside its own checksum.

    Attributes:
        step: optimizer steps done.
        sequence: how many checkpoints were saved in this output_dir before.
        has_optimizer: False for save_only_model and for imports.
        tied: the head is the embedding, stored once.
        layout: sizes of tp, pp and dp that wrote it (for people; any layout loads it).
        files: size and checksum of every other file, by path relative to the checkpoint.
    """

    step: int
    sequence: int
    has_optimizer: bool
    tied: bool
    layout: Mapping[str, int]
    files: Mapping[str, FileRecord]
    format_version: int = FORMAT_VERSION


def read_marker(checkpoint: Path) -> Marker:
    """The marker of a complete checkpoint; DamagedCheckpointError says why it is not one."""
    path = checkpoint / MARKER_NAME
    if not path.is_file():
        raise DamagedCheckpointError(
            f"{checkpoint}: not a complete checkpoint: it has no {MARKER_NAME} file"
        )
    try:
        content = read_json_object(path)
    except ValueError as error:
        raise DamagedCheckpointError(str(error)) from error
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise DamagedCheckpointError(
            f"{path}: format_version is {shown(version)}, this program reads {FORMAT_VERSION}; use "
            "the version of megatron_sdar that wrote it"
        )
    try:
        files = {name: FileRecord(**record) for name, record in content["files"].items()}
        fields = {name: value for name, value in content.items() if name != _OWN_CHECKSUM}
        marker = Marker(**{**fields, "files": files})
        if not _has_right_types(marker):
            raise TypeError("a value is of the wrong type")
    except (TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path}: not a marker of a checkpoint: {error!r}") from error
    root = checkpoint.resolve()
    if outside := [name for name in files if not (root / name).resolve().is_relative_to(root)]:
        raise DamagedCheckpointError(
            f"{path}: names files outside of the checkpoint: {', '.join(outside)}; copy them there"
        )
    if read_regular(path) != _encoded(marker):
        raise DamagedCheckpointError(
            f"{path}: damaged: it does not have the checksum that it states of itself"
        )
    damaged = [
        problem
        for name, record in files.items()
        if (problem := _size_problem(checkpoint, name, record)) is not None
    ]
    if damaged:
        what = ", ".join(damaged)
        raise DamagedCheckpointError(f"{checkpoint}: not a complete checkpoint: {what}")
    return marker


def _has_right_types(marker: Marker) -> bool:
    counts = [marker.step, marker.sequence, *(file.num_bytes for file in marker.files.values())]
    return (
        all(type(count) is int and 0 <= count < 2**63 for count in counts)
        and type(marker.has_optimizer) is type(marker.tied) is bool
        and not any("\0" in name for name in marker.files)
    )


def write_marker(directory: Path, marker: Marker) -> None:
    """Write COMMITTED. OSError is the caller's to explain."""
    (directory / MARKER_NAME).write_bytes(_encoded(marker))


def _encoded(marker: Marker) -> bytes:
    """The bytes of COMMITTED, the same for equal markers, so that any flipped bit shows."""
    content = asdict(marker)
    own = Checksum()
    own.update(json.dumps(content).encode())
    text = json.dumps({**content, _OWN_CHECKSUM: own.record().xxh3_128}, indent=2)
    return text.encode() + b"\n"


def _size_problem(checkpoint: Path, name: str, wanted: FileRecord) -> str | None:
    path = checkpoint / name
    size = path.stat().st_size if path.is_file() else None
    if size == wanted.num_bytes:
        return None
    found = "missing" if size is None else f"{size} bytes"
    return f"{name} ({found}, should have {wanted.num_bytes})"


def damaged_files(
    checkpoint: Path,
    files: Mapping[str, FileRecord],
    advance: Callable[[int], None] | None = None,
) -> list[str]:
    """Read these files and compare their checksums with the marker's; a line per damaged one.

    Args:
        files: all of `read_marker(checkpoint).files`, or a process's share of them.
        advance: called with every number of bytes read.
    """
    damaged = []
    for name, wanted in files.items():
        try:
            found = file_record(checkpoint / name, advance)
        except OSError as error:
            damaged.append(f"{checkpoint / name}: cannot read it: {error.strerror or error}")
            continue
        if found != wanted:
            damaged.append(
                f"{checkpoint / name}: damaged: its checksum is {found.xxh3_128}, "
                f"{MARKER_NAME} says {wanted.xxh3_128}"
            )
    return damaged


def commit(
    directory: Path,
    *,
    step: int,
    sequence: int,
    has_optimizer: bool,
    tied: bool,
    layout: Mapping[str, int],
    known: Mapping[str, FileRecord],
) -> int:
    """Sync everything in `directory` to disk, then write the marker that says so.

    Args:
        known: records of files whose writers took the checksum on the way, by path relative to
            `directory`; the others are read.

    Returns:
        how many bytes the marker vouches for.

    Raises:
        ValueError: a file of `known` has another size than was written.
    """
    for name, record in known.items():
        problem = _size_problem(directory, name, record)
        if problem is not None:
            raise ValueError(f"{directory}: {problem}; check the file system of output_dir")
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            name = path.relative_to(directory).as_posix()
            files[name] = known.get(name) or file_record(path)
        _sync(path)
    write_marker(directory, Marker(step, sequence, has_optimizer, tied, layout, files))
    _sync(directory / MARKER_NAME)
    _sync(directory)
    return sum(record.num_bytes for record in files.values())


def put_in_place(temporary: Path, final: Path) -> None:
    """Rename a finished directory to its name, replacing an older one of that name."""
    retired = final.rename(_retired(final)) if final.exists() else None
    temporary.rename(final)
    _sync(final.parent)
    if retired is not None:
        shutil.rmtree(retired)


def _retired(directory: Path) -> Path:
    """What it is called while it is removed; of a checkpoint-N that is a leftover's name."""
    return directory.with_name(f"{directory.name}.old")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_directories(output_dir: Path) -> list[Path]:
    """Every checkpoint-N, complete or not."""
    entries = sorted(output_dir.iterdir()) if output_dir.is_dir() else ()
    return [path for path in entries if _CHECKPOINT.fullmatch(path.name)]


def _leftovers(output_dir: Path) -> list[Path]:
    entries = sorted(output_dir.iterdir()) if output_dir.is_dir() else ()
    return [path for path in entries if _LEFTOVER.fullmatch(path.name)]


def _scan(output_dir: Path) -> tuple[list[tuple[Path, Marker]], list[str]]:
    """Complete checkpoints in the order they were saved, and why others are not complete."""
    complete, incomplete = [], []
    for path in checkpoint_directories(output_dir):
        try:
            complete.append((path, read_marker(path)))
        except DamagedCheckpointError as error:
            incomplete.append(str(error))
    incomplete += [
        f"{path}: left over from a save that was interrupted" for path in _leftovers(output_dir)
    ]
    return sorted(complete, key=lambda item: (item[1].sequence, item[1].step)), incomplete


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoint-N directories, in the order they were saved."""
    return [path for path, _ in _scan(Path(output_dir))[0]]


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The checkpoint-N saved last, of those that are complete."""
    complete = complete_checkpoints(output_dir)
    return complete[-1] if complete else None


def incomplete_checkpoints(output_dir: str | Path) -> list[str]:
    """One line for every checkpoint that `latest_checkpoint` passed over, saying why."""
    return _scan(Path(output_dir))[1]


def remove_leftovers(output_dir: Path) -> None:
    """Remove what interrupted saves left behind; a run is alone in its output_dir."""
    for path in _leftovers(output_dir):
        shutil.rmtree(path)


def prune_checkpoints(
    output_dir: str | Path,
    save_total_limit: int,
    damaged: Collection[Path] = (),
    spared: Path | None = None,
) -> list[Path]:
    """Remove all but the `save_total_limit` last saved complete checkpoints; returns them.

    Incomplete ones, and those that the caller knows to be damaged, do not count and are left for
    the user to look at. `spared`, the best one, is among those kept, and so is the newest, which a
    run resumes from: with a limit of 1 that may be two.
    OSError when one cannot be removed.
    """
    assert save_total_limit >= 1, "validated"
    complete = [path for path in complete_checkpoints(output_dir) if path not in damaged]
    kept = {*complete[-1:], spared}.intersection(complete)
    for path in reversed(complete):
        if len(kept) < save_total_limit:
            kept.add(path)
    removed = [path for path in complete if path not in kept]
    for path in removed:
        retired = _retired(path)
        if retired.exists():
            shutil.rmtree(retired)
        # Renamed first, so that an interrupted removal leaves nothing that looks complete.
        shutil.rmtree(path.rename(retired))
    return removed
