"""Selective recomputation: the same gradients bit for bit, with half of the activations kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from distributed.layouts import Layout, build, make_steps, micro_batches
from torch import Tensor

from megatron_sdar.model.recomputation import not_kept
from megatron_sdar.parallel.mesh import build_mesh


def gradients_and_kept(recompute: str) -> tuple[dict[str, Tensor], int]:
    """All gradients of one step, and the bytes of distinct storages kept by the first forward."""
    layout = Layout(f"recompute_{recompute}", recompute=recompute)
    mesh = build_mesh(torch.device("cpu"), 1, 1)
    step, _ = build(layout, mesh)
    rows = micro_batches(layout, make_steps(False)[0], 0)
    parameters = {p.to_local().untyped_storage().data_ptr() for p in step.parameters.values()}
    storages: dict[int, Tensor] = {}

    def pack(saved: Tensor) -> Tensor:
        plain = saved.to_local() if hasattr(saved, "to_local") else saved
        storages.setdefault(plain.untyped_storage().data_ptr(), plain)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        step.stages[0](None, step._batch(rows[0], 1.0))
    kept = sum(
        tensor.untyped_storage().nbytes()
        for pointer, tensor in storages.items()
        if pointer not in parameters and tensor.is_floating_point()
    )
    step.optimizer.zero_grad()
    step.backward(rows)
    return {n: p.grad.to_local().clone() for n, p in step.parameters.items()}, kept


@pytest.mark.usefixtures("single_process")
def test_gradients_are_the_same_bits_and_less_is_kept() -> None:
    plain, kept_by_none = gradients_and_kept("none")
    selective, kept = gradients_and_kept("selective")
    assert all(torch.equal(selective[name], plain[name]) for name in plain)
    assert kept < 0.75 * kept_by_none


def test_only_the_named_tensor_is_made_again() -> None:
    made: list[str] = []
    x = torch.linspace(0, 1, 6, dtype=torch.float64, requires_grad=True)
    y = x.exp()

    def make() -> Tensor:
        made.append("y")
        return x.detach().exp()

    with not_kept((y, make)):
        out = (y.view(2, 3)[:, 1:] * x.view(2, 3)[:, :2]).sum()
    assert made == []
    (grad,) = torch.autograd.grad(out, x)
    assert made == ["y"]
    values = np.linspace(0, 1, 6)
    expected = np.zeros(6)
    for row in range(2):
        for column in range(2):
            left, right = 3 * row + column, 3 * row + column + 1
            expected[left] += np.exp(values[right])
            expected[right] += values[left] * np.exp(values[right])
    np.testing.assert_allclose(grad.numpy(), expected, rtol=1e-14)


def test_nothing_is_hooked_without_gradients() -> None:
    with torch.no_grad(), not_kept((torch.ones(3), lambda: torch.ones(3))) as hooks:
        assert hooks is None
