"""Runs a file of tests in a process of its own, such as those with Triton's interpreter.

TRITON_INTERPRET must be set before triton is imported, and then holds for the whole process, so
such tests cannot share one with the others. Their files are called interpreted_*.py. Those of
kernels that Inductor builds, built_*.py, take threads, which no later fork could use.
"""

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def run_interpreted(name: str, marked: str = "not backends") -> None:
    """Run tests/unit/NAME in the interpreter; see `run_apart`."""
    run_apart(name, marked, {"TRITON_INTERPRET": "1"})


def run_apart(name: str, marked: str, environment: dict[str, str]) -> None:
    """Run tests/unit/NAME; its failures fail the caller, and so does a file without tests.

    Args:
        name: of the file.
        marked: which of its tests, as pytest's -m has it.
        environment: variables to set.
    """
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider",
            "-m", marked, str(_ROOT / "tests" / "unit" / name),
        ],
        cwd=_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 0, f"{run.stdout[-6000:]}\n{run.stderr[-2000:]}"
