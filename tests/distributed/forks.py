"""Processes forked from one that has imported torch and the trainer already, hence soon ready.

The one they come from is a fresh interpreter (multiprocessing's fork server), so nothing of
pytest's process, its threads or its process groups is in them.
"""

from __future__ import annotations

import atexit
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.multiprocessing as mp

PRELOADED = (
    "distributed.world",
    "megatron_sdar.training.run",
    "torch.distributed.fsdp",
    "torch.distributed.run",
)


def fork_context() -> ForkServerContext:
    """For `Process`es of functions that can be imported."""
    context: ForkServerContext = mp.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def run_forked(
    arguments: Sequence[str], cwd: Path, environment: Mapping[str, str], seconds: float
) -> subprocess.CompletedProcess[str]:
    """What `python ARGUMENTS` does, for a script or `-m module`; TimeoutExpired after so long."""
    with TemporaryDirectory() as folder:
        texts = [Path(folder) / name for name in ("stdout", "stderr")]
        process = fork_context().Process(
            target=_run_script, args=(list(arguments), str(cwd), dict(environment), texts)
        )
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(list(arguments), seconds)
        out, err = (path.read_text(errors="replace") for path in texts)
        return subprocess.CompletedProcess(list(arguments), process.exitcode or 0, out, err)


def _run_script(
    arguments: list[str], cwd: str, environment: dict[str, str], texts: Sequence[Path]
) -> None:
    for number, path in enumerate(texts, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # read before, where torch loads
    is_module = arguments[0] == "-m"
    if is_module:
        sys.modules.pop(arguments[1], None)  # as runpy wants it
    sys.argv = arguments[1:] if is_module else list(arguments)
    try:
        if is_module:
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # as an interpreter does, unlike multiprocessing's processes
        sys.stdout.flush()
        sys.stderr.flush()
