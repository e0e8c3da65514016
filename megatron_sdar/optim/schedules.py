"""Learning-rate schedules as one pure function of the step, with transformers' formulas.

The multiplier of step s (counted from 0) scales the peak learning rate for the update that
follows; during warm-up it starts at 0, as there. No state: a resumed run asks for the step it
is at.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Span:
    """What every schedule is evaluated at."""

    step: int
    total: int
    warmup: int
    learning_rate: float | None

    @property
    def progress(self) -> float:
        """Fraction of the steps after warm-up that is done; 0 at the end of warm-up."""
        return (self.step - self.warmup) / max(1, self.total - self.warmup)

    def peak(self, reason: str) -> float:
        if self.learning_rate is None:
            raise ValueError(f"{reason} is absolute: lr_multiplier needs learning_rate")
        return self.learning_rate


def lr_multiplier(
    name: str,
    step: int,
    total_steps: int,
    warmup_steps: int,
    kwargs: Mapping[str, Any],
    learning_rate: float | None = None,
) -> float:
    """Return the factor on the peak learning rate at `step` (0-based).

    `kwargs` are transformers' arguments of the schedule. `learning_rate`, the peak, is needed
    by the schedules with an absolute floor only: polynomial (lr_end) and cosine_with_min_lr or
    cosine_warmup_with_min_lr with min_lr. ValueError names an unknown schedule or argument and
    the ones that exist.
    """
    if name not in _SCHEDULES:
        raise ValueError(f"lr_scheduler_type: {name!r} is unknown; use {', '.join(_SCHEDULES)}")
    schedule = _SCHEDULES[name]
    known = list(inspect.signature(schedule).parameters)[1:]
    for key, value in kwargs.items():
        if key not in known:
            takes = ", ".join(known) or "no arguments"
            raise ValueError(f"lr_scheduler_kwargs: {name} has no {key!r}; it takes {takes}")
        is_text = key.endswith("_type")
        if type(value) not in ((str,) if is_text else (int, float)):
            wanted = "text" if is_text else "a number"
            raise ValueError(f"lr_scheduler_kwargs: {key} is {value!r}; it must be {wanted}")
    return schedule(_Span(step, total_steps, warmup_steps, learning_rate), **kwargs)


def resolve_warmup_steps(warmup_steps: int, warmup_ratio: float, total_steps: int) -> int:
    """Return the warm-up steps: `warmup_steps` when positive, else the ratio rounded up."""
    return warmup_steps if warmup_steps > 0 else math.ceil(total_steps * warmup_ratio)


def _ramp(span: _Span) -> float:
    return span.step / max(1, span.warmup)


def _constant(span: _Span) -> float:
    return 1.0


def _constant_with_warmup(span: _Span) -> float:
    return _ramp(span) if span.step < span.warmup else 1.0


def _linear(span: _Span) -> float:
    if span.step < span.warmup:
        return _ramp(span)
    return max(0.0, (span.total - span.step) / max(1, span.total - span.warmup))


def _half_cosine(turns: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * turns))


def _cosine(span: _Span, num_cycles: float = 0.5) -> float:
    if span.step < span.warmup:
        return _ramp(span)
    return max(0.0, _half_cosine(num_cycles * 2.0 * span.progress))


def _cosine_with_restarts(span: _Span, num_cycles: int = 1) -> float:
    if span.step < span.warmup:
        return _ramp(span)
    if span.progress >= 1.0:
        return 0.0
    return max(0.0, _half_cosine((num_cycles * span.progress) % 1.0))


def _floor(span: _Span, name: str, min_lr: float | None, min_lr_rate: float | None) -> float:
    """The least multiplier, given absolutely or as a share of the peak."""
    if min_lr is not None and min_lr_rate is None:
        return min_lr / span.peak("min_lr")
    if min_lr is None and min_lr_rate is not None:
        return min_lr_rate
    raise ValueError(f"lr_scheduler_kwargs: {name} needs exactly one of min_lr and min_lr_rate")


def _cosine_with_min_lr(
    span: _Span,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> float:
    floor = _floor(span, "cosine_with_min_lr", min_lr, min_lr_rate)
    if span.step < span.warmup:
        return _ramp(span)
    factor = _half_cosine(num_cycles * 2.0 * span.progress)
    return max(0.0, factor * (1 - floor) + floor)


def _cosine_warmup_with_min_lr(
    span: _Span,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> float:
    """As the one above, but warm-up starts above 0 and everything comes a step earlier."""
    floor = _floor(span, "cosine_warmup_with_min_lr", min_lr, min_lr_rate)
    if span.step < span.warmup:
        if warmup_lr_rate is None:
            return (span.step + 1) / span.warmup
        return warmup_lr_rate + (1 - warmup_lr_rate) * span.step / max(1, span.warmup - 1)
    progress = (span.step - span.warmup + 1) / max(1, span.total - span.warmup)
    return max(0.0, _half_cosine(num_cycles * 2.0 * progress) * (1 - floor) + floor)


def _polynomial(span: _Span, lr_end: float = 1e-7, power: float = 1.0) -> float:
    peak = span.peak("lr_end")
    if not lr_end < peak:
        raise ValueError(f"lr_scheduler_kwargs: lr_end={lr_end} must be below learning_rate={peak}")
    if power < 0:
        raise ValueError(f"lr_scheduler_kwargs: power={power} must not be negative")
    if span.step < span.warmup:
        return _ramp(span)
    if span.step > span.total or span.total <= span.warmup:
        return lr_end / peak
    remaining = 1 - (span.step - span.warmup) / (span.total - span.warmup)
    return ((peak - lr_end) * remaining**power + lr_end) / peak


def _inverse_sqrt(span: _Span, timescale: int | None = None) -> float:
    if timescale is not None and timescale <= 0:
        raise ValueError(f"lr_scheduler_kwargs: timescale={timescale} must be positive")
    if span.step < span.warmup:
        return _ramp(span)
    scale = timescale or span.warmup or 10_000
    return 1.0 / math.sqrt((span.step + scale - span.warmup) / scale)


def _warmup_stable_decay(
    span: _Span,
    num_decay_steps: int | None = None,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> float:
    if num_decay_steps is None:
        raise ValueError(
            "lr_scheduler_kwargs: warmup_stable_decay needs num_decay_steps, "
            "such as {num_decay_steps: 100}"
        )
    decays: dict[str, Callable[[float], float]] = {
        "linear": lambda progress: 1.0 - progress,
        "cosine": lambda progress: _half_cosine(num_cycles * 2.0 * progress),
        "1-sqrt": lambda progress: 1.0 - math.sqrt(progress),
    }
    warmups: dict[str, Callable[[float], float]] = {
        "linear": lambda progress: progress,
        "cosine": lambda progress: 0.5 * (1.0 - math.cos(math.pi * progress)),
        "1-sqrt": lambda progress: 1.0 - math.sqrt(1.0 - progress),
    }
    for key, kind in (("warmup_type", warmup_type), ("decay_type", decay_type)):
        if kind not in decays:
            raise ValueError(
                f"lr_scheduler_kwargs: {key} {kind!r} is unknown; use {', '.join(decays)}"
            )
    if num_stable_steps is None:
        num_stable_steps = span.total - span.warmup - num_decay_steps
    decay_start = span.warmup + num_stable_steps
    if span.step < span.warmup:
        factor = warmups[warmup_type](_ramp(span))
    elif span.step < decay_start:
        return 1.0
    elif span.step < decay_start + num_decay_steps:
        factor = decays[decay_type]((span.step - decay_start) / max(1, num_decay_steps))
    else:
        return min_lr_ratio
    return max(0.0, factor * (1.0 - min_lr_ratio) + min_lr_ratio)


_SCHEDULES: Mapping[str, Callable[..., float]] = {
    "constant": _constant,
    "constant_with_warmup": _constant_with_warmup,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "cosine_warmup_with_min_lr": _cosine_warmup_with_min_lr,
    "warmup_stable_decay": _warmup_stable_decay,
}
