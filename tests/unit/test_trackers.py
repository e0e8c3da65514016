"""Trackers: tensorboard read back from its files, the others by what their libraries are told."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sdar.config import ReportingConfig
from megatron_sdar.training import trackers
from megatron_sdar.training.metrics import Reporter
from megatron_sdar.training.trackers import open_trackers, wanted_trackers

SETTINGS = {"learning_rate": 1e-3, "report_to": ("wandb",), "eval_steps": None} | {
    f"key{number}": number for number in range(150)
}


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def begin(output: Path, name: str, start: int = 0, **reporting: Any) -> trackers.Trackers:
    said: list[str] = []
    opened = open_trackers(
        ReportingConfig(report_to=(name,), **reporting), output, SETTINGS, start, said.append
    )
    assert said == [f"report_to: {name}"]
    return opened


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path: Path) -> None:
    run = begin(tmp_path, "tensorboard")
    for step in (1, 2, 3):
        run.log(step, {"train/loss": 4.0 - step, "eval/loss": 1.0})
    run.close()
    again = begin(tmp_path, "tensorboard", start=2)
    again.log(3, {"train/loss": 7.0})
    again.close()
    assert scalars(tmp_path / "runs", "train/loss") == [(1, 3.0), (2, 2.0), (3, 7.0)]
    elsewhere = begin(tmp_path, "tensorboard", logging_dir=str(tmp_path / "tb"))
    elsewhere.log(1, {"a": 1.0})
    elsewhere.close()
    assert scalars(tmp_path / "tb", "a") == [(1, 1.0)]


class Library:
    """Stands for wandb, swanlab and mlflow: keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.info = SimpleNamespace(run_id="run-1")

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Library:
            self.calls.append((name, kwargs | ({"value": args[0]} if args else {})))
            return self

        return call

    def told(self, name: str) -> list[dict[str, Any]]:
        return [arguments for called, arguments in self.calls if called == name]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library()
    for name in ("wandb", "swanlab", "mlflow"):
        monkeypatch.setitem(sys.modules, name, found)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "missing" else True)
    return found


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_resumed_run_goes_on_under_its_id(tmp_path: Path, library: Library, name: str) -> None:
    run = begin(tmp_path, name, run_name="mine", project_name="sdar")
    run.log(5, {"train/loss": 2.0})
    run.close()
    begin(tmp_path, name, start=5).close()
    first, second = library.told("init")
    assert first["project"] == "sdar"
    assert first["name" if name == "wandb" else "experiment_name"] == "mine"
    assert first["config"]["learning_rate"] == 1e-3
    assert first["config"]["eval_steps"] == "None"
    assert first["resume"] == second["resume"] == "allow"
    assert first["id"] == second["id"]
    assert second["name" if name == "wandb" else "experiment_name"] == tmp_path.name
    assert library.told("log") == [{"value": {"train/loss": 2.0}, "step": 5}]
    assert len(library.told("finish")) == 2
    begin(tmp_path, name).close()
    assert library.told("init")[2]["id"] != first["id"], "a fresh run is another one"


def test_mlflow(tmp_path: Path, library: Library) -> None:
    run = begin(tmp_path, "mlflow", project_name="sdar")
    run.log(5, {"train/loss": 2.0})
    run.close()
    begin(tmp_path, "mlflow", start=5).close()
    assert library.told("set_experiment") == [{"value": "sdar"}]
    assert [call["run_id"] for call in library.told("start_run")] == [None, "run-1"]
    parts = [call["value"] for call in library.told("log_params")]
    assert [len(part) for part in parts] == [100, 53], "mlflow takes 100 at once"
    assert library.told("log_metrics") == [{"value": {"train/loss": 2.0}, "step": 5}]
    assert [call["value"] for call in library.told("end_run")] == ["FINISHED"] * 2


@pytest.mark.parametrize(
    ("name", "call", "expected"),
    [
        ("wandb", "finish", {"exit_code": 1}),
        ("swanlab", "finish", {"state": "crashed", "error": "see the output of the run"}),
        ("mlflow", "end_run", {"value": "FAILED"}),
    ],
)
def test_a_run_that_ends_by_an_error_ends_as_failed(
    tmp_path: Path, library: Library, name: str, call: str, expected: dict[str, Any]
) -> None:
    reporter = Reporter(tmp_path, 5, 0, begin(tmp_path, name))
    with pytest.raises(FloatingPointError), reporter:
        raise FloatingPointError("loss nan")
    assert library.told(call) == [expected]


def test_a_tracker_that_fails_is_told_of_once_and_harms_nobody() -> None:
    class Broken:
        def log(self, step: int, metrics: trackers.Metrics) -> None:
            raise ConnectionError("no network")

        def close(self, failed: bool) -> None:
            raise AssertionError("it is gone")

    class Sound:
        def __init__(self) -> None:
            self.steps: list[int] = []

        def log(self, step: int, metrics: trackers.Metrics) -> None:
            self.steps.append(step)

        def close(self, failed: bool) -> None:
            self.steps.append(-1)

    said: list[str] = []
    sound = Sound()
    both = trackers.Trackers({"wandb": Broken(), "mlflow": sound}, said.append)
    both.log(1, {})
    both.log(2, {})
    both.close()
    assert sound.steps == [1, 2, -1]
    (line,) = said
    assert line.startswith("report_to: wandb failed and gets nothing more (ConnectionError: no net")


def test_what_is_missing_or_cannot_begin_is_one_error(
    tmp_path: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wanted_trackers(("all",)) == ["tensorboard", "wandb", "swanlab", "mlflow"]
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "swanlab" else True)
    assert wanted_trackers(("all",)) == ["tensorboard", "wandb", "mlflow"]
    with pytest.raises(ValueError, match=r"swanlab is not installed; pip install 'megatron-sdar\["):
        wanted_trackers(("wandb", "swanlab"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: 1 / 0))
    with pytest.raises(ValueError, match=r"wandb cannot begin \(ZeroDivisionError: .*log in"):
        begin(tmp_path, "wandb")
