"""One output_dir, one run at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sdar.checkpoint.run_lock import RUN_LOCK_NAME, RunLock

HOLDER = """
import sys
from pathlib import Path
from megatron_sdar.checkpoint.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print(lock.take("first"), flush=True)
sys.stdin.read()
"""

CHILD = """
if os.fork():
    print(os.getpid(), told, flush=True)
os.read(0, 1)
"""


def hold(output_dir: Path) -> subprocess.Popen[str]:
    """Another process that has the lock until its input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(output_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "None\n"
    return process


def test_a_second_run_is_refused_until_the_first_has_ended_however_that_was(tmp_path: Path) -> None:
    with hold(tmp_path) as first:
        words = rf"another run writes into {re.escape(str(tmp_path))} \(process {first.pid} on .+\)"
        with pytest.raises(ValueError, match=words):
            RunLock(tmp_path).take("second")
        first.kill()
    second = RunLock(tmp_path)
    assert second.take("second") is None
    assert '"job": "second"' in (tmp_path / RUN_LOCK_NAME).read_text()
    assert "first" not in (tmp_path / RUN_LOCK_NAME).read_text(), "the old note is gone"


def test_a_job_is_not_held_up_by_what_is_left_of_itself(tmp_path: Path) -> None:
    with hold(tmp_path) as first:
        told = RunLock(tmp_path).take("first")
        assert told is not None
        assert f"still held by this job itself (process {first.pid} on " in told
        first.kill()


def test_removing_the_file_lets_the_next_run_in(tmp_path: Path) -> None:
    with hold(tmp_path) as first:
        (tmp_path / RUN_LOCK_NAME).unlink()
        assert RunLock(tmp_path).take("second") is None
        first.kill()


def test_children_of_the_run_do_not_keep_its_lock(tmp_path: Path) -> None:
    """A worker of the loader may outlive a killed rank for seconds."""
    script = HOLDER.replace("print(", "import os\ntold = ").replace(", flush=True)", "")
    script = script.replace("sys.stdin.read()", CHILD)
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as first:
        assert first.stdout is not None
        pid, told = first.stdout.readline().split()
        assert told == "None"
        os.kill(int(pid), 9)
        first.wait()
        assert RunLock(tmp_path).take("second") is None
        os.killpg(first.pid, 9)


def test_where_nothing_can_be_locked_a_run_is_told_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    told = RunLock(tmp_path).take("first")
    assert told is not None
    assert "cannot be locked (No locks available)" in told


@pytest.mark.parametrize("note", ["", "{", "[]", "\x00\xff"])
def test_a_holder_without_a_note_is_still_a_holder(tmp_path: Path, note: str) -> None:
    with hold(tmp_path) as first:
        (tmp_path / RUN_LOCK_NAME).write_text(note, encoding="latin-1")
        with pytest.raises(ValueError, match="which did not note its name"):
            RunLock(tmp_path).take("second")
        first.kill()


def test_a_link_in_its_place_is_not_written_through(tmp_path: Path) -> None:
    other = tmp_path / "precious"
    other.write_text("content")
    (tmp_path / RUN_LOCK_NAME).symlink_to(other)
    with pytest.raises(OSError, match="symbolic links"):
        RunLock(tmp_path).take("first")
    assert other.read_text() == "content"
