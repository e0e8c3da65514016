"""Do all ranks that hold a copy of a weight hold the same bits?

Copies are parameters (or shards of them) that lie on several ranks: over dp_replicate, over tp
where a layer is not split, and a tied weight's two copies. They stay equal only as long as every
rank adds the same update, which a faulty device or a forgotten reduction ends without a sound.
Invariant: the hash depends on bits and their places alone, not on device or order of summation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron_sdar.parallel.launch import gather_from_all
from megatron_sdar.parallel.mesh import ParallelMesh
from megatron_sdar.parallel.sharding import local_ranges, local_tensor

_CHUNK = 1 << 20
_MULTIPLIER = 0x5851F42D4C957F2D
_NON_NEGATIVE = (1 << 63) - 1
_ABSENT = -1
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Name of the parameter, and first and last index of the shard on every dim.
Shard = tuple[str, tuple[tuple[int, int], ...]]


@dataclass(frozen=True)
class UnequalCopies:
    """A shard of which ranks hold different bits; `hashes` by rank."""

    name: str
    hashes: Mapping[int, int]

    def describe(self) -> str:
        by_hash: dict[int, list[int]] = {}
        for rank, value in self.hashes.items():
            by_hash.setdefault(value, []).append(rank)
        groups = " and ".join(
            f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
            for ranks in by_hash.values()
        )
        return f"{self.name} differs between {groups}"


class WeightCopies:
    """The copies of a model's weights, found once and compared when asked.

    Args:
        parameters: this rank's, by global name.
        same: names that mean another parameter: a tied head's the embedding.

    Attributes:
        num_shared: shards that several ranks hold.

    Collective: all_gather_object (world).
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        mesh: ParallelMesh,
        same: Mapping[str, str] | None = None,
    ) -> None:
        self._mesh = mesh
        renamed = same or {}
        own: dict[Shard, Tensor] = {}
        for name, parameter in parameters.items():
            assert isinstance(parameter, DTensor), f"{name} is not distributed"
            if local_tensor(parameter).numel():
                ranges = tuple((part.start, part.stop) for part in local_ranges(parameter))
                own[(renamed.get(name, name), ranges)] = local_tensor(parameter).detach()
        holders: dict[Shard, int] = {}
        for shards in gather_from_all(list(own), mesh):
            for shard in shards:
                holders[shard] = holders.get(shard, 0) + 1
        self._shards = sorted(shard for shard, count in holders.items() if count > 1)
        self._own = [own.get(shard) for shard in self._shards]
        self._weights = _place_weights(mesh.device)

    @property
    def num_shared(self) -> int:
        return len(self._shards)

    def differences(self) -> list[UnequalCopies]:
        """Shards whose copies differ; the same on every rank.

        Collective: all_reduce of two numbers per shard (world); where something differs,
        all_gather_object (world).
        """
        if not self._shards:
            return []
        device = self._mesh.device
        absent = torch.full((), _ABSENT, dtype=torch.int64, device=device)
        hashes = torch.stack(
            [absent if shard is None else bit_hash(shard, self._weights) for shard in self._own]
        )
        # One maximum gives both ends: the largest hash, and the smallest as minus the largest of
        # its negative. Who holds no copy takes no part in either.
        lowest = torch.where(hashes == _ABSENT, -_NON_NEGATIVE - 1, -hashes)
        ends = torch.cat((hashes, lowest))
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        largest, smallest = ends[: len(hashes)], -ends[len(hashes) :]
        different = torch.nonzero(largest != smallest).flatten().tolist()
        if not different:
            return []
        return self._name(different, hashes.tolist())

    def _name(self, different: Sequence[int], hashes: Sequence[int]) -> list[UnequalCopies]:
        everyones = gather_from_all([hashes[place] for place in different], self._mesh)
        return [
            UnequalCopies(
                self._shards[place][0],
                {
                    rank: theirs[number]
                    for rank, theirs in enumerate(everyones)
                    if theirs[number] != _ABSENT
                },
            )
            for number, place in enumerate(different)
        ]


def bit_hash(tensor: Tensor, weights: Tensor | None = None) -> Tensor:
    """A number of 63 bits for the bits of a tensor, int64 scalar on its device.

    Every element's bits are multiplied by an odd number of its place and summed modulo 2^64:
    one flipped bit always shows, other differences but with a chance of about 2^-63.

    Args:
        weights: from an earlier call's device; None makes them.
    """
    if weights is None:
        weights = _place_weights(tensor.device)
    words = tensor.contiguous().view(-1).view(_WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in words.split(_CHUNK):
        places = weights[: chunk.numel()]
        total = total * _MULTIPLIER + (chunk.to(torch.int64) * places).sum()
    # A flipped sign of a float64 may change the highest bit alone, which is cut off: fold it in.
    return (total ^ (total >> 63)) & _NON_NEGATIVE


def _place_weights(device: torch.device) -> Tensor:
    """Odd int64 [_CHUNK] that look random: splitmix64 of the place."""
    mixed = torch.arange(1, _CHUNK + 1, dtype=torch.int64, device=device) * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ (mixed >> 27)) * -0x6B2FB644ECCEEE15
    return (mixed ^ (mixed >> 31)) | 1
