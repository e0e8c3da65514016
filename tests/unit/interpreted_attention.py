"""The Triton attention kernels equal the fp64 reference, in Triton's interpreter.

Run in the interpreter by test_triton_attention.py.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sdar_kernels import reference
from sdar_kernels.attention import block_diffusion_attention
from sdar_kernels.attention_backend import backend_problem, choose_backend
from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.head_layout import HeadLayout
from sdar_kernels.triton_attention import triton_attention
from sdar_kernels.triton_configs import AttentionConfig, KernelConfig
from sdar_kernels.triton_search import search_config
from torch import Tensor
from unit.intervals import queries_without_a_document, random_intervals, some_queries
from unit.packings import pack, random_document, random_packing

CPU = torch.device("cpu")


def _config(rows: int, keys: int, masked: int) -> AttentionConfig:
    launch = KernelConfig(rows, keys, masked, 4, 1)
    return AttentionConfig(launch, launch, launch)


# Tiles smaller and larger than the rows below, unequal on purpose.
CONFIGS = (
    _config(16, 16, 8),
    AttentionConfig(
        KernelConfig(32, 16, 16, 4, 1), KernelConfig(16, 32, 8, 4, 1), KernelConfig(64, 16, 8, 4, 1)
    ),
    _config(64, 64, 32),
)
HEADS = ((4, 2, 16), (4, 1, 32), (6, 2, 48), (2, 2, 64), (3, 1, 16))


def _inputs(seed: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Random normal tensors."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def _max_errors(
    ours: Callable[..., Tensor], exact: Callable[..., Tensor], tensors: Sequence[Tensor]
) -> dict[str, float]:
    """Largest absolute error of the output and each gradient; the last tensor is upstream."""
    found = []
    results = []
    for function, dtype in ((ours, tensors[0].dtype), (exact, torch.float64)):
        *leaves, upstream = (tensor.to(dtype).clone() for tensor in tensors)
        for leaf in leaves:
            leaf.requires_grad_()
        out = function(*leaves)
        assert out.dtype == dtype
        results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
    for left, right in zip(*results, strict=True):
        assert left.shape == right.shape
        found.append((left.double() - right).abs().max().item())
    return dict(zip(("out", "dq", "dk", "dv"), found, strict=True))


def _errors(
    mask: AttentionMask, heads: tuple[int, int, int], dtype: torch.dtype, config: AttentionConfig
) -> dict[str, float]:
    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return triton_attention(q, k, v, mask, config)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention(q, k, v, mask.key_intervals)

    num_heads, num_kv_heads, head_dim = heads
    queries = (mask.num_tokens, num_heads, head_dim)
    keys = (mask.num_keys, num_kv_heads, head_dim)
    shapes = [queries, keys, keys, queries]
    return _max_errors(ours, exact, _inputs(mask.num_tokens, shapes, dtype))


def _seeds(number: int, quick: Container[int]) -> list[Any]:
    """That many; all but the quick ones are for `make test-backends`."""
    return [
        pytest.param(seed, marks=() if seed in quick else pytest.mark.backends)
        for seed in range(number)
    ]


@pytest.mark.parametrize("seed", _seeds(100, range(10)))
def test_random_packings_in_fp32(seed: int) -> None:
    """Ragged ends, dropped blocks, one-token documents, 1 to 3 views, T not a tile multiple."""
    block = (1, 4, 3, 8, 16, 7)[seed % 6]
    packing = random_packing(seed, block, max_documents=3, max_blocks=max(2, 28 // block))
    found = _errors(packing.mask(), HEADS[seed % 5], torch.float32, CONFIGS[seed % 3])
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("seed", range(6))
def test_random_packings_in_fp64(seed: int) -> None:
    packing = random_packing(seed, (4, 1, 8)[seed % 3], max_documents=3, max_blocks=6)
    found = _errors(packing.mask(), HEADS[seed % 5], torch.float64, CONFIGS[seed % 3])
    assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("seed", _seeds(6, (1,)))
def test_any_two_ranges(seed: int) -> None:
    """Nothing of a block-diffusion row is assumed: any two ranges per query, in any order."""
    mask = AttentionMask.build(random_intervals(seed, 50 + seed))
    found = _errors(mask, HEADS[seed % 5], torch.float32, CONFIGS[seed % 3])
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("seed", _seeds(8, (0, 1, 5, 6)))
def test_some_of_the_queries(seed: int) -> None:
    """One, all, some and repeated ones of a row's queries, over all of its keys."""
    block = (1, 4)[seed // 4]
    mask = random_packing(200 + seed, block, max_documents=3, max_blocks=16 // block).mask()
    chosen = mask.select(some_queries(seed, mask))
    found = _errors(chosen, HEADS[seed % 5], torch.float64, CONFIGS[seed % 3])
    assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("seed", _seeds(4, (0, 1)))
def test_some_of_the_queries_of_any_two_ranges(seed: int) -> None:
    mask = AttentionMask.build(random_intervals(seed, 20 + seed))
    chosen = mask.select(some_queries(seed, mask))
    found = _errors(chosen, HEADS[seed % 5], torch.float64, CONFIGS[seed % 3])
    assert max(found.values()) < 1e-12, found


def test_keys_that_nobody_reads_have_no_gradient() -> None:
    documents = [random_document(np.random.default_rng(seed), 4, 6, False) for seed in (1, 2)]
    whole = pack(documents, 4, 3).mask()
    chosen = whole.select(queries_without_a_document(whole))
    assert chosen.num_tokens < whole.num_tokens
    found = _errors(chosen, (4, 2, 16), torch.float64, CONFIGS[0])
    assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("views", [0, 1, 3])
def test_documents_with_no_noisy_part_and_with_several(views: int) -> None:
    rng = np.random.default_rng(views)
    document = random_document(rng, 4, 8, drop=False)
    document = type(document)(
        document.ids, document.labels, document.num_clean_blocks, (document.views[0],) * views
    )
    mask = pack([document, document], 4, 3).mask()
    found = _errors(mask, (4, 2, 16), torch.float32, CONFIGS[0])
    assert max(found.values()) < 1e-5, found


def test_one_token() -> None:
    mask = AttentionMask.build(np.array([[0, 1, 0, 0]], dtype=np.int32))
    assert max(_errors(mask, (4, 2, 16), torch.float32, CONFIGS[0]).values()) < 1e-5


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 136, 256])
def test_every_head_dim(head_dim: int) -> None:
    mask = random_packing(3, 4).mask()
    found = _errors(mask, (4, 2, head_dim), torch.float32, CONFIGS[2])
    assert max(found.values()) < 1e-5, found


def test_fp16() -> None:
    mask = random_packing(3, 4, max_blocks=12).mask()
    found = _errors(mask, (4, 2, 64), torch.float16, CONFIGS[2])
    assert max(found.values()) < 1e-2, found


def test_strided_inputs_and_gradients() -> None:
    mask = random_packing(5, 4).mask()
    whole = torch.randn(mask.num_tokens, 8, 16, dtype=torch.float64)
    q, k, v = whole[:, ::2], whole[:, :2], whole[:, 6:]
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    dense = triton_attention(*leaves, mask, CONFIGS[0])
    strided = [x.requires_grad_() for x in (q.detach(), k.detach(), v.detach())]
    out = triton_attention(*strided, mask, CONFIGS[0])
    upstream = torch.randn(mask.num_tokens, 16, 4, dtype=torch.float64).transpose(1, 2)
    ours = torch.autograd.grad(out, strided, upstream)
    theirs = torch.autograd.grad(dense, leaves, upstream.contiguous())
    for left, right in zip((out, *ours), (dense, *theirs), strict=True):
        assert torch.equal(left, right)


def test_two_runs_are_bitwise_equal() -> None:
    mask = random_packing(8, 4, max_blocks=8).mask()
    shapes = [(mask.num_tokens, count, 16) for count in (4, 2, 2, 4)]
    *leaves, upstream = _inputs(0, shapes, torch.float32)
    runs = []
    for _ in range(2):
        q, k, v = (leaf.clone().requires_grad_() for leaf in leaves)
        out = triton_attention(q, k, v, mask, CONFIGS[0])
        runs.append([out, *torch.autograd.grad(out, (q, k, v), upstream)])
    for left, right in zip(*runs, strict=True):
        assert torch.equal(left, right)


def test_the_front_door_and_its_self_check() -> None:
    heads = HeadLayout(4, 2, 16)
    assert choose_backend("triton", CPU, torch.float32, heads).name == "triton"
    assert choose_backend("auto", CPU, torch.float32, heads).name in ("native", "tiled")
    mask = random_packing(3, 4).mask()
    shapes = [(mask.num_tokens, count, 16) for count in (4, 2, 2)]
    q, k, v = _inputs(1, shapes, torch.float32)
    out = block_diffusion_attention(q, k, v, mask, "triton")
    assert torch.equal(out, triton_attention(q, k, v, mask))


def test_the_self_check_sees_the_interpreters_bf16() -> None:
    """Triton's interpreter multiplies the bit patterns of bf16 (triton issue 11584)."""
    problem = backend_problem("triton", CPU, torch.bfloat16, HeadLayout(4, 2, 16), True)
    assert problem is not None
    assert problem.startswith(("output", "query", "key", "value")), problem


def test_the_search_keeps_the_fastest_and_passes_over_failures() -> None:
    slow = KernelConfig(32, 32, 16, 4, 1)
    fast = KernelConfig(16, 16, 16, 4, 1)
    broken = KernelConfig(24, 16, 16, 4, 1)  # not a power of two: does not compile
    times = iter(range(100, 0, -1))

    def timer(call: object) -> float:
        call()
        return float(next(times))

    result = search_config(
        CPU, torch.float32, HeadLayout(2, 1, 16), 24, timer,
        propose=lambda default: iter((default, broken, slow, fast)),
    )  # fmt: skip
    assert result.config == AttentionConfig(fast, fast, fast)
    assert (result.num_timed, result.num_failed) == (7, 3)
    assert result.default_milliseconds == 100.0
    assert result.milliseconds == 94.0
