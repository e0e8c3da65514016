"""Draw what a terminal shows in the middle of a run, from its trainer_log.jsonl."""

import argparse
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_sdar.training.metrics import LOG_NAME, Reporter, StepRecord
from megatron_sdar.training.plot import read_log
from megatron_sdar.training.trackers import Trackers
from megatron_sdar.training.work_meter import WorkCounts

_WIDTH = 100


def draw_progress(run: Path, image: Path) -> None:
    """Write the view at half of the run as SVG. ValueError: the run has no log."""
    path = run / LOG_NAME
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the output_dir of a run")
    records = read_log(path)
    if not records:
        raise ValueError(f"{path} holds no logged step")
    total = records[-1]["total_steps"]
    picture = Console(record=True, width=_WIDTH, file=io.StringIO(), force_terminal=True)
    terminal = Console(width=_WIDTH, file=io.StringIO(), force_terminal=True)
    nobody, now = Trackers({}, print), 0.0
    with (
        tempfile.TemporaryDirectory() as folder,
        Reporter(Path(folder), int(total), 0, nobody, terminal, lambda: now) as reporter,
    ):
        for record in records:
            if record["step"] > total / 2:
                break
            if "loss" in record:
                now = _seconds(str(record["elapsed_time"]))
                reporter.log(_step_record(record))
        picture.print(reporter.view())
    image.parent.mkdir(parents=True, exist_ok=True)
    picture.save_svg(str(image), title="pretrain_sdar.py")


def _seconds(clock: str) -> float:
    hours, minutes, seconds = clock.split(":")
    return 3600.0 * int(hours) + 60 * int(minutes) + int(seconds)


def _step_record(line: dict[str, Any]) -> StepRecord:
    tokens = [line[f"{kind}_tokens"] for kind in ("noisy", "clean", "padding")]
    names = (
        "step", "loss", "grad_norm", "lr", "epoch", "label_tokens_per_s", "row_tokens_per_s",
        "data_wait_share", "memory_mb",
    )  # fmt: skip
    return StepRecord(
        **{name: line[name] for name in names},
        work=WorkCounts(*tokens, flops=0),
        left_out=line["left_out_tokens"],
        mfu=line.get("mfu"),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python tools/draw_progress.py demo/output --output docs/progress.svg",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="OUTPUT_DIR", help="the run")
    add("--output", type=Path, default=Path("progress.svg"), metavar="SVG",
        help="where to (default %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    try:
        draw_progress(args.run, args.output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(args.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
