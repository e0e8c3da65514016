"""A model with fused_kernels: triton is the same model, and every kernel takes part.

Run in the interpreter by test_fused_kernels.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed.layouts import Layout
from sdar_kernels import (
    triton_cross_entropy,
    triton_qk_norm_rope,
    triton_rms_norm,
    triton_swiglu,
)
from torch import Tensor
from unit.packings import pack, random_document

from megatron_sdar.model.options import ModelOptions
from megatron_sdar.model.partition import build_stages
from megatron_sdar.model.weights import initialize, materialize
from megatron_sdar.parallel.mesh import build_mesh
from megatron_sdar.training.batch import to_device

ARCH = replace(Layout("fused").arch, vocab_size=1003)
PADDED = 1024
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _loss_and_gradients(fused_kernels: str, recompute: str) -> list[Tensor]:
    options = ModelOptions(PADDED, torch.float64, False, recompute, "reference", fused_kernels)
    stages = build_stages(ARCH, build_mesh(CPU, 1, 1), options)
    materialize(stages, CPU)
    initialize(stages, seed=11)
    row = pack([random_document(np.random.default_rng(2), 4, 6, drop=False)], 4, 5).row
    loss = stages[0](None, to_device(row, CPU, 0.1))
    loss.backward()
    return [loss.detach(), *(weight.grad._local_tensor for weight in stages[0].parameters())]


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
    expected = _loss_and_gradients("torch", recompute)
    calls: Counter[str] = Counter()
    for owner in (triton_rms_norm, triton_qk_norm_rope, triton_swiglu):
        _count(monkeypatch, calls, owner, "_forward_kernel")
        _count(monkeypatch, calls, owner, "_backward_kernel")
    _count(monkeypatch, calls, triton_cross_entropy, "_statistics_kernel")
    _count(monkeypatch, calls, triton_cross_entropy, "_gradient_kernel")
    actual = _loss_and_gradients("triton", recompute)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-12 * max(1.0, float(theirs.abs().max()))
    layers, forwards = ARCH.num_hidden_layers, 1 if recompute == "none" else 2
    # The reference attention copies keys for every query head, so only queries come back.
    rotations = {"none": 2, "selective": 3, "full": 4}[recompute]
    assert calls == {
        "rms_norm _forward_kernel": 2 * layers * forwards + 1,
        "rms_norm _backward_kernel": 2 * layers + 1,
        "qk_norm_rope _forward_kernel": rotations * layers,
        "qk_norm_rope _backward_kernel": 2 * layers,
        "swiglu _forward_kernel": layers * forwards,
        "swiglu _backward_kernel": layers,
        "cross_entropy _statistics_kernel": 1,
        "cross_entropy _gradient_kernel": 1,
    }
