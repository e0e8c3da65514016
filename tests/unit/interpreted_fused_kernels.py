"""The self-check of the Triton kernels passes them, and catches each kind of broken kernel.

Run in the interpreter by test_fused_kernels.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sdar_kernels import (
    fused_kernels,
    triton_cross_entropy,
    triton_qk_norm_rope,
    triton_rms_norm,
    triton_swiglu,
)
from sdar_kernels.fused_kernels import choose_fused_kernels
from torch import Tensor

SIZES = {"hidden_size": 80, "head_dim": 48, "intermediate_size": 123, "vocab_size": 5000}
CPU = torch.device("cpu")


def _choose(dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    return choose_fused_kernels("triton", CPU, dtype, **SIZES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_sound_kernels_pass(dtype: torch.dtype) -> None:
    assert _choose(dtype) == ("triton", "its self-check passed")


def test_auto_is_torch_on_a_cpu_even_here() -> None:
    impl, reason = choose_fused_kernels("auto", CPU, torch.float32, **SIZES)
    assert (impl, reason) == ("torch", "triton needs a GPU, the device is cpu; using torch")


def test_auto_on_a_gpu_falls_back_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        type = "cuda"

    monkeypatch.setattr(fused_kernels, "why_no_triton", lambda device: None)
    monkeypatch.setattr(fused_kernels, "_checks", _checks_on_cpu(fused_kernels._checks))
    assert choose_fused_kernels("auto", Gpu(), torch.float32, **SIZES)[0] == "triton"  # type: ignore[arg-type]
    _break(monkeypatch, triton_swiglu, "swiglu_gradients", _scale(0, 1.3))
    impl, reason = choose_fused_kernels("auto", Gpu(), torch.float32, **SIZES)  # type: ignore[arg-type]
    assert impl == "torch"
    assert reason == (
        "triton failed: swiglu: gradient of gate and up off by 3e-01 (allowed 1e-04); using torch"
    )


def _checks_on_cpu(checks: Callable[..., Any]) -> Callable[..., Any]:
    return lambda form, device, *sizes: checks(form, CPU, *sizes)


def _break(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, damage: Callable[[Any], Any]
) -> None:
    """Let `owner.name` return damage(what it returned)."""
    sound = getattr(owner, name)
    broken = lambda *arguments, **options: damage(sound(*arguments, **options))  # noqa: E731
    monkeypatch.setattr(owner, name, staticmethod(broken) if isinstance(owner, type) else broken)


def _scale(index: int, factor: float) -> Callable[[Any], Any]:
    """Scale one of several results, or the only one."""

    def damage(result: Any) -> Any:
        if isinstance(result, Tensor):
            return result * factor
        return tuple(x * factor if i == index else x for i, x in enumerate(result))

    return damage


def _zero_last_column(result: Any) -> Any:
    result[..., -1] = 0
    return result


def _raise(result: Any) -> Any:
    raise RuntimeError("out of resource:\n  shared memory")


def _norm_only(damage: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Damage the normed output, or the gradients of x and of the weight, not the stream's."""

    def apply(result: Any) -> Any:
        if len(result) == 2:
            return result[0], damage(result[1])
        grad_x, grad_weight = damage((result[0], result[2]))
        return grad_x, result[1], grad_weight, result[3]

    return apply


def _all(damage: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return damage


OPS = {
    "rms_norm": (triton_rms_norm.ResidualRmsNorm, "forward", "backward", _norm_only),
    "qk_norm_rope": (triton_qk_norm_rope.QkNormRope, "forward", "backward", _all),
    "swiglu": (triton_swiglu, "swiglu", "swiglu_gradients", _all),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("direction", "damage", "what"),
    [
        ("forward", _scale(0, 1.01), "output off by 1e-02 (allowed 1e-04)"),
        ("forward", _zero_last_column, "output off by"),
        ("forward", _scale(0, float("nan")), "output is not finite"),
        ("forward", _raise, "RuntimeError: out of resource: shared memory"),
        ("backward", _scale(0, 0.0), "off by 1e+00"),
        ("backward", _scale(1, -1.0), "off by 2e+00"),
        ("backward", _scale(1, float("inf")), "is not finite"),
        ("backward", _raise, "RuntimeError: out of resource: shared memory"),
    ],
)
def test_a_broken_kernel_is_caught(
    monkeypatch: pytest.MonkeyPatch,
    op: str,
    direction: str,
    damage: Callable[[Any], Any],
    what: str,
) -> None:
    owner, forward, backward, of = OPS[op]
    _break(monkeypatch, owner, forward if direction == "forward" else backward, of(damage))
    with pytest.raises(ValueError) as caught:
        _choose()
    message = str(caught.value)
    assert message.startswith(
        f"fused_kernels: triton cannot be used here: triton failed: {op}: "
    ), message
    assert what in message
    assert message.endswith("; use fused_kernels: auto or torch")


@pytest.mark.parametrize(
    ("direction", "index", "what"),
    [("forward", 0, "output off"), ("backward", 1, "gradient of addend off")],
)
def test_a_wrong_residual_stream_is_caught(
    monkeypatch: pytest.MonkeyPatch, direction: str, index: int, what: str
) -> None:
    def damage(result: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        # None where only the norm is asked for.
        return tuple(
            x * 1.01 if at == index and x is not None else x for at, x in enumerate(result)
        )

    _break(monkeypatch, triton_rms_norm.ResidualRmsNorm, direction, damage)
    with pytest.raises(ValueError, match=rf"residual_rms_norm: {what} by 1e-02"):
        _choose()


def test_an_activation_that_backward_makes_wrong_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _break(monkeypatch, triton_swiglu, "swiglu_gradients", _scale(1, 1.01))
    with pytest.raises(ValueError, match="swiglu: gradient of scale off by 1e-02"):
        _choose()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_broken_softmax_statistics_are_caught(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    _break(monkeypatch, triton_cross_entropy, "row_statistics", _scale(index, 1.02))
    with pytest.raises(ValueError, match=r"cross_entropy: \w.* off by"):
        _choose()


def test_a_gradient_of_the_logits_that_is_not_written_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_cross_entropy, "write_gradient", lambda *arguments: None)
    with pytest.raises(ValueError, match="cross_entropy: gradient of hidden off by"):
        _choose()


def test_a_kernel_whose_loop_stops_early_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns beyond the first tile are left out of the statistics."""
    sound = triton_cross_entropy.row_statistics
    tile = triton_cross_entropy._BLOCK

    def first_tile(logits: Tensor, targets: Tensor, wide: torch.dtype) -> tuple[Tensor, ...]:
        return sound(logits[:, :tile], targets, wide)

    monkeypatch.setattr(triton_cross_entropy, "row_statistics", first_tile)
    with pytest.raises(ValueError, match="cross_entropy: output off by"):
        _choose()
