"""Presets: choices of the noise, the loss and the rows that belong together, each with its source.

A preset fills in keys that are not given; a key that is given keeps its value. What a preset chose
is in the resolved configuration, so a checkpoint does not depend on what the preset means later.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """One key of a preset, its value and where the value comes from."""

    key: str
    value: object
    source: str


_SDAR = "SDAR's published training code (arXiv 2510.06303)"
_EXACT = "the published gradient with less work (DESIGN.md, What the step leaves out)"
_MEASURED = "least loss on held-out documents, toy scale (LOG.md)"
_BOUND = "the weight of the likelihood bound (MDLM, arXiv 2406.07524)"

PRESETS: Mapping[str, tuple[Choice, ...]] = {
    "paper": (
        Choice("semantics", "paper", _SDAR),
        Choice("noise_level_per", "document", _SDAR),
        Choice("noise_sampling", "uniform", _SDAR),
        Choice("noise_eps", 1e-3, _SDAR),
        Choice("noise_low", None, _SDAR),
        Choice("noise_high", 1.0, _SDAR),
        Choice("loss_weight", "inverse_p", _SDAR),
        Choice("block_padding_labels", "learn", _SDAR),
        Choice("loss_normalization", "llamafactory", "LLaMA-Factory's trainer, as SDAR uses it"),
        Choice("packing_algorithm", "llamafactory", "LLaMA-Factory's packing, as SDAR uses it"),
    ),
    "recommended": (
        Choice("semantics", "exact", _EXACT),
        Choice("noise_level_per", "block", f"BD3-LM (arXiv 2503.09573); {_MEASURED}"),
        Choice("noise_sampling", "stratified", f"VDM (arXiv 2107.00630); {_MEASURED}"),
        Choice("noise_low", 0.1, f"clipped as in BD3-LM (arXiv 2503.09573); {_MEASURED}"),
        Choice("noise_high", 1.0, "generation begins with blocks of masks only"),
        Choice("loss_weight", "inverse_p", _BOUND),
        Choice("block_padding_labels", "learn", _SDAR),
        Choice("loss_normalization", "global", "one denominator whatever the layout (DESIGN.md)"),
        Choice("packing_algorithm", "exact_fill", "as few rows as can be (DESIGN.md)"),
    ),
}


def fill_preset(values: dict[str, object]) -> None:
    """Add what the preset in VALUES chooses for keys that are not in it, in place."""
    for choice in PRESETS.get(str(values.get("preset")), ()):
        values.setdefault(choice.key, choice.value)


def describe_preset(values: Mapping[str, object]) -> str | None:
    """What the preset of a whole flat configuration chose and what was given instead."""
    choices = PRESETS.get(str(values["preset"]), ())
    if not choices:
        return None
    kept = [
        f"{each.key} {_shown(each.value)}" for each in choices if values[each.key] == each.value
    ]
    changed = [
        f"{each.key} {_shown(values[each.key])} instead of {_shown(each.value)}"
        for each in choices
        if values[each.key] != each.value
    ]
    given = f"; given: {', '.join(changed)}" if changed else ""
    return f"preset {values['preset']}: {', '.join(kept)}{given}"


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
