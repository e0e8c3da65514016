"""Load, describe and write the configuration: one flat YAML namespace, strict.

`load_config` answers with every section filled in and every problem named by file and line, all
of them in one message. Unknown keys are errors with the nearest known key. Second names of
LLaMA-Factory are folded away (compat); whether the values fit each other, the model and the
machine is `validate`'s question (config_rules).
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from megatron_sdar import compat
from megatron_sdar.config_fields import (
    SECTION_TYPES,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    SdarConfig,
    TrainingConfig,
    value_problem,
)
from megatron_sdar.config_rules import validate
from megatron_sdar.config_yaml import Entry, parse_override, read_file, write_file

__all__ = [
    "DataConfig",
    "DiffusionConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "SdarConfig",
    "TrainingConfig",
    "describe_keys",
    "dump_resolved",
    "load_config",
    "to_flat_dict",
    "validate",
]


def load_config(argv: Sequence[str]) -> SdarConfig:
    """Read `CONFIG.yaml key=value ...`; a later value replaces the file's.

    Raises ValueError with one line per problem: unreadable file, unknown, refused, duplicate or
    missing key, value of the wrong type or out of its range, contradiction of two names.
    """
    if not argv or "=" in argv[0] or argv[0].startswith("-"):
        raise ValueError("expected the path of a YAML file first: CONFIG.yaml key=value ...")
    entries: dict[str, Entry] = {entry.key: entry for entry in read_file(argv[0])}
    seen: set[str] = set()
    for override in map(parse_override, argv[1:]):
        if override.key in seen:
            raise ValueError(f"{override.where}: {override.key!r} is given twice; keep one")
        seen.add(override.key)
        entries[override.key] = override

    values: dict[str, object] = {}
    warnings: list[str] = []
    problems: list[str] = []
    for entry in entries.values():
        try:
            values |= _accept(entry, warnings)
        except ValueError as error:
            problems.append(f"{entry.where}: {error}")
    missing = [key.name for key, _ in _keys().values() if _default(key) is MISSING]
    problems += [
        f"{argv[0]}: {name} is required; add a line `{name}: ...`"
        for name in missing
        if name not in entries
    ]
    if problems:
        raise ValueError("\n".join(problems))
    try:
        warnings += compat.fold_second_names(values)
    except ValueError as error:
        raise ValueError(f"{argv[0]}: {error}") from error
    sections: dict[str, Any] = {
        name: section(
            **{key.name: values[key.name] for key in fields(section) if key.name in values}
        )
        for name, section in SECTION_TYPES.items()
    }
    return SdarConfig(**sections, warnings=tuple(warnings))


def _accept(entry: Entry, warnings: list[str]) -> dict[str, object]:
    """Return {key: value} of a known key, {} of a harmless foreign one; ValueError otherwise."""
    known = _keys().get(entry.key)
    if known is None:
        verdict = compat.judge_foreign_key(entry.key, entry.value)
        if verdict is None:
            near = get_close_matches(entry.key, _keys(), n=1)
            advice = f"did you mean {near[0]!r}?" if near else "--help lists every key"
            raise ValueError(f"unknown key {entry.key!r}; {advice}")
        warning, problem = verdict
        if problem is not None:
            raise ValueError(problem)
        if warning is not None:
            warnings.append(f"{entry.where}: {warning}")
        return {}
    key, annotation = known
    value = entry.value
    if entry.key == "report_to":
        value = compat.normalise_report_to(value)
    elif entry.text is not None and _takes_text(annotation, value):
        value = entry.text
    try:
        converted = _convert(value, annotation)
    except TypeError as error:
        raise ValueError(f"{entry.key}: {value!r} is not {_expected(annotation)}") from error
    problem = value_problem(key, converted)
    if problem is not None:
        raise ValueError(problem)
    return {entry.key: converted}


@cache
def _keys() -> dict[str, tuple[Field[Any], Any]]:
    """Every key: its field and its resolved annotation."""
    return {
        key.name: (key, get_type_hints(section)[key.name])
        for section in SECTION_TYPES.values()
        for key in fields(section)
    }


def _default(key: Field[Any]) -> object:
    return key.default if key.default_factory is MISSING else key.default_factory()


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) is UnionType else (annotation,)


def _takes_text(annotation: Any, value: object) -> bool:
    """Whether a command-line value of a text key is its literal argument: `output_dir=007`."""
    members = _members(annotation)
    if str not in members:
        return annotation == tuple[str, ...] and not isinstance(value, list | NoneType)
    return type(value) not in members or isinstance(value, str)


def _convert(value: object, annotation: Any) -> object:
    """Return `value` as `annotation` wants it; TypeError if it is something else."""
    for member in _members(annotation):
        origin = get_origin(member)
        if member is NoneType and value is None:
            return None
        if member in (bool, str) and type(value) is member:
            return value
        if member is int and type(value) is int:
            return value
        if member is float and type(value) in (int, float):
            return _finite(value)
        if origin is tuple:
            items = _items(value, get_args(member)[0])
            if items is not None:
                return items
        if origin is Mapping and isinstance(value, dict):
            scalars = (str, int, float, bool, NoneType)
            if all(type(k) is str and type(v) in scalars for k, v in value.items()):
                return value
    raise TypeError


def _finite(value: Any) -> float:
    if not math.isfinite(value):
        raise TypeError
    return float(value)


def _items(value: object, kind: type) -> tuple[object, ...] | None:
    if value is None and kind is str:
        return ()
    if isinstance(value, str) and kind is str:
        value = [name.strip() for name in value.split(",")]
    if isinstance(value, list) and all(type(item) is kind and item != "" for item in value):
        return tuple(value)
    return None


def _expected(annotation: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a finite number", str: "text"}
    words = []
    for member in _members(annotation):
        if member is NoneType:
            words.append("null")
        elif get_origin(member) is tuple:
            words.append(
                "a list of integers"
                if get_args(member)[0] is int
                else "a list of names (or one text with commas), none of them empty"
            )
        else:
            words.append(names.get(member, "a mapping of plain values such as {min_lr: 1e-6}"))
    text = " or ".join(words)
    return f"{text} (put it in quotes)" if annotation in (str, str | None) else text


def to_flat_dict(config: SdarConfig) -> dict[str, Any]:
    """Every key and its value in plain types (lists for tuples), in the order of the sections."""
    flat: dict[str, Any] = {}
    for name, section in SECTION_TYPES.items():
        for key in fields(section):
            value = getattr(getattr(config, name), key.name)
            if isinstance(value, tuple):
                value = list(value)
            elif isinstance(value, Mapping):
                value = dict(value)
            flat[key.name] = value
    return flat


def dump_resolved(config: SdarConfig, path: str | Path) -> None:
    """Write every key as YAML; `load_config([path])` gives an equal configuration."""
    write_file(
        path, "Resolved configuration; pretrain_sdar.py THIS_FILE runs it.", to_flat_dict(config)
    )


def describe_keys() -> str:
    """Every key by section with its default and its help, for `--help`."""
    lines = []
    for name, section in SECTION_TYPES.items():
        lines += ["", f"{name}: {(section.__doc__ or '').strip()}"]
        for key in fields(section):
            default = _default(key)
            shown = "(required)" if default is MISSING else f"= {_as_yaml(default)}"
            help_text = key.metadata["help"]
            if len(key.metadata.get("choices", ())) > 1:
                help_text += f" ({' | '.join(key.metadata['choices'])})"
            lines += textwrap.wrap(
                f"{key.name} {shown}".ljust(48) + f"  {help_text}",
                width=118,
                initial_indent="  ",
                subsequent_indent=" " * 52,
            )
    lines += ["", "Accepted from LLaMA-Factory files and ignored:"]
    lines += [f"  {key}: {reason}" for key, reason in compat.IGNORED.items()]
    return "\n".join(lines[1:]) + "\n"


def _as_yaml(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    return str(value)
