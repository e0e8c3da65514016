"""Which tokens a forward's logits reveal: candidates, their confidences, and the chosen ones.

Everything is row by row, so a choice depends on its own logits and its own sequence's draws,
never on what else is in the batch. Shapes: M unknown positions of N sequences, V token ids, B
positions of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sdar.generation.sampler_config import SamplerConfig

# Confidences are compared in steps of 2^-16. Positions that see the same (all of an empty prompt's
# first block do) have equal confidences, and rounding, which depends on batch and layout, must not
# decide between them.
_CONFIDENCE_STEPS = 2.0**16
# Weyl's constant: odd, so all requests below 2^32 differ in the 32 bits that a CPU generator takes.
_SEED_STRIDE = 0x9E3779B97F4A7C15


def request_generator(seed: int, request_id: int, device: torch.device) -> torch.Generator:
    """The generator of one request's draws; request 0 has the seed itself."""
    return torch.Generator(device).manual_seed((seed + request_id * _SEED_STRIDE) % 2**63)


def are_finite(logits: Tensor) -> bool:
    """Whether there is neither NaN nor infinity."""
    return bool(torch.isfinite(logits).all())


def damaged_logits() -> ValueError:
    """What the user is told of logits that are not finite."""
    return ValueError(
        "the model's logits are not finite (NaN or infinity): its weights are damaged, or "
        "too large for this dtype; check the weights or compute in float32"
    )


def candidates(
    logits_MV: Tensor,
    counts: Sequence[int],
    config: SamplerConfig,
    generators: Sequence[torch.Generator],
) -> tuple[Tensor, Tensor]:
    """For each unknown position a token [M] and its probability [M], fp32 or wider.

    Args:
        logits_MV: finite; positions of one sequence lie together.
        counts: unknown positions of each sequence; they sum to M.
        generators: of each sequence's draws; not used at temperature 0.
    """
    logits = logits_MV if logits_MV.dtype == torch.float64 else logits_MV.float()
    mask_token = torch.tensor([config.mask_token_id], device=logits.device)
    logits = logits.index_fill(1, mask_token, -torch.inf)
    logits = logits - logits.amax(dim=-1, keepdim=True)
    probabilities = logits.softmax(dim=-1)
    if config.temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:
        # With the largest logit at 0 a tiny temperature cannot overflow.
        kept = _cut(logits / config.temperature, config.top_k, config.top_p).softmax(dim=-1)
        drawn = [
            torch.multinomial(rows, 1, generator=generator)
            for rows, generator in zip(kept.split(list(counts)), generators, strict=True)
        ]
        tokens = torch.cat(drawn).squeeze(-1)
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


def revealed(
    confidences_M: Tensor, unknown_NB: Tensor, shares: Sequence[int], config: SamplerConfig
) -> Tensor:
    """bool [N, B]: the unknown positions that become known.

    Args:
        confidences_M: of the unknown positions, row after row.
        unknown_NB: which positions are unknown.
        shares: how many tokens each sequence's step reveals at least, most confident first; the
            earlier one of equals.
    """
    confidences_NB = confidences_M.new_full(unknown_NB.shape, -1.0)
    confidences_NB[unknown_NB] = confidences_M
    compared = (confidences_NB * _CONFIDENCE_STEPS).round()
    ranks = compared.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    chosen = ranks < torch.tensor(shares, device=ranks.device).unsqueeze(1)
    if config.remasking == "dynamic":
        chosen |= confidences_NB > config.confidence_threshold
    return chosen & unknown_NB
