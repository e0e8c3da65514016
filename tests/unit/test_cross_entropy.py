"""Chunked vocabulary-parallel cross-entropy on one rank equals torch's, at less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sdar_kernels import reference
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_sdar.parallel.cross_entropy import VocabShard, vocab_parallel_cross_entropy

VOCAB, PADDED, HIDDEN = 37, 48, 12


@pytest.fixture
def tp(single_process: None) -> DeviceMesh:
    return init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))


def _inputs(count: int, dtype: torch.dtype, padded: int = PADDED) -> tuple[Tensor, ...]:
    """hidden, head, targets, loss weights."""
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64)
    head = torch.randn(padded, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCAB, (count,), generator=generator)
    weights = torch.rand(count, generator=generator, dtype=torch.float64) * 5 + 1
    return (
        hidden.to(dtype).requires_grad_(),
        head.to(dtype).requires_grad_(),
        targets,
        weights,
    )


def _expected(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> list[Tensor]:
    loss = reference.weighted_cross_entropy(hidden, head[:VOCAB], targets, weights)
    return [loss.detach(), *torch.autograd.grad(loss * 3, (hidden, head))]


def _actual(tp: DeviceMesh, tensors: tuple[Tensor, ...], chunk_tokens: int) -> list[Tensor]:
    hidden, head, targets, weights = tensors
    shard = VocabShard.of(tp, VOCAB, head.shape[0])
    loss = vocab_parallel_cross_entropy(hidden, head, targets, weights, shard, chunk_tokens)
    return [loss.detach(), *torch.autograd.grad(loss * 3, (hidden, head))]


@pytest.mark.parametrize("chunk_tokens", [1, 3, 29, 30, 1024])
@pytest.mark.parametrize("padded", [VOCAB, PADDED])
def test_loss_and_gradients_are_torchs_in_fp64(
    tp: DeviceMesh, chunk_tokens: int, padded: int
) -> None:
    tensors = _inputs(29, torch.float64, padded)
    for ours, theirs in zip(_actual(tp, tensors, chunk_tokens), _expected(*tensors), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() < 1e-12


def test_padding_rows_take_no_part(tp: DeviceMesh) -> None:
    hidden, head, targets, weights = _inputs(7, torch.float64)
    with torch.no_grad():
        head[VOCAB:] = 1e6
    _, _, grad_head = _actual(tp, (hidden, head, targets, weights), 4)
    assert (grad_head[VOCAB:] == 0).all()
    assert (grad_head[:VOCAB].abs().sum(dim=1) > 0).all()


def test_no_masked_token_gives_zero_loss_and_zero_gradients(tp: DeviceMesh) -> None:
    loss, grad_hidden, grad_head = _actual(tp, _inputs(0, torch.float64), 4)
    assert loss == 0
    assert grad_hidden.shape == (0, HIDDEN)
    assert grad_head.shape == (PADDED, HIDDEN)
    assert (grad_head == 0).all()


def test_large_logits_do_not_overflow(tp: DeviceMesh) -> None:
    hidden, head, targets, weights = _inputs(5, torch.float32)
    tensors = ((hidden.detach() * 1e4).requires_grad_(), head, targets, weights)
    for ours, theirs in zip(_actual(tp, tensors, 2), _expected(*tensors), strict=True):
        assert torch.isfinite(ours).all()
        assert torch.allclose(ours, theirs.to(ours.dtype), rtol=1e-5)


def test_bf16_keeps_an_fp32_loss(tp: DeviceMesh) -> None:
    tensors = _inputs(64, torch.bfloat16)
    loss, grad_hidden, grad_head = _actual(tp, tensors, 16)
    hidden, head, targets, weights = tensors
    wide = (hidden.detach().double(), head.detach().double())
    exact = _expected(*(x.requires_grad_() for x in wide), targets, weights)
    assert loss.dtype == torch.float32
    assert grad_hidden.dtype == grad_head.dtype == torch.bfloat16
    for ours, theirs in zip((loss, grad_hidden, grad_head), exact, strict=True):
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < 2e-2


class _Sizes(TorchDispatchMode):
    """Shapes of everything that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.shapes += [tuple(x.shape) for x in tree_leaves(out) if isinstance(x, Tensor)]
        return out


def test_logits_never_exist_for_more_tokens_than_a_chunk(tp: DeviceMesh) -> None:
    tensors = _inputs(400, torch.float32)
    with _Sizes() as seen:
        _actual(tp, tensors, chunk_tokens=32)
    rows = [shape[0] for shape in seen.shapes if len(shape) == 2 and shape[1] in (VOCAB, PADDED)]
    assert max(rows) == 32
    with _Sizes() as whole:
        _actual(tp, tensors, chunk_tokens=400)
    assert (400, VOCAB) in whole.shapes, "the recorder would see logits of all tokens"


def test_without_gradients_only_the_loss_is_computed(tp: DeviceMesh) -> None:
    tensors = _inputs(29, torch.float64)
    shard = VocabShard.of(tp, VOCAB, PADDED)
    with torch.no_grad(), _Sizes() as seen:
        loss = vocab_parallel_cross_entropy(*tensors, shard, 8)
    assert not loss.requires_grad
    assert abs(loss - _expected(*tensors)[0]) < 1e-12
    assert (PADDED, HIDDEN) not in seen.shapes, "no gradient of the head"
    with _Sizes() as training:
        _actual(tp, tensors, 8)
    assert (PADDED, HIDDEN) in training.shapes, "the recorder would see it"


def test_the_shard_of_one_rank_is_the_vocabulary(tp: DeviceMesh) -> None:
    shard = VocabShard.of(tp, VOCAB, PADDED)
    assert (shard.start, shard.num_valid) == (0, VOCAB)
