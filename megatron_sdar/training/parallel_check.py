"""check_parallel: does this layout compute what one process computes? Asked before a long run.

The run's own stages, with the weights that it starts from, make one backward of few micro-batches
of the first step; a child process of rank 0 makes the same without parallelism. Invariant:
nothing is left behind, so the run's numbers are those without the check, bit for bit.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_sdar.config import SdarConfig, dump_resolved
from megatron_sdar.data.loading.loader import RowLoader
from megatron_sdar.diffusion.rows import Row
from megatron_sdar.parallel.launch import run_on_main
from megatron_sdar.parallel.mesh import ParallelMesh, environment_of_one_process
from megatron_sdar.training.precision import precision
from megatron_sdar.training.preparation import Parts
from megatron_sdar.training.step_numbers import (
    TOLERANCES,
    StepNumbers,
    differences,
    format_differences,
    step_numbers,
)

_SHOWN = 8


def check_parallel(
    config: SdarConfig,
    mesh: ParallelMesh,
    parts: Parts,
    checkpoint: Path | None,
    say: Callable[[str], None],
) -> None:
    """Compare this layout with one process; does nothing when the key is off.

    Args:
        parts: of the run, filled with the weights that it starts from; no step was run yet.
        checkpoint: where these weights come from; None: they are the run's first ones.

    Raises:
        ValueError: on every rank, when they differ, or the one process failed.

    Collectives: those of a step, broadcast_object_list (world) for as long as the one process
    takes.
    """
    if not config.guards.check_parallel:
        return
    started = time.monotonic()
    count = min(config.training.gradient_accumulation_steps, max(2, mesh.pp_size))
    rows = _first_rows(parts.loader, count)
    parts.step.zero_grad()
    loss, _ = parts.step.backward(rows)
    found = step_numbers(parts.step, loss, mesh)
    parts.step.optimizer.zero_grad()
    say(
        f"check_parallel: {count} micro-batches on each of {mesh.dp_size} data-parallel ranks; one "
        "process now computes the same"
    )
    text = run_on_main(lambda: _compare(found, count, config, mesh.dp_size, checkpoint), mesh)
    say(f"{text}\ncheck_parallel: passed in {time.monotonic() - started:.0f} s")


def _first_rows(loader: RowLoader, count: int) -> Sequence[Row]:
    """This rank's first micro-batches of the stream; the loader stays where it is."""
    state = loader.state_dict()
    rows = loader.step_at(0)[:count]
    loader.load_state_dict(state)
    return rows


def _compare(
    found: StepNumbers, count: int, config: SdarConfig, dp_size: int, checkpoint: Path | None
) -> str:
    """Run the one process (on rank 0); the table, if it agrees.

    Raises:
        ValueError: it does not, or failed.
    """
    expected = _run_one_process(one_process(config, count * dp_size), dp_size, checkpoint)
    if not (math.isfinite(expected.loss) and math.isfinite(expected.grad_norm)):
        raise ValueError(
            f"check_parallel: one process has loss {expected.loss}, gradient norm "
            f"{expected.grad_norm}: with these weights nothing can be compared; check the model "
            "and the data, or set check_parallel: false"
        )
    dtype = precision(config).compute
    tolerance = TOLERANCES[dtype]
    rows, unmatched = differences(found, expected, tolerance)
    totals = [row for row in rows if row.name in ("loss", "gradient norm")]
    names = [row for row in rows if row not in totals]
    table = format_differences([*totals, *names[:_SHOWN]])
    about = (
        f"loss, gradient norm and the gradient norms of {len(names)} parameters, of which the "
        f"worst {min(_SHOWN, len(names))} are shown (tolerance {tolerance:g}, "
        f"{str(dtype).removeprefix('torch.')})"
    )
    wrong = [row.name for row in rows if row.excess > 1]
    if not (wrong or unmatched):
        return f"{about}:\n{table}"
    lines = [
        f"check_parallel: this layout does not compute what one process computes: {about}:",
        table,
    ]
    if wrong:
        lines.append(f"beyond the tolerance, worst first: {', '.join(wrong[:_SHOWN])}")
    if unmatched:
        lines.append(f"only one of the two trains: {', '.join(unmatched[:_SHOWN])}")
    lines.append(
        "nothing was trained; use another layout, and report this one with its configuration "
        "(check_parallel: false trains nevertheless)"
    )
    raise ValueError("\n".join(lines))


def one_process(config: SdarConfig, num_micro_batches: int) -> SdarConfig:
    """The configuration of one process that takes these micro-batches in its first step."""
    parallel = replace(
        config.parallel,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=1,
        num_layers_per_pipeline_stage=None,
    )
    training = replace(config.training, gradient_accumulation_steps=num_micro_batches)
    if config.guards.check_parallel_device == "cpu":
        training = replace(training, device="cpu")
        parallel = replace(parallel, ddp_backend=None)
    return replace(
        config,
        parallel=parallel,
        training=training,
        # What the run has just made is read, not made again.
        data=replace(config.data, overwrite_cache=False, dataloader_num_workers=0),
        guards=replace(config.guards, check_parallel=False),
    )


def _run_one_process(config: SdarConfig, dp_size: int, checkpoint: Path | None) -> StepNumbers:
    with tempfile.TemporaryDirectory() as folder:
        settings, result = Path(folder, "config.yaml"), Path(folder, "numbers.json")
        dump_resolved(config, settings)
        command = [sys.executable, "-m", "megatron_sdar.training.reference_step"]
        arguments = [str(settings), str(result), str(dp_size)]
        if checkpoint is not None:
            arguments.append(str(checkpoint))
        done = subprocess.run(
            [*command, *arguments],
            env=environment_of_one_process(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["it said nothing"]
            raise ValueError(
                f"check_parallel: the one process ended with {done.returncode}: {said[-1]}; if it "
                "needs more memory than is left (whole model and gradients), set "
                "check_parallel_device: cpu, or check_parallel: false"
            )
        return StepNumbers(**json.loads(result.read_text(encoding="utf-8")))
