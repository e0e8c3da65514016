"""Low-rank updates and their dropout on one process: against autograd's own products."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from megatron_sdar.parallel.dropout import dropped
from megatron_sdar.parallel.local_weights import ProductWeight
from megatron_sdar.parallel.lora import Dropout, LowRankUpdate
from megatron_sdar.parallel.projections import column_parallel_projections

TOKENS, COLUMNS, RANK = 7, 6, 3
TRAINED = [kind for kind in product((False, True), repeat=4) if any(kind)]


def drawn(*shape: int, trained: bool) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_(trained)


@pytest.mark.parametrize("probability", [0.0, 0.4])
@pytest.mark.parametrize("trained", TRAINED, ids=lambda kind: "".join("01"[k] for k in kind))
def test_every_gradient_is_autograds(trained: tuple[bool, ...], probability: float) -> None:
    """Whichever of input, weight and factors are trained, beside a projection without update."""
    torch.manual_seed(3)
    learns_x, learns_w, learns_down, learns_up = trained
    x = drawn(TOKENS, COLUMNS, trained=learns_x)
    weights = [drawn(rows, COLUMNS, trained=learns_w) for rows in (5, 4)]
    down, up = drawn(RANK, COLUMNS, trained=learns_down), drawn(5, RANK, trained=learns_up)
    leaves = [t for t in (x, *weights, down, up) if t.requires_grad]
    scale, dropout = 1.7, Dropout.of(probability, 11, "layer", 40) if probability else None
    mask = torch.ones_like(x) if dropout is None else dropout(torch.ones_like(x)).detach()
    expected = (
        x @ weights[0].T + scale * (x * mask) @ down.T @ up.T,
        x @ weights[1].T,
    )  # fmt: skip
    update = LowRankUpdate(ProductWeight(down), ProductWeight(up), scale, dropout)
    products = [ProductWeight(weights[0], update=update), ProductWeight(weights[1])]
    found = column_parallel_projections(x, products, None, False)
    upstream = [torch.randn_like(out) for out in expected]
    gradients = [
        torch.autograd.grad(
            [out for out in outputs if out.requires_grad],
            leaves,
            [g for g, out in zip(upstream, outputs, strict=True) if out.requires_grad],
        )
        for outputs in (found, expected)
    ]
    for ours, theirs in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert (probability == 0) == bool(mask.eq(1).all())


def test_seed_and_layer_make_other_masks() -> None:
    x = torch.ones(50, 40)
    masks = [
        Dropout.of(0.5, seed, name, 0)(x)
        for seed, name in ((1, "model.layers.0.mlp.up_proj"), (2, "model.layers.0.mlp.up_proj"),
                           (1, "model.layers.1.mlp.up_proj"))
    ]  # fmt: skip
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs((masks[one] == masks[other]).double().mean() - 0.5) < 0.05


def test_dropout_follows_from_key_and_place_alone() -> None:
    torch.manual_seed(0)
    x, key = torch.randn(300, 200, dtype=torch.float64), 2**63 + 12345
    whole = dropped(x, 0.3, key, 0)
    kept = whole != 0
    assert torch.equal(whole[kept], x[kept] * (1 / 0.7))
    assert abs(kept.double().mean() - 0.7) < 0.01
    # Neither rows nor columns hang together.
    assert (kept.double().mean(0) - 0.7).abs().max() < 0.12
    assert (kept.double().mean(1) - 0.7).abs().max() < 0.15
    for shift in ((1, 0), (0, 1), (1, 1), (2, 0), (0, 2)):
        both = kept & kept.roll(shift, (0, 1))
        assert abs(both.double().mean() - 0.49) < 0.01, shift
    # A rank's columns are those of the whole, in any number type.
    part = dropped(x[:, 120:].float(), 0.3, key, 120)
    assert torch.equal(part != 0, kept[:, 120:])
    # Any bit of the key makes another mask.
    for bit in (0, 31, 32, 63):
        other = dropped(x, 0.3, key ^ (1 << bit), 0) != 0
        assert abs((other & kept).double().mean() - 0.49) < 0.01, bit
    assert dropped(x, 0.0, key, 0) is x
