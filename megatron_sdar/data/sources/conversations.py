"""One record to one document: the alpaca and plain text layouts, and the choice of layout.

Owns the meaning of `columns`. What cannot be read in its layout is a RecordError; nothing is
repaired by guessing.
"""

from typing import Any

from megatron_sdar.data.readers.records import RecordError
from megatron_sdar.data.sources.fields import (
    optional_column,
    optional_text,
    require_answer,
    require_text,
    require_unicode,
    required,
)
from megatron_sdar.data.sources.layouts import (
    Columns,
    Conversation,
    Layout,
    PlainText,
    Tags,
    Turn,
)
from megatron_sdar.data.sources.messages import read_first_message, read_openai, read_sharegpt

__all__ = [
    "Columns",
    "Conversation",
    "Layout",
    "PlainText",
    "Tags",
    "Turn",
    "read_document",
    "require_unicode",
]


def read_document(
    record: dict[str, Any], layout: Layout, location: str
) -> Conversation | PlainText:
    """The document in RECORD. Raises RecordError, which names LOCATION and the field."""
    match layout.formatting:
        case "alpaca":
            return _read_alpaca(record, layout.columns, location)
        case "sharegpt":
            return read_sharegpt(record, layout.columns, layout.tags, location)
        case "openai":
            return read_openai(record, layout.columns, layout.tags, location)
        case formatting:
            assert formatting == "text"
            return _read_text(record, layout, location)


def _read_alpaca(record: dict[str, Any], columns: Columns, location: str) -> Conversation:
    turns = _read_history(record, columns, location)
    assert columns.response is not None
    prompt = _join_prompt(record, columns, location)
    response = required(record, columns.response, location)
    answer = require_answer(response, columns.response, location)
    turns.append(Turn("user", prompt, "assistant", answer))
    return Conversation(
        tuple(turns),
        optional_column(record, columns.system, location),
        optional_column(record, columns.tools, location),
        location,
    )


def _read_history(record: dict[str, Any], columns: Columns, location: str) -> list[Turn]:
    turns: list[Turn] = []
    history = None if columns.history is None else record.get(columns.history)
    if history is None:
        return turns
    if not isinstance(history, list):
        raise RecordError(
            location,
            "bad history",
            f"{columns.history!r} must be a list of [user, assistant] pairs, got "
            f"{type(history).__name__}",
        )
    for index, pair in enumerate(history):
        where = f"{columns.history}[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordError(
                location, "bad history", f"{where} must be a pair [user, assistant]: {pair!r}"
            )
        prompt = require_text(pair[0], f"{where}[0]", location)
        answer = require_answer(pair[1], f"{where}[1]", location)
        turns.append(Turn("user", prompt, "assistant", answer))
    return turns


def _join_prompt(record: dict[str, Any], columns: Columns, location: str) -> str:
    assert columns.prompt is not None
    first = optional_text(required(record, columns.prompt, location), columns.prompt, location)
    second = optional_column(record, columns.query, location)
    return f"{first}\n{second}" if first and second else first or second


def _read_text(record: dict[str, Any], layout: Layout, location: str) -> PlainText:
    columns = layout.columns
    if columns.prompt is None:
        return read_first_message(record, columns, layout.tags, location)
    text = _join_prompt(record, columns, location)
    if not text:
        raise RecordError(location, "empty text", f"{columns.prompt!r} has no text to train on")
    return PlainText(text, location)
