"""The best evaluation, patience, and which checkpoints outlive save_total_limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sdar.checkpoint import run_directory
from megatron_sdar.checkpoint.run_directory import prune_checkpoints
from megatron_sdar.training.best_model import BestModel


def watch(values: list[float], saved: set[int], *, greater: bool = False) -> BestModel:
    best = BestModel("eval_loss", greater, patience=2)
    for step, value in enumerate(values, start=1):
        assert not best.stops
        best.update(step, {"eval_loss": value, "eval_accuracy": 0.0}, step in saved)
    return best


def test_the_best_of_all_and_the_best_that_was_saved() -> None:
    best = watch([3.0, 1.0, 2.0, 0.5], {1, 3})
    assert (best.value, best.step) == (0.5, 4)
    assert (best.saved_value, best.saved_step) == (2.0, 3)
    best = watch([3.0, 4.0, 4.0], {1, 2, 3}, greater=True)
    assert (best.value, best.step, best.saved_step) == (4.0, 2, 2)


def test_what_is_saved_when_only_better_ones_are() -> None:
    best = BestModel("eval_loss", False, None, saves_best=True)
    values = [3.0, 1.0, 2.0, 1.0, 0.5, 0.7]
    saved = [best.update(n, {"eval_loss": value}, n == 6) for n, value in enumerate(values, 1)]
    assert saved == [True, True, False, False, True, True]
    assert (best.saved_value, best.saved_step) == (0.5, 5)
    assert watch([3.0, 1.0], set()).saved_step is None


def test_patience_counts_evaluations_in_a_row() -> None:
    best = watch([3.0, 4.0, 2.0, 2.0, 5.0], set())
    assert best.without_better == 2
    assert best.stops
    assert not watch([3.0, 4.0, 2.0, 2.0], set()).stops
    best.patience = None
    assert not best.stops


def test_the_state_survives_a_resume_and_another_metrics_is_no_use() -> None:
    best = watch([3.0, 1.0, 2.0], {2})
    again = BestModel("eval_loss", False, 5)
    again.load_state_dict(best.state_dict())
    assert again == BestModel("eval_loss", False, 5, 1.0, 2, 1.0, 2, 1)
    again.forget_saved()
    again.update(4, {"eval_loss": 3.0}, True)
    assert (again.value, again.step) == (1.0, 2), "still the one to beat"
    assert (again.saved_value, again.saved_step) == (3.0, 4)
    other = BestModel("eval_accuracy", True, 5)
    other.load_state_dict(best.state_dict())
    assert other == BestModel("eval_accuracy", True, 5)


def test_metrics_that_say_nothing_are_refused() -> None:
    best = BestModel("eval_los", False, None)
    with pytest.raises(ValueError, match=r"eval_los is not measured; there are eval_loss"):
        best.update(1, {"eval_loss": 1.0}, False)
    with pytest.raises(ValueError, match=r"eval_los is nan at step 1"):
        best.update(1, {"eval_los": float("nan")}, False)


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (2, None, [30, 40]), (2, 10, [10, 40]), (2, 40, [30, 40]), (1, 40, [40]),
        (1, 20, [20, 40]), (3, 10, [10, 30, 40]), (3, 50, [20, 30, 40]), (9, 10, [10, 20, 30, 40]),
    ],
)  # fmt: skip
def test_the_best_checkpoint_is_spared(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    best: int | None,
    kept: list[int],
) -> None:
    folders = [tmp_path / f"checkpoint-{step}" for step in (10, 20, 30, 40)]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setattr(run_directory, "complete_checkpoints", lambda directory: folders)
    spared = None if best is None else tmp_path / f"checkpoint-{best}"
    prune_checkpoints(tmp_path, limit, spared=spared)
    assert sorted(int(path.name[11:]) for path in tmp_path.iterdir()) == kept
