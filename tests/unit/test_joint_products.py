"""Weights side by side are one product each way, and the numbers are those of products apart."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from unit.small_model import ARCH, small_stage

from megatron_sdar.parallel.adjacency import place_side_by_side, rows_as_one
from megatron_sdar.parallel.joint_products import input_gradient, joint_product
from megatron_sdar.parallel.local_weights import ProductWeight
from megatron_sdar.parallel.sharding import local_tensor

TOKENS, HIDDEN, COLUMNS = 7, 5, (4, 6)


class Calls(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.found[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        return self.found["mm"] + self.found["addmm"] + self.found["addmm_"]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters(beside: bool) -> list[nn.Parameter]:
    made = [nn.Parameter(draw(columns, HIDDEN, seed=columns)) for columns in COLUMNS]
    values = [parameter.detach().clone() for parameter in made]
    if beside:
        place_side_by_side(made)
    with torch.no_grad():
        for parameter, value in zip(made, values, strict=True):
            parameter.copy_(value)
    return made


def gradients() -> list[Tensor]:
    return list(draw(TOKENS, sum(COLUMNS), seed=1).split(COLUMNS, dim=1))


def work(beside: bool, grads: list[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Output and input gradient, and the number of products of each."""
    weights = [ProductWeight(parameter) for parameter in parameters(beside)]
    x = draw(TOKENS, HIDDEN, seed=0)
    found, counts = [], []
    for run in (lambda: joint_product(x, weights), lambda: input_gradient(grads, weights)):
        with torch.no_grad(), Calls() as calls:
            found.append(run())
        counts.append(calls.products)
    return found, counts


def test_one_product_each_way_with_the_same_numbers() -> None:
    together, few = work(True, gradients())
    apart, many = work(False, [grad.clone() for grad in gradients()])
    assert (few, many) == ([1, 1], [2, 2])
    for ours, theirs in zip(together, apart, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("beside", [False, True])
def test_what_lies_apart_on_one_side_is_computed_one_by_one(beside: bool) -> None:
    expected, _ = work(False, [grad.clone() for grad in gradients()])
    grads = [grad.clone() for grad in gradients()] if beside else gradients()
    found, counts = work(beside, grads)
    assert counts == ([1, 2] if beside else [2, 2])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.usefixtures("single_process")
def test_the_models_gate_and_up_are_one_product_each_way() -> None:
    stage = small_stage("torch", "none", "tiled")
    for layer in stage.model.layers.values():
        shards = [local_tensor(each.weight) for each in (layer.mlp.gate_proj, layer.mlp.up_proj)]
        assert rows_as_one([shard.detach() for shard in shards]) is not None
    x = draw(TOKENS, ARCH.hidden_size, seed=0).requires_grad_()
    with Calls() as calls:
        out = layer.mlp(x)
    assert calls.products == 2
    with Calls() as calls:
        out.sum().backward()
    assert calls.products == 5  # of the input's two, and of three weights'
