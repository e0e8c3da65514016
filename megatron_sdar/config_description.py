"""The keys described from their dataclasses: `--help` and docs/configuration.md.

Whatever a reader is told about a key comes from here, so that it cannot differ from what the key
does.
"""

import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from megatron_sdar.compat_ignored import IGNORED
from megatron_sdar.compat_mapped import RENAMED
from megatron_sdar.compat_refused import REFUSED
from megatron_sdar.config_fields import SECTION_TYPES
from megatron_sdar.config_presets import PRESETS

REFERENCE_COMMAND = "make docs"


def describe_keys() -> str:
    """Every key by section with its default and its help, for `--help`."""
    lines = []
    for name, section in SECTION_TYPES.items():
        lines += ["", f"{name}: {(section.__doc__ or '').strip()}"]
        for key in fields(section):
            help_text = key.metadata["help"]
            if len(key.metadata.get("choices", ())) > 1:
                help_text += f" ({' | '.join(key.metadata['choices'])})"
            lines += textwrap.wrap(
                f"{key.name} {_shown_default(key)}".ljust(48) + f"  {help_text}",
                width=118,
                initial_indent="  ",
                subsequent_indent=" " * 52,
            )
    lines += ["", "Accepted from LLaMA-Factory files and ignored:"]
    for reason, keys in _by_reason(IGNORED).items():
        lines += textwrap.wrap(
            f"{', '.join(keys)}: {reason}",
            width=118,
            initial_indent="  ",
            subsequent_indent="    ",
        )
    return "\n".join(lines[1:]) + "\n"


def reference_markdown() -> str:
    """docs/configuration.md."""
    lines = [
        "# Configuration reference",
        "",
        f"Written by `{REFERENCE_COMMAND}` from `megatron_sdar/config_sections`; edit those.",
        "",
        "A configuration is one flat YAML (or JSON) file; `key=value` behind its name on the",
        "command line replaces single keys. Unknown keys are errors. Names and defaults are",
        "LLaMA-Factory's where a key is theirs, Megatron's for parallel sizes.",
        "",
        f"Sections: {', '.join(f'[{name}](#{name})' for name in SECTION_TYPES)}, "
        "[presets](#presets), [LLaMA-Factory keys](#llama-factory-keys).",
    ]
    for name, section in SECTION_TYPES.items():
        lines += ["", f"## {name}", "", (section.__doc__ or "").strip(), ""]
        lines += ["| key | default | meaning |", "|---|---|---|"]
        for key in fields(section):
            default = _shown_default(key).removeprefix("= ")
            lines.append(f"| `{key.name}` | `{default}` | {_cell(key)} |")
    lines += _presets()
    lines += ["", "## LLaMA-Factory keys", ""]
    lines += ["Read as another key:", "", "| key | is |", "|---|---|"]
    lines += [f"| `{name}` | `{target}` |" for name, target in RENAMED.items()]
    lines += ["| `use_cpu`, `no_cuda` | `device: cpu` |", "| `pure_bf16` | `bf16` |"]
    lines += ["| `fsdp` | `data_parallel_sharding_strategy` |"]
    lines += ["", "Ignored with a warning, since the result does not depend on them:", ""]
    lines += ["| keys | why |", "|---|---|"]
    for reason, keys in _by_reason(IGNORED).items():
        lines.append(f"| {', '.join(f'`{key}`' for key in keys)} | {reason} |")
    lines += ["", "Refused unless their value asks for nothing (null, false, or as listed):", ""]
    lines += ["| key | harmless values | instead |", "|---|---|---|"]
    for refused, (neutral, advice) in REFUSED.items():
        harmless = ", ".join(f"`{as_yaml(value)}`" for value in neutral)
        lines.append(f"| `{refused}` | {harmless} | {_escaped(advice)} |")
    return "\n".join(lines) + "\n"


def _presets() -> list[str]:
    lines = ["", "## presets", "", "What `preset` fills in where a key is not given."]
    for name, choices in PRESETS.items():
        lines += ["", f"`preset: {name}`", "", "| key | value | from |", "|---|---|---|"]
        lines += [f"| `{c.key}` | `{as_yaml(c.value)}` | {_escaped(c.source)} |" for c in choices]
    return lines


def default_of(key: Field[Any]) -> object:
    """The default of a key, MISSING for a required one."""
    return key.default if key.default_factory is MISSING else key.default_factory()


def as_yaml(value: object) -> str:
    """A plain value in YAML's spelling."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(list(value))
    return str(value)


def _shown_default(key: Field[Any]) -> str:
    default = default_of(key)
    return "(required)" if default is MISSING else f"= {as_yaml(default)}"


def _cell(key: Field[Any]) -> str:
    limits = key.metadata
    text = str(limits["help"])
    choices = limits.get("choices", ())
    if len(choices) > 1:
        text += f" ({' | '.join(as_yaml(choice) for choice in choices)})"
    bounds = {"minimum": "at least", "maximum": "at most", "above": "above", "below": "below"}
    found = [f"{words} {limits[name]}" for name, words in bounds.items() if name in limits]
    if found:
        text += f"; {', '.join(found)}"
    return _escaped(text)


def _escaped(text: str) -> str:
    """Text for a cell: neither the end of the cell nor the begin of a tag."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def _by_reason(table: Mapping[str, str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for key, reason in table.items():
        grouped.setdefault(reason, []).append(key)
    return grouped
