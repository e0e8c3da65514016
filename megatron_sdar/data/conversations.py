"""One record to one conversation: the alpaca and sharegpt layouts.

Owns the meaning of `columns` and `tags`. A conversation always alternates a prompt (user or
observation) and a response (assistant or function), so a template never meets a bad role order.
What cannot be read so is a RecordError; nothing is repaired by guessing.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_sdar.data.records import RecordError


class Turn(NamedTuple):
    """One exchange. Roles: user or observation, answered by assistant or function."""

    prompt_role: str
    prompt_text: str
    response_role: str
    response_text: str


@dataclass(frozen=True)
class Conversation:
    """Turns in order, the system prompt ("" for none) and the tools (JSON text of a list, or "").

    `location` is file:line of the record, for messages.
    """

    turns: tuple[Turn, ...]
    system: str = ""
    tools: str = ""
    location: str = "conversation"


@dataclass(frozen=True)
class Columns:
    """Names of a record's fields; None: the record has no such field."""

    prompt: str | None = "instruction"
    query: str | None = "input"
    response: str | None = "output"
    history: str | None = None
    messages: str | None = "conversations"
    system: str | None = None
    tools: str | None = None


@dataclass(frozen=True)
class Tags:
    """Names inside a sharegpt message: its two fields, and the value of each role."""

    role_tag: str | None = "from"
    content_tag: str | None = "value"
    user_tag: str | None = "human"
    assistant_tag: str | None = "gpt"
    observation_tag: str | None = "observation"
    function_tag: str | None = "function_call"
    system_tag: str | None = "system"


@dataclass(frozen=True)
class Layout:
    """How a record is laid out: formatting (alpaca or sharegpt) with its columns and tags."""

    formatting: str = "alpaca"
    columns: Columns = field(default_factory=Columns)
    tags: Tags = field(default_factory=Tags)


def read_conversation(record: dict[str, Any], layout: Layout, location: str) -> Conversation:
    """The conversation in RECORD. Raises RecordError, which names LOCATION and the field."""
    if layout.formatting == "alpaca":
        return _read_alpaca(record, layout.columns, location)
    return _read_sharegpt(record, layout.columns, layout.tags, location)


def _read_alpaca(record: dict[str, Any], columns: Columns, location: str) -> Conversation:
    turns = []
    history = None if columns.history is None else record.get(columns.history)
    if history is not None:
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
            prompt = _text(pair[0], f"{where}[0]", location)
            answer = _answer(pair[1], f"{where}[1]", location)
            turns.append(Turn("user", prompt, "assistant", answer))
    assert columns.prompt is not None
    assert columns.response is not None
    parts = [
        _optional_text(_required(record, columns.prompt, location), columns.prompt, location),
        _optional_column(record, columns.query, location),
    ]
    response = _required(record, columns.response, location)
    turns.append(
        Turn(
            "user",
            "\n".join(part for part in parts if part),
            "assistant",
            _answer(response, columns.response, location),
        )
    )
    return Conversation(
        tuple(turns),
        _optional_column(record, columns.system, location),
        _optional_column(record, columns.tools, location),
        location,
    )


def _read_sharegpt(
    record: dict[str, Any], columns: Columns, tags: Tags, location: str
) -> Conversation:
    assert columns.messages is not None
    messages = _required(record, columns.messages, location)
    if not isinstance(messages, list):
        raise RecordError(
            location,
            "bad messages",
            f"{columns.messages!r} must be a list of messages, got {type(messages).__name__}",
        )
    said = [
        _read_message(message, f"{columns.messages}[{index}]", tags, location)
        for index, message in enumerate(messages)
    ]
    system = _optional_column(record, columns.system, location)
    first = 0
    if said and tags.system_tag is not None and said[0][0] == tags.system_tag:
        system = said[0][1]
        first = 1
    prompt_roles = {tags.user_tag: "user", tags.observation_tag: "observation"}
    response_roles = {tags.assistant_tag: "assistant", tags.function_tag: "function"}
    roles: list[str] = []
    for index, (tag, content) in enumerate(said[first:]):
        expected = response_roles if index % 2 else prompt_roles
        where = f"{columns.messages}[{index + first}]"
        if tag not in expected:
            wanted = " or ".join(repr(name) for name in expected if name is not None)
            raise RecordError(
                location, "wrong role order", f"{where} has role {tag!r} where {wanted} must be"
            )
        if index % 2:
            _answer(content, where, location)
        roles.append(expected[tag])
    if not roles:
        raise RecordError(
            location, "no turns", f"{columns.messages!r} holds no question and answer"
        )
    if len(roles) % 2:
        raise RecordError(
            location,
            "wrong role order",
            f"{columns.messages!r} ends with a {roles[-1]} message that nobody answers",
        )
    texts = [content for _, content in said[first:]]
    turns = tuple(
        Turn(roles[i], texts[i], roles[i + 1], texts[i + 1]) for i in range(0, len(roles), 2)
    )
    return Conversation(turns, system, _optional_column(record, columns.tools, location), location)


def _read_message(message: object, where: str, tags: Tags, location: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise RecordError(
            location, "bad messages", f"{where} must be an object, got {type(message).__name__}"
        )
    assert tags.role_tag is not None
    assert tags.content_tag is not None
    # OpenAI-style calls live outside the content: reading only the content would lose them.
    if message.get("tool_calls"):
        raise RecordError(
            location,
            "tool_calls",
            f"{where} has tool_calls; write each call as a message of role "
            f"{tags.function_tag or 'function_call'!r} whose content is the JSON "
            '{"name": ..., "arguments": ...}',
        )
    for key in (tags.role_tag, tags.content_tag):
        if key not in message:
            raise RecordError(
                location, "missing column", f"{where} has no {key!r}; it has {_names(message)}"
            )
    role = _text(message[tags.role_tag], f"{where}.{tags.role_tag}", location)
    return role, _text(message[tags.content_tag], f"{where}.{tags.content_tag}", location)


def _required(record: dict[str, Any], column: str, location: str) -> object:
    if column not in record:
        raise RecordError(
            location, "missing column", f"the record has no {column!r}; it has {_names(record)}"
        )
    return record[column]


def _optional_column(record: dict[str, Any], column: str | None, location: str) -> str:
    if column is None:
        return ""
    return _optional_text(record.get(column), column, location)


def _optional_text(value: object, name: str, location: str) -> str:
    return "" if value is None else _text(value, name, location)


def _text(value: object, name: str, location: str) -> str:
    if not isinstance(value, str):
        remedy = "; store it as JSON text (json.dumps)" if isinstance(value, list | dict) else ""
        raise RecordError(
            location,
            "non-string content",
            f"{name!r} must be a string, got {type(value).__name__}{remedy}",
        )
    return require_unicode(value, name, location)


def require_unicode(text: str, name: str, location: str) -> str:
    """TEXT, unless it holds half of a surrogate pair, which no tokenizer accepts: RecordError."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(
            location,
            "invalid unicode",
            f"{name!r} holds half of a surrogate pair (\\u{ord(text[error.start]):04x}) at "
            f"character {error.start}",
        ) from error
    return text


def _answer(value: object, name: str, location: str) -> str:
    text = _text(value, name, location)
    if not text:
        raise RecordError(location, "empty answer", f"{name!r} is an empty string")
    return text


def _names(record: dict[str, Any]) -> str:
    return ", ".join(map(repr, record)) or "no fields"
