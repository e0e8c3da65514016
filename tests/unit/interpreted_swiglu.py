"""The Triton form of swiglu equals the torch form, gradients included.

Run in the interpreter by test_swiglu.py.
"""

from __future__ import annotations

import pytest
import torch
from sdar_kernels.swiglu import swiglu, swiglu_gradients
from torch import Tensor

# bf16: the interpreter truncates where a GPU rounds.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def _compare(gate_up: Tensor, upstream: Tensor) -> None:
    ours, theirs = (
        [swiglu(gate_up, impl), *swiglu_gradients(upstream, gate_up, impl)]
        for impl in ("triton", "torch")
    )
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        tolerance = TOLERANCE[gate_up.dtype]
        assert torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)


def _normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values * 2).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 48), (5, 80), (67, 123), (3, 1024), (2, 2500), (0, 48)])
def test_swiglu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    tokens, width = shape
    _compare(_normal(tokens, 2 * width, dtype=dtype, seed=0), _normal(*shape, dtype=dtype, seed=1))


def test_silu_is_rounded_where_the_torch_form_stores_it() -> None:
    """fp16, which the interpreter rounds."""
    gate_up = _normal(67, 246, dtype=torch.float16, seed=0)
    expected = swiglu(gate_up)
    for actual in (
        swiglu(gate_up, "triton"),
        swiglu_gradients(gate_up[:, :123], gate_up, "triton")[1],
    ):
        assert (actual != expected).float().mean() < 1e-2


def test_columns_of_a_wider_matrix_and_an_expanded_gradient() -> None:
    gate_up = _normal(67, 200, dtype=torch.float64, seed=0)[:, 20:180]
    _compare(gate_up, _normal(67, 1, dtype=torch.float64, seed=1).expand(67, 80))


def test_large_gates_stay_finite() -> None:
    gate = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4])
    _compare(torch.cat((gate, torch.ones(7))), torch.ones(7))
