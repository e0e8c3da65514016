"""One prompt and its answer while it is decoded: which tokens are known, which are computed next.

Invariant: tokens before `num_final` have their last keys and values in the cache; those from
there on, up to the end of the current block, are what the next forward computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_sdar.generation.sampler_config import GenerationResult, SamplerConfig


class DecodedSequence:
    """One prompt and what is known of its answer.

    Attributes:
        index: of the prompt.
        tokens: prompt and finished part of the answer.
        block: ids of the current block; mask tokens are unknown.
        num_final: leading tokens whose keys and values are in the cache for good.
        step: forwards of the current block so far.
    """

    def __init__(
        self, index: int, prompt: Sequence[int], config: SamplerConfig, generator: torch.Generator
    ) -> None:
        self.index = index
        self.generator = generator
        self.num_final = self.step = self.num_forwards = 0
        self.stopped = False
        self.tokens = list(prompt)
        self._config = config
        self._num_prompt = len(prompt)
        self._open_block()

    def _open_block(self) -> None:
        size = self._config.block_length
        begun = self.tokens[self.block_start :]
        self.block = begun + [self._config.mask_token_id] * (size - len(begun))

    @property
    def block_start(self) -> int:
        size = self._config.block_length
        return len(self.tokens) // size * size

    @property
    def pending(self) -> list[int]:
        """The tokens that the next forward computes, from position num_final on."""
        return self.tokens[self.num_final : self.block_start] + self.block

    @property
    def share(self) -> int:
        """How many tokens the current step reveals at least."""
        return self._config.step_shares[self.step]

    @property
    def is_over(self) -> bool:
        return self.stopped or self._room == 0

    @property
    def _room(self) -> int:
        return self._config.max_new_tokens - (len(self.tokens) - self._num_prompt)

    @property
    def result(self) -> GenerationResult:
        answer = tuple(self.tokens[self._num_prompt :])
        return GenerationResult(answer, self.num_forwards, self.stopped)

    def advance(self, block: list[int]) -> tuple[int, ...] | None:
        """Take the block as a forward left it; the answer's new tokens if that finished it."""
        self.num_final = self.block_start
        self.num_forwards += 1
        self.step += 1
        self.block = block
        if self._config.mask_token_id in block:
            return None
        new = block[len(self.tokens) - self.block_start :][: self._room]
        stops = set(self._config.stop_token_ids)
        stop = next((place for place, token in enumerate(new) if token in stops), None)
        if stop is not None:
            new, self.stopped = new[: stop + 1], True
        self.tokens += new
        self.step = 0
        if not self.is_over:
            self._open_block()
        return tuple(new)
