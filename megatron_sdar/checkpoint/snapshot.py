"""What one checkpoint will hold, as it is at one step, and its copy in host memory.

A snapshot refers to the live weights and moments; `HostCopies.fill` gives one that later steps
cannot change. Invariant: the tensors of both are DTensors of the same layout, so what is written
does not depend on which of them is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.cuda._pin_memory_utils import pin_memory, unpin_memory
from torch.distributed.tensor import DTensor

from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.optim.adamw import ShardedAdamW
from megatron_sdar.parallel.sharding import like_parameter, local_tensor

_ALIGNMENT = 64


@dataclass(frozen=True)
class Snapshot:
    """This rank's part of a checkpoint.

    Attributes:
        step: optimizer steps done.
        weights: parameters by name.
        moments: by name; None leaves them out (save_only_model).
        state: JSON-able; shares nothing with whom it was taken from.
    """

    step: int
    weights: Mapping[str, DTensor]
    moments: Mapping[str, DTensor] | None
    state: Mapping[str, Any]

    @property
    def tensors(self) -> dict[str, DTensor]:
        return {**self.weights, **(self.moments or {})}


def parameters_of(stages: Sequence[SdarStage]) -> dict[str, DTensor]:
    """This rank's parameters by name."""
    parameters: dict[str, DTensor] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert isinstance(parameter, DTensor), f"{name} is not distributed"
            parameters[name] = parameter
    return parameters


def stored_parameters(stages: Sequence[SdarStage]) -> dict[str, DTensor]:
    """Those that a checkpoint of the run holds: with LoRA what is trained, else all."""
    stores = stages[0].options.finetuning.stores
    return {name: tensor for name, tensor in parameters_of(stages).items() if stores(name)}


def take_snapshot(
    step: int,
    stages: Sequence[SdarStage],
    optimizer: ShardedAdamW | None,
    state: Mapping[str, Any],
) -> Snapshot:
    """A snapshot whose tensors are the live ones.

    Args:
        optimizer: None leaves the moments out.
        state: numbers that are not finite become null, for JSON has none.
    """
    moments = None if optimizer is None else optimizer.moments()
    return Snapshot(step, stored_parameters(stages), moments, _finite(state))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class HostCopies:
    """Host memory for the tensors of one snapshot, allocated once and filled again and again.

    It is touched (or, for a GPU's tensors, pinned) when it is made, so that no later copy pays
    for page faults. One piece holds all tensors: the caching allocator of pinned memory would
    round each up to a power of two.

    Args:
        like: a snapshot with the same tensors as those to come.
        pinned: whether they lie on a GPU.

    Attributes:
        num_bytes: its size.

    Raises:
        ValueError: there is not as much memory.
    """

    def __init__(self, like: Snapshot, pinned: bool) -> None:
        starts: dict[str, int] = {}
        self.num_bytes = 0
        for name, tensor in like.tensors.items():
            starts[name] = self.num_bytes
            size = local_tensor(tensor).nbytes
            self.num_bytes += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._pinned = pinned
        self._memory = _allocate(self.num_bytes, pinned)
        self._copies = {}
        for name, tensor in like.tensors.items():
            local = local_tensor(tensor)
            piece = self._memory[starts[name] : starts[name] + local.nbytes]
            self._copies[name] = piece.view(local.dtype).view(local.shape)

    def fill(self, snapshot: Snapshot) -> Snapshot:
        """Copy the tensors; the result is the same snapshot over this memory.

        Valid until the next call.
        """
        with torch.no_grad():
            for name, tensor in snapshot.tensors.items():
                self._copies[name].copy_(local_tensor(tensor), non_blocking=True)
        if self._pinned:
            torch.cuda.current_stream().synchronize()
        moments = None if snapshot.moments is None else self._wrapped(snapshot.moments)
        return replace(snapshot, weights=self._wrapped(snapshot.weights), moments=moments)

    def _wrapped(self, tensors: Mapping[str, DTensor]) -> dict[str, DTensor]:
        return {name: like_parameter(self._copies[name], like) for name, like in tensors.items()}

    def release(self) -> None:
        """Give the memory back; snapshots over it are invalid from now on."""
        if self._pinned:
            unpin_memory(self._memory.data_ptr())
        self._copies = {}
        self._memory = torch.empty(0, dtype=torch.uint8)


def _allocate(num_bytes: int, pinned: bool) -> torch.Tensor:
    try:
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        if pinned:
            pin_memory(memory.data_ptr(), num_bytes)
        else:
            memory.zero_()
    except RuntimeError as error:
        raise ValueError(
            f"async_save: cannot get {num_bytes / 1e9:.1f} GB of host memory for a copy of what "
            f"this process saves ({str(error).splitlines()[0]}); set async_save: false"
        ) from error
    return memory
