"""fused_kernels: inductor. What is built runs in a process of its own: it takes threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sdar_kernels.fused_kernels import choose_fused_kernels
from unit.interpreted import run_apart

SIZES = {"hidden_size": 80, "head_dim": 48, "intermediate_size": 123, "vocab_size": 500}
WITHOUT_COMPILER = """
import torch
from sdar_kernels.fused_kernels import choose_fused_kernels
try:
    choose_fused_kernels("inductor", torch.device("cpu"), torch.float32, 80, 48, 123, 500)
except ValueError as error:
    print(error)
"""


def test_built_kernels() -> None:
    run_apart("built_inductor_kernels.py", "not backends", {"OMP_NUM_THREADS": "2"})


def test_it_is_for_cpus() -> None:
    with pytest.raises(
        ValueError,
        match=r"^fused_kernels: inductor cannot be used here: inductor is for CPUs, the device is "
        r"meta; use fused_kernels: auto or torch$",
    ):
        choose_fused_kernels("inductor", torch.device("meta"), torch.float32, **SIZES)


def test_a_machine_without_a_compiler_is_told(tmp_path: Path) -> None:
    folders = (str(tmp_path / "cache"), str(tmp_path))
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folders[0], "PATH": folders[1]}
    environment.pop("CXX", None)
    command = [sys.executable, "-c", WITHOUT_COMPILER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "fused_kernels: inductor cannot be used here: inductor failed: rms_norm: "
    )
    assert "C++ compiler" in done.stdout
    assert done.stdout.endswith("; use fused_kernels: auto or torch\n")
