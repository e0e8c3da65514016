"""check_parallel's other side: the same rows and weights in one process without parallelism.

Run as `python -m megatron_sdar.training.reference_step CONFIG.yaml RESULT.json DP_SIZE
[CHECKPOINT]`, a world of its own beside the run that it is compared with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_sdar.checkpoint.native import load_checkpoint
from megatron_sdar.config import SdarConfig, load_config, validate
from megatron_sdar.diffusion.loss import micro_batch_scales
from megatron_sdar.parallel.devices import device_type
from megatron_sdar.parallel.mesh import (
    LaunchInfo,
    build_mesh,
    start_process_group,
    stop_process_group,
)
from megatron_sdar.training.checkpoints import adapter_origin
from megatron_sdar.training.preparation import prepare
from megatron_sdar.training.setup import resolve_architecture
from megatron_sdar.training.step_numbers import StepNumbers, step_numbers

ALONE = LaunchInfo(rank=0, local_rank=0, world_size=1)


def reference_numbers(config: SdarConfig, dp_size: int, checkpoint: Path | None) -> StepNumbers:
    """Loss and gradient norms of the first step of a configuration for one process.

    Args:
        dp_size: data-parallel ranks of the run; loss_normalization may depend on it.
        checkpoint: whose weights; None: the run's first ones.

    Raises:
        ValueError, OSError: the configuration's, the model's or the checkpoint's error.

    Starts and stops the process group.
    """
    arch = resolve_architecture(config)
    validate(config, arch, ALONE.world_size)
    parallel, chosen = config.parallel, device_type(config.training.device)
    device = start_process_group(ALONE, chosen, parallel.ddp_backend, parallel.ddp_timeout)
    mesh = build_mesh(device, 1, 1)
    parts = prepare(config, arch, mesh, checkpoint is not None, lambda line: None)
    if checkpoint is not None:
        adapter = adapter_origin(config, arch, mesh)
        load_checkpoint(checkpoint, parts.stages, None, False, adapter)
    rows = parts.loader.step_at(0)
    counts = [row.num_label_tokens for row in rows]
    normalization = config.diffusion.loss_normalization
    scales = micro_batch_scales(counts, sum(counts), normalization, dp_size)
    parts.step.zero_grad()
    numbers = step_numbers(parts.step, parts.step.backward_scaled(rows, scales), mesh)
    parts.loader.close()
    del parts, mesh
    stop_process_group()
    return numbers


def main(argv: Sequence[str]) -> int:
    """Write the numbers to RESULT.json; returns the exit code."""
    config_path, result_path, dp_size, *checkpoint = argv
    try:
        numbers = reference_numbers(
            load_config([config_path]), int(dp_size), Path(checkpoint[0]) if checkpoint else None
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    Path(result_path).write_text(json.dumps(asdict(numbers)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
