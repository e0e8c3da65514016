"""FlexAttention through the interval mask equals the reference, and compiles once per shape.

torch has no compiled CPU backward, so on CPU the uncompiled form stands in for it: the same mask
function and BlockMask go through torch's own backward pass.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from sdar_kernels import flex_attention as ours
from sdar_kernels import reference
from sdar_kernels.attention import block_diffusion_attention
from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.flex_attention import flex_block_attention, make_block_mask
from sdar_kernels.self_check import document_intervals
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import flex_attention
from unit.flex_on_cpu import flex_trains_on_cpu
from unit.intervals import some_queries
from unit.packings import Packing, random_packing

# Eager is what is meant here; torch advises to compile.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")


def _inputs(packing: Packing, heads: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    total = packing.row.num_tokens
    return [torch.randn(total, count, 16, generator=generator) for count in (*heads, heads[1])]


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
@pytest.mark.parametrize("block_length", [1, 4, 16])
def test_flex_forward_is_the_reference(heads: tuple[int, int], block_length: int) -> None:
    packing = random_packing(7 + block_length, block_length)
    q, k, v = _inputs(packing, heads)
    mask = packing.mask()
    out = flex_block_attention(q, k, v, mask)
    assert (out - reference.attention(q, k, v, mask.key_intervals)).abs().max() < 1e-5
    assert torch.equal(out, block_diffusion_attention(q, k, v, mask, "flex"))


@pytest.mark.parametrize("block_length", [1, 4, 16])
def test_flex_gradients_are_the_references(block_length: int) -> None:
    packing = random_packing(20 + block_length, block_length, max_blocks=9)
    mask = packing.mask()
    results = []
    for attention in (
        lambda q, k, v: flex_block_attention(q, k, v, mask),
        lambda q, k, v: reference.attention(q, k, v, mask.key_intervals),
    ):
        leaves = [x.double().requires_grad_() for x in _inputs(packing, (4, 2))]
        with flex_trains_on_cpu():
            out = attention(*leaves)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for name, left, right in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert (left - right).abs().max() < 1e-12, name


@pytest.mark.parametrize("needs_grad", [0, 1, 2], ids=["query", "key", "value"])
def test_a_gradient_on_cpu_is_refused(needs_grad: int) -> None:
    packing = random_packing(1, 4)
    inputs = _inputs(packing, (2, 2))
    inputs[needs_grad].requires_grad_()
    with pytest.raises(ValueError, match="FlexAttention has no CPU backward"):
        flex_block_attention(*inputs, packing.mask())


def test_one_graph_serves_every_mask_of_a_shape_and_computes_with_the_new_one() -> None:
    """A mask captured at compile time would give the first step's result, or a graph per step."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(flex_attention, backend=counter, dynamic=False)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 256, 16, generator=generator) for _ in range(3))
    for lengths in ((64, 64), (128,), (40, 60, 28), (4,) * 32):
        mask = AttentionMask.build(document_intervals(lengths, block=4))
        with torch.no_grad():
            out = compiled(q, k, v, block_mask=make_block_mask(mask))
        exact = reference.attention(*(x[0].transpose(0, 1) for x in (q, k, v)), mask.key_intervals)
        assert (out[0].transpose(0, 1) - exact).abs().max() < 1e-5, lengths
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_more_shapes_are_compiled_than_torch_allows_by_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Past its limit torch would run uncompiled, without an error, and store all scores."""
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    compiled = ours._compiled_flex.__wrapped__()
    mask = AttentionMask.build(document_intervals([64, 64], block=4))
    k = v = torch.randn(1, 1, 256, 16)
    for num_queries in range(16, 192, 16):
        chosen = mask.select(np.arange(num_queries))
        with torch.no_grad():
            compiled(torch.randn(1, 1, num_queries, 16), k, v, block_mask=make_block_mask(chosen))
    assert counter.frame_count == 11
    torch._dynamo.reset()


@pytest.mark.parametrize("seed", range(8))
def test_some_of_the_queries(seed: int) -> None:
    packing = random_packing(40 + seed, (1, 4, 16)[seed % 3], max_blocks=9)
    mask = packing.mask()
    positions = some_queries(seed, mask)
    chosen = mask.select(positions)
    q, k, v = (x.double() for x in _inputs(packing, (4, 2)))
    results = []
    for attention in (
        lambda q, k, v: flex_block_attention(q, k, v, chosen),
        lambda q, k, v: reference.attention(q, k, v, chosen.key_intervals),
    ):
        leaves = [x.clone().requires_grad_() for x in (q[positions], k, v)]
        with flex_trains_on_cpu():
            out = attention(*leaves)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for name, left, right in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert (left - right).abs().max() < 1e-12, name
