"""Whose the checkpoints of an output_dir are, and what a job that begins again goes on from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_sdar.checkpoint.resumption import resume_candidates
from megatron_sdar.checkpoint.run_directory import commit
from megatron_sdar.checkpoint.run_mark import begin_run, next_sequence, read_run_mark


def save(run: Path, step: int) -> Path:
    """A complete checkpoint of one small file."""
    path = run / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_text(str(step))
    commit(
        path, step=step, sequence=next_sequence(run), has_optimizer=False, tied=False,
        layout={}, known={},
    )  # fmt: skip
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An output_dir with two checkpoints of a run that is over."""
    begin_run(tmp_path, "first", is_fresh=True)
    save(tmp_path, 10)
    save(tmp_path, 20)
    return tmp_path


def test_a_job_that_began_afresh_goes_on_from_its_own_checkpoints_only(run: Path) -> None:
    assert resume_candidates(run, None, True, "second") == []
    begin_run(run, "second", is_fresh=True)
    assert resume_candidates(run, None, True, "second") == [], "it has saved nothing yet"
    five, ten = save(run, 5), run / "checkpoint-15"
    save(run, 15)
    assert resume_candidates(run, None, True, "second") == [ten, five]
    assert resume_candidates(run, None, True, "third") == [], "another job starts afresh"
    assert resume_candidates(run, None, False, "third") == [ten, five]
    begin_run(run, "second", is_fresh=True)  # the second start of the job marks nothing anew
    assert resume_candidates(run, None, True, "second") == [ten, five]


def test_checkpoints_of_two_runs_are_not_mixed(run: Path) -> None:
    begin_run(run, "second", is_fresh=True)
    with pytest.raises(ValueError, match=r"began afresh and saved nothing.*checkpoint-20 of an ea"):
        resume_candidates(run, None, False, "third")
    assert resume_candidates(run, True, False, "third") == [
        run / f"checkpoint-{n}" for n in (20, 10)
    ]
    assert resume_candidates(run, str(run / "checkpoint-20"), False, "third") == [
        run / "checkpoint-20"
    ]
    damaged = save(run, 5)
    (damaged / "weights").unlink()
    with pytest.raises(ValueError, match="saved nothing"):
        resume_candidates(run, None, False, "third")


def test_a_job_that_was_given_a_path_goes_on_from_what_it_saved_since(run: Path) -> None:
    given = str(run / "checkpoint-10")
    assert resume_candidates(run, given, False, "second") == [run / "checkpoint-10"]
    begin_run(run, "second", is_fresh=False)
    assert resume_candidates(run, given, True, "second") == [run / "checkpoint-10"]
    newest = save(run, 12)
    assert resume_candidates(run, given, True, "second") == [newest, run / "checkpoint-10"]
    assert resume_candidates(run, given, True, "third") == [run / "checkpoint-10"]
    # The others still belong to what the run goes on from.
    everything = [newest, run / "checkpoint-20", run / "checkpoint-10"]
    assert resume_candidates(run, None, False, "third") == everything


def test_numbers_do_not_come_twice_when_checkpoints_were_removed(run: Path) -> None:
    begin_run(run, "second", is_fresh=True)
    for step in (10, 20):
        shutil.rmtree(run / f"checkpoint-{step}")
    path = save(run, 3)
    assert resume_candidates(run, None, True, "second") == [path]


def test_output_directories_without_a_mark_are_as_before(tmp_path: Path) -> None:
    assert read_run_mark(tmp_path) is None
    paths = [save(tmp_path, step) for step in (1, 2)]
    assert resume_candidates(tmp_path, None, False, "any") == paths[::-1]
    assert resume_candidates(tmp_path, None, True, "any") == []


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"job": 1, "first_sequence": 0, "is_fresh": true}',
     '{"job": "a", "first_sequence": true, "is_fresh": true}', '{"job": "a"}'],
)  # fmt: skip
def test_a_damaged_mark_is_named(run: Path, text: str) -> None:
    (run / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json"):
        resume_candidates(run, None, False, "any")
