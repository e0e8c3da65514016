"""linear_cross_entropy on one process, and over shards whose ranks are threads.

Its behaviour behind VocabShard is tested in test_cross_entropy.py; the Triton form is compared
with the torch form in the interpreter.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any

import pytest
import torch
from sdar_kernels import cross_entropy_rows, reference
from sdar_kernels import linear_cross_entropy as module
from sdar_kernels.cross_entropy_rows import (
    row_statistics_torch,
    scale_exponentials,
    write_gradient_torch,
)
from sdar_kernels.linear_cross_entropy import (
    Reductions,
    default_chunk_tokens,
    linear_cross_entropy,
)
from torch import Tensor
from torch.nn import functional as F
from unit.interpreted import run_interpreted

from megatron_sdar.benchmark.linear_cross_entropy import (
    LinearCrossEntropySize,
    measure_linear_cross_entropy,
)

VOCAB, HIDDEN = 37, 12


def _inputs(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """hidden, head, targets, loss weights."""
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64)
    head = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCAB, (count,), generator=generator)
    weights = torch.rand(count, generator=generator, dtype=torch.float64) * 5 + 1
    return hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), targets, weights


def _outputs(loss: Tensor, hidden: Tensor, head: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss * 3, (hidden, head))]


def _actual(inputs: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    return _outputs(linear_cross_entropy(*inputs, **options), *inputs[:2])


def _assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.shape == expected.shape
        assert (actual.double() - expected.double()).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 16])
def test_alone_it_is_the_plain_form(chunk_tokens: int | None, dtype: torch.dtype) -> None:
    inputs = _inputs(29, dtype)
    exact = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in inputs[:2])
    theirs = _outputs(reference.weighted_cross_entropy(*exact, *inputs[2:]), *exact)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-4
    _assert_close(_actual(inputs, chunk_tokens=chunk_tokens), theirs, tolerance)


def test_torchs_own_linear_cross_entropy_agrees() -> None:
    hidden, head, targets, weights = _inputs(29)
    options = torch.nn.LinearCrossEntropyOptions()
    losses = F.linear_cross_entropy(hidden, head, targets, reduction="none", options=options)
    theirs = _outputs((losses * weights).sum(), hidden, head)
    _assert_close(_actual((hidden, head, targets, weights)), theirs, 1e-12)


def test_a_cpus_tiles_of_rows_and_of_the_head_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = _inputs(29, torch.bfloat16)
    whole = _actual(inputs, chunk_tokens=16)
    monkeypatch.setattr(cross_entropy_rows, "_TILE_ELEMENTS", {"cpu": 3 * VOCAB})
    monkeypatch.setattr(module, "_HEAD_ROWS", 5)
    _assert_close(_actual(inputs, chunk_tokens=16), whole, 1e-6)


def test_the_heads_gradient_is_summed_in_fp32() -> None:
    """1000 chunks of one token: bf16 sums would lose the small addends."""
    hidden, head, targets, weights = _inputs(1000, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    theirs = _outputs(reference.weighted_cross_entropy(*exact, targets, weights), *exact)
    ours = _actual((hidden, head, targets, weights), chunk_tokens=1)
    assert (ours[2].double() - theirs[2]).norm() / theirs[2].norm() < 5e-3


@pytest.mark.parametrize("chunk_tokens", [None, 1, 16])
def test_the_heads_gradient_is_added_to_a_sum(chunk_tokens: int | None) -> None:
    hidden, head, targets, weights = _inputs(29)
    loss = reference.weighted_cross_entropy(hidden, head, targets, weights)
    expected = torch.autograd.grad(loss, (hidden, head))
    before = torch.randn(VOCAB, HIDDEN, dtype=torch.float64)
    held = before.clone()
    options: dict[str, Any] = {"chunk_tokens": chunk_tokens, "weight_grad_sum": held}
    with torch.no_grad():
        linear_cross_entropy(hidden, head, targets, weights, **options)
    assert torch.equal(held, before)
    linear_cross_entropy(hidden, head, targets, weights, **options).backward()
    assert head.grad is None
    assert hidden.grad is not None
    _assert_close([hidden.grad, held], [expected[0], before + expected[1]], 1e-12)


def test_exponentials_in_place_give_the_same_gradient() -> None:
    hidden, head, targets, weights = (x.detach() for x in _inputs(29))
    targets[:4] = torch.tensor([-1, VOCAB, VOCAB + 5, -7])  # of other shards
    logits = hidden @ head.T
    again = logits.clone()
    kept = row_statistics_torch(logits, targets, torch.float64)
    peak, normalizer, target = row_statistics_torch(again, targets, torch.float64, in_place=True)
    _assert_close([peak, normalizer, target], list(kept), 1e-15)
    overall = peak + torch.linspace(0, 30, len(peak))  # the peak of another shard
    scale = weights / normalizer
    write_gradient_torch(logits, targets, overall, scale, weights)
    scale_exponentials(again, targets, scale * (peak - overall).exp(), weights)
    _assert_close([again], [logits], 1e-13)


def test_a_summed_gradient_cannot_be_scaled_afterwards() -> None:
    hidden, head, targets, weights = _inputs(3)
    held = torch.zeros(VOCAB, HIDDEN, dtype=torch.float64)
    loss = linear_cross_entropy(hidden, head, targets, weights, weight_grad_sum=held)
    with pytest.raises(AssertionError, match="summed already"):
        (loss * 3).backward()


class _Ranks:
    """Reductions of threads that meet at a barrier; counts what each call was given."""

    def __init__(self, count: int) -> None:
        self.barrier = Barrier(count, timeout=30)
        self.parts: list[Tensor | None] = [None] * count
        self.shapes: list[tuple[int, ...]] = []

    def of(self, rank: int) -> Reductions:
        return Reductions(partial(self._reduce, rank, "amax"), partial(self._reduce, rank, "sum"))

    def _reduce(self, rank: int, how: str, part: Tensor) -> Tensor:
        self.parts[rank] = part
        self.barrier.wait()
        stacked = torch.stack([x for x in self.parts if x is not None])
        self.barrier.wait()
        if rank == 0:
            self.shapes.append((how == "sum", *part.shape))
        return stacked.amax(0) if how == "amax" else stacked.sum(0)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_shards_that_exchange_statistics_are_the_whole(num_ranks: int) -> None:
    """The last of two ranks holds padding too, the last of three nothing but padding."""
    hidden, head, targets, weights = _inputs(29)
    theirs = _outputs(
        reference.weighted_cross_entropy(hidden, head, targets, weights), hidden, head
    )
    rows = 32 if num_ranks == 2 else 20
    padded = F.pad(head.detach(), (0, 0, 0, rows * num_ranks - VOCAB), value=9.0)
    ranks = _Ranks(num_ranks)

    def shard(rank: int) -> list[Tensor]:
        return _actual(
            (
                hidden.detach().requires_grad_(),
                padded[rank * rows : (rank + 1) * rows].clone().requires_grad_(),
                targets,
                weights,
            ),
            first_token=rank * rows,
            num_valid=max(0, min(rows, VOCAB - rank * rows)),
            reductions=ranks.of(rank),
            chunk_tokens=16,
        )

    with ThreadPoolExecutor(num_ranks) as pool:
        losses, grad_hidden, grad_head = zip(*pool.map(shard, range(num_ranks)), strict=True)
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    ours = [losses[0], torch.stack(grad_hidden).sum(0), torch.cat(grad_head)[:VOCAB]]
    _assert_close(ours, theirs, 1e-12)
    assert (torch.cat(grad_head)[VOCAB:] == 0).all()
    assert ranks.shapes == [(0, 16), (1, 2, 16), (0, 13), (1, 2, 13)], "two per chunk"


def test_a_second_backward_is_refused() -> None:
    """Gradients are scaled in place: a second pass would scale them twice."""
    hidden, head, targets, weights = _inputs(5)
    loss = linear_cross_entropy(hidden, head, targets, weights)
    torch.autograd.grad(loss * 3, (hidden, head), retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(loss * 3, (hidden, head))


def test_chunks_follow_the_byte_budget() -> None:
    head = torch.empty(151_936, 512, device="meta")
    assert default_chunk_tokens(head, torch.float32) == 192
    assert default_chunk_tokens(head, torch.bfloat16) == 384
    large = torch.empty(151_936, 4096, device="meta")
    assert default_chunk_tokens(large, torch.bfloat16) == 3072
    assert default_chunk_tokens(torch.empty(16_384, 512, device="meta"), torch.float32) == 512
    assert default_chunk_tokens(torch.empty(10**6, 8, device="meta"), torch.float64) == 64


def test_an_unresolved_name_is_refused() -> None:
    with pytest.raises(AssertionError, match="unresolved fused_kernels 'auto'"):
        linear_cross_entropy(*_inputs(3), impl="auto")


def test_triton_form_in_the_interpreter() -> None:
    run_interpreted("interpreted_cross_entropy.py")


def test_the_benchmark_measures_both_forms() -> None:
    figures = measure_linear_cross_entropy(LinearCrossEntropySize(1024, 32, 20_000), rounds=1)
    assert figures.peak_mb_plain > 2 * 1024 * 20_000 * 4 / 2**20
    assert 0 < figures.memory_ratio < 1
    assert figures.time_ratio == pytest.approx(figures.seconds_chunked / figures.seconds_plain)


@pytest.mark.slow
def test_at_a_large_vocabulary_a_fifth_of_the_memory_and_no_more_time() -> None:
    figures = measure_linear_cross_entropy(rounds=2)
    assert figures.memory_ratio <= 0.2
    assert figures.time_ratio <= 1.15
