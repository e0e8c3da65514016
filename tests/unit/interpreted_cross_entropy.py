"""The Triton form of linear_cross_entropy equals the torch form, gradients included.

Run in the interpreter by test_linear_cross_entropy.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sdar_kernels.cross_entropy_rows import row_statistics_torch, write_gradient_torch
from sdar_kernels.linear_cross_entropy import Reductions, linear_cross_entropy
from sdar_kernels.triton_cross_entropy import row_statistics, write_gradient
from torch import Tensor

# bf16: the interpreter truncates where a GPU rounds.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 4e-3, torch.bfloat16: 2e-2}
HIDDEN = 12


def _inputs(count: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """hidden, head, targets, loss weights."""
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64)
    head = torch.randn(vocab, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocab, (count,), generator=generator)
    return hidden.to(dtype), head.to(dtype), targets, torch.rand(count, generator=generator) + 1


def _run(inputs: tuple[Tensor, ...], impl: str, **options: Any) -> list[Tensor]:
    hidden, head = (x.detach().requires_grad_() for x in inputs[:2])
    loss = linear_cross_entropy(hidden, head, *inputs[2:], impl=impl, **options)
    return [loss.detach(), *torch.autograd.grad(loss * 3, (hidden, head))]


def _compare(inputs: tuple[Tensor, ...], **options: Any) -> None:
    ours, theirs = (_run(inputs, impl, **options) for impl in ("triton", "torch"))
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.dtype == expected.dtype
        error = (actual.double() - expected.double()).abs().max() if actual.numel() else 0.0
        tolerance = TOLERANCE[inputs[0].dtype]
        assert error <= tolerance * max(1.0, float(expected.abs().amax() if error else 0))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("vocab", [1, 37, 5003])
@pytest.mark.parametrize("count", [0, 1, 5, 29])
def test_loss_and_gradients(count: int, vocab: int, dtype: torch.dtype) -> None:
    _compare(_inputs(count, vocab, dtype), chunk_tokens=16)


@pytest.mark.parametrize("num_valid", [0, 30, 37])
@pytest.mark.parametrize("first_token", [0, 11, 50])
def test_a_shard(first_token: int, num_valid: int) -> None:
    """Statistics of other ranks stand in as constants; most targets lie outside the shard."""
    reductions = Reductions(
        maximum=lambda peak: peak.clamp_min(1.5), total=lambda sums: sums + 0.25
    )
    inputs = _inputs(29, 37, torch.float64)
    options = {"first_token": first_token, "num_valid": num_valid, "reductions": reductions}
    _compare(inputs, chunk_tokens=16, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_rows_of_a_wider_buffer(scale: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    buffer = (torch.randn(7, 4200, generator=generator, dtype=torch.float64) * scale).to(dtype)
    buffer[2, :4100] = -1e30  # a row of equal, very small logits
    targets = torch.tensor([0, 4099, -1, 4100, 4096, 7, 4200])
    ours, theirs = buffer.clone()[:, :4100], buffer.clone()[:, :4100]
    statistics = row_statistics(ours, targets, dtype)
    for actual, expected in zip(
        statistics, row_statistics_torch(theirs, targets, dtype), strict=True
    ):
        assert torch.allclose(actual, expected, rtol=TOLERANCE[dtype])
    peak, normalizer, _ = statistics
    weights = torch.rand(7, generator=generator, dtype=dtype)
    whole = ours._base
    write_gradient(ours, targets, peak, weights / normalizer, weights)
    write_gradient_torch(theirs, targets, peak, weights / normalizer, weights)
    assert (ours - theirs).abs().max() <= TOLERANCE[dtype]
    assert whole is not None
    assert torch.equal(whole[:, 4100:], buffer[:, 4100:]), "nothing beyond the row is written"


def test_a_logit_that_is_not_a_number_is_not_hidden() -> None:
    hidden, head, targets, weights = _inputs(5, 37, torch.float32)
    hidden[3] = float("nan")
    assert torch.isnan(_run((hidden, head, targets, weights), "triton")[0])
