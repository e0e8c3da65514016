"""Configuration text: YAML files and key=value arguments, read with their positions.

Scalars follow the YAML 1.2 core schema, not PyYAML's 1.1: `1e-5` is a number, `no` is text (so
`save_strategy: no` means what it says) and `1:30` is not sexagesimal. Every entry knows the
file and line it came from. Nothing is ever constructed but plain data.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_SCALARS = (
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|[0-9]+(?:\.[0-9]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


_MAX_BYTES = 2**20  # of a configuration file
_MAX_ALIASED = 1000  # characters
_MAX_DEPTH = 50  # of lists in lists; beyond it PyYAML takes seconds to run out of stack


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own class protocol)

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Aliases of short scalars only: nested ones grow without bound once shown."""
        if self._depth == _MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=mark)
        alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if alias is None or (isinstance(node, yaml.ScalarNode) and len(node.value) <= _MAX_ALIASED):
            return node
        raise yaml.MarkedYAMLError(
            problem=f"*{alias.anchor} repeats a list, a mapping or a long text; write it out",
            problem_mark=alias.start_mark,
        )


class _Dumper(yaml.SafeDumper):
    """Quotes what either schema would misread, so that other YAML readers agree too."""

    def text(self, data: str) -> yaml.ScalarNode:
        # Left to itself PyYAML writes U+0085 and its like as line breaks and reads spaces back.
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.text)

for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first
        )


@dataclass(frozen=True)
class Entry:
    """One key as written. `text` is the literal argument when it came from the command line."""

    key: str
    value: object
    where: str
    text: str | None = None


def read_file(path: str | Path) -> list[Entry]:
    """Read a flat YAML or JSON mapping. ValueError names the file and, where it can, the line."""
    try:
        with Path(path).open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{path}: cannot read this configuration file: {reason}") from error
    if len(content) > _MAX_BYTES:
        raise ValueError(
            f"{path}: larger than {_MAX_BYTES} bytes, so not a configuration; name a YAML file"
        )
    if Path(path).suffix == ".json":
        return _read_json(content, path)
    try:
        loader = _Loader(content)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(
                f"{path}: expected lines of the form `key: value`, found "
                f"{'an empty file' if node is None else _shown(node)}"
            )
        for mapping in (node, *(value for _, value in node.value)):
            _reject_duplicates(mapping, path)
        return [
            Entry(key.value, _construct(loader, key, value, path), f"{path}:{_line(key)}")
            for key, value in node.value
        ]
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error


def _construct(loader: _Loader, key: yaml.Node, value: yaml.Node, path: str | Path) -> object:
    """The plain value of a node. PyYAML's own constructors raise anything for a wrong text."""
    try:
        return loader.construct_object(value, deep=True)
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path}:{_line(key)}: {key.value}: not a value of the type that it is written as "
            f"({type(error).__name__}: {error}); write a plain number or text"
        ) from error


class _TwiceError(ValueError):
    """A key is given twice."""


def _read_json(content: bytes, path: str | Path) -> list[Entry]:
    """JSON is YAML but for tabs and surrogate pairs, so it has a parser of its own."""
    try:
        text = content.decode("utf-8-sig")
        values = json.loads(text, object_pairs_hook=lambda pairs: _without_duplicates(pairs, path))
    except _TwiceError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected an object, one key for each setting: {{...}}")
    entries = []
    for key, value in values.items():
        found = re.search(rf"{re.escape(json.dumps(key))}\s*:", text)
        line = f":{text.count(chr(10), 0, found.start()) + 1}" if found else ""
        entries.append(Entry(key, value, f"{path}{line}"))
    return entries


def _without_duplicates(pairs: list[tuple[str, Any]], path: str | Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise _TwiceError(f"{path}: {key!r} is given twice; keep one")
        seen[key] = value
    return seen


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _reject_duplicates(node: yaml.Node | None, path: str | Path) -> None:
    """Check one mapping, not those inside it; a node of another kind passes."""
    seen: dict[str, int] = {}
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        where = f"{path}:{_line(key)}"
        if not isinstance(key, yaml.ScalarNode) or not key.tag.endswith(":str"):
            raise ValueError(f"{where}: keys must be plain names, found {_shown(key)}")
        if key.value in seen:
            raise ValueError(
                f"{where}: {key.value!r} is already given on line {seen[key.value]}; keep one"
            )
        seen[key.value] = _line(key)


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def parse_override(argument: str) -> Entry:
    """Read one `key=value` argument; the value is YAML (`null`, `1e-5`, `[1, 2]`, `text`).

    `--key=value` is the same, and the switch `--key` is `key=true`; dashes within stand for
    underscores.
    """
    key, separator, text = argument.partition("=")
    if key.startswith("--"):
        key = key[2:].replace("-", "_")
        text = text if separator else "true"
    elif not separator:
        key = ""
    if not key.isidentifier():
        raise ValueError(
            f"command line: {argument!r} is not of the form key=value "
            "(such as learning_rate=1e-5, without spaces)"
        )
    where = f"command line ({argument})"
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _reject_duplicates(node, where)
        value = None if node is None else loader.construct_object(node, deep=True)
    except yaml.YAMLError:
        # Not YAML, yet a fine path or sentence; a key of another type refuses it by name.
        return Entry(key, text, where, text)
    quoted = isinstance(node, yaml.ScalarNode) and node.style is not None
    return Entry(key, value, where, str(value) if quoted else text)


def as_text(header: str, values: Mapping[str, Any]) -> str:
    """A flat mapping as YAML that `read_file` reads back to equal values."""
    text = yaml.dump(
        dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000
    )
    return f"# {header}\n{text}"
