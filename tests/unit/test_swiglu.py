"""swiglu is Qwen3's gated activation; its Triton form is proved in the interpreter."""

from __future__ import annotations

import pytest
import torch
from sdar_kernels import reference
from sdar_kernels import swiglu as swiglu_module
from sdar_kernels.swiglu import swiglu, swiglu_gradients
from unit.interpreted import run_interpreted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 96), (2, 3, 96), (96,), (0, 96)])
def test_swiglu_is_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate_up = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    assert torch.equal(swiglu(gate_up), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("tile", [7, 100, 1 << 16])
@pytest.mark.parametrize("turned", [False, True])
def test_gradients_are_those_of_the_plain_form(
    tile: int, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swiglu_module, "_TILE_ELEMENTS", tile)
    generator = torch.Generator().manual_seed(0)
    shapes = [(96, 5), (48, 5)] if turned else [(5, 96), (5, 48)]
    gate_up, upstream = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    if turned:
        gate_up, upstream = gate_up.t(), upstream.t()
    found = swiglu_gradients(upstream, gate_up)
    gate_up.requires_grad_()
    product = reference.swiglu(*gate_up.chunk(2, dim=-1))
    (expected,) = torch.autograd.grad(product, gate_up, upstream)
    for ours, plain in zip(found, (expected, product), strict=True):
        assert ours.shape == plain.shape
        assert ours.is_contiguous()
        assert (ours - plain).abs().max() < 1e-14


def test_an_unresolved_name_is_refused() -> None:
    with pytest.raises(AssertionError, match="unresolved fused_kernels 'auto'"):
        swiglu(torch.ones(4), "auto")
    with pytest.raises(AssertionError, match="unresolved fused_kernels 'auto'"):
        swiglu_gradients(torch.ones(2), torch.ones(4), "auto")


def test_gate_and_up_must_agree() -> None:
    with pytest.raises(AssertionError, match="same width"):
        swiglu(torch.ones(3))


def test_triton_form_in_the_interpreter() -> None:
    run_interpreted("interpreted_swiglu.py")
