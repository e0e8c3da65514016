"""Experiment trackers: what is logged goes to each one that report_to names. Rank 0 only.

Each speaks through its own library, which is an optional extra. Training never depends on one: a
tracker that fails is told of once and left out from then on.
"""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from megatron_sdar.config import ReportingConfig
from megatron_sdar.regular_files import read_json
from megatron_sdar.training.output_files import replace_json

IDS_NAME = "trackers.json"
TRACKER_NAMES = ("tensorboard", "wandb", "swanlab", "mlflow")  # each is its library's name, too
_MLFLOW_PARAMS_AT_ONCE = 100
_MLFLOW_LONGEST = 500  # characters of a parameter that every mlflow takes

Metrics = Mapping[str, float]


class Tracker(Protocol):
    """One tracker's run."""

    def log(self, step: int, metrics: Metrics) -> None: ...

    def close(self, failed: bool) -> None: ...


class Trackers:
    """All of a run's trackers.

    Args:
        trackers: by name.
        say: told when one fails.
    """

    def __init__(self, trackers: Mapping[str, Tracker], say: Callable[[str], None]) -> None:
        self._trackers = dict(trackers)
        self._say = say

    def log(self, step: int, metrics: Metrics) -> None:
        """Pass metrics on."""
        for name in list(self._trackers):
            self._attempt(name, lambda tracker: tracker.log(step, metrics))

    def close(self, failed: bool = False) -> None:
        """Finish the runs, as failed ones if they are; what they still hold is sent."""
        for name in list(self._trackers):
            self._attempt(name, lambda tracker: tracker.close(failed))
        self._trackers.clear()

    def _attempt(self, name: str, what: Callable[[Tracker], None]) -> None:
        try:
            what(self._trackers[name])
        except Exception as error:  # whatever a foreign library raises
            del self._trackers[name]
            self._say(
                f"report_to: {name} failed and gets nothing more ({type(error).__name__}: {error});"
                " training goes on, trainer_log.jsonl has everything"
            )


def wanted_trackers(report_to: Sequence[str]) -> list[str]:
    """The trackers to open; all: those that are installed.

    Raises:
        ValueError: one that is named is not installed.
    """
    if "all" in report_to:
        return [name for name in TRACKER_NAMES if find_spec(name) is not None]
    missing = [name for name in report_to if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"report_to: {', '.join(missing)} is not installed; "
            f"pip install 'megatron-sdar[{','.join(missing)}]', or leave it out"
        )
    return list(report_to)


def open_trackers(
    reporting: ReportingConfig,
    output_dir: Path,
    settings: Mapping[str, Any],
    start_step: int,
    say: Callable[[str], None],
) -> Trackers:
    """Begin, or on a resume go on with, a run in each tracker.

    Args:
        settings: the resolved configuration, logged as hyperparameters.
        start_step: steps done; what a tracker has beyond is replaced where it can be.

    Raises:
        ValueError: see wanted_trackers, and when a tracker cannot begin.
    """
    names = wanted_trackers(reporting.report_to)
    if not names:
        return Trackers({}, say)
    ids = _run_ids(output_dir, names, fresh=start_step == 0)
    run = _Run(reporting, output_dir, settings, start_step, ids)
    opened: dict[str, Tracker] = {}
    for name in names:
        try:
            opened[name] = _OPENERS[name](run)
        except Exception as error:
            raise ValueError(
                f"report_to: {name} cannot begin ({type(error).__name__}: {error}); log in to it, "
                "set it offline, or leave it out"
            ) from error
    replace_json(output_dir / IDS_NAME, ids)
    say(f"report_to: {', '.join(names)}")
    return Trackers(opened, say)


def _run_ids(output_dir: Path, names: Sequence[str], *, fresh: bool) -> dict[str, str]:
    """A run id for each tracker, kept in output_dir so that a resumed run goes on under it."""
    path = output_dir / IDS_NAME
    ids: dict[str, str] = {}
    if path.exists() and not fresh:
        ids = read_json(path)
        if not isinstance(ids, dict) or not all(isinstance(known, str) for known in ids.values()):
            raise ValueError(f"{path}: not an object of run ids; move it away to begin new ones")
    return {name: ids.get(name, "") for name in names}


def _run_name(reporting: ReportingConfig, output_dir: Path) -> str:
    return reporting.run_name or output_dir.resolve().name


def _text_values(settings: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Hyperparameters as trackers take them."""
    return {
        name: value if isinstance(value, str | int | float | bool) else str(value)
        for name, value in settings.items()
    }


@dataclass(frozen=True)
class _Run:
    """What a tracker begins with; `ids` is filled in by those that have ids."""

    reporting: ReportingConfig
    output_dir: Path
    settings: Mapping[str, Any]
    start_step: int
    ids: dict[str, str]


class _TensorBoard:
    def __init__(self, run: _Run) -> None:
        module = importlib.import_module("torch.utils.tensorboard")
        folder = run.reporting.logging_dir or str(run.output_dir / "runs")
        # Without purge_step, what a run logged after the checkpoint would be drawn twice.
        purge = run.start_step + 1 if run.start_step else None
        self._writer = module.SummaryWriter(log_dir=folder, purge_step=purge)
        lines = [f"    {name}: {value}" for name, value in _text_values(run.settings).items()]
        self._writer.add_text("config", "\n".join(lines), run.start_step)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()  # it knows no state


class _Wandb:
    def __init__(self, run: _Run) -> None:
        # Its steps only grow: what is logged again after a resume is left out by its server.
        run.ids["wandb"] = run.ids["wandb"] or secrets.token_hex(4)
        self._run = importlib.import_module("wandb").init(
            project=run.reporting.project_name,
            name=_run_name(run.reporting, run.output_dir),
            id=run.ids["wandb"],
            resume="allow",
            dir=str(run.output_dir),
            config=_text_values(run.settings),
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _SwanLab:
    def __init__(self, run: _Run) -> None:
        run.ids["swanlab"] = run.ids["swanlab"] or secrets.token_hex(11)[:21]
        self._module = importlib.import_module("swanlab")
        self._module.init(
            project=run.reporting.project_name,
            experiment_name=_run_name(run.reporting, run.output_dir),
            id=run.ids["swanlab"],
            resume="allow",
            logdir=run.reporting.logging_dir or str(run.output_dir / "runs" / "swanlab"),
            config=_text_values(run.settings),
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self._module.log(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        if failed:
            self._module.finish(state="crashed", error="see the output of the run")
        else:
            self._module.finish()


class _Mlflow:
    def __init__(self, run: _Run) -> None:
        self._module = importlib.import_module("mlflow")
        if run.reporting.project_name is not None:
            self._module.set_experiment(run.reporting.project_name)
        known = run.ids["mlflow"]
        name = None if known else _run_name(run.reporting, run.output_dir)
        started = self._module.start_run(run_id=known or None, run_name=name)
        run.ids["mlflow"] = started.info.run_id
        if known:
            return  # parameters of a run cannot change
        values = {n: str(v)[:_MLFLOW_LONGEST] for n, v in _text_values(run.settings).items()}
        names = sorted(values)
        for first in range(0, len(names), _MLFLOW_PARAMS_AT_ONCE):
            part = names[first : first + _MLFLOW_PARAMS_AT_ONCE]
            self._module.log_params({name: values[name] for name in part})

    def log(self, step: int, metrics: Metrics) -> None:
        self._module.log_metrics(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        self._module.end_run("FAILED" if failed else "FINISHED")


_OPENERS: Mapping[str, Callable[..., Tracker]] = {
    "tensorboard": _TensorBoard, "wandb": _Wandb, "swanlab": _SwanLab, "mlflow": _Mlflow,
}  # fmt: skip
