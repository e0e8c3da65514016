"""Experts of a layer: one tensor per expert outside, two tensors for all of them inside.

Published models have `experts.{e}.{gate,up,down}_proj.weight`, 18,432 small tensors in the 30B-A3B.
Native checkpoints hold them as a grouped product wants them, with the names and shapes that
transformers uses in memory: `experts.gate_up_proj` [experts, 2 * inter, hidden] (gate above up)
and `experts.down_proj` [experts, hidden, inter]. Here is which piece lies where.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sdar.checkpoint.safetensors_files import Ranges

GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
_PUBLISHED = re.compile(
    r"(?P<prefix>.*\.)experts\.(?P<expert>\d+)\.(?P<kind>gate|up|down)_proj\.weight"
)
_FUSED = re.compile(r"(?P<prefix>.*\.)experts\.(?P<kind>gate_up|down)_proj")


@dataclass(frozen=True)
class ExpertPlace:
    """Where a published tensor lies in the fused one.

    Attributes:
        fused: name of the fused tensor.
        expert: index along its dim 0.
        is_up: whether its rows lie behind those of the gate.
    """

    fused: str
    expert: int
    is_up: bool

    def ranges(self, ranges: Ranges, inter: int) -> Ranges:
        """Those of the fused tensor for `ranges` of the published one; inter rows are a gate."""
        rows, columns = ranges
        start = inter if self.is_up else 0
        moved = slice(rows.start + start, rows.stop + start)
        return slice(self.expert, self.expert + 1), moved, columns


def expert_place(name: str) -> ExpertPlace | None:
    """The place of a published tensor; None when it is not an expert's."""
    match = _PUBLISHED.fullmatch(name)
    if match is None:
        return None
    fused = DOWN if match["kind"] == "down" else GATE_UP
    return ExpertPlace(f"{match['prefix']}{fused}", int(match["expert"]), match["kind"] == "up")


def published_parts(name: str, num_experts: int) -> list[str]:
    """The published tensors that the stored one `name` consists of (itself, where not fused)."""
    match = _FUSED.fullmatch(name)
    if match is None:
        return [name]
    kinds = ("down",) if match["kind"] == "down" else ("gate", "up")
    return [
        f"{match['prefix']}experts.{expert}.{kind}_proj.weight"
        for expert in range(num_experts)
        for kind in kinds
    ]


def read_fused(
    name: str, ranges: Ranges, inter: int, read: Callable[[str, Ranges], Tensor]
) -> Tensor:
    """A slice of the stored tensor `name`, gathered from published ones.

    Args:
        ranges: of the fused tensor; any slice (of a tensor that is not fused, too).
        inter: moe_intermediate_size, the rows of a gate.
        read: gives a slice of a published tensor.
    """
    match = _FUSED.fullmatch(name)
    if match is None:
        return read(name, ranges)
    experts, rows, columns = ranges
    kinds = ("down",) if match["kind"] == "down" else ("gate", "up")
    whole: list[Tensor] = []
    for expert in range(experts.start, experts.stop):
        pieces = []
        for index, kind in enumerate(kinds):
            start = index * inter
            end = start + inter if len(kinds) > 1 else rows.stop
            first, last = max(rows.start, start), min(rows.stop, end)
            if first < last:
                published = f"{match['prefix']}experts.{expert}.{kind}_proj.weight"
                pieces.append(read(published, (slice(first - start, last - start), columns)))
        whole.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces))
    return torch.stack(whole)
