"""Running the entry script as a user does, through torchrun, and reading what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_python(arguments: Sequence[str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run this interpreter with one thread per process, the project importable."""
    paths = [str(ROOT), str(ROOT / "kernels")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        text=True,
        capture_output=True,
        timeout=900,
        check=False,
    )


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
