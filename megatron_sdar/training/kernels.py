"""Which kernels a run computes with: chosen once, checked on every rank, the same on all.

Ranks may sit on different GPUs or torch builds. A rank whose check fails, or that would choose
differently, stops all of them with one message; a mixed run would still train, but no layout
could be compared with another any more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from sdar_kernels.attention_backend import choose_backend
from sdar_kernels.bf16_products import bf16_is_slow, bf16_slowdown
from sdar_kernels.fused_kernels import choose_fused_kernels
from sdar_kernels.head_layout import HeadLayout
from sdar_kernels.triton_configs import AttentionConfig
from sdar_kernels.triton_search import SearchResult, search_config

from megatron_sdar.architecture import Architecture
from megatron_sdar.config import SdarConfig
from megatron_sdar.parallel.launch import gather_from_all
from megatron_sdar.parallel.mesh import ParallelMesh
from megatron_sdar.training.precision import precision


@dataclass(frozen=True)
class KernelChoice:
    """What every rank computes with, and one line for the log.

    Attributes:
        attention: resolved attention backend.
        fused_kernels: "torch", "triton" or "inductor".
        attention_config: tile sizes found by attention_autotune; None: those chosen beforehand.
        description: names and reasons.
        warning: what makes this run much slower than it could be, or "".
    """

    attention: str
    fused_kernels: str
    attention_config: AttentionConfig | None
    description: str
    warning: str


def choose_kernels(config: SdarConfig, arch: Architecture, mesh: ParallelMesh) -> KernelChoice:
    """Resolve attention_backend and fused_kernels on this device.

    Raises:
        ValueError: on every rank, when a configured kernel cannot be used on one of them, or
            when ranks would use different ones.

    Collective: all_gather_object (world).
    """
    choice: KernelChoice | None = None
    error = ""
    try:
        choice = _choose_here(config, arch, mesh)
    except ValueError as caught:
        error = str(caught)
    answers = gather_from_all((choice, error), mesh)
    for rank, (_, text) in enumerate(answers):
        if text:
            raise ValueError(f"rank {rank}: {text}" if rank else text)
    first = answers[0][0]
    for rank, (theirs, _) in enumerate(answers):
        if _names(theirs) != _names(first):
            raise ValueError(
                f"rank 0 would compute with {_names(first)}, rank {rank} with {_names(theirs)}; "
                "set attention_backend and fused_kernels to what all of them can use"
            )
    assert first is not None, "no error, so a choice"
    warnings = (theirs.warning for theirs, _ in answers if theirs is not None)
    return replace(first, warning=next(filter(None, warnings), ""))


def _names(choice: KernelChoice | None) -> str:
    return f"{choice.attention} attention and {choice.fused_kernels} kernels" if choice else ""


def _choose_here(config: SdarConfig, arch: Architecture, mesh: ParallelMesh) -> KernelChoice:
    dtype = precision(config).compute
    heads = HeadLayout(
        arch.num_attention_heads // mesh.tp_size,
        max(1, arch.num_key_value_heads // mesh.tp_size),
        arch.head_dim,
    )
    model = config.model
    attention = choose_backend(model.attention_backend, mesh.device, dtype, heads)
    fused, reason = choose_fused_kernels(
        model.fused_kernels,
        mesh.device,
        dtype,
        arch.hidden_size,
        arch.head_dim,
        arch.intermediate_size // mesh.tp_size,
        arch.vocab_size,
    )
    description = (
        f"kernels: attention {attention.name} for {heads} ({attention.reason}); "
        f"norms, SwiGLU and loss {fused} ({reason})"
    )
    found = None
    if model.attention_autotune and attention.name == "triton":
        found = _search(heads, dtype, mesh, config.data.cutoff_len)
        description += (
            f"; attention_autotune: {found.default_milliseconds:.2f} -> {found.milliseconds:.2f} "
            f"ms per layer with {found.config} ({found.num_timed} timed, {found.num_failed} "
            "do not run here)"
        )
    elif model.attention_autotune:
        description += f"; attention_autotune has nothing to tune in {attention.name}"
    return KernelChoice(
        attention.name,
        fused,
        found.config if found else None,
        description,
        _bf16_warning(dtype, mesh.device),
    )


def _bf16_warning(dtype: torch.dtype, device: torch.device) -> str:
    """On a CPU without bf16 units torch multiplies in plain loops, and says nothing."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return ""
    slowdown = bf16_slowdown()
    if not bf16_is_slow(slowdown):
        return ""
    return (
        f"warning: this CPU has no bf16 units: a product in bf16 takes {slowdown:.0f} times as "
        "long as in float32; set bf16: false"
    )


def _search(
    heads: HeadLayout, dtype: torch.dtype, mesh: ParallelMesh, cutoff_len: int
) -> SearchResult:
    from triton.testing import do_bench

    return search_config(mesh.device, dtype, heads, cutoff_len, do_bench)
