"""Saving on a disk that is really full or read-only: a named error, older checkpoints untouched."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from unit.test_checkpoint_damage import save
from unit.tiny_hf import write_model

from megatron_sdar.checkpoint.checksums import FileRecord, file_record
from megatron_sdar.checkpoint.run_directory import DamagedCheckpointError, read_marker

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 16 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    command = [mount, "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    return tmp_path / "model"


def records(checkpoint: Path) -> dict[str, FileRecord]:
    return {name: file_record(checkpoint / name) for name in read_marker(checkpoint).files}


def fill_up(disk: Path, leave: int) -> Path:
    """A file that leaves so many bytes."""
    status = os.statvfs(disk)
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(status.f_bavail * status.f_frsize - leave))
    return ballast


@pytest.mark.parametrize("leave", [0, 4096, 65536, 2**18])
def test_a_full_disk(disk: Path, model: Path, leave: int) -> None:
    older = save(model, disk / "run", 1)
    before = records(older)
    ballast = fill_up(disk, leave)
    with pytest.raises(ValueError, match=r"cannot save .*checkpoint-2: .*No space left"):
        save(model, disk / "run", 2)
    assert records(older) == before
    with pytest.raises(DamagedCheckpointError):
        read_marker(disk / "run" / "checkpoint-2")
    ballast.unlink()
    read_marker(save(model, disk / "run", 2))


def test_a_read_only_disk(disk: Path, model: Path) -> None:
    older = save(model, disk / "run", 1)
    before = records(older)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(ValueError, match=r"cannot save .*checkpoint-2: .*Read-only file system"):
        save(model, disk / "run", 2)
    assert records(older) == before
