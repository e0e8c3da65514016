"""Cross-entropy of rows of logits in torch: their statistics, and their gradient in their place."""

from __future__ import annotations

import torch
from torch import Tensor

_TILE_ELEMENTS = {"cpu": 2**18}
_LARGE_TILE_ELEMENTS = 2**25


def row_statistics_torch(
    logits_MV: Tensor, targets_M: Tensor, wide: torch.dtype, *, in_place: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum, sum of exp(logit - maximum) and target logit of each row, in `wide`.

    Targets outside [0, V) have target logit 0. in_place leaves exp(logit - maximum) where the
    logits were, which must have the dtype `wide`.
    """
    assert not in_place or logits_MV.dtype == wide, "exponentials would be rounded"
    inside, columns = _target_columns(targets_M, logits_MV.shape[1])
    target = logits_MV.gather(1, columns.unsqueeze(-1)).squeeze(-1).to(wide)
    peak = logits_MV.amax(dim=-1).to(wide)
    normalizer = torch.empty_like(peak)
    for rows in _tiles(logits_MV):
        tile, top = logits_MV[rows], peak[rows].unsqueeze(-1)
        shifted = tile.sub_(top) if in_place else tile.to(wide) - top
        torch.sum(shifted.exp_(), dim=-1, out=normalizer[rows])
    return peak, normalizer, torch.where(inside, target, 0.0)


def write_gradient_torch(
    logits_MV: Tensor, targets_M: Tensor, peak_M: Tensor, scale_M: Tensor, weights_M: Tensor
) -> None:
    """Replace logits by exp(logit - peak) * scale - weight * onehot(target), in place."""
    inside, columns = _target_columns(targets_M, logits_MV.shape[1])
    hits = torch.where(inside, weights_M, 0.0).unsqueeze(-1)
    for rows in _tiles(logits_MV):
        tile = logits_MV[rows]
        values = tile.to(peak_M.dtype)
        values.sub_(peak_M[rows].unsqueeze(-1)).exp_().mul_(scale_M[rows].unsqueeze(-1))
        values.scatter_add_(1, columns[rows].unsqueeze(-1), -hits[rows])
        if values is not tile:
            tile.copy_(values)


def scale_exponentials(
    values_MV: Tensor, targets_M: Tensor, scale_M: Tensor, weights_M: Tensor
) -> None:
    """As `write_gradient_torch`, of exponentials that `row_statistics_torch` left in place."""
    inside, columns = _target_columns(targets_M, values_MV.shape[1])
    hits = torch.where(inside, weights_M, 0.0).unsqueeze(-1)
    values_MV.mul_(scale_M.unsqueeze(-1)).scatter_add_(1, columns.unsqueeze(-1), -hits)


def _target_columns(targets: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in [0, num_columns), and each target moved into that range."""
    return (targets >= 0) & (targets < num_columns), targets.clamp(0, num_columns - 1)


def _tiles(logits: Tensor) -> list[slice]:
    """Rows to be processed together: on a CPU as many as stay in its cache between passes."""
    elements = _TILE_ELEMENTS.get(logits.device.type, _LARGE_TILE_ELEMENTS)
    step = max(1, elements // logits.shape[1])
    return [slice(start, start + step) for start in range(0, logits.shape[0], step)]
