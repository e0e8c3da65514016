"""One key of the configuration: default, help and what its value may be.

What is true of one value alone is declared beside its field and checked by `value_problem`; what
relates several values lives in config_rules.
"""

from dataclasses import MISSING, Field, field
from typing import Any


def key(help: str, default: Any = MISSING, *, factory: Any = MISSING, **limits: Any) -> Any:
    """One key. Limits: choices, advice (said when a choice is refused), minimum, maximum,
    above and below (both exclusive)."""
    return field(default=default, default_factory=factory, metadata={"help": help, **limits})


def value_problem(key: Field[Any], value: object) -> str | None:
    """Return why `value` is inadmissible for `key`, or None. Assumes the type is right.

    None always passes (only optional keys can hold it); the items of a tuple are checked one
    by one.
    """
    limits = key.metadata
    for item in value if isinstance(value, tuple) else (value,):
        if item is None:
            continue
        choices = limits.get("choices")
        if choices is not None and item not in choices:
            words = " or ".join(_word(choice) for choice in choices)
            advice = f"; {limits['advice']}" if "advice" in limits else ""
            return f"{key.name}: {_word(item)} is not supported; use {words}{advice}"
        for name, holds, text in (
            ("minimum", lambda item, limit: item >= limit, "at least"),
            ("maximum", lambda item, limit: item <= limit, "at most"),
            ("above", lambda item, limit: item > limit, "greater than"),
            ("below", lambda item, limit: item < limit, "less than"),
        ):
            if name in limits and not holds(item, limits[name]):
                return f"{key.name}: {item} is out of range; it must be {text} {limits[name]}"
    return None


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
