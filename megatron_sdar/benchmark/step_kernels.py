"""Which elementwise kernels our forms of the step benchmark compute with."""

from __future__ import annotations

from dataclasses import replace

import torch
from sdar_kernels.fused_kernels import choose_fused_kernels

from megatron_sdar.benchmark.step_options import StepOptions


def with_kernels(options: StepOptions) -> tuple[StepOptions, str]:
    """The options with fused_kernels resolved, and a line for the reader.

    "auto" is inductor where it can be built: the step at its fastest.

    Raises:
        ValueError: inductor was asked for and cannot be built.
    """
    wanted = options.fused_kernels
    try:
        fastest = replace(options, fused_kernels="inductor") if wanted == "auto" else options
        resolved, reason = build_kernels(fastest)
    except ValueError as error:
        if wanted != "auto":
            raise
        resolved, reason = "torch", str(error)
    note = f"Elementwise kernels of our forms: {resolved} ({reason})."
    return replace(options, fused_kernels=resolved), note


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
