"""The results files that transformers' Trainer leaves in output_dir. Rank 0 only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sdar.regular_files import read_json
from megatron_sdar.training.output_files import replace_json

TRAIN_RESULTS_NAME = "train_results.json"
EVAL_RESULTS_NAME = "eval_results.json"
ALL_RESULTS_NAME = "all_results.json"


def write_results(output_dir: Path, name: str, results: Mapping[str, Any]) -> None:
    """Write a results file and put its values into all_results.json, too."""
    replace_json(output_dir / name, results)
    everything = output_dir / ALL_RESULTS_NAME
    known = read_json(everything) if everything.exists() else {}
    if not isinstance(known, dict):
        raise ValueError(f"{everything}: not an object of results; move it away and start again")
    replace_json(everything, known | dict(results))


def train_results(
    *,
    epoch: float,
    train_loss: float,
    seconds: float,
    rows: float,
    steps: int,
    flops: int,
    effective_tokens: float | None,
) -> dict[str, float]:
    """What train_results.json says, of the steps that this start of the run trained.

    Args:
        train_loss: mean over these steps.
        seconds: that they took, evaluations and saves between them included.
        rows: packed rows (of cutoff_len document tokens) that they took.
        flops: model FLOPs.
        effective_tokens: tokens of these rows, pads included, per process; None: not asked for.
    """
    results = {
        "epoch": epoch,
        "total_flos": float(flops),
        "train_loss": train_loss,
        "train_runtime": round(seconds, 4),
        "train_samples_per_second": round(rows / seconds, 3),
        "train_steps_per_second": round(steps / seconds, 3),
    }
    if effective_tokens is not None:
        results["effective_tokens_per_sec"] = effective_tokens / seconds
    return results
