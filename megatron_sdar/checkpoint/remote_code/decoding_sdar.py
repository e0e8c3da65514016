"""Decoding by block diffusion, with cached keys and values of finished blocks.

Part of the model directory: needs only torch and transformers 5. Licence: Apache-2.0.
Blocks lie at multiples of the block length counted from each row's first token. A block starts as
mask tokens (behind the end of the prompt, if that ends inside it) and runs until every one is
revealed; then it runs once more to store its keys and values, and the next block begins.
Shapes: B rows, L tokens of a block, M unknown tokens of all rows, V token ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

REMASKING = ("static", "dynamic")
# A prompt is read in pieces of about so many tokens, which bounds the memory of its masks.
_PREFILL_TOKENS = 2048
_CONFIDENCE_STEPS = 2.0**16


@dataclass(frozen=True)
class BlockDecoding:
    """How answers are decoded; see SDARGenerationMixin.generate."""

    max_new_tokens: int
    block_length: int
    denoising_steps: int
    remasking: str
    confidence_threshold: float
    temperature: float
    top_k: int
    top_p: float
    eos_token_ids: frozenset[int]
    mask_token_id: int

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "block_length"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")
        steps = self.denoising_steps
        if type(steps) is not int or not 1 <= steps <= self.block_length:
            raise ValueError(
                f"denoising_steps is {steps!r}; it must be from 1 to block_length "
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
        if type(self.top_k) is not int or self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k!r}; it must be an integer, 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0, at most 1 (all tokens)")

    @property
    def step_shares(self) -> list[int]:
        """Tokens that each step reveals of a block; they sum to block_length."""
        share, rest = divmod(self.block_length, self.denoising_steps)
        return [share + (step < rest) for step in range(self.denoising_steps)]


class _FinishedBlocks:
    """Keys and values of every row's finished blocks, padded on the left.

    Blocks of all rows are equally long, so only the prompts' blocks have padding, and a row's
    blocks lie at multiples of the block length whatever the other rows hold.
    """

    def __init__(self, model: Any, block_length: int) -> None:
        self.model = model
        self.block_length = block_length
        self.cache = DynamicCache()
        self.used_BK: Tensor | None = None  # None while no row has padding

    def read(self, prompts: Sequence[Tensor]) -> list[Tensor]:
        """Store every prompt's whole blocks; returns what is left of each prompt."""
        lengths = [len(prompt) // self.block_length * self.block_length for prompt in prompts]
        longest = max(lengths)
        ids = prompts[0].new_zeros((len(prompts), longest))
        used = torch.zeros_like(ids, dtype=torch.bool)
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            ids[row, longest - length :] = prompt[:length]
            used[row, longest - length :] = True
        if min(lengths) < longest:
            self.used_BK = used[:, :0]
        piece = max(1, _PREFILL_TOKENS // self.block_length) * self.block_length
        for start in range(0, longest, piece):
            self.run(ids[:, start : start + piece], True, used[:, start : start + piece])
        return [prompt[length:] for prompt, length in zip(prompts, lengths, strict=True)]

    def run(self, ids_BL: Tensor, store: bool, used_BL: Tensor | None = None) -> Tensor:
        """Hidden states [B, L, D] of whole blocks behind the finished ones.

        Args:
            store: the blocks are finished now.
            used_BL: False for padding; None for no padding.
        """
        used = self.used_BK
        if used is not None:
            new = torch.ones_like(ids_BL, dtype=torch.bool) if used_BL is None else used_BL
            used = torch.cat((used, new), dim=1)
        output = self.model.model(
            input_ids=ids_BL,
            attention_mask=used,
            past_key_values=self.cache,
            use_cache=True,
            store_kv=store,
            block_length=self.block_length,
        )
        if store:
            self.used_BK = used
        hidden: Tensor = output.last_hidden_state
        return hidden


def decode(
    model: Any,
    prompts: Sequence[Tensor],
    decoding: BlockDecoding,
    generator: torch.Generator | None,
    streamer: Any,
) -> list[list[int]]:
    """Each prompt's answer, the end-of-sequence token included where one ended it.

    Args:
        model: an SDARForCausalLM.
        prompts: int64 ids of each row without padding; may be empty, and may end inside a block.
        generator: of the draws; None for torch's own.
        streamer: gets a single row's answer block by block; may be None.

    Raises:
        ValueError: logits that are not finite.
    """
    finished = _FinishedBlocks(model, decoding.block_length)
    begun = finished.read(prompts)
    shape = (len(prompts), decoding.block_length)
    ids_BL = prompts[0].new_full(shape, decoding.mask_token_id)
    for row, prompt_end in enumerate(begun):
        ids_BL[row, : len(prompt_end)] = prompt_end
    num_known = [len(prompt_end) for prompt_end in begun]
    answers: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    while True:
        # A row whose answer has ended runs on with the others, and reveals nothing.
        first = [
            known if runs else shape[1] for known, runs in zip(num_known, running, strict=True)
        ]
        places = torch.arange(shape[1], device=ids_BL.device)
        unknown_BL = places >= torch.tensor(first, device=ids_BL.device)[:, None]
        _denoise(finished, ids_BL, unknown_BL, decoding, generator)
        for row, block in enumerate(ids_BL.tolist()):
            if running[row]:
                room = decoding.max_new_tokens - len(answers[row])
                part, ended = _answer_part(block[num_known[row] :], room, decoding.eos_token_ids)
                answers[row] += part
                running[row] = not ended
                if streamer is not None:
                    streamer.put(torch.tensor(part))
        if not any(running):
            return answers
        finished.run(ids_BL, True)
        ids_BL = torch.full_like(ids_BL, decoding.mask_token_id)
        num_known = [0] * len(prompts)


def _answer_part(
    block: list[int], room: int, eos_token_ids: frozenset[int]
) -> tuple[list[int], bool]:
    """What of a block's new tokens belongs to the answer, and whether the answer ends there."""
    part = block[:room]
    for place, token in enumerate(part):
        if token in eos_token_ids:
            return part[: place + 1], True
    return part, len(part) == room


def _denoise(
    finished: _FinishedBlocks,
    ids_BL: Tensor,
    unknown_BL: Tensor,
    decoding: BlockDecoding,
    generator: torch.Generator | None,
) -> None:
    """Reveal every unknown token of the current blocks, in place."""
    for share in decoding.step_shares:
        hidden = finished.run(ids_BL, False)
        # Layers may be spread over devices; drawing stays on the prompts' one.
        logits = finished.model.lm_head(hidden[unknown_BL.to(hidden.device)]).to(ids_BL.device)
        tokens_M, confidences_M = _candidates(logits, decoding, generator)
        confidences_BL = confidences_M.new_full(ids_BL.shape, -1.0)
        confidences_BL[unknown_BL] = confidences_M
        # Equal but for rounding, as in an empty prompt's first block: the earlier one.
        compared = (confidences_BL * _CONFIDENCE_STEPS).round()
        order = compared.argsort(dim=1, descending=True, stable=True)
        chosen_BL = unknown_BL & (order.argsort(dim=1) < share)
        if decoding.remasking == "dynamic":
            chosen_BL |= confidences_BL > decoding.confidence_threshold
        ids_BL[chosen_BL] = tokens_M[chosen_BL[unknown_BL]]
        unknown_BL = unknown_BL & ~chosen_BL
        if not bool(unknown_BL.any()):
            return
    raise AssertionError("the shares sum to the block length")


def _candidates(
    logits_MV: Tensor, decoding: BlockDecoding, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """For each unknown position a token [M] and its probability [M], fp32 or wider."""
    logits = logits_MV if logits_MV.dtype == torch.float64 else logits_MV.float()
    logits[:, decoding.mask_token_id] = -torch.inf
    logits = logits - logits.amax(dim=-1, keepdim=True)
    probabilities = logits.softmax(dim=-1)
    if not bool(torch.isfinite(probabilities).all()):
        raise ValueError(
            "the model's logits are not finite (NaN or infinity): its weights are damaged, or "
            "too large for this dtype; check the weights or compute in float32"
        )
    if decoding.temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:
        # With the largest logit at 0 a tiny temperature cannot overflow.
        kept = _cut(logits / decoding.temperature, decoding.top_k, decoding.top_p)
        tokens = torch.multinomial(kept.softmax(dim=-1), 1, generator=generator).squeeze(-1)
    return tokens, probabilities.gather(1, tokens.unsqueeze(-1)).squeeze(-1)


def _cut(logits_MV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Only the top_k most probable tokens, and of these only so many as hold top_p."""
    if 0 < top_k < logits_MV.shape[-1]:
        least = logits_MV.topk(top_k, dim=-1).values[:, -1:]
        logits_MV = logits_MV.masked_fill(logits_MV < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits_MV.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        beyond = probabilities.cumsum(dim=-1) - probabilities >= top_p
        logits_MV = logits_MV.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    return logits_MV
