"""trainer_state.json: transformers' TrainerState, of a run and of each of its checkpoints.

What our own resume needs lies where transformers keeps the states of callbacks, so whoever reads
its file (`TrainerState.load_from_json`, log_history) reads ours, too. Invariant: log_history is
trainer_log.jsonl up to the step of the state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_sdar.config import SdarConfig
from megatron_sdar.data.loading.loader import RowLoader
from megatron_sdar.training.best_model import BestModel
from megatron_sdar.training.metrics import LOG_NAME, replace_log
from megatron_sdar.training.plan import StepPlan
from megatron_sdar.training.plot import read_log

TRAINER_STATE_NAME = "trainer_state.json"
_OWN_STATE = "megatron_sdar"
_LOGGED = {"loss": "loss", "grad_norm": "grad_norm", "lr": "learning_rate", "epoch": "epoch"}


def trainer_state(
    config: SdarConfig,
    plan: StepPlan,
    loader: RowLoader,
    best: BestModel,
    done: int,
    flops: int,
    own_state: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The state after `done` steps (rank 0).

    Args:
        flops: model FLOPs of all these steps.
        own_state: what `own_state_of` is to give back; None: nothing resumes from this.

    Raises:
        ValueError, OSError: the log cannot be read.
    """
    training = config.training
    output_dir = Path(training.output_dir)
    best_path = None
    if best.saved_step is not None:
        best_path = str(output_dir / f"checkpoint-{best.saved_step}")
    return {
        "best_global_step": best.step,
        "best_metric": best.value,
        "best_model_checkpoint": best_path,
        "epoch": loader.epoch,
        "eval_steps": plan.eval_every,
        "global_step": done,
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": [
            _history(record) for record in _records(output_dir / LOG_NAME) if record["step"] <= done
        ],
        "logging_steps": plan.log_every,
        "max_steps": plan.total,
        # Document tokens, pads of packed rows included: what transformers calls input.
        "num_input_tokens_seen": round(loader.epoch * loader.num_rows * config.data.cutoff_len),
        "num_train_epochs": training.num_train_epochs,
        "save_steps": plan.save_every,
        "stateful_callbacks": {} if own_state is None else {_OWN_STATE: dict(own_state)},
        "total_flos": float(flops),
        "train_batch_size": training.per_device_train_batch_size,
        "trial_name": None,
        "trial_params": None,
    }


@contextmanager
def state_of(path: Path) -> Iterator[None]:
    """Around the use of a file's state of a run, whose keys and types nobody has checked before.

    Raises:
        ValueError: names the file, when it is not what a run writes.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(
            f"{path}: not the state of a run ({type(error).__name__}: {error}); use another one"
        ) from error


def own_state_of(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a checkpoint's run needs to go on; of one converted from a model directory, nothing.

    Checkpoints from before this file had transformers' form hold it at the top.
    """
    own: Mapping[str, Any] = state.get("stateful_callbacks", {}).get(_OWN_STATE, state)
    return own


def restore_log(path: Path, state: Mapping[str, Any]) -> None:
    """Give a run's log the lines that its checkpoint knows of and the file has not (rank 0).

    They are missing when a run goes on from a checkpoint of another directory, or when a host
    failed that had not written them to disk. What comes back is what trainer_state.json keeps.

    Args:
        path: trainer_log.jsonl; need not exist.
        state: the checkpoint's trainer_state.json.

    Raises:
        ValueError, OSError: the log is damaged, or cannot be written.
    """
    records = _records(path)
    known = {_kind(record): record for record in records}
    history = [_log_record(entry) for entry in state.get("log_history", ())]
    if all(_kind(record) in known for record in history):
        return
    whole = [known.pop(_kind(record), record) for record in history]
    later = [record for record in records if _kind(record) in known]
    replace_log(path, [*whole, *later])


def _records(path: Path) -> list[dict[str, float]]:
    return read_log(path) if path.exists() else []  # somebody may have moved it away


def _kind(record: Mapping[str, Any]) -> tuple[int, bool]:
    """What there is one line of: the training or the evaluation of a step."""
    return record["step"], "lr" in record


def _log_record(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `_history`, with what both keep."""
    renamed = {theirs: ours for ours, theirs in _LOGGED.items()}
    named = {renamed.get(name, name): value for name, value in entry.items() if name != "step"}
    return {"step": entry["step"], **named}


def _history(record: Mapping[str, Any]) -> dict[str, Any]:
    if "lr" not in record:
        kept = {name: value for name, value in record.items() if name.startswith("eval_")}
        return {"epoch": record["epoch"], "step": record["step"], **kept}
    named = {theirs: record[ours] for ours, theirs in _LOGGED.items() if ours in record}
    return {**named, "step": record["step"]}
