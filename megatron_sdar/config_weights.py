"""Values written as text: interleave_probs, and what changes at a step, such as blend_weights.

Owns their form; what they must add up to is said where they are used.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

Value = TypeVar("Value")


def parse_numbers(key: str, text: str) -> list[float]:
    """Numbers with commas between them, such as `0.7,0.3`. Raises ValueError naming KEY."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"{key}: {text.strip()!r} is not a list of numbers such as 0.7,0.3"
        ) from error


def parse_blend(text: str) -> list[tuple[int, list[float]]]:
    """(step, weights from that step on) of `0.7,0.3; 0.5,0.5 @1000`.

    Raises ValueError when a part is not of that form, or when the steps do not ascend from 0.
    """
    return _parse_steps(
        "blend_weights",
        text,
        "weights begin",
        "0.7,0.3",
        lambda part: parse_numbers("blend_weights", part),
    )


def parse_block_lengths(text: str) -> list[tuple[int, int]]:
    """(step, block length from that step on) of `4; 8 @1000; 16 @3000`.

    Raises ValueError when a part is not of that form, when the steps do not ascend from 0, or
    when a length is not a multiple of the one before.
    """
    name = "block_length_schedule"
    phases = _parse_steps(name, text, "block length begins", "8", _parse_block_length)
    lengths = [length for _, length in phases]
    if any(later <= first or later % first for first, later in pairwise(lengths)):
        raise ValueError(
            f"{name}: the block lengths {lengths} must grow, each a multiple of the one before, "
            "such as 4; 8 @1000; 16 @3000"
        )
    return phases


def _parse_block_length(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(
            f"block_length_schedule: {text.strip()!r} is not a block length; write "
            "4; 8 @1000; 16 @3000"
        )
    return int(text)


def _parse_steps(
    key: str, text: str, clause: str, example: str, parse: Callable[[str], Value]
) -> list[tuple[int, Value]]:
    """(step, value from that step on) of `VALUE; VALUE @STEP; ...`.

    `clause` says what begins, such as "weights begin", and `example` what a value looks like.
    """
    segments = []
    for part in text.split(";"):
        value, at, step = part.partition("@")
        if at and not step.strip().isdecimal():
            raise ValueError(
                f"{key}: {part.strip()!r} must end in the step its {clause} at, "
                f"such as {example} @1000"
            )
        segments.append((int(step) if at else 0, parse(value)))
    steps = [step for step, _ in segments]
    if steps[0] != 0 or steps != sorted(set(steps)):
        raise ValueError(
            f"{key}: the {clause} at steps {steps}; the first must begin at 0 "
            "(no @), later ones at higher and higher steps"
        )
    return segments
