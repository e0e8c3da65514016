"""Weights of datasets written as text: interleave_probs and blend_weights.

Owns their form; what they must add up to is said where they are used.
"""


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
    segments = []
    for part in text.split(";"):
        weights, at, step = part.partition("@")
        if at and not step.strip().isdecimal():
            raise ValueError(
                f"blend_weights: {part.strip()!r} must end in the step its weights begin at, "
                "such as 0.7,0.3 @1000"
            )
        segments.append((int(step) if at else 0, parse_numbers("blend_weights", weights)))
    steps = [step for step, _ in segments]
    if steps[0] != 0 or steps != sorted(set(steps)):
        raise ValueError(
            f"blend_weights: the weights begin at steps {steps}; the first must begin at 0 "
            "(no @), later ones at higher and higher steps"
        )
    return segments
