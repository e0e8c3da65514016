"""Which kernels our forms of the step benchmark compute with."""

from __future__ import annotations

from dataclasses import replace

import torch
from sdar_kernels.attention_backend import choose_backend
from sdar_kernels.fused_kernels import choose_fused_kernels
from sdar_kernels.head_layout import HeadLayout

from megatron_sdar.benchmark.step_options import StepOptions


def with_kernels(options: StepOptions) -> tuple[StepOptions, str]:
    """The options with both kernels resolved, and a line for the reader.

    fused_kernels "auto" is inductor where it can be built: the step at its fastest.

    Raises:
        ValueError: what was asked for cannot be built.
    """
    wanted = options.fused_kernels
    try:
        fastest = replace(options, fused_kernels="inductor") if wanted == "auto" else options
        resolved, reason = build_kernels(fastest)
    except ValueError as error:
        if wanted != "auto":
            raise
        resolved, reason = "torch", str(error)
    arch = options.arch
    heads = HeadLayout(arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim)
    attention = choose_backend(options.attention_backend, torch.device("cpu"), torch.float32, heads)
    note = (
        f"Kernels of our forms: attention {attention.name} ({attention.reason}); elementwise "
        f"{resolved} ({reason})."
    )
    return replace(options, fused_kernels=resolved, attention_backend=attention.name), note


def build_kernels(options: StepOptions) -> tuple[str, str]:
    """Compile and check what a resolved name needs, as a run does when it starts."""
    arch = options.arch
    return choose_fused_kernels(
        options.fused_kernels,
        torch.device("cpu"),
        torch.float32,
        arch.hidden_size,
        arch.head_dim,
        arch.intermediate_size,
        arch.vocab_size,
    )
