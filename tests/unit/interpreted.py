"""Runs a file of tests with Triton's interpreter, in a process of its own.

TRITON_INTERPRET must be set before triton is imported, and then holds for the whole process, so
such tests cannot share one with the others. Their files are called interpreted_*.py.
"""

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def run_interpreted(name: str, marked: str = "not backends") -> None:
    """Run tests/unit/NAME; its failures fail the caller, and so does a file without tests.

    Args:
        name: of the file.
        marked: which of its tests, as pytest's -m has it.
    """
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider",
            "-m", marked, str(_ROOT / "tests" / "unit" / name),
        ],
        cwd=_ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 0, f"{run.stdout[-6000:]}\n{run.stderr[-2000:]}"
