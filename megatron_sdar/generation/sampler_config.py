"""How answers are decoded, and what came out: the types that every sampler shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sdar.architecture import Architecture

REMASKING = ("static", "dynamic")


@dataclass(frozen=True)
class SamplerConfig:
    """How one answer is decoded.

    Attributes:
        block_length: tokens decoded together.
        mask_token_id: the id that stands for an unknown token; it is never produced.
        stop_token_ids: the answer ends with the first of these.
        max_new_tokens: the answer's greatest length.
        denoising_steps: most forwards per block; None means block_length. The tokens of a
            block are shared out over the steps, the larger shares first (8 in 3: 3, 3, 2).
        remasking: "static" reveals each step's share, most confident tokens first; "dynamic"
            reveals every token above the threshold, and at least the step's share.
        confidence_threshold: of "dynamic", a probability; only above it counts.
        temperature: 0 takes the most probable token; above 0 draws from
            softmax(logits / temperature). Confidence is always the probability at temperature
            1, so that the threshold keeps its meaning.
        top_k: draw only among so many most probable tokens; 0: all.
        top_p: draw only among the most probable tokens that together hold so much probability
            (at the temperature, after top_k); 1: all.
        seed: of the draws.

    Raises:
        ValueError: for a value out of range.
    """

    block_length: int
    mask_token_id: int
    stop_token_ids: tuple[int, ...]
    max_new_tokens: int
    denoising_steps: int | None = None
    remasking: str = "static"
    confidence_threshold: float = 0.9
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("block_length", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 1 <= self.num_steps <= self.block_length:
            raise ValueError(
                f"denoising_steps is {self.num_steps}; it must be from 1 to block_length "
                f"({self.block_length}), since every step reveals at least one token"
            )
        if self.remasking not in REMASKING:
            raise ValueError(f"remasking is {self.remasking!r}; use {' or '.join(REMASKING)}")
        if not 0 <= self.confidence_threshold <= 1:
            raise ValueError(
                f"confidence_threshold is {self.confidence_threshold}; it is a probability, "
                "from 0 to 1"
            )
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or above, finite")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0, at most 1 (all tokens)")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to 2^63 - 1")

    @property
    def num_steps(self) -> int:
        """Most forwards per block."""
        return self.block_length if self.denoising_steps is None else self.denoising_steps

    @property
    def step_shares(self) -> list[int]:
        """Tokens that each step reveals of a block; they sum to block_length."""
        share, rest = divmod(self.block_length, self.num_steps)
        return [share + (step < rest) for step in range(self.num_steps)]


@dataclass(frozen=True)
class GenerationResult:
    """One decoded answer.

    Attributes:
        ids: the new tokens, the stop token included where one ended the answer.
        num_forwards: model calls that revealed tokens of this answer. There are no others but
            those that read the prompt's whole blocks.
        stopped: whether a stop token ended it (otherwise max_new_tokens did).
    """

    ids: tuple[int, ...]
    num_forwards: int
    stopped: bool

    @property
    def tokens_per_forward(self) -> float:
        return len(self.ids) / self.num_forwards


def check_request(arch: Architecture, prompt_ids: Sequence[int], config: SamplerConfig) -> None:
    """Refuse what the model cannot read or continue.

    Raises:
        ValueError: the mask token or a prompt token is not the model's, the prompt holds the mask
            token, or prompt and answer are longer than the model's positions.
    """
    if not 0 <= config.mask_token_id < arch.vocab_size:
        raise ValueError(
            f"mask_token_id is {config.mask_token_id} but the model has only {arch.vocab_size} "
            "token ids; use the model's own tokenizer and config.json"
        )
    for place, token in enumerate(prompt_ids):
        if not 0 <= token < arch.vocab_size:
            raise ValueError(
                f"prompt token {place} is id {token} but the model has only {arch.vocab_size} "
                "token ids; use the model's own tokenizer"
            )
        if token == config.mask_token_id:
            raise ValueError(
                f"prompt token {place} is the mask token (id {token}), which stands for a token "
                "to be generated; take it out of the prompt"
            )
    needed = len(prompt_ids) + config.max_new_tokens
    if needed > arch.max_position_embeddings:
        raise ValueError(
            f"max_new_tokens is {config.max_new_tokens} after a prompt of {len(prompt_ids)} "
            f"tokens, but the model has only {arch.max_position_embeddings} positions "
            "(max_position_embeddings); ask for fewer tokens or shorten the prompt"
        )
