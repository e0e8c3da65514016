"""The choice of fused_kernels without a GPU; the self-check is proved in the interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from sdar_kernels.fused_kernels import choose_fused_kernels
from unit.interpreted import run_interpreted

SIZES = {"hidden_size": 80, "head_dim": 48, "intermediate_size": 123, "vocab_size": 5000}
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("auto", "triton needs a GPU, the device is cpu; using torch"),
        ("torch", "as configured"),
    ],
)
def test_a_cpu_runs_torch(name: str, reason: str) -> None:
    assert choose_fused_kernels(name, CPU, torch.float32, **SIZES) == ("torch", reason)


def test_triton_on_a_cpu_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"^fused_kernels: triton cannot be used here: triton needs a GPU, the device is cpu; "
        r"use fused_kernels: auto or torch$",
    ):
        choose_fused_kernels("triton", CPU, torch.float32, **SIZES)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="fused_kernels: 'cuda' is not one of auto, torch, triton"):
        choose_fused_kernels("cuda", CPU, torch.float32, **SIZES)


def test_torch_forms_work_without_triton() -> None:
    """triton is made unimportable; nothing may load it behind the dispatching branch."""
    probe = """
import sys
sys.modules["triton"] = None
import torch
from sdar_kernels.fused_kernels import choose_fused_kernels
from sdar_kernels.linear_cross_entropy import linear_cross_entropy
from sdar_kernels.rms_norm import qk_norm_rope, rms_norm, rotary_tables
from sdar_kernels.swiglu import swiglu
x = torch.ones(3, 2, 4)
rms_norm(x, x[0, 0], 1e-6)
qk_norm_rope(x, x[0, 0], 1e-6, *rotary_tables(torch.arange(3), 4, 1e4, x.dtype))
swiglu(x)
linear_cross_entropy(x[:, 0], torch.ones(5, 4), torch.arange(3), torch.ones(3))
import importlib.util
importlib.util.find_spec = lambda name: None
print(choose_fused_kernels("auto", torch.device("cuda"), torch.float32, 8, 4, 8, 8))
"""
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "('torch', 'triton is not installed" in run.stdout


def test_self_check_in_the_interpreter() -> None:
    run_interpreted("interpreted_fused_kernels.py")


def test_a_model_in_the_interpreter() -> None:
    run_interpreted("interpreted_model.py")
