"""Processes that save without end until they are killed; run as a script by test_killed_saves.

Imports once and forks a saver per line of stdin, a number of seconds after which the saver gets
SIGKILL; "first" lets it save once, undisturbed. Answers with a line per trial: how many
seconds the saver lived after it was ready. Every weight and moment of checkpoint-N is N.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # DTensor imports it when first used: a second for every fork
import torch.distributed as dist
from unit.tiny_hf import make_config, make_optimizer, make_stages

from megatron_sdar.checkpoint.run_directory import latest_checkpoint
from megatron_sdar.training.checkpoints import CheckpointWriter

LIMIT = 2


def save_until_killed(model_dir: Path, run: Path, ready: int, saves: int) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.set_num_threads(1)
    stages, arch, mesh = make_stages(model_dir)
    optimizer = make_optimizer(stages)
    config = make_config(run)
    config = replace(
        config,
        model=replace(config.model, model_name_or_path=str(model_dir)),
        training=replace(config.training, save_total_limit=LIMIT),
    )
    step: Any = SimpleNamespace(stages=stages, optimizer=optimizer, before_update=lambda: None)
    tensors = [*dict(stages[0].named_parameters()).values(), *optimizer.moments().values()]
    newest = latest_checkpoint(run)
    done = 0 if newest is None else int(newest.name.rpartition("-")[2])
    with CheckpointWriter(config, arch, mesh, step, True, (), lambda text: None) as writer:
        os.write(ready, b".")
        for _ in range(saves):
            done += 1
            step.before_update()
            for tensor in tensors:
                tensor._local_tensor.fill_(done)
            writer.save(done, {"number": done}, is_last=False)


def trial(model_dir: Path, run: Path, seconds: float | None) -> float:
    """How long the saver lived after it was ready."""
    reading, writing = os.pipe()
    saver = os.fork()
    if saver == 0:
        save_until_killed(model_dir, run, writing, 1 if seconds is None else 10**9)
        os._exit(0)
    assert os.read(reading, 1) == b"."
    started = time.monotonic()
    if seconds is not None:
        time.sleep(seconds)
        os.kill(saver, signal.SIGKILL)
    _, status = os.waitpid(saver, 0)
    lived = time.monotonic() - started
    assert status == (0 if seconds is None else signal.SIGKILL), status
    os.close(reading)
    os.close(writing)
    return lived


def main() -> None:
    model_dir, run = map(Path, sys.argv[1:])
    for line in sys.stdin:
        seconds = None if line.strip() == "first" else float(line)
        print(trial(model_dir, run, seconds), flush=True)


if __name__ == "__main__":
    main()
