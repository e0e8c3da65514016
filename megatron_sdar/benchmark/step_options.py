"""What the step benchmark measures: the model, the rows and how often."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any

from megatron_sdar.architecture import Architecture
from megatron_sdar.benchmark.step_rows import RowShape
from megatron_sdar.config import OptimConfig


def benchmark_model() -> Architecture:
    """42 million parameters in the proportions of the smallest Qwen3."""
    return Architecture(
        vocab_size=16_384,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        rms_norm_eps=1e-6,
        rope_theta=1_000_000.0,
        tie_word_embeddings=False,
        max_position_embeddings=32_768,
    )


@dataclass(frozen=True)
class StepOptions:
    """Attributes:
    arch: the model; its last token id is the mask token.
    lengths: document tokens of a row; rows hold two copies of as many.
    row_length: tokens of a row with exact savings, which need not hold two copies; None: three
        quarters of the published row's document tokens, beyond 2048 two thirds, at
        least 1024, in whole blocks.
    rows: published rows of one optimizer step.
    rounds, peer_rounds: of our forms and of the peer, after one that does not count.
    threads: of torch, in the comparison of forms.
    block_length, seed: as in training.
    gemm_size: of the square product that sets the limit.
    max_documents: of the input that are read.
    parallel_rows, parallel_rounds: of the comparison of layouts.
    slow_bf16: measure the form in bf16 on a CPU without bf16 units, too, where it takes 50 times
        as long.
    fused_kernels: of our forms: "torch", "inductor", or "auto", which step_kernels resolves.
    attention_backend: of our forms, as in training; "auto" is resolved there, too.
    """

    arch: Architecture = field(default_factory=benchmark_model)
    lengths: tuple[int, ...] = (2048, 4096)
    row_length: int | None = None
    rows: int = 4
    rounds: int = 3
    peer_rounds: int = 2
    threads: int = os.cpu_count() or 1
    block_length: int = 4
    seed: int = 0
    gemm_size: int = 2048
    max_documents: int = 2000
    parallel_rows: int = 12
    parallel_rounds: int = 3
    slow_bf16: bool = False
    fused_kernels: str = "auto"
    attention_backend: str = "auto"

    @property
    def optim(self) -> OptimConfig:
        # The update costs the same at any rate. At this one the weights stay as they are, so that
        # forms that took different numbers of steps can still be compared by their loss.
        return OptimConfig(learning_rate=1e-12)

    @property
    def mask_token_id(self) -> int:
        return self.arch.vocab_size - 1

    def shape(self, length: int) -> RowShape:
        kept = self.row_length
        if kept is None:
            # Savings leave 1.49 of 2 tokens on GSM8K: what fills 4 published rows fills 8 rows of
            # three quarters, 9 of two thirds. Long rows of three quarters take too much memory.
            share = Fraction(3, 4) if length <= 2048 else Fraction(2, 3)
            # Short ones still hold documents of some length with two noisy copies.
            kept = max(int(share * length), 1024) // self.block_length * self.block_length
        return RowShape(length, self.block_length, self.mask_token_id, kept)

    def quick(self) -> StepOptions:
        """The same at toy size: everything runs, no figure means anything."""
        arch = replace(
            self.arch,
            vocab_size=1024,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        )
        return replace(
            self,
            arch=arch,
            lengths=(256,),
            row_length=512,
            rows=2,
            rounds=1,
            gemm_size=128,
            max_documents=100,
            parallel_rows=2,
            parallel_rounds=min(self.parallel_rounds, 1),
            slow_bf16=True,
            fused_kernels="torch" if self.fused_kernels == "auto" else self.fused_kernels,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StepOptions:
        arch = Architecture(**values["arch"])
        return cls(**{**values, "arch": arch, "lengths": tuple(values["lengths"])})
