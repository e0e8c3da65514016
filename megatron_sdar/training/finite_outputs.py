"""Where in the forward numbers stop being finite: hooks on the modules of this rank's stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.parallel.sharding import local_tensor


@dataclass(frozen=True, order=True)
class ModuleFinding:
    """A module whose output is not finite, though its inputs are.

    Ordered as the forward runs.

    Attributes:
        layer: first decoder layer of its stage.
        call: how many of the stage's modules were called before.
        name: global name; that of a whole stage says so.
    """

    layer: int
    call: int
    name: str


class OutputWatch:
    """Remembers the first such module until it is asked."""

    def __init__(self, stages: Sequence[SdarStage]) -> None:
        self._stages = stages
        self._calls = 0
        self._first: ModuleFinding | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Forwards in here are watched; each module's inputs and outputs are read for that."""
        handles: list[RemovableHandle] = []
        for stage in self._stages:
            for name, module in stage.named_modules():
                handles.append(self._watch(stage, module, name))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> ModuleFinding | None:
        """The first module since the last call, if there is one."""
        found, self._first, self._calls = self._first, None, 0
        return found

    def _watch(self, stage: SdarStage, module: nn.Module, name: str) -> RemovableHandle:
        layer, is_last = stage.stage.start, stage.stage.is_last
        shown = name or ("the last stage (final norm, head, loss)" if is_last else "a stage")

        def check(module: nn.Module, inputs: Any, output: Any) -> None:
            del module
            self._calls += 1
            if self._first is None and not is_finite(output) and is_finite(inputs):
                self._first = ModuleFinding(layer, self._calls, shown)

        return module.register_forward_hook(check)


def is_finite(value: Any) -> bool:
    """Whether all floating-point tensors in it are; of a tuple, in each of its items."""
    if isinstance(value, tuple):
        return all(map(is_finite, value))
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return True
    return bool(torch.isfinite(local_tensor(value.detach())).all())


def not_finite_parameters(stages: Sequence[nn.Module]) -> list[str]:
    """Names of this rank's parameters with an element that is not finite."""
    return [
        name
        for stage in stages
        for name, parameter in stage.named_parameters()
        if not is_finite(parameter.detach())
    ]
