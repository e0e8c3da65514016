"""The loss plot: raw values and their running mean, from trainer_log.jsonl."""

from __future__ import annotations

import json
import math
from pathlib import Path

from megatron_sdar.regular_files import check_regular
from megatron_sdar.training.output_files import written

_LINE_BYTES = 64 * 2**20  # of eval_samples.jsonl, whose records hold whole documents


def smooth(values: list[float]) -> list[float]:
    """Exponential moving average whose memory grows with the length of the run.

    Weight of the past: 1.8 (sigmoid(n / 20) - 0.5), LLaMA-Factory's choice, so that its users
    see the curve they know.
    """
    keep = 1.8 * (1 / (1 + math.exp(-0.05 * len(values))) - 0.5)
    smoothed: list[float] = []
    for value in values:
        smoothed.append(keep * smoothed[-1] + (1 - keep) * value if smoothed else value)
    return smoothed


def read_log(path: Path) -> list[dict[str, float]]:
    """The records of a trainer_log.jsonl.

    A last line without its newline was being written when a run was killed and is left out.

    Raises:
        ValueError: another line is not a record of a step.
    """
    records = []
    check_regular(path)
    with path.open("rb") as lines:
        # Bounded, since a file that lost its newlines would be one line.
        for number, line in enumerate(iter(lambda: lines.readline(_LINE_BYTES), b""), start=1):
            if not line.endswith(b"\n") and len(line) < _LINE_BYTES:
                break
            try:
                record = json.loads(line.decode("utf-8"))
                if type(record) is not dict or type(record.get("step")) is not int:
                    raise ValueError("it is no object with a step")
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}:{number}: not a log record ({error}); move the file away to go on"
                ) from error
            records.append(record)
    return records


def plot_loss(log_path: Path, image_path: Path) -> bool:
    """Write the loss curve as PNG; False when there is nothing to plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_log(log_path)
    steps, losses = _curve(records, "loss")
    if not steps:
        return False
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, label="each logged step")
    axes.plot(steps, smooth(losses), color="tab:blue", label="running mean")
    evaluated = _curve(records, "eval_loss")
    if evaluated[0]:
        axes.plot(*evaluated, color="tab:orange", marker="o", label="evaluation (bound)")
    axes.set(xlabel="step", ylabel="loss (CE / p per label token)", title="Training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    with written(image_path):
        figure.savefig(image_path, dpi=120)
    pyplot.close(figure)
    return True


def _curve(records: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the records that have this metric."""
    having = [record for record in records if name in record]
    return [record["step"] for record in having], [record[name] for record in having]
