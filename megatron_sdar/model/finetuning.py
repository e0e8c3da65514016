"""Which weights of a model are trained, and which a checkpoint of the run holds.

A pure function of a parameter's global name, so that every rank and every layout agree without
asking. Invariant: with LoRA exactly the trained weights are stored, otherwise all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_sdar.parallel.lora import LoraOptions

DOWN, UP = "lora_A", "lora_B"
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(\w+)")


@dataclass(frozen=True)
class Finetuning:
    """What is trained of a model.

    Attributes:
        lora: low-rank updates beside frozen weights; None: weights themselves are trained.
        layers: decoder layers whose weights are trained; None: all. LoRA trains none.
        parts: what of these layers, such as self_attn; None: everything.
        extra: modules outside the layers that are trained; None: all. Norm stands for those in
            the layers too.
    """

    lora: LoraOptions | None = None
    layers: range | None = None
    parts: frozenset[str] | None = None
    extra: frozenset[str] | None = None

    @property
    def _trains_norms(self) -> bool:
        """Of every layer: LLaMA-Factory and PEFT look for names that hold or end in "norm"."""
        return "norm" in (self.extra or ())

    def trains(self, name: str) -> bool:
        """Whether the parameter of this name is trained."""
        place = _IN_LAYER.match(name)
        if place is None:
            return self.extra is None or name.split(".")[-2] in self.extra
        if self._trains_norms and name.endswith("norm.weight"):
            return True
        if self.lora is not None:
            return is_factor(name)
        in_layers = self.layers is None or int(place[1]) in self.layers
        return in_layers and (self.parts is None or place[2] in self.parts)

    def trains_before(self, layer: int) -> bool:
        """Whether anything in front of this decoder layer (0 is the first) is trained."""
        if self.trains("model.embed_tokens.weight"):
            return True
        if self.lora is not None or self.layers is None or self._trains_norms:
            return layer > 0
        return bool(self.layers) and self.layers[0] < layer

    def stores(self, name: str) -> bool:
        """Whether a checkpoint holds the parameter of this name."""
        return self.lora is None or self.trains(name)

    def adapted(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """A model's shapes by name, with those of the low-rank factors."""
        if self.lora is None:
            return dict(shapes)
        factors = {}
        for name, shape in shapes.items():
            module = name.removesuffix(".weight")
            if module.split(".")[-1] in self.lora.targets:
                factors[f"{module}.{DOWN}.weight"] = (self.lora.rank, shape[1])
                factors[f"{module}.{UP}.weight"] = (shape[0], self.lora.rank)
        return {**shapes, **factors}


EVERYTHING = Finetuning()


def is_factor(name: str) -> bool:
    """Whether this is the name of a low-rank factor."""
    return name.endswith((f".{DOWN}.weight", f".{UP}.weight"))
