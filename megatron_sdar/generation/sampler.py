"""Block-by-block decoding of a block-diffusion model, without a K/V cache.

Blocks lie where training puts them: at multiples of the block length counted from the first
prompt token. The block that the prompt ends in keeps its prompt tokens and gets mask tokens
behind them. Every forward runs [finished blocks ; current block], so it computes exactly what a
noisy block saw in training: the clean blocks before it, and itself in both directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sdar_kernels.block_mask import AttentionMask
from torch import Tensor

from megatron_sdar.model.sdar import DeviceBatch, SdarStage

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
        num_forwards: model calls.
        stopped: whether a stop token ended it (otherwise max_new_tokens did).
    """

    ids: tuple[int, ...]
    num_forwards: int
    stopped: bool

    @property
    def tokens_per_forward(self) -> float:
        return len(self.ids) / self.num_forwards


@torch.no_grad()
def generate(
    stage: SdarStage,
    prompt_ids: Sequence[int],
    config: SamplerConfig,
    on_block: Callable[[tuple[int, ...]], None] | None = None,
) -> GenerationResult:
    """Decode one answer.

    Args:
        stage: the whole model as one stage (one process, tp 1).
        prompt_ids: may be empty, and may end inside a block.
        config: see SamplerConfig.
        on_block: called with the answer's new tokens after each block.

    Raises:
        ValueError: for a prompt that the model cannot read or continue, and when the model
            gives logits that are not finite.
    """
    assert stage.stage.is_first, "the sampler needs the whole model"
    assert stage.stage.is_last, "the sampler needs the whole model"
    assert stage.tp.size() == 1, "the sampler runs in one process"
    _check_request(stage, prompt_ids, config)
    generator = torch.Generator(stage.lm_head.weight.device).manual_seed(config.seed)
    stops = set(config.stop_token_ids)
    sequence = list(prompt_ids)
    limit = len(sequence) + config.max_new_tokens
    num_forwards, stopped = 0, False
    while len(sequence) < limit and not stopped:
        block, forwards = _decode_block(stage, sequence, config, generator)
        num_forwards += forwards
        block = block[: limit - len(sequence)]
        stop = next((place for place, token in enumerate(block) if token in stops), None)
        if stop is not None:
            block, stopped = block[: stop + 1], True
        sequence += block
        if on_block is not None:
            on_block(tuple(block))
    return GenerationResult(tuple(sequence[len(prompt_ids) :]), num_forwards, stopped)


def _check_request(stage: SdarStage, prompt_ids: Sequence[int], config: SamplerConfig) -> None:
    arch = stage.arch
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


def _decode_block(
    stage: SdarStage, sequence: list[int], config: SamplerConfig, generator: torch.Generator
) -> tuple[list[int], int]:
    """The tokens that complete the block in which `sequence` ends, and the forwards used."""
    known = len(sequence)
    end = (known // config.block_length + 1) * config.block_length
    padded = sequence + [config.mask_token_id] * (end - known)
    ids = torch.tensor(padded, device=generator.device)
    unknown = torch.arange(known, end, device=generator.device)
    # Logits of the same positions in every forward, so that their mask is planned once.
    batch = _sequence_batch(ids, config.block_length).at(np.arange(known, end))
    num_forwards = 0
    for share in config.step_shares:
        logits = stage(None, batch, return_logits=True)[unknown - known]
        num_forwards += 1
        tokens, confidences = _candidates(logits, config, generator)
        chosen = _most_confident(confidences, share)
        if config.remasking == "dynamic":
            chosen |= confidences > config.confidence_threshold
        # The batch reads this very tensor, so the next forward sees the revealed tokens.
        ids[unknown[chosen]] = tokens[chosen]
        unknown = unknown[~chosen]
        if unknown.numel() == 0:
            break
    assert unknown.numel() == 0, "the shares sum to the block length"
    return ids[known:].tolist(), num_forwards


def _sequence_batch(ids: Tensor, block_length: int) -> DeviceBatch:
    """One clean copy of `ids` (whole blocks) as a micro-batch; see DeviceBatch.at for logits."""
    positions = np.arange(ids.shape[0])
    intervals = np.zeros((ids.shape[0], 4), dtype=np.int32)
    intervals[:, 1] = (positions // block_length + 1) * block_length
    empty = ids.new_zeros(0)
    return DeviceBatch(
        input_ids=ids,
        position_ids=torch.from_numpy(positions).to(ids.device),
        mask=AttentionMask.build(intervals, ids.device),
        loss_positions=empty,
        target_ids=empty,
        loss_weights=empty.double(),
        loss_scale=0.0,
    )


def _candidates(
    logits_MV: Tensor, config: SamplerConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """For each unknown position a token [M] and its probability [M], fp32 or wider."""
    logits = logits_MV if logits_MV.dtype == torch.float64 else logits_MV.float()
    logits[:, config.mask_token_id] = -torch.inf
    logits = logits - logits.amax(dim=-1, keepdim=True)
    probabilities = logits.softmax(dim=-1)
    if not bool(torch.isfinite(probabilities).all()):
        raise ValueError(
            "the model's logits are not finite (NaN or infinity): its weights are damaged, or "
            "too large for this dtype; check the weights or compute in float32"
        )
    if config.temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:
        # With the largest logit at 0 a tiny temperature cannot overflow.
        tempered = (logits / config.temperature).softmax(dim=-1)
        tokens = torch.multinomial(tempered, 1, generator=generator).squeeze(-1)
    confidences = probabilities.gather(1, tokens.unsqueeze(-1)).squeeze(-1)
    return tokens, confidences


def _most_confident(confidences: Tensor, count: int) -> Tensor:
    """bool [M], the `count` most confident positions; the earlier one of equals."""
    order = confidences.argsort(descending=True, stable=True)
    chosen = torch.zeros_like(confidences, dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen
