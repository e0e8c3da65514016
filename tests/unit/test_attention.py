"""Tiled attention equals the reference, forward and backward, on random packings."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sdar_kernels import reference
from sdar_kernels.attention import (
    BACKENDS,
    AttentionPlan,
    block_diffusion_attention,
    resolve_backend,
)
from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.tiled_attention import tiled_attention
from torch import Tensor
from unit.packings import pack, random_document, random_packing, rule_mask

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for tensors this small a second thread only costs
    yield
    torch.set_num_threads(threads)


def _inputs(
    seed: int, num_tokens: int, heads: tuple[int, int, int], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """q, k, v and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads, head_dim = heads
    return tuple(
        torch.randn(num_tokens, count, head_dim, generator=generator, dtype=torch.float64).to(dtype)
        for count in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    )


def _run(tensors: tuple[Tensor, ...], attention: Callable[..., Tensor]) -> list[Tensor]:
    """Output and the gradients of q, k and v."""
    *leaves, upstream = (tensor.detach().clone() for tensor in tensors)
    for leaf in leaves:
        leaf.requires_grad_()
    out = attention(*leaves)
    out.backward(upstream)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def _worst(mask: AttentionMask, tensors: tuple[Tensor, ...]) -> float:
    ours = _run(tensors, lambda q, k, v: tiled_attention(q, k, v, mask))
    theirs = _run(tensors, lambda q, k, v: reference.attention(q, k, v, mask.key_intervals))
    for left, right in zip(ours, theirs, strict=True):
        assert left.shape == right.shape
        assert left.dtype == right.dtype
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    block_length=st.sampled_from([1, 2, 3, 4, 7, 8, 16, 32, 64]),
    heads=st.sampled_from([(1, 1, 4), (4, 1, 8), (4, 2, 8), (6, 3, 2), (2, 2, 16)]),
    query_tile=st.sampled_from([3, 16, 64, 1000]),
    padding=st.integers(0, 70),
)
def test_tiled_attention_is_the_reference_in_fp64(
    seed: int, block_length: int, heads: tuple[int, int, int], query_tile: int, padding: int
) -> None:
    max_blocks = max(1, min(5, 64 // block_length))
    packing = random_packing(
        seed, block_length, max_documents=3, max_blocks=max_blocks, max_padding=padding
    )
    mask = packing.mask(query_tile)
    assert _worst(mask, _inputs(seed, mask.num_tokens, heads, torch.float64)) < 1e-12


@pytest.mark.parametrize("block_length", [1, 4, 8, 64])
@pytest.mark.parametrize("drop", [False, True])
def test_tiled_attention_is_the_reference_in_fp32(block_length: int, drop: bool) -> None:
    for seed in range(3):
        packing = random_packing(seed, block_length, max_blocks=3, drop=drop)
        mask = packing.mask()
        assert _worst(mask, _inputs(seed, mask.num_tokens, (4, 2, 16), torch.float32)) < 1e-5


def test_tiled_attention_in_bf16_is_close_to_fp32() -> None:
    packing = random_packing(2, 4, max_blocks=12, max_documents=3)
    mask = packing.mask()
    wide = _inputs(0, mask.num_tokens, (4, 2, 32), torch.float32)
    narrow = tuple(tensor.bfloat16() for tensor in wide)
    ours = _run(narrow, lambda q, k, v: tiled_attention(q, k, v, mask))
    exact = _run(
        tuple(tensor.float() for tensor in narrow),
        lambda q, k, v: reference.attention(q, k, v, mask.key_intervals),
    )
    for name, left, right in zip(("out", "dq", "dk", "dv"), ours, exact, strict=True):
        assert left.dtype == torch.bfloat16, name
        error = (left.float() - right).norm() / right.norm()
        assert error < 1e-2, f"{name}: relative error {error:.1e}"


def test_the_reference_is_softmax_attention_under_the_rule_in_words() -> None:
    packing = random_packing(11, 4)
    q, k, v, _ = _inputs(0, len(packing.tokens), (4, 2, 8), torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)),
        attn_mask=rule_mask(packing.tokens),
        enable_gqa=True,
    ).transpose(0, 1)
    out = reference.attention(q, k, v, packing.mask().key_intervals)
    assert (out - expected).abs().max() < 1e-12


def test_a_document_does_not_depend_on_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(count: int) -> list[Tensor]:
        return [torch.randn(count, 2, 8, generator=generator) for _ in range(3)]

    rng = np.random.default_rng(4)
    document = random_document(rng, 4, 4, drop=False)
    neighbour = random_document(rng, 4, 4, drop=False)
    alone, packed = pack([document], 4, 0), pack([document, neighbour], 4, 5)
    mine = [place for place, token in enumerate(packed.tokens) if token.document == 0]
    inputs = random(len(alone.tokens))
    mixed = random(len(packed.tokens))
    for tensor, values in zip(mixed, inputs, strict=True):
        tensor[mine] = values
    out = tiled_attention(*mixed, packed.mask())[mine]
    assert (out - tiled_attention(*inputs, alone.mask())).abs().max() < 1e-6


def test_the_front_door_runs_the_backend_it_is_told() -> None:
    row = random_packing(1, 4).row
    plan = AttentionPlan.build(row.key_intervals, row.segment_starts, "cpu")
    q, k, v, _ = _inputs(0, row.num_tokens, (4, 2, 8), torch.float32)
    outs = [block_diffusion_attention(q, k, v, plan, name) for name in ("reference", "tiled")]
    assert torch.equal(outs[0], reference.attention(q, k, v, plan.mask.key_intervals))
    assert torch.equal(outs[1], tiled_attention(q, k, v, plan.mask))
    with pytest.raises(AssertionError, match="unresolved attention backend 'auto'"):
        block_diffusion_attention(q, k, v, plan, "auto")


def test_auto_is_flex_on_cuda_and_tiled_elsewhere() -> None:
    assert resolve_backend("auto", CUDA) == "flex"
    assert resolve_backend("auto", CPU) == "tiled"
    assert [resolve_backend(name, CUDA) for name in BACKENDS if name != "auto"] == [
        name for name in BACKENDS if name != "auto"
    ]


def test_flex_on_cpu_is_refused_for_training_only() -> None:
    with pytest.raises(ValueError, match=r"flex cannot train on CPU.*use attention_backend: auto"):
        resolve_backend("flex", CPU)
    assert resolve_backend("flex", CPU, training=False) == "flex"


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'flash' is not one of auto, tiled, flex, reference"):
        resolve_backend("flash", CPU)
