"""The record of a skipped step, and from which weights it can be run again.

A skipped step leaves the weights alone, so a checkpoint behind it is as good as one before it, as
long as every step between was skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sdar.checkpoint.hf_assets import read_json_object
from megatron_sdar.checkpoint.run_directory import STATE_NAME, complete_checkpoints, read_marker
from megatron_sdar.training.trainer_state import own_state_of, state_of


@dataclass(frozen=True)
class StepRecord:
    """What nonfinite.SkippedSteps wrote about a step.

    Attributes:
        path: the file.
        step: counted from 1.
        skipped_before: earlier steps that were skipped.
        loss, grad_norm: as said then, numbers or words.
        label_tokens: of the step, over all data-parallel ranks.
        rows_per_micro_batch, data_parallel_size: of the run.
        micro_batches: in the order of the stream, with their documents.
        loader: the state of the loader before the step.
    """

    path: Path
    step: int
    skipped_before: Sequence[int]
    loss: float | str
    grad_norm: float | str
    label_tokens: int
    rows_per_micro_batch: int
    data_parallel_size: int
    micro_batches: Sequence[Mapping[str, Any]]
    loader: Mapping[str, Any]

    @property
    def output_dir(self) -> Path:
        """Of the run."""
        return self.path.parent.parent


@dataclass(frozen=True)
class ReplayStart:
    """Where the weights come from.

    Attributes:
        checkpoint: None: what the run started from.
        step: of the checkpoint; 0 without one.
        is_exact: whether they are those that the step had.
    """

    checkpoint: Path | None
    step: int
    is_exact: bool

    def describe(self, number: int) -> str:
        """A line for the user about the weights of step `number`."""
        what = "the run's first weights" if self.checkpoint is None else str(self.checkpoint)
        between = number - 1 - self.step
        if self.is_exact:
            return f"weights: {what}, exactly those of step {number}"
        return (
            f"weights: {what}, {between} step{'s' * (between > 1)} before those of step {number}; "
            "--train-from-checkpoint runs what lies between"
        )


def read_record(path: Path) -> StepRecord:
    """Read OUTPUT_DIR/skipped_steps/step-N.json.

    Raises:
        ValueError: it cannot be read, or is no such record.
    """
    if not path.is_file():
        raise ValueError(
            f"{path}: there is no such file; give OUTPUT_DIR/skipped_steps/step-N.json"
        )
    content = read_json_object(path)
    names = [name for name in StepRecord.__dataclass_fields__ if name != "path"]
    missing = [name for name in names if name not in content]
    if missing:
        raise ValueError(
            f"{path}: not the record of a skipped step: it has no {', '.join(missing)}; give "
            "OUTPUT_DIR/skipped_steps/step-N.json"
        )
    wrong = [name for name in names if not _KINDS[name](content[name])]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{path}: not the record of a skipped step: {name} is {str(content[name])[:80]!r}; "
            "give OUTPUT_DIR/skipped_steps/step-N.json as the run wrote it"
        )
    return StepRecord(path=path, **{name: content[name] for name in names})


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**63


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is list and all(type(each) is kind for each in value)


_KINDS: Mapping[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "skipped_before": _is_list_of(int),
    "loss": lambda value: type(value) in (int, float, str),
    "grad_norm": lambda value: type(value) in (int, float, str),
    "label_tokens": lambda value: type(value) is int,
    "rows_per_micro_batch": _is_count,
    "data_parallel_size": _is_count,
    "micro_batches": lambda value: bool(value) and _is_list_of(dict)(value),
    "loader": lambda value: type(value) is dict,
}


def find_start(record: StepRecord) -> ReplayStart:
    """The best weights for a replay: exact ones, else the newest checkpoint before the step."""
    number = record.step
    before = ReplayStart(None, 0, _all_in(range(1, number), record.skipped_before))
    found = []
    for path in complete_checkpoints(record.output_dir):
        step = read_marker(path).step
        if step >= number:
            with state_of(path / STATE_NAME):
                own = own_state_of(read_json_object(path / STATE_NAME))
                skipped = own.get("skipped", {}).get("steps", ())
            if _all_in(range(number, step + 1), skipped):
                found.append(ReplayStart(path, step, True))
        else:
            exact = _all_in(range(step + 1, number), record.skipped_before)
            found.append(ReplayStart(path, step, exact))
    exact_ones = [start for start in found if start.is_exact]
    if exact_ones:
        return exact_ones[-1]
    if before.is_exact:
        return before
    return max([before, *found], key=lambda start: start.step)


def _all_in(steps: range, skipped: Sequence[int]) -> bool:
    known = set(skipped)
    return all(step in known for step in steps)  # stops early: a record may claim step 2**62
