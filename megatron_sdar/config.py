"""Load, describe and write the configuration: one flat YAML namespace, strict.

`load_config` answers with every section filled in and every problem named by file and line, all
of them in one message. Unknown keys are errors with the nearest known key. Second names of
LLaMA-Factory are folded away (compat); whether the values fit each other, the model and the
machine is `validate`'s question (config_rules).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from megatron_sdar import compat
from megatron_sdar.config_description import as_yaml, default_of, describe_keys
from megatron_sdar.config_fields import (
    SECTION_TYPES,
    DataConfig,
    DiffusionConfig,
    EvaluationConfig,
    FinetuningConfig,
    GuardConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ReportingConfig,
    SdarConfig,
    TrainingConfig,
)
from megatron_sdar.config_presets import fill_preset
from megatron_sdar.config_rules import validate
from megatron_sdar.config_sections.key import value_problem
from megatron_sdar.config_yaml import Entry, as_text, parse_override, read_file

__all__ = [
    "DataConfig",
    "DiffusionConfig",
    "EvaluationConfig",
    "FinetuningConfig",
    "GuardConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "ReportingConfig",
    "SdarConfig",
    "TrainingConfig",
    "describe_keys",
    "dump_resolved",
    "judge",
    "load_config",
    "read_entries",
    "resolve",
    "resolved_text",
    "to_flat_dict",
    "validate",
]

_INTERPOLATION = re.compile(r"\$\{[\w.:]+\}")


def load_config(argv: Sequence[str], *, allow_unknown: bool = False) -> SdarConfig:
    """Read `CONFIG.yaml key=value ...`; a later value replaces the file's.

    Args:
        allow_unknown: unknown keys are ignored with a warning (LLaMA-Factory's ALLOW_EXTRA_ARGS).

    Raises ValueError with one line per problem: unreadable file, unknown, refused, duplicate or
    missing key, value of the wrong type or out of its range, contradiction of two names.
    """
    entries = read_entries(argv)
    verdicts = {entry.key: judge(entry, allow_unknown=allow_unknown) for entry in entries}
    return resolve(argv[0], entries, verdicts)


def read_entries(argv: Sequence[str]) -> list[Entry]:
    """The keys of `CONFIG.yaml key=value ...` as written, each once; ValueError as load_config."""
    if not argv or "=" in argv[0] or argv[0].startswith("-"):
        raise ValueError("expected the path of a YAML file first: CONFIG.yaml key=value ...")
    entries: dict[str, Entry] = {entry.key: entry for entry in read_file(argv[0])}
    seen: set[str] = set()
    for override in map(parse_override, argv[1:]):
        if override.key in seen:
            raise ValueError(f"{override.where}: {override.key!r} is given twice; keep one")
        seen.add(override.key)
        entries[override.key] = override
    return list(entries.values())


def resolve(
    path: str, entries: Sequence[Entry], verdicts: Mapping[str, compat.Verdict]
) -> SdarConfig:
    """The configuration that `entries` of the file `path` mean, judged by key in `verdicts`.

    Raises ValueError as load_config.
    """
    values: dict[str, object] = {}
    said_by: dict[str, str] = {}
    warnings: list[str] = []
    problems: list[str] = []
    for entry in entries:
        verdict = verdicts[entry.key]
        if verdict.kind in ("refused", "unknown"):
            problems.append(f"{entry.where}: {verdict.note}")
        elif verdict.kind == "mapped":
            (taken,) = (f"{key}: {as_yaml(value)}" for key, value in verdict.values.items())
            note = f"; {verdict.note}" if verdict.note else ""
            warnings.append(f"{entry.where}: {entry.key} is taken as {taken}{note}")
        elif verdict.kind == "ignored" and verdict.note:
            warnings.append(f"{entry.where}: {entry.key} is ignored: {verdict.note}")
        for key, value in verdict.values.items():
            if values.setdefault(key, value) != value:
                problems.append(
                    f"{entry.where}: {entry.key} and {said_by[key]} contradict each other; "
                    f"keep {key}"
                )
            said_by[key] = entry.key
    missing = [key.name for key, _ in _keys().values() if default_of(key) is MISSING]
    given = {entry.key for entry in entries}
    problems += [
        f"{path}: {name} is required; add a line `{name}: ...`"
        for name in missing
        if name not in given
    ]
    if problems:
        raise ValueError("\n".join(problems))
    try:
        warnings += compat.fold_second_names(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    fill_preset(values)
    sections: dict[str, Any] = {
        name: section(
            **{key.name: values[key.name] for key in fields(section) if key.name in values}
        )
        for name, section in SECTION_TYPES.items()
    }
    return SdarConfig(**sections, warnings=tuple(warnings))


def judge(entry: Entry, *, allow_unknown: bool = False) -> compat.Verdict:
    """What becomes of one key as written; the note of a refused one is the message for the user."""
    if _INTERPOLATION.search(str(entry.value)):
        return compat.Verdict(
            "refused",
            f"{entry.key}: {entry.value} refers to another key; OmegaConf's interpolation is not "
            "available, write the value out",
        )
    if entry.key in compat.RENAMED:
        target = compat.RENAMED[entry.key]
        found = judge(replace(entry, key=target))
        kind = "mapped" if found.kind == "supported" else found.kind
        return replace(found, kind=kind)
    if entry.key not in _keys():
        foreign = compat.judge_foreign_key(entry.key, entry.value)
        if foreign is not None:
            return foreign
        near = get_close_matches(entry.key, _keys(), n=1)
        advice = f"did you mean {near[0]!r}?" if near else "--help lists every key"
        if allow_unknown:
            return compat.Verdict("ignored", "it is unknown, and ALLOW_EXTRA_ARGS is set")
        return compat.Verdict("unknown", f"unknown key {entry.key!r}; {advice}")
    try:
        return compat.Verdict("supported", values={entry.key: _accept(entry)})
    except ValueError as error:
        return compat.Verdict("refused", str(error))


def _accept(entry: Entry) -> object:
    """The value of a key of ours; ValueError says what is wrong with it."""
    key, annotation = _keys()[entry.key]
    value = compat.normalise_value(entry.key, entry.value)
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
    return converted


@cache
def _keys() -> dict[str, tuple[Field[Any], Any]]:
    """Every key: its field and its resolved annotation."""
    return {
        key.name: (key, get_type_hints(section)[key.name])
        for section in SECTION_TYPES.values()
        for key in fields(section)
    }


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


def resolved_text(config: SdarConfig) -> str:
    """Every key as YAML; a file of it loads to an equal configuration."""
    header = "Resolved configuration; pretrain_sdar.py THIS_FILE runs it."
    return as_text(header, to_flat_dict(config))


def dump_resolved(config: SdarConfig, path: str | Path) -> None:
    """Write `resolved_text`."""
    Path(path).write_text(resolved_text(config), encoding="utf-8")
