"""Block-by-block decoding of many answers with cached keys and values, on any layout.

One rule makes all forwards: a sequence computes the tokens whose keys and values are not final
yet, up to the end of its current block. So the prompt's whole blocks are read once; a block that
has just been finished is computed once more together with the mask tokens of the next one, which
makes its keys and values final without a forward of its own; and every forward reveals tokens.
Sequences are independent: each goes on at its own pace and leaves the batch when it ends.
Invariant: the tokens are `reference_sampler.generate`'s, whatever the batch and the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from megatron_sdar.checkpoint.agreement import together
from megatron_sdar.generation.choice import (
    are_finite,
    candidates,
    damaged_logits,
    request_generator,
    revealed,
)
from megatron_sdar.generation.decoded_sequence import DecodedSequence
from megatron_sdar.generation.model_runner import ModelRunner, TokenRuns
from megatron_sdar.generation.sampler_config import (
    GenerationResult,
    SamplerConfig,
    check_request,
)
from megatron_sdar.model.cache import KeyValueCache
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.parallel.inference import spread_from_last_stage
from megatron_sdar.parallel.launch import gather_from_all
from megatron_sdar.parallel.mesh import ParallelMesh

# Prompts are read in forwards of about so many tokens, which bounds activations and masks.
PROMPT_TOKENS = 2048
# Stands for every token of a block whose logits were not finite.
_DAMAGED = -1

OnBlock = Callable[[int, tuple[int, ...]], None]


def generate_batch(
    stages: Sequence[SdarStage],
    mesh: ParallelMesh,
    prompts: Sequence[Sequence[int]],
    config: SamplerConfig,
    on_block: OnBlock | None = None,
    request_ids: Sequence[int] | None = None,
) -> list[GenerationResult]:
    """Decode an answer to each prompt, all of them at the same time.

    Works on stages in training, under FSDP too, and leaves weights, gradients and train mode as
    they were. An answer depends on its prompt, the config and its request id only, not on the
    other prompts, their order or the layout (but for rounding, which may decide between tokens
    that are equally probable to it).

    Args:
        stages: this rank's stages (virtual chunks in order), materialised and filled.
        mesh: the grid they were built on.
        prompts: token ids; each may be empty, and may end inside a block. Every rank of one
            data-parallel replica passes the same; replicas may pass different ones, or none.
        config: see SamplerConfig.
        on_block: called on every rank with (index of the prompt, new tokens of its answer) when
            a block of it is finished; the prompts take turns.
        request_ids: what the draws of each prompt are keyed by, beside config.seed; default: its
            index. Give ids when prompts of one job are decoded in several calls.

    Returns:
        One result per prompt, in order, on every rank of the replica.

    Raises:
        ValueError: on every rank of the world the same: for a prompt that the model cannot read
            or continue, and for logits that are not finite.

    Memory: keys and values of all prompts and answers at their greatest length, see
    `model.cache.KeyValueCache`; the caller bounds it by the number of prompts.

    Collectives: every rank of the world must call. all_gather_object (world) once; per forward
    those of the stages, point-to-point messages along the pipeline, all_gather (tp) of the logits
    and broadcast (tp, pp) of the tokens; with several data-parallel ranks also an all_reduce
    (dp), as replicas that are done go on taking part in the others' forwards.
    """
    ids = range(len(prompts)) if request_ids is None else request_ids
    assert len(ids) == len(prompts), "a request id per prompt"
    runner = ModelRunner(stages, mesh)

    def decode() -> list[GenerationResult]:
        try:
            return _Decoder(runner, mesh, prompts, config, on_block, ids).run()
        finally:
            runner.keep_company()

    with runner:
        return together(decode)


def generate_over_data_parallel(
    stages: Sequence[SdarStage],
    mesh: ParallelMesh,
    prompts: Sequence[Sequence[int]],
    config: SamplerConfig,
    on_block: OnBlock | None = None,
    request_ids: Sequence[int] | None = None,
) -> list[GenerationResult]:
    """`generate_batch` of prompts that all ranks pass alike, shared out over the replicas.

    Args:
        on_block: hears of the prompts of this rank's replica only, by their index in `prompts`.

    Returns:
        One result per prompt, in order, on every rank.

    Collectives: those of `generate_batch`, and all_gather_object (mesh.control).
    """
    ids = range(len(prompts)) if request_ids is None else request_ids
    mine = range(mesh.dp_rank, len(prompts), mesh.dp_size)

    def heard(place: int, tokens: tuple[int, ...]) -> None:
        if on_block is not None:
            on_block(mine[place], tokens)

    own = generate_batch(
        stages, mesh, [prompts[i] for i in mine], config, heard, [ids[i] for i in mine]
    )
    found = dict(zip(mine, own, strict=True))
    for part in gather_from_all(found, mesh):
        found.update(part)
    return [found[index] for index in range(len(prompts))]


class _Decoder:
    """The sequences of one call, each in its slot of the cache; those that ended are gone."""

    def __init__(
        self,
        runner: ModelRunner,
        mesh: ParallelMesh,
        prompts: Sequence[Sequence[int]],
        config: SamplerConfig,
        on_block: OnBlock | None,
        request_ids: Sequence[int],
    ) -> None:
        self._runner, self._mesh, self._config = runner, mesh, config
        self._on_block = on_block
        self._results: dict[int, GenerationResult] = {}
        for index, prompt in enumerate(prompts):
            try:
                check_request(runner.arch, prompt, config)
            except ValueError as error:
                where = f"prompt {index}: " if len(prompts) > 1 else ""
                raise ValueError(f"{where}{error}") from error
        self._running = [
            DecodedSequence(index, prompt, config, request_generator(config.seed, key, mesh.device))
            for index, (prompt, key) in enumerate(zip(prompts, request_ids, strict=True))
        ]
        longest = max((len(prompt) for prompt in prompts), default=0) + config.max_new_tokens
        block_length = config.block_length
        capacity = -(-longest // block_length) * block_length
        self._cache = KeyValueCache(len(prompts), capacity)

    def run(self) -> list[GenerationResult]:
        self._read_prompts()
        while self._running:
            self._reveal()
        return [self._results[index] for index in range(len(self._results))]

    def _read_prompts(self) -> None:
        """Whole blocks of the prompts, several prompts in a forward, a long one in several."""
        block_length = self._config.block_length
        piece = max(1, PROMPT_TOKENS // block_length) * block_length
        first = 0
        while first < len(self._running):
            todo = [sequence.block_start - sequence.num_final for sequence in self._running[first:]]
            if todo[0] == 0:
                first += 1
                continue
            # Sequences are padded to the longest one of their forward.
            number, width = 0, 0
            while number < len(todo) and todo[number] > 0:
                width = max(width, min(todo[number], piece))
                if number > 0 and width * (number + 1) > piece:
                    break
                number += 1
            batch = self._running[first : first + number]
            parts = [
                sequence.tokens[sequence.num_final : sequence.block_start][:piece]
                for sequence in batch
            ]
            starts = [sequence.num_final for sequence in batch]
            self._runner.read(self._cache, TokenRuns(first, starts, parts, block_length))
            for sequence, part in zip(batch, parts, strict=True):
                sequence.num_final += len(part)

    def _reveal(self) -> None:
        """One forward of all sequences, and what it reveals of each one's block."""
        config, running = self._config, self._running
        blocks_NB = torch.tensor([each.block for each in running], device=self._mesh.device)
        unknown_NB = blocks_NB == config.mask_token_id
        starts = [sequence.num_final for sequence in running]
        parts = [sequence.pending for sequence in running]
        runs = TokenRuns(0, starts, parts, config.block_length)
        logits = self._runner.logits(self._cache, runs, unknown_NB)
        if logits is not None:
            self._choose(logits, blocks_NB, unknown_NB)
        spread_from_last_stage(blocks_NB, self._mesh)
        blocks = cast(list[list[int]], blocks_NB.tolist())
        if blocks[0][0] == _DAMAGED:
            raise damaged_logits()
        for sequence, block in zip(running, blocks, strict=True):
            new = sequence.advance(block)
            if new is not None and self._on_block is not None:
                self._on_block(sequence.index, new)
        self._dismiss()

    def _choose(self, logits_MV: Tensor, blocks_NB: Tensor, unknown_NB: Tensor) -> None:
        """Write what these logits of all unknown positions reveal into the blocks."""
        if not are_finite(logits_MV):
            blocks_NB.fill_(_DAMAGED)
            return
        counts = unknown_NB.sum(dim=1).tolist()
        generators = [sequence.generator for sequence in self._running]
        tokens, confidences = candidates(logits_MV, counts, self._config, generators)
        shares = [sequence.share for sequence in self._running]
        chosen = revealed(confidences, unknown_NB, shares, self._config)
        blocks_NB[chosen] = tokens[chosen[unknown_NB]]

    def _dismiss(self) -> None:
        """Sequences that ended leave; the last ones take their slots."""
        for slot in reversed(range(len(self._running))):
            sequence = self._running[slot]
            if not sequence.is_over:
                continue
            self._results[sequence.index] = sequence.result
            last = self._running.pop()
            if last is not sequence:
                self._cache.move(len(self._running), slot)
                self._running[slot] = last
