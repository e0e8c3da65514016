"""The reference sampler: block-by-block decoding of one answer without a K/V cache.

Blocks lie where training puts them: at multiples of the block length counted from the first
prompt token. The block that the prompt ends in keeps its prompt tokens and gets mask tokens
behind them. Every forward runs [finished blocks ; current block], so it computes exactly what a
noisy block saw in training: the clean blocks before it, and itself in both directions. Slow and
plain: `decoder.generate_batch` is what is used, and is held to these tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from sdar_kernels.block_mask import AttentionMask
from torch import Tensor

from megatron_sdar.generation.choice import (
    are_finite,
    candidates,
    damaged_logits,
    request_generator,
    revealed,
)
from megatron_sdar.generation.sampler_config import (
    GenerationResult,
    SamplerConfig,
    check_request,
)
from megatron_sdar.model.batch import DeviceBatch
from megatron_sdar.model.sdar import SdarStage


@torch.no_grad()
def generate(
    stage: SdarStage,
    prompt_ids: Sequence[int],
    config: SamplerConfig,
    on_block: Callable[[tuple[int, ...]], None] | None = None,
    request_id: int = 0,
) -> GenerationResult:
    """Decode one answer.

    Args:
        stage: the whole model as one stage (one process, tp 1).
        prompt_ids: may be empty, and may end inside a block.
        config: see SamplerConfig.
        on_block: called with the answer's new tokens after each block.
        request_id: what the draws are keyed by, beside config.seed.

    Raises:
        ValueError: for a prompt that the model cannot read or continue, and when the model
            gives logits that are not finite.
    """
    assert stage.stage.is_first, "the sampler needs the whole model"
    assert stage.stage.is_last, "the sampler needs the whole model"
    assert stage.tp.size() == 1, "the sampler runs in one process"
    check_request(stage.arch, prompt_ids, config)
    generator = request_generator(config.seed, request_id, stage.lm_head.weight.device)
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
    batch = sequence_batch(ids, config.block_length).at(np.arange(known, end))
    num_forwards = 0
    for share in config.step_shares:
        logits = stage(None, batch, return_logits=True)[unknown - known]
        num_forwards += 1
        if not are_finite(logits):
            raise damaged_logits()
        tokens, confidences = candidates(logits, [len(unknown)], config, [generator])
        every = torch.ones_like(unknown, dtype=torch.bool).unsqueeze(0)
        chosen = revealed(confidences, every, [share], config).squeeze(0)
        # The batch reads this very tensor, so the next forward sees the revealed tokens.
        ids[unknown[chosen]] = tokens[chosen]
        unknown = unknown[~chosen]
        if unknown.numel() == 0:
            break
    assert unknown.numel() == 0, "the shares sum to the block length"
    return ids[known:].tolist(), num_forwards


def sequence_batch(ids: Tensor, block_length: int) -> DeviceBatch:
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
