"""One rank of a layout under measurement: a process that runs a step whenever it is told to.

Started by step_parallel with torchrun's environment variables. Each line on stdin asks for one
optimizer step and is answered by one JSON line with the rank's clocks; the end of stdin ends the
process. Between steps a rank waits in a read, so it takes no time from others.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from megatron_sdar.benchmark.step_clock import time_step
from megatron_sdar.benchmark.step_data import load_documents
from megatron_sdar.benchmark.step_options import StepOptions
from megatron_sdar.benchmark.step_own import Layout, make_own_step
from megatron_sdar.diffusion.rows import Row
from megatron_sdar.parallel.host_memory import keep_freed_memory
from megatron_sdar.parallel.mesh import (
    read_launch_info,
    start_process_group,
    stop_process_group,
)

_TIMEOUT_SECONDS = 600


def main(options_file: Path, documents_file: Path, layout_json: str, group: int) -> None:
    """Serve steps until stdin ends, as a rank of one of the layout's groups."""
    torch.set_num_threads(1)
    keep_freed_memory()
    options = StepOptions.from_json(json.loads(options_file.read_text(encoding="utf-8")))
    layout = Layout(**json.loads(layout_json))
    rows = options.shape(options.lengths[0]).kept_rows(load_documents(documents_file))
    start_process_group(read_launch_info(), "cpu", "gloo", _TIMEOUT_SECONDS)
    _serve(options, layout, rows[group :: layout.apart])
    stop_process_group()


def _serve(options: StepOptions, layout: Layout, rows: list[Row]) -> None:
    step = make_own_step(
        options.arch,
        options.optim,
        options.seed,
        trimmed=True,
        layout=layout,
        fused_kernels=options.fused_kernels,
        attention_backend=options.attention_backend,
    )
    mine = rows[step.mesh.dp_rank :: layout.dp]
    for _ in sys.stdin:
        taken = time_step(lambda: step.run(mine, options.optim.learning_rate).loss)
        answer = {"seconds": taken.seconds, "cpu_seconds": taken.cpu_seconds, "loss": taken.loss}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
