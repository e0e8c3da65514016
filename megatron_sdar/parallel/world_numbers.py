"""A few numbers of every rank, known to all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def gather_numbers(values: Sequence[float], device: torch.device) -> list[list[float]]:
    """Every rank's numbers, by rank, in float64; as many on each rank.

    No rank returns before all have come.

    Collective: all_gather_single (world), on the device.
    """
    own = torch.tensor(values, dtype=torch.float64, device=device)
    everyones = torch.empty(dist.get_world_size() * len(values), dtype=own.dtype, device=device)
    dist.all_gather_single(everyones, own)
    rows: list[list[float]] = everyones.view(-1, len(values)).tolist()
    return rows
