"""A model with fused_kernels: triton is the same model, and every kernel takes part.

Run in the interpreter by test_fused_kernels.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from sdar_kernels import (
    triton_cross_entropy,
    triton_qk_norm_rope,
    triton_rms_norm,
    triton_swiglu,
)
from unit.small_model import ARCH, assert_same, loss_and_gradients, one_process


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    with one_process():
        yield


def _count(
    monkeypatch: pytest.MonkeyPatch, calls: Counter[str], owner: ModuleType, name: str
) -> None:
    """Count the launches of a kernel, under its module and name."""
    kernel = getattr(owner, name)

    class Counting:
        def __getitem__(self, grid: Any) -> Any:
            calls[f"{owner.__name__.removeprefix('sdar_kernels.triton_')} {name}"] += 1
            return kernel[grid]

    monkeypatch.setattr(owner, name, Counting())


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_model_is_the_same_and_uses_every_kernel(
    monkeypatch: pytest.MonkeyPatch, recompute: str
) -> None:
    expected = loss_and_gradients("torch", recompute, "reference")
    calls: Counter[str] = Counter()
    for owner in (triton_rms_norm, triton_qk_norm_rope, triton_swiglu):
        _count(monkeypatch, calls, owner, "_forward_kernel")
        _count(monkeypatch, calls, owner, "_backward_kernel")
    _count(monkeypatch, calls, triton_cross_entropy, "_statistics_kernel")
    _count(monkeypatch, calls, triton_cross_entropy, "_gradient_kernel")
    actual = loss_and_gradients("triton", recompute, "reference")
    assert_same(actual, expected)
    layers, forwards = ARCH.num_hidden_layers, 1 if recompute == "none" else 2
    # The reference attention copies keys for every query head, so only queries come back.
    rotations = {"none": 2, "selective": 3, "full": 4}[recompute]
    assert calls == {
        "rms_norm _forward_kernel": 2 * layers * forwards + 1,
        "rms_norm _backward_kernel": 2 * layers + 1,
        "qk_norm_rope _forward_kernel": rotations * layers,
        "qk_norm_rope _backward_kernel": 2 * layers,
        # Even where whole layers are made again.
        "swiglu _forward_kernel": layers * (2 if recompute == "full" else 1),
        "swiglu _backward_kernel": layers,
        "cross_entropy _statistics_kernel": 1,
        "cross_entropy _gradient_kernel": 1,
    }
