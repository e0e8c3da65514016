"""FlexAttention through the interval mask equals the reference; on CPU it only runs forward."""

from __future__ import annotations

import pytest
import torch
from sdar_kernels import reference
from sdar_kernels.attention import AttentionPlan, block_diffusion_attention
from sdar_kernels.flex_attention import flex_block_attention, make_block_mask
from torch import Tensor
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
    out = flex_block_attention(q, k, v, make_block_mask(mask), compiled=False)
    assert (out - reference.attention(q, k, v, mask.key_intervals)).abs().max() < 1e-5


def test_the_front_door_reaches_flex() -> None:
    packing = random_packing(1, 4)
    q, k, v = _inputs(packing, (4, 2))
    row = packing.row
    plan = AttentionPlan.build(row.key_intervals, row.segment_starts, "cpu")
    out = block_diffusion_attention(q, k, v, plan, "flex")
    assert (out - reference.attention(q, k, v, plan.mask.key_intervals)).abs().max() < 1e-5


@pytest.mark.parametrize("needs_grad", [0, 1, 2], ids=["query", "key", "value"])
def test_a_gradient_on_cpu_is_refused(needs_grad: int) -> None:
    packing = random_packing(1, 4)
    inputs = _inputs(packing, (2, 2))
    inputs[needs_grad].requires_grad_()
    block_mask = make_block_mask(packing.mask())
    with pytest.raises(ValueError, match="flex cannot train on CPU"):
        flex_block_attention(*inputs, block_mask, compiled=False)
