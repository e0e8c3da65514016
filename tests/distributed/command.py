"""Running the entry script as a user does, through torchrun, and reading what it says."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from distributed.forks import run_forked

ROOT = Path(__file__).resolve().parents[2]
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of a test's own world


def run_python(arguments: Sequence[str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run this interpreter with one thread per process, the project importable."""
    paths = [str(ROOT), str(ROOT / "kernels")]
    environment = {
        **{name: value for name, value in os.environ.items() if name not in LAUNCHED},
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
    }
    return run_forked(arguments, cwd, environment, 900)


def train(
    num_processes: int, arguments: Sequence[str], cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """torchrun --nproc_per_node N pretrain_sdar.py ARGUMENTS."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    script = [str(num_processes), str(ROOT / "pretrain_sdar.py")]
    return run_python([*launcher, *script, *arguments], cwd)


def error_lines(stderr: str) -> list[str]:
    """Our own messages: lines that begin with `error:` or `rank N: error:`."""
    return [line for line in stderr.splitlines() if re.match(r"(rank \d+: )?error: ", line)]


def exit_codes(stderr: str) -> set[int]:
    """Exit codes torchrun lists for the failed ranks."""
    return {int(code) for code in re.findall(r"exitcode\s*:\s*(-?\d+)", stderr)}
