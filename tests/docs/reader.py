"""What a reader of the documentation has, and does: a checkout, a shell, the commands of a page.

Commands run in a copy of the tracked tree, so that nothing is left behind in the checkout, and with
what a reader has: the project installed in the first `python` on PATH.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)
ACTIVATE = ". .venv/bin/activate"
# What make and conftest.py add to the environment of a test run; a reader's shell lacks it.
TEST_RUN_VARIABLES = ("PYTHONPATH", "PYTHON", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")

Result = subprocess.CompletedProcess[str]


def commands_of(page: Path) -> list[str]:
    """The lines of all sh blocks, in order."""
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def run(command: str, directory: Path, timeout: int = 600) -> Result:
    return subprocess.run(
        command,
        shell=True,
        cwd=directory,
        # transformers copies model code into its cache, which is the reader's otherwise.
        env=readers_environment() | {"HF_HOME": str(directory / "demo/hf-home")},
        text=True,
        capture_output=True,
        timeout=timeout,
        check=False,
    )


def readers_environment() -> dict[str, str]:
    """This environment, with this interpreter's folder in the place of .venv/bin."""
    kept = {name: value for name, value in os.environ.items() if name not in TEST_RUN_VARIABLES}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
