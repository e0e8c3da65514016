"""Run a step that was skipped again, and find the micro-batch and module where numbers break."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_sdar.parallel.launch import leave_together
from megatron_sdar.parallel.mesh import read_launch_info
from megatron_sdar.training.replay_report import format_reports
from megatron_sdar.training.step_replay import ReplayRequest, replay_step

DESCRIPTION = """\
A step whose loss or gradient is not finite is skipped (max_skipped_steps) and recorded in
OUTPUT_DIR/skipped_steps/step-N.json. This tool makes the very rows of that step again, loads the
checkpoint nearest to it, and runs forward and backward of one micro-batch after the other. The
table names, for each, its documents, loss, gradient norm, and the first module whose output is
not finite though its inputs are. Nothing of the run is changed.

The weights of step N lie in a checkpoint of step N - 1, or of step N, since skipping changes
nothing. Otherwise the newest one before is taken, and the first line says how far it is away;
--train-from-checkpoint runs the steps between first (bit for bit as the run did, in its layout).
"""
EPILOG = """\
examples:
  python tools/replay_step.py my.yaml output/skipped_steps/step-512.json
  python tools/replay_step.py my.yaml output/skipped_steps/step-512.json bf16=false
  torchrun --nproc_per_node 8 tools/replay_step.py my.yaml output/skipped_steps/step-512.json \\
      --train-from-checkpoint

In one process the model is whole, whatever tensor_model_parallel_size and
pipeline_model_parallel_size say. Give key=value as for pretrain_sdar.py; batch sizes follow from
the record. Show the documents with tools/inspect_data.py.
"""


def parse_request(argv: Sequence[str] | None) -> ReplayRequest:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="replay_step.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config", metavar="CONFIG.yaml", help="the run's configuration")
    add("record", type=Path, metavar="RECORD.json", help="OUTPUT_DIR/skipped_steps/step-N.json")
    add("overrides", nargs="*", metavar="key=value", help="replaces single keys of CONFIG.yaml")
    add(
        "--train-from-checkpoint",
        action="store_true",
        help="run the steps between the checkpoint and the step first",
    )
    found = parser.parse_args(argv)
    arguments = [found.config, *found.overrides]
    return ReplayRequest(arguments, found.record, found.train_from_checkpoint)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    request, launch = parse_request(argv), read_launch_info()

    def say(text: str) -> None:
        if launch.rank == 0:
            print(text, flush=True)

    try:
        reports = replay_step(request, launch, say)
    except (ValueError, OSError) as error:
        if launch.world_size > 1:
            leave_together(str(error), launch)
        print(f"error: {error}", file=sys.stderr)
        return 1
    say(f"\n{format_reports(reports)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
