"""Which attention backend runs, and why: by capability and by a short numerical check.

Kernels fail in ways that no version number tells (torch issues 158212: wrong key and value
gradients of compiled FlexAttention on noisy|clean masks; 186775: NaN). So a backend is used only
after it has reproduced the reference, forward and backward, on the run's own head layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdar_kernels import reference
from sdar_kernels.block_mask import AttentionMask
from sdar_kernels.flex_attention import FLEX_CPU_ERROR, flex_block_attention
from sdar_kernels.head_layout import HeadLayout
from sdar_kernels.native_attention import native_attention, why_no_native
from sdar_kernels.self_check import attention_problem
from sdar_kernels.tiled_attention import tiled_attention
from sdar_kernels.triton_configs import AttentionConfig, why_no_config
from sdar_kernels.triton_runtime import interpreting, why_no_triton

BACKENDS = ("auto", "flex", "triton", "native", "tiled", "reference")

# What `auto` tries, best first. The reference stores all scores, so it is never chosen.
_PREFERENCE = {"cuda": ("flex", "triton", "tiled"), "cpu": ("native", "tiled")}

Attention = Callable[[Tensor, Tensor, Tensor, AttentionMask], Tensor]


@dataclass(frozen=True)
class BackendChoice:
    """The backend of a run and one line that says why."""

    name: str
    reason: str


def run_backend(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    triton_config: AttentionConfig | None = None,
) -> Tensor:
    """Attention by a resolved backend; arguments as in `attention.block_diffusion_attention`."""
    if name == "tiled":
        return tiled_attention(q, k, v, mask)
    if name == "native":
        return native_attention(q, k, v, mask)
    if name == "flex":
        return flex_block_attention(q, k, v, mask)
    if name == "triton":
        from sdar_kernels.triton_attention import triton_attention

        return triton_attention(q, k, v, mask, triton_config)
    assert name == "reference", f"unresolved attention backend {name!r}"
    return reference.attention(q, k, v, mask.key_intervals)


def choose_backend(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    heads: HeadLayout,
    training: bool = True,
) -> BackendChoice:
    """The backend that will run for a configured name, checked on this device.

    Args:
        name: one of BACKENDS.
        device, dtype, heads: what attention will compute with.
        training: whether gradients are needed, and therefore checked.

    Raises:
        ValueError: for an unknown name, or for a named backend that cannot run or is wrong here.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention_backend: {name!r} is not one of {', '.join(BACKENDS)}")
    if name != "auto":
        problem = backend_problem(name, device, dtype, heads, training)
        if problem is not None:
            raise ValueError(
                f"attention_backend: {name} cannot be used here: {problem}; "
                "use attention_backend: auto"
            )
        return BackendChoice(name, "as configured; its self-check passed")
    failures: list[str] = []
    candidates = _PREFERENCE.get(device.type, ("tiled",))
    for candidate in candidates:
        problem = backend_problem(candidate, device, dtype, heads, training)
        if problem is None:
            found = "; ".join([*failures, f"using {candidate}"])
            reason = found if failures else f"first choice on {device.type}; its self-check passed"
            return BackendChoice(candidate, reason)
        failures.append(f"{candidate} failed: {problem}")
    raise ValueError(
        f"attention_backend: no backend works for {heads} in {dtype} on {device}: "
        f"{'; '.join(failures)}"
    )


def backend_problem(
    name: str, device: torch.device, dtype: torch.dtype, heads: HeadLayout, training: bool
) -> str | None:
    """Why a backend cannot be used, by capability, then by the self-check; None if it can."""
    problem = _incapable(name, device, dtype, heads, training)
    if problem is not None or name == "reference":
        return problem

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        return run_backend(name, q, k, v, mask)

    # A kernel step takes milliseconds in the interpreter.
    short = name == "triton" and interpreting()
    return attention_problem(attention, device, dtype, heads, training=training, short=short)


def _incapable(
    name: str, device: torch.device, dtype: torch.dtype, heads: HeadLayout, training: bool
) -> str | None:
    if name == "flex" and device.type == "cpu" and training:
        return FLEX_CPU_ERROR
    if name == "triton":
        return why_no_triton(device) or why_no_config(device, heads, dtype)
    if name == "native":
        return why_no_native(device, dtype)
    return None
