"""What Inductor builds computes what the torch forms do, and is built once.

Run in a process of its own by test_inductor_kernels.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sdar_kernels import fused_kernels, inductor_kernels
from sdar_kernels.fused_kernels import (
    _run_residual_rms_norm,
    _run_swiglu,
    choose_fused_kernels,
)
from sdar_kernels.rms_norm import qk_norm_rope, rms_norm, rotary_tables
from torch import Tensor
from torch._dynamo.utils import counters
from unit.small_model import ARCH, CPU, assert_same, loss_and_gradients, one_process

EPS = 1e-5
WIDTH, HEADS, HEAD_DIM = 48, 3, 16
# fp32 is what the self-check below compares. bf16: C++ keeps more digits between operations.
TOLERANCE = {torch.float64: 1e-13, torch.bfloat16: 2e-2}
SIZES = {"hidden_size": 48, "head_dim": 16, "intermediate_size": 64, "vocab_size": 100}


def _normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values * 2).to(dtype)


def _rms_norm(impl: str, x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPS, impl)


def _qk_norm_rope(impl: str, x: Tensor, weight: Tensor) -> Tensor:
    tables = rotary_tables(torch.arange(x.shape[0]), x.shape[-1], 1e4, x.dtype)
    return qk_norm_rope(x, weight, EPS, *tables, impl)


def _leaves(run: Callable[..., Tensor], tokens: int, dtype: torch.dtype) -> list[Tensor]:
    if run is _run_swiglu:
        gate_up = _normal(tokens, 2 * WIDTH, dtype=dtype, seed=0)
        return [gate_up, _normal(WIDTH, dtype=dtype, seed=2)]
    shape = (HEADS, HEAD_DIM) if run is _qk_norm_rope else (WIDTH,)
    x, addend = (_normal(tokens, *shape, dtype=dtype, seed=seed) for seed in (0, 2))
    weight = _normal(shape[-1], dtype=dtype, seed=1) / 4 + 1
    return [x, addend, weight] if run is _run_residual_rms_norm else [x, weight]


def _results(run: Callable[..., Tensor], impl: str, leaves: list[Tensor]) -> list[Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = run(impl, *leaves)
    upstream = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def _compare(run: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    ours, theirs = (_results(run, impl, leaves) for impl in ("inductor", "torch"))
    for actual, expected in zip(ours, theirs, strict=True):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        allowed = TOLERANCE[actual.dtype] * scale
        assert torch.allclose(actual, expected, rtol=0, atol=allowed)


OPS = [_rms_norm, _run_residual_rms_norm, _qk_norm_rope, _run_swiglu]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("run", OPS)
def test_it_computes_what_the_torch_form_does(
    run: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    # Each of the special numbers has graphs of its own, which take seconds to build.
    for tokens in (700, 67, 1, 0) if dtype == torch.float64 else (700, 67):
        _compare(run, _leaves(run, tokens, dtype))


def test_views_and_expanded_gradients() -> None:
    gate_up = _normal(67, 200, dtype=torch.float64, seed=0)[:, 20:180]
    _compare(_run_swiglu, [gate_up, torch.ones(80, dtype=torch.float64)])
    joined = _normal(67, 2 * HEADS * HEAD_DIM, dtype=torch.float64, seed=2)
    heads = joined[:, : HEADS * HEAD_DIM].view(67, HEADS, HEAD_DIM)
    _compare(_qk_norm_rope, [heads, _normal(HEAD_DIM, dtype=torch.float64, seed=1)])
    x = _normal(2, 35, WIDTH, dtype=torch.float64, seed=3).requires_grad_()
    weight = torch.ones(WIDTH, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad(rms_norm(x, weight, EPS, impl).sum(), x)[0]
        for impl in ("inductor", "torch")
    )
    assert (ours - theirs).abs().max() < 1e-13


def test_nothing_is_built_again_for_other_numbers_of_tokens_and_heads() -> None:
    def work(tokens: int, heads: int) -> None:
        for run in OPS:
            leaves = _leaves(run, tokens, torch.float64)
            if run is _qk_norm_rope:
                leaves[0] = _normal(tokens, heads, HEAD_DIM, dtype=torch.float64, seed=4)
            _results(run, "inductor", leaves)

    work(3000, 3)
    work(40, 3)
    before = counters["stats"]["unique_graphs"]
    assert before >= 8
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens, heads in ((41, 3), (3500, 2), (77, 8), (1536, 4)):
            work(tokens, heads)
    with torch.no_grad():
        rms_norm(torch.ones(50, WIDTH, dtype=torch.float64), torch.ones(WIDTH).double(), EPS)
    assert counters["stats"]["unique_graphs"] == before


def test_the_self_check_passes_it() -> None:
    chosen = choose_fused_kernels("inductor", CPU, torch.float32, **SIZES)
    assert chosen == ("inductor", "its self-check passed")


@pytest.mark.parametrize(
    ("op", "owner", "name", "index"),
    [
        ("rms_norm", inductor_kernels.ResidualRmsNorm, "forward", 1),
        ("rms_norm", inductor_kernels.ResidualRmsNorm, "backward", 2),
        ("qk_norm_rope", inductor_kernels.QkNormRope, "backward", 1),
        ("swiglu", inductor_kernels, "swiglu", 0),
        ("swiglu", inductor_kernels, "swiglu_gradients", 0),
        ("swiglu", inductor_kernels, "swiglu_gradients", 1),
    ],
)
def test_the_self_check_catches_a_wrong_one(
    op: str, owner: Any, name: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = getattr(owner, name)

    def broken(*inputs: Any) -> Any:
        result = sound(*inputs)
        if isinstance(result, Tensor):
            return result * 1.01
        return tuple(x * 1.01 if place == index else x for place, x in enumerate(result))

    monkeypatch.setattr(owner, name, staticmethod(broken) if isinstance(owner, type) else broken)
    with pytest.raises(ValueError, match=rf"inductor failed: {op}: .* off by 1e-02"):
        choose_fused_kernels("inductor", CPU, torch.float32, **SIZES)


def test_it_is_built_for_many_tokens() -> None:
    """Of few, Inductor would leave a loop to one thread on a machine of many, for good."""
    sizes = (torch.float32, *SIZES.values())
    checks = fused_kernels._checks("inductor", CPU, *sizes)
    ops = ["rms_norm", "residual_rms_norm", "qk_norm_rope", "swiglu"]
    assert [check.op for check in checks] == ops * 2
    assert all(check.leaves[0].shape[0] >= 2048 for check in checks[: len(ops)])
    assert all(check.leaves[0].shape[0] < 100 for check in checks[len(ops) :])


def test_a_step_builds_nothing_that_the_self_check_has_not() -> None:
    sizes = {**SIZES, "head_dim": 64}  # wide enough for Inductor to split sums over many rows
    torch._dynamo.reset()  # what other tests built
    choose_fused_kernels("inductor", CPU, torch.float32, **sizes)
    before = counters["stats"]["unique_graphs"]
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens, heads in ((1536, 8), (1536, 4), (380, 8), (8, 4)):
            x = _normal(tokens, sizes["hidden_size"], dtype=torch.float32, seed=0)
            q = _normal(tokens, heads, sizes["head_dim"], dtype=torch.float32, seed=1)
            gate_up = _normal(tokens, 2 * sizes["intermediate_size"], dtype=torch.float32, seed=2)
            for run, leaves in (
                (fused_kernels._run_rms_norm, [x, x[0]]),
                (_run_residual_rms_norm, [x, x, x[0]]),
                (fused_kernels._run_qk_norm_rope, [q, q[0, 0]]),
                (_run_swiglu, [gate_up, gate_up[0].chunk(2)[0]]),
            ):
                _results(run, "inductor", leaves)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_model_is_the_same(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with one_process():
        expected = loss_and_gradients("torch", recompute, "tiled")
    calls = []
    backwards = ("_norm_gradients", "_residual_gradients", "_qk_gradients", "_swiglu_gradients")
    compiled = inductor_kernels._compiled

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        calls.append(function.__name__)
        return compiled(function)

    monkeypatch.setattr(inductor_kernels, "_compiled", counted)
    with one_process():
        actual = loss_and_gradients("inductor", recompute, "tiled")
    assert_same(actual, expected)
    layers = ARCH.num_hidden_layers
    found = [calls.count(name) for name in backwards]
    assert found == [1, 2 * layers, 2 * layers, layers]
