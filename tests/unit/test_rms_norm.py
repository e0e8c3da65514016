"""RMSNorm and rotary embedding are those of transformers' Qwen3, bit for bit.

Gradients are compared with those of the plain forms; the Triton forms in the interpreter.
"""

from __future__ import annotations

import pytest
import torch
from sdar_kernels import reference
from sdar_kernels import rms_norm as rms_norm_module
from sdar_kernels.reference import apply_rotary
from sdar_kernels.rms_norm import qk_norm_rope, residual_rms_norm, rms_norm, rotary_tables
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)
from unit.interpreted import run_interpreted

EPS = 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 48), (7, 3, 16)])
def test_rms_norm_is_qwen3s(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    norm = Qwen3RMSNorm(shape[-1], eps=EPS).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(shape[-1], generator=generator) + 0.5)
    out = rms_norm(x, norm.weight, EPS)
    assert out.dtype == dtype
    assert torch.equal(out, norm(x))


def test_rms_norm_of_fp64_keeps_fp64_statistics() -> None:
    x = torch.randn(5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(0.5, 1.5, 48, dtype=torch.float64)
    out = rms_norm(x, weight, EPS)
    exact = x / (x.pow(2).sum(-1, keepdim=True) / 48 + EPS).sqrt() * weight
    assert out.dtype == torch.float64
    assert (out - exact).abs().max() < 1e-14


def _config(head_dim: int, rope_theta: float) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=32,
        num_attention_heads=2,
        head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "rope_theta"), [(16, 10_000.0), (128, 1_000_000.0)])
def test_rotary_is_qwen3s(head_dim: int, rope_theta: float, dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 1, 2, 0, 1, 40_000])
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(6, 4, head_dim, generator=generator).to(dtype)
    k = torch.randn(6, 2, head_dim, generator=generator).to(dtype)
    rotary = Qwen3RotaryEmbedding(_config(head_dim, rope_theta))
    hf_cos, hf_sin = rotary(q, positions[None])
    hf_q, hf_k = apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], hf_cos, hf_sin
    )
    cos, sin = rotary_tables(positions, head_dim, rope_theta, dtype)
    assert cos.shape == sin.shape == (6, 1, head_dim)
    assert torch.equal(cos[:, 0], hf_cos[0])
    assert torch.equal(sin[:, 0], hf_sin[0])
    assert torch.equal(apply_rotary(q, cos, sin), hf_q[0].transpose(0, 1))
    assert torch.equal(apply_rotary(k, cos, sin), hf_k[0].transpose(0, 1))


def test_rotary_of_fp64_activations_uses_fp32_angles_and_fp64_products() -> None:
    positions = torch.tensor([0, 3, 1000])
    cos, sin = rotary_tables(positions, 8, 10_000.0, torch.float64)
    narrow_cos, narrow_sin = rotary_tables(positions, 8, 10_000.0, torch.float32)
    assert cos.dtype == sin.dtype == torch.float64
    assert torch.equal(cos, narrow_cos.double())
    assert torch.equal(sin, narrow_sin.double())
    x = torch.randn(3, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert apply_rotary(x, cos, sin).dtype == torch.float64


def test_rotary_scores_depend_on_the_distance_only() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 16, generator=generator).expand(4, 1, 16) for _ in range(2))
    query_positions, key_positions = torch.tensor([3, 10, 50, 400]), torch.tensor([1, 8, 48, 398])
    turned_q = apply_rotary(q, *rotary_tables(query_positions, 16, 10_000.0, torch.float32))
    turned_k = apply_rotary(k, *rotary_tables(key_positions, 16, 10_000.0, torch.float32))
    scores = (turned_q * turned_k).sum(-1).flatten()
    assert (scores - scores[0]).abs().max() < 1e-4
    assert (scores[0] - (q * k).sum(-1).flatten()[0]).abs() > 1e-2


def test_qk_norm_rope_is_its_two_steps() -> None:
    x = torch.randn(6, 4, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weight = torch.linspace(0.5, 1.5, 16).to(torch.bfloat16)
    tables = rotary_tables(torch.arange(6), 16, 10_000.0, torch.bfloat16)
    expected = apply_rotary(rms_norm(x, weight, EPS), *tables)
    assert torch.equal(qk_norm_rope(x, weight, EPS, *tables), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [40, 1 << 16])
def test_gradients_are_those_of_the_plain_forms(
    dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rms_norm_module, "_TILE_ELEMENTS", tile)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tables = rotary_tables(torch.arange(7), 16, 10_000.0, dtype)
    # q and k are strided views of one projection's output.
    x, weight, upstream = draw(7, 5, 16)[:, 1:4], draw(16) + 1, draw(7, 3, 16)
    pairs = [
        (lambda x, w: rms_norm(x, w, EPS), lambda x, w: reference.rms_norm(x, w, EPS)),
        (
            lambda x, w: qk_norm_rope(x, w, EPS, *tables),
            lambda x, w: apply_rotary(reference.rms_norm(x, w, EPS), *tables),
        ),
    ]
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for ours, plain in pairs:
        found, expected = (gradients(op, x, weight, upstream) for op in (ours, plain))
        for actual, wanted in zip(found, expected, strict=True):
            assert actual.dtype == dtype
            error = (actual.double() - wanted.double()).abs().max() / wanted.double().abs().max()
            assert error < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tile", [40, 1 << 16])
@pytest.mark.parametrize("adds", [True, False])
def test_the_residual_stream_is_summed_and_normed(
    adds: bool, dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rms_norm_module, "_TILE_ELEMENTS", tile)
    generator = torch.Generator().manual_seed(0)
    x, addend, *upstreams = torch.randn(4, 14, 16, generator=generator, dtype=torch.float64)
    weight = torch.linspace(0.5, 1.5, 16, dtype=torch.float64)
    given = (x.to(dtype), addend.to(dtype) if adds else None, weight.to(dtype))
    # Of which every second column is the stream, so that rows are strided.
    given = (torch.stack((given[0], given[0]), -1)[..., 0], *given[1:])
    leaves = [tensor.detach().requires_grad_() for tensor in given if tensor is not None]
    total, normed = residual_rms_norm(leaves[0], leaves[1] if adds else None, leaves[-1], EPS)
    expected = leaves[0] + leaves[1] if adds else leaves[0]
    plain = reference.rms_norm(expected, leaves[-1], EPS)
    assert torch.equal(total, expected)
    assert torch.equal(normed, plain)
    upstreams = [upstream.to(dtype) for upstream in upstreams]
    found = torch.autograd.grad((total, normed), leaves, upstreams)
    wanted = torch.autograd.grad((expected, plain), leaves, upstreams)
    for ours, theirs in zip(found, wanted, strict=True):
        error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
        assert error < (1e-13 if dtype == torch.float64 else 2e-2)


def test_what_is_added_is_one_with_the_stream() -> None:
    x, weight = torch.ones(2, 4), torch.ones(4)
    for addend in (torch.ones(1, 4), torch.ones(2, 4, dtype=torch.float64)):
        with pytest.raises(AssertionError, match="one stream"):
            residual_rms_norm(x, addend, weight, EPS)


def gradients(
    op: object, x: torch.Tensor, weight: torch.Tensor, upstream: torch.Tensor
) -> list[torch.Tensor]:
    leaves = [x.detach(), weight.clone()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = op(*leaves)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("op", ["rms_norm", "residual_rms_norm", "qk_norm_rope"])
def test_little_is_kept_for_backward(op: str) -> None:
    x, weight = torch.randn(7, 3, 16, requires_grad=True), torch.ones(16, requires_grad=True)
    tables = rotary_tables(torch.arange(7), 16, 10_000.0, torch.float32)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        if op == "rms_norm":
            rms_norm(x, weight, EPS)
        elif op == "residual_rms_norm":
            residual_rms_norm(x, x, weight, EPS)
        else:
            qk_norm_rope(x, weight, EPS, *tables)
    tables_size = 2 * 7 * 16 if op == "qk_norm_rope" else 0
    assert sum(saved) == x.numel() + weight.numel() + 7 * 3 + tables_size


def test_an_unresolved_name_is_refused() -> None:
    x, weight = torch.ones(2, 1, 4), torch.ones(4)
    with pytest.raises(AssertionError, match="unresolved fused_kernels 'auto'"):
        rms_norm(x, weight, EPS, "auto")
    with pytest.raises(AssertionError, match="unresolved fused_kernels 'auto'"):
        qk_norm_rope(x, weight, EPS, x, x, "auto")


def test_triton_forms_in_the_interpreter() -> None:
    run_interpreted("interpreted_rms_norm.py")
