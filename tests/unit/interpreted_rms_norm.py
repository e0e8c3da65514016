"""The Triton forms of rms_norm and qk_norm_rope equal the torch forms, gradients included.

Run in the interpreter by test_rms_norm.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from sdar_kernels import triton_qk_norm_rope, triton_rms_norm
from sdar_kernels.rms_norm import qk_norm_rope, residual_rms_norm, rms_norm, rotary_tables
from torch import Tensor

EPS = 1e-6
# bf16: the interpreter truncates where a GPU rounds, up to three times in a row.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 4e-3, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)
Op = Callable[..., Tensor]


def _normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype)


def _run(op: Op, leaves: Sequence[Tensor], upstream: Tensor, impl: str) -> list[Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = op(*leaves, impl)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def _compare(op: Op, leaves: Sequence[Tensor], upstream: Tensor) -> None:
    ours = _run(op, leaves, upstream, "triton")
    theirs = _run(op, leaves, upstream, "torch")
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        error = (actual.double() - expected.double()).abs().max()
        assert error <= TOLERANCE[upstream.dtype] * max(1.0, float(expected.abs().max()))


def _norm(x: Tensor, weight: Tensor, impl: str) -> Tensor:
    return rms_norm(x, weight, EPS, impl)


def _residual_norm(x: Tensor, addend: Tensor, weight: Tensor, impl: str) -> Tensor:
    """[stream | normed], with gradients on both ways."""
    return torch.cat(residual_rms_norm(x, addend, weight, EPS, impl), dim=-1)


def _forked_norm(x: Tensor, weight: Tensor, impl: str) -> Tensor:
    return torch.cat(residual_rms_norm(x, None, weight, EPS, impl), dim=-1)


def _norm_rope(x: Tensor, weight: Tensor, impl: str) -> Tensor:
    positions = torch.arange(x.shape[0]) * 7 % 41
    tables = rotary_tables(positions, x.shape[-1], 1e4, x.dtype)
    return qk_norm_rope(x, weight, EPS, *tables, impl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [48, 80, 123])
@pytest.mark.parametrize("num_tokens", [1, 5, 67])
def test_rms_norm(num_tokens: int, size: int, dtype: torch.dtype) -> None:
    x, weight = _normal(num_tokens, size, dtype=dtype) * 3, _normal(size, dtype=dtype, seed=1)
    _compare(_norm, (x, weight), _normal(num_tokens, size, dtype=dtype, seed=2))
    addend = _normal(num_tokens, size, dtype=dtype, seed=3)
    upstream = _normal(num_tokens, 2 * size, dtype=dtype, seed=2)
    _compare(_residual_norm, (x, addend, weight), upstream)
    _compare(_forked_norm, (x, weight), upstream)


def test_the_stream_is_rounded_before_it_is_normed() -> None:
    """fp16, which the interpreter rounds; unrounded, the norm would differ in one of four."""
    x, addend = (_normal(67, 96, dtype=torch.float16, seed=seed) for seed in range(2))
    weight = _normal(96, dtype=torch.float16, seed=2)
    ours, theirs = (_residual_norm(x, addend, weight, impl) for impl in ("triton", "torch"))
    assert torch.equal(ours[:, :96], theirs[:, :96])
    assert (ours != theirs).float().mean() < 1e-2


@pytest.mark.parametrize("op", [_norm, _norm_rope])
def test_values_are_rounded_where_the_torch_form_stores_them(op: Op) -> None:
    """fp16, which the interpreter rounds; a rounding left out changes one bit in four numbers."""
    x, weight = (_normal(*shape, dtype=torch.float16) for shape in ((67, 3, 48), (48,)))
    differ = op(x, weight, "triton") != op(x, weight, "torch")
    assert differ.float().mean() < 1e-2


def test_rms_norm_of_small_values_keeps_eps_in_fp64() -> None:
    x = _normal(5, 80, dtype=torch.float64) * 1e-4
    weight = torch.ones(80, dtype=torch.float64)
    _compare(_norm, (x, weight), _normal(5, 80, dtype=torch.float64, seed=2))


@pytest.mark.parametrize("shape", [(3, 4, 48), (0, 48), (4, 8192)])
def test_rms_norm_of_other_shapes(shape: tuple[int, ...]) -> None:
    x, weight = _normal(*shape, dtype=torch.float32), _normal(shape[-1], dtype=torch.float32)
    ours = _run(_norm, (x, weight), x, "triton")
    for actual, expected in zip(ours, _run(_norm, (x, weight), x, "torch"), strict=True):
        assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_rms_norm_of_views_and_an_expanded_gradient() -> None:
    wide = _normal(67, 200, dtype=torch.float32)
    weight = _normal(80, dtype=torch.float32, seed=1)
    upstream = _normal(67, 1, dtype=torch.float32, seed=2).expand(67, 80)
    for x in (wide[:, 3:83], _normal(80, 67, dtype=torch.float32).T):
        _compare(_norm, (x, weight), upstream)
        _compare(_residual_norm, (x, wide[:, 100:180], weight), upstream.repeat(1, 2))


def test_rms_norm_of_bf16_with_an_fp32_weight_is_fp32() -> None:
    x, weight = _normal(5, 48, dtype=torch.bfloat16), _normal(48, dtype=torch.float32)
    out, grad_x, grad_weight = _run(_norm, (x, weight), torch.ones(5, 48), "triton")
    assert (out.dtype, grad_x.dtype, grad_weight.dtype) == (
        torch.float32, torch.bfloat16, torch.float32,
    )  # fmt: skip
    assert torch.allclose(out, _norm(x, weight, "torch"), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [48, 80, 128])
@pytest.mark.parametrize(("num_tokens", "num_heads"), [(1, 1), (5, 3), (67, 2)])
def test_qk_norm_rope(num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    shape = (num_tokens, num_heads, head_dim)
    leaves = (_normal(*shape, dtype=dtype) * 3, _normal(head_dim, dtype=dtype, seed=1))
    _compare(_norm_rope, leaves, _normal(*shape, dtype=dtype, seed=2))


@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_qk_norm_rope_of_a_part_of_a_projection(head_dim: int) -> None:
    """Strides of tokens and heads differ from those of a contiguous tensor, both ways."""
    fused = _normal(19, 5 * head_dim, dtype=torch.float64)
    queries = fused.view(19, 5, head_dim)[:, 1:4]
    upstream = _normal(3, 19, head_dim, dtype=torch.float64, seed=2).transpose(0, 1)
    weight = _normal(head_dim, dtype=torch.float64, seed=1)
    _compare(_norm_rope, (queries, weight), upstream)
    last = _normal(19, head_dim, 3, dtype=torch.float64).transpose(1, 2)
    _compare(_norm_rope, (last, weight), last)


def test_halves_of_the_tables_may_differ() -> None:
    x, weight = _normal(7, 2, 48, dtype=torch.float64), _normal(48, dtype=torch.float64, seed=1)
    cos, sin = (_normal(7, 1, 48, dtype=torch.float64, seed=seed) for seed in (3, 4))

    def op(x: Tensor, weight: Tensor, impl: str) -> Tensor:
        return qk_norm_rope(x, weight, EPS, cos, sin, impl)

    _compare(op, (x, weight), _normal(7, 2, 48, dtype=torch.float64, seed=2))


def test_a_program_of_the_backward_pass_takes_several_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (triton_rms_norm, triton_qk_norm_rope):
        monkeypatch.setattr(module, "_BACKWARD_PROGRAMS", 2)
    monkeypatch.setattr(triton_rms_norm, "_TILE", 128)
    monkeypatch.setattr(triton_qk_norm_rope, "_HALF_TILE", 128)
    weight, upstream = _normal(48, dtype=torch.float64), _normal(67, 48, dtype=torch.float64)
    _compare(_norm, (_normal(67, 48, dtype=torch.float64, seed=3), weight), upstream)
    x = _normal(23, 3, 48, dtype=torch.float64, seed=3)
    _compare(_norm_rope, (x, weight), _normal(23, 3, 48, dtype=torch.float64))


def test_results_repeat_bit_for_bit() -> None:
    x, weight = _normal(67, 2, 48, dtype=torch.float32), _normal(48, dtype=torch.float32)
    for op in (_norm, _norm_rope):
        first, second = (_run(op, (x, weight), x, "triton") for _ in range(2))
        assert all(map(torch.equal, first, second))
