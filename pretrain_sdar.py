"""Train SDAR: `torchrun --nproc_per_node N pretrain_sdar.py CONFIG.yaml [key=value ...]`.

Parses the configuration, builds the mesh and runs; there is no logic here. Plain `python`
starts a world of one. Every error of the user ends in one message and exit code 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megatron_sdar.config import describe_keys, load_config, validate
from megatron_sdar.config_batch import with_global_batch
from megatron_sdar.parallel.devices import check_launch, device_type
from megatron_sdar.parallel.host_memory import keep_freed_memory
from megatron_sdar.parallel.launch import leave_alone, leave_together
from megatron_sdar.parallel.mesh import (
    build_mesh,
    read_launch_info,
    start_process_group,
    stop_process_group,
)
from megatron_sdar.parallel.watchdog import StalledError
from megatron_sdar.training.run import TrainingRun
from megatron_sdar.training.setup import check_schedule, resolve_architecture

USAGE = """\
usage: torchrun --nproc_per_node N pretrain_sdar.py CONFIG.yaml [key=value ...]
       python pretrain_sdar.py CONFIG.yaml [key=value ...]          (one process)

Trains an SDAR block-diffusion language model on N = tp x pp x dp processes. CONFIG.yaml is a
flat YAML file of the keys below; key=value behind it replaces single keys (--key=value does too,
and --key means key=true). For example:

  torchrun --nproc_per_node 4 pretrain_sdar.py configs/tiny_cpu.yaml max_steps=100
  torchrun --nproc_per_node 8 pretrain_sdar.py my.yaml tensor_model_parallel_size=4

"""


def main(argv: Sequence[str]) -> None:
    """Run the job described by argv."""
    launch = read_launch_info()
    if not argv or argv[0] in ("-h", "--help"):
        if launch.rank == 0:
            print(USAGE + describe_keys())
        return
    try:
        config = load_config(argv, allow_unknown=_allows_extra_arguments())
        arch = resolve_architecture(config)
        validate(config, arch, launch.world_size)
        config = with_global_batch(config, launch.world_size)
        check_schedule(config)
        device_name = device_type(config.training.device)
        check_launch(launch, device_name, config.parallel.ddp_backend)
    except (ValueError, OSError) as error:
        leave_together(str(error), launch)
    if launch.rank == 0:
        for warning in config.warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    parallel = config.parallel
    if device_name == "cpu":
        keep_freed_memory()
    try:
        device = start_process_group(
            launch, device_name, parallel.ddp_backend, parallel.ddp_timeout
        )
    except RuntimeError as error:
        leave_alone(f"the processes do not find each other: {error}", launch)
    try:
        mesh = build_mesh(
            device,
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.data_parallel_sharding_strategy == "no_shard",
        )
        TrainingRun(config, arch, mesh).run()
    except (ValueError, OSError, FloatingPointError) as error:
        leave_together(str(error), launch)
    except StalledError as error:
        leave_alone(str(error), launch)
    del mesh
    stop_process_group()


def _allows_extra_arguments() -> bool:
    """LLaMA-Factory's switch: unknown keys are warned of instead of refused."""
    return os.environ.get("ALLOW_EXTRA_ARGS", "").lower() in ("1", "y", "true")


if __name__ == "__main__":
    main(sys.argv[1:])
