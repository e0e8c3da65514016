"""Tools and function calls: the JSON texts of a record, checked.

Owns what counts as a list of tools and as a call. Whatever a template gets from here has the
form it expects; anything else is a RecordError that names the record.
"""

import json
from typing import Any

from megatron_sdar.data.readers.records import RecordError
from megatron_sdar.data.sources.conversations import require_unicode


def parse_tools(text: str, location: str) -> list[dict[str, Any]]:
    """The tools in TEXT, the JSON text of a list of objects."""
    tools = _parse_json(text, "tools", location)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError(
            location, "bad tools", "'tools' must be the JSON text of a list of objects"
        )
    return tools


def parse_calls(text: str, location: str) -> list[dict[str, Any]]:
    """The calls in TEXT, the JSON text of one call or of a list; only name and arguments stay."""
    calls = _parse_json(text, "function call", location)
    named = []
    for call in calls if isinstance(calls, list) else [calls]:
        if not (isinstance(call, dict) and "name" in call and "arguments" in call):
            raise RecordError(
                location,
                "bad function call",
                f'a call must be {{"name": ..., "arguments": ...}} or a list of them: {text!r}',
            )
        named.append({"name": call["name"], "arguments": call["arguments"]})
    return named


def dump_json(value: object, what: str, location: str) -> str:
    """VALUE as JSON in UTF-8 with Python's default separators, as templates write it."""
    # An escaped lone surrogate is plain ASCII in the record and shows up only here.
    return require_unicode(json.dumps(value, ensure_ascii=False), what, location)


def _parse_json(text: str, what: str, location: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(location, f"bad {what}", f"not valid JSON ({error}): {text!r}") from error
