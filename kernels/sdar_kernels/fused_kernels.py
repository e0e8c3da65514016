"""Which form of norm, rotary embedding, SwiGLU and loss runs, and why.

A compiled form (Triton on a GPU, torch.compile's C++ on a CPU) is used only after it has reproduced
the reference in fp64 on this device, forward and backward, at the model's own hidden size and head
dim: compilers and drivers fail in ways that no version number tells. The choice is made once per
run; no step falls back silently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdar_kernels import reference
from sdar_kernels.linear_cross_entropy import linear_cross_entropy
from sdar_kernels.rms_norm import qk_norm_rope, residual_rms_norm, rms_norm, rotary_tables
from sdar_kernels.swiglu import swiglu, swiglu_gradients
from sdar_kernels.triton_runtime import why_no_triton

FUSED_KERNELS = ("auto", "torch", "triton", "inductor")

# Largest error relative to the largest element. Rounding gives about a quarter of it; a wrong
# element, such as one beyond a mask, gives 0.1 or more.
_TOLERANCE = {
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
    torch.float32: 1e-4,
    torch.float64: 1e-10,
}
_TF32_TOLERANCE = 1e-2
_EPS = 1e-6
_MOST_COLUMNS = 4500  # above a kernel's tile, so that its loop over columns is taken
_HEADS = 3
_FEW_TOKENS = 37


@dataclass(frozen=True)
class _Check:
    """An op on float tensors: run(impl, *leaves) gives its output, names are the leaves'."""

    op: str
    names: Sequence[str]
    leaves: Sequence[Tensor]
    run: Callable[..., Tensor]


def choose_fused_kernels(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int,
    head_dim: int,
    intermediate_size: int,
    vocab_size: int,
) -> tuple[str, str]:
    """The `impl` that will run for a configured name, and one line that says why.

    "auto" is triton on a GPU where the self-check passes, else torch: inductor, some percent of a
    CPU's step, takes a C++ compiler and 5 to 30 s to start, so it has to be asked for.

    Args:
        name: one of FUSED_KERNELS.
        device, dtype: of activations and weights.
        hidden_size, head_dim: checked as they are.
        intermediate_size, vocab_size: checked up to 4500 (inductor: the former as it is).

    Raises:
        ValueError: for an unknown name, or for "triton" or "inductor" where it cannot run or is
            wrong.
    """
    if name not in FUSED_KERNELS:
        raise ValueError(f"fused_kernels: {name!r} is not one of {', '.join(FUSED_KERNELS)}")
    if name == "torch":
        return "torch", "as configured"
    form = "inductor" if name == "inductor" else "triton"
    problem = why_no_triton(device) if form == "triton" else _why_no_inductor(device)
    if problem is None and name == "auto" and device.type != "cuda":
        problem = f"triton needs a GPU, the device is {device.type}"
    if problem is None:
        checks = _checks(form, device, dtype, hidden_size, head_dim, intermediate_size, vocab_size)
        failures = (_failure(check, form, dtype) for check in checks)
        failure = next(filter(None, failures), None)
        if failure is None:
            return form, "its self-check passed"
        problem = f"{form} failed: {failure}"
    if name == form:
        raise ValueError(
            f"fused_kernels: {form} cannot be used here: {problem}; "
            "use fused_kernels: auto or torch"
        )
    return "torch", f"{problem}; using torch"


def _why_no_inductor(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"inductor is for CPUs, the device is {device.type}"


def _failure(check: _Check, form: str, dtype: torch.dtype) -> str | None:
    """What is wrong with a compiled form of an op, or None."""
    exact = _outputs(check, "reference", [leaf.double() for leaf in check.leaves])
    try:
        ours = _outputs(check, form, check.leaves)
    except Exception as error:  # whatever a compiler or a driver raises
        return f"{check.op}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    allowed = _tolerance(dtype)
    names = ("output", *(f"gradient of {name}" for name in check.names))
    for name, actual, expected in zip(names, ours, exact, strict=True):
        off = (actual.double() - expected).abs().max() / expected.abs().max()
        if not torch.isfinite(off):
            return f"{check.op}: {name} is not finite"
        if off > allowed:
            return f"{check.op}: {name} off by {off.item():.0e} (allowed {allowed:.0e})"
    return None


def _outputs(check: _Check, impl: str, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The output and the gradient of each leaf, for an upstream gradient that varies."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    with torch.enable_grad():
        out = check.run(impl, *leaves)
        upstream = torch.linspace(-1, 2, out.numel(), device=out.device, dtype=torch.float64)
        gradients = torch.autograd.grad(out, leaves, upstream.view(out.shape).to(out.dtype))
    return [out.detach(), *gradients]


def _tolerance(dtype: torch.dtype) -> float:
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return _TF32_TOLERANCE
    return _TOLERANCE[dtype]


def _checks(
    form: str,
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int,
    head_dim: int,
    intermediate_size: int,
    vocab_size: int,
) -> list[_Check]:
    # From numpy: the run's own generators stay untouched. On a GPU there are more rows than
    # programs of a backward pass, in the interpreter there is less time. Inductor decides by
    # the first sizes that it sees whether a loop is worth all threads, for all later ones, and
    # builds sums over few rows anew, which are better built here than within a step.
    rng = np.random.default_rng(0)
    tokens = 2048 if form == "inductor" else 300 if device.type == "cuda" else 37
    # Inductor builds for this width alone.
    columns = intermediate_size if form == "inductor" else min(intermediate_size, _MOST_COLUMNS)
    vocab = min(vocab_size, _MOST_COLUMNS)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        values = rng.standard_normal(shape) * std + mean
        return torch.from_numpy(values).to(device, dtype)

    x, scale = normal(tokens, hidden_size), normal(hidden_size, std=0.2, mean=1.0)
    addend = normal(tokens, hidden_size)
    heads, head_scale = normal(tokens, _HEADS, head_dim), normal(head_dim, std=0.2, mean=1.0)
    gate_up = torch.cat((normal(tokens, columns, std=2.0), normal(tokens, columns)), dim=1)
    columns_scale = normal(columns, std=0.2, mean=1.0)
    checks = [
        check
        for rows in ((tokens, _FEW_TOKENS) if form == "inductor" else (tokens,))
        for check in (
            _Check("rms_norm", ("x", "weight"), (x[:rows], scale), _run_rms_norm),
            _Check(
                "residual_rms_norm",
                ("x", "addend", "weight"),
                (x[:rows], addend[:rows], scale),
                _run_residual_rms_norm,
            ),
            _Check("qk_norm_rope", ("x", "weight"), (heads[:rows], head_scale), _run_qk_norm_rope),
            _Check(
                "swiglu",
                ("gate and up", "scale"),
                (gate_up[:rows], columns_scale),
                _run_swiglu,
            ),
        )
    ]
    if form == "triton":
        head = normal(vocab, hidden_size, std=hidden_size**-0.5)
        targets = torch.from_numpy(rng.integers(0, vocab, tokens)).to(device)
        run = partial(_run_cross_entropy, targets)
        checks.append(_Check("cross_entropy", ("hidden", "weight"), (x, head), run))
    return checks


def _run_rms_norm(impl: str, x: Tensor, weight: Tensor) -> Tensor:
    if impl == "reference":
        return reference.rms_norm(x, weight, _EPS)
    return rms_norm(x, weight, _EPS, impl)


def _run_residual_rms_norm(impl: str, x: Tensor, addend: Tensor, weight: Tensor) -> Tensor:
    """[stream | normed], so that gradients come back on both ways."""
    if impl == "reference":
        return torch.cat((x + addend, reference.rms_norm(x + addend, weight, _EPS)), dim=1)
    return torch.cat(residual_rms_norm(x, addend, weight, _EPS, impl), dim=1)


def _run_qk_norm_rope(impl: str, x: Tensor, weight: Tensor) -> Tensor:
    positions = torch.arange(x.shape[0], device=x.device)
    tables = rotary_tables(positions, x.shape[-1], 1e4, x.dtype)
    if impl == "reference":
        return reference.apply_rotary(reference.rms_norm(x, weight, _EPS), *tables)
    return qk_norm_rope(x, weight, _EPS, *tables, impl)


class _ScaledSwiglu(torch.autograd.Function):
    """swiglu(gate_up) * scale, which reads all that the kernels make: [T, 2 I], [I]."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, scale: Tensor, impl: str) -> Tensor:
        ctx.save_for_backward(gate_up, scale)
        ctx.impl = impl
        return swiglu(gate_up, impl) * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate_up, scale = ctx.saved_tensors
        grad_gate_up, activated = swiglu_gradients(grad * scale, gate_up, ctx.impl)
        return grad_gate_up, (grad * activated).sum(0), None


def _run_swiglu(impl: str, gate_up: Tensor, scale: Tensor) -> Tensor:
    if impl == "reference":
        return reference.swiglu(*gate_up.chunk(2, dim=-1)) * scale
    out: Tensor = _ScaledSwiglu.apply(gate_up, scale, impl)
    return out


def _run_cross_entropy(targets: Tensor, impl: str, hidden: Tensor, weight: Tensor) -> Tensor:
    weights = torch.linspace(1, 3, hidden.shape[0], device=hidden.device, dtype=torch.float64)
    if impl == "reference":
        return reference.weighted_cross_entropy(hidden, weight, targets, weights)
    return linear_cross_entropy(hidden, weight, targets, weights, chunk_tokens=29, impl=impl)
