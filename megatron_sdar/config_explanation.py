"""What becomes of each line of a LLaMA-Factory file: a table, and the configuration it means.

`explain` goes the same way as loading, but collects verdicts instead of stopping at the first file
with a problem. Values of keys that hold secrets are not shown.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sdar.compat import SECOND_NAMES, Verdict
from megatron_sdar.compat_defaults import THEIR_DEFAULTS
from megatron_sdar.config import judge, read_entries, resolve, resolved_text, to_flat_dict
from megatron_sdar.config_description import as_yaml
from megatron_sdar.config_fields import SdarConfig
from megatron_sdar.config_yaml import Entry

_SECRET = re.compile(r"token$|api_key$|secret$|webhook_url$")
_HIDDEN = "(hidden)"
_UNUSED = {
    "trust_remote_code": "no code of a model directory is executed; it is never needed",
    "do_train": "this program only trains",
}


@dataclass(frozen=True)
class ExplainedKey:
    """One line of the table.

    Attributes:
        key, value: as written; value as text.
        where: file:line, or the command-line argument.
        kind: supported, mapped, ignored, refused or unknown.
        text: what it becomes, why it is ignored, or what to use instead.
    """

    key: str
    value: str
    where: str
    kind: str
    text: str


@dataclass(frozen=True)
class OtherDefault:
    """A key that is not given, where LLaMA-Factory would do something else.

    Attributes:
        key: its name.
        value, theirs: what it is here and there, as text.
        change: what that changes.
    """

    key: str
    value: str
    theirs: str
    change: str


@dataclass(frozen=True)
class Explanation:
    """The table and what it adds up to.

    Attributes:
        keys: one per key, in the order of the file, command-line arguments in place.
        defaults: what is not in the file; empty where a run would be refused.
        config: None where a run would be refused.
        problems: why a run would be refused, as loading says it, one line each.
        notes: what loading warns of beyond the table.
    """

    keys: tuple[ExplainedKey, ...]
    defaults: tuple[OtherDefault, ...]
    config: SdarConfig | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def as_json(self) -> str:
        """Everything as one JSON object."""
        content: dict[str, Any] = {
            "keys": [vars(key) for key in self.keys],
            "defaults": [vars(default) for default in self.defaults],
            "problems": list(self.problems),
            "notes": list(self.notes),
            "config": None if self.config is None else to_flat_dict(self.config),
        }
        return json.dumps(content, indent=2, ensure_ascii=False)

    def resolved(self) -> str:
        """The configuration as YAML; "" where a run would be refused."""
        return "" if self.config is None else resolved_text(self.config)


def explain(argv: Sequence[str], *, allow_unknown: bool = False) -> Explanation:
    """Explain `CONFIG.yaml key=value ...`.

    Raises ValueError when the file cannot be read at all; bad keys and values are in the result.
    """
    entries = read_entries(argv)
    verdicts = {entry.key: judge(entry, allow_unknown=allow_unknown) for entry in entries}
    config = None
    problems: tuple[str, ...] = ()
    try:
        config = resolve(argv[0], entries, verdicts)
    except ValueError as error:
        problems = tuple(str(error).splitlines())
    keys = tuple(_explain_key(entry, verdicts[entry.key], config) for entry in entries)
    shown = {f"{entry.where}: {entry.key} is " for entry in entries}
    warnings = () if config is None else config.warnings
    notes = tuple(line for line in warnings if not any(line.startswith(text) for text in shown))
    return Explanation(keys, _other_defaults(entries, verdicts, config), config, problems, notes)


def _other_defaults(
    entries: Sequence[Entry], verdicts: Mapping[str, Verdict], config: SdarConfig | None
) -> tuple[OtherDefault, ...]:
    if config is None:
        return ()
    # What a key of LLaMA-Factory was taken as is said, too; null says nothing.
    given = [entry.key for entry in entries if entry.value is not None]
    said = {*given, *(key for name in given for key in verdicts[name].values)}
    said |= {SECOND_NAMES[key] for key in said if key in SECOND_NAMES}
    flat = to_flat_dict(config)
    return tuple(
        OtherDefault(key, as_yaml(flat[key]), default.theirs, default.change)
        for key, default in THEIR_DEFAULTS.items()
        if key not in said and flat[key] not in default.values
    )


def _explain_key(entry: Entry, verdict: Verdict, config: SdarConfig | None) -> ExplainedKey:
    value = _HIDDEN if _SECRET.search(entry.key) and entry.value else as_yaml(entry.value)
    kind, text = verdict.kind, verdict.note
    if kind == "mapped":
        (taken,) = (f"{key}: {as_yaml(given)}" for key, given in verdict.values.items())
        text = f"{taken}; {text}" if text else taken
    elif kind == "ignored" and not text:
        text = "it asks for what happens anyway"
    elif kind == "supported" and entry.key in SECOND_NAMES and entry.value is not None:
        kind, target = "mapped", SECOND_NAMES[entry.key]
        text = target if config is None else f"{target}: {as_yaml(to_flat_dict(config)[target])}"
    elif kind == "supported" and config is not None:
        kind, text = _compare(entry, verdict, config)
    return ExplainedKey(entry.key, value, entry.where, kind, text)


def _compare(entry: Entry, verdict: Verdict, config: SdarConfig) -> tuple[str, str]:
    """(kind, text) of a key of ours: whether folding changed what it says."""
    if entry.key in _UNUSED:
        return "ignored", _UNUSED[entry.key]
    flat = to_flat_dict(config)
    given, resolved = verdict.values[entry.key], flat[entry.key]
    given = list(given) if isinstance(given, tuple) else given
    if given is None or resolved == given:
        return "supported", ""
    return "mapped", f"{entry.key}: {as_yaml(resolved)}"
