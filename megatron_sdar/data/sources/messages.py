"""Records that hold a list of messages: the sharegpt and openai layouts.

Owns the meaning of `tags`. Messages alternate after a leading system message; what is out of
order is a RecordError. What the published openai layout leaves out of a record is named, never
dropped in silence.
"""

import json
from typing import Any, NamedTuple

from megatron_sdar.data.readers.records import RecordError
from megatron_sdar.data.sources.fields import (
    is_unicode,
    names_in,
    optional_column,
    require_answer,
    require_text,
    required,
)
from megatron_sdar.data.sources.layouts import (
    OPENAI_TAGS,
    Columns,
    Conversation,
    PlainText,
    Tags,
    Turn,
)

TEXT_BESIDE_CALLS = "text beside tool_calls"
TOOL_MESSAGES_AT_END = "tool messages that nobody answers"
LATER_MESSAGES = "messages after the first"

# LLaMA-Factory's way to put several tool results into one observation of the template.
BETWEEN_TOOL_RESULTS = "\n</tool_response>\n<tool_response>\n"
_DEFAULT_TAGS = Tags()
_PROMPT_ROLES = ("user", "observation")
_RESPONSE_ROLES = ("assistant", "function")


class _Message(NamedTuple):
    """A message: its place in the list, its role ("" for an unknown tag), its tag and text."""

    place: int
    role: str
    tag: str
    text: str


def read_sharegpt(
    record: dict[str, Any], columns: Columns, tags: Tags, location: str
) -> Conversation:
    """The conversation of a sharegpt RECORD; a leading system message wins over the column."""
    column, messages = _message_list(record, columns, location)
    roles = _roles(tags)
    said = []
    for index, message in enumerate(messages):
        # Calls of the openai layout live outside the content, which would lose them.
        if isinstance(message, dict) and message.get("tool_calls"):
            raise RecordError(
                location,
                "tool_calls",
                f"{column}[{index}] has tool_calls, which only 'formatting': 'openai' reads; or "
                f"write them as a message of role {tags.function_tag or 'function_call'!r} whose "
                'content is the JSON {"name": ..., "arguments": ...}',
            )
        said.append(_read_message(message, column, index, tags, roles, location))
    system, said = _take_system(said, record, columns, location)
    turns = _pair_up(said, column, tags, location)
    return Conversation(turns, system, optional_column(record, columns.tools, location), location)


def read_openai(
    record: dict[str, Any], columns: Columns, tags: Tags, location: str
) -> Conversation:
    """The conversation of an openai RECORD, as LLaMA-Factory's converter reads it.

    tool_calls become one function turn: the JSON list of their `function` objects, unchanged
    (arguments may be an object or JSON text). Consecutive tool messages become one observation.
    As there, text beside tool_calls and tool messages at the very end are left out, here with
    a word in `left_out`. `tools` may be JSON text, a list or an object. Unlike there, no
    "detailed thinking off" is added to the system prompt, which only some models know.
    """
    column, messages = _message_list(record, columns, location)
    tags = _tags_in_use(messages, tags)
    roles = _roles(tags)
    left_out: list[str] = []
    said: list[_Message] = []
    results: list[_Message] = []
    for index, message in enumerate(messages):
        if isinstance(message, dict) and message.get("tool_calls"):
            read = _read_calls(message, column, index, tags, roles, location)
            if message.get(tags.content_tag) and TEXT_BESIDE_CALLS not in left_out:
                left_out.append(TEXT_BESIDE_CALLS)
        else:
            read = _read_message(message, column, index, tags, roles, location)
        if read.role == "observation":
            results.append(read)
            continue
        if results:
            said.append(_join_results(results))
            results = []
        said.append(read)
    if results:
        left_out.append(TOOL_MESSAGES_AT_END)
    system, said = _take_system(said, record, columns, location)
    turns = _pair_up(said, column, tags, location)
    tools = _read_tools(record, columns, location)
    return Conversation(turns, system, tools, location, tuple(left_out))


def read_first_message(
    record: dict[str, Any], columns: Columns, tags: Tags, location: str
) -> PlainText:
    """The first message of RECORD (after a system message) as plain text, as stage pt takes it."""
    column, messages = _message_list(record, columns, location)
    tags = _tags_in_use(messages, tags)
    roles = _roles(tags)
    for index, message in enumerate(messages):
        read = _read_message(message, column, index, tags, roles, location)
        if index == 0 and read.role == "system":
            continue
        if not read.text:
            raise RecordError(location, "empty text", f"{column}[{index}] has no text to train on")
        left_out = (LATER_MESSAGES,) if len(messages) > index + 1 else ()
        return PlainText(read.text, location, left_out)
    raise RecordError(location, "empty text", f"{column!r} holds no message with text")


def _message_list(
    record: dict[str, Any], columns: Columns, location: str
) -> tuple[str, list[object]]:
    """The column of the messages and the messages."""
    column = columns.messages
    assert column is not None
    messages = required(record, column, location)
    if not isinstance(messages, list):
        raise RecordError(
            location,
            "bad messages",
            f"{column!r} must be a list of messages, got {type(messages).__name__}",
        )
    return column, messages


def _roles(tags: Tags) -> dict[str | None, str]:
    return {
        tags.user_tag: "user",
        tags.assistant_tag: "assistant",
        tags.observation_tag: "observation",
        tags.function_tag: "function",
        tags.system_tag: "system",
    }


def _tags_in_use(messages: list[object], tags: Tags) -> Tags:
    """TAGS; OpenAI's own names where dataset_info.json gives none and the messages use them."""
    first = messages[0] if messages else None
    if (
        tags == _DEFAULT_TAGS
        and isinstance(first, dict)
        and "from" not in first
        and "role" in first
    ):
        return OPENAI_TAGS
    return tags


def _read_message(
    message: object,
    column: str,
    index: int,
    tags: Tags,
    roles: dict[str | None, str],
    location: str,
) -> _Message:
    if not isinstance(message, dict):
        raise _not_a_message(message, column, index, location)
    tag: object = message.get(tags.role_tag)
    text: object = message.get(tags.content_tag)
    # The names for a message of an error are put together only when there is one.
    if not (
        isinstance(tag, str) and isinstance(text, str) and is_unicode(tag) and is_unicode(text)
    ):
        tag = _read_tag(message, column, index, tags, location)
        where = f"{column}[{index}]"
        _require_key(message, tags.content_tag, where, location)
        text = require_text(text, f"{where}.{tags.content_tag}", location)
    return _Message(index, roles.get(tag, ""), tag, text)


def _not_a_message(message: object, column: str, index: int, location: str) -> RecordError:
    return RecordError(
        location,
        "bad messages",
        f"{column}[{index}] must be an object, got {type(message).__name__}",
    )


def _read_tag(message: dict[str, Any], column: str, index: int, tags: Tags, location: str) -> str:
    where = f"{column}[{index}]"
    _require_key(message, tags.role_tag, where, location)
    return require_text(message[tags.role_tag], f"{where}.{tags.role_tag}", location)


def _require_key(message: dict[str, Any], key: str, where: str, location: str) -> None:
    if key not in message:
        raise RecordError(
            location, "missing column", f"{where} has no {key!r}; it has {names_in(message)}"
        )


def _read_calls(
    message: dict[str, Any],
    column: str,
    index: int,
    tags: Tags,
    roles: dict[str | None, str],
    location: str,
) -> _Message:
    where = f"{column}[{index}].tool_calls"
    tag = _read_tag(message, column, index, tags, location)
    if roles.get(tag) not in _RESPONSE_ROLES:
        raise RecordError(
            location, "bad tool_calls", f"{where}: a message of role {tag!r} makes no calls"
        )
    calls = message["tool_calls"]
    functions = [
        call.get("function") if isinstance(call, dict) else None
        for call in (calls if isinstance(calls, list) else [None])
    ]
    if not all(isinstance(function, dict) for function in functions):
        raise RecordError(
            location, "bad tool_calls", f'{where} must be a list of {{"function": {{...}}}} objects'
        )
    return _Message(index, "function", tag, _dump_json(functions, where, location))


def _join_results(results: list[_Message]) -> _Message:
    text = BETWEEN_TOOL_RESULTS.join(result.text for result in results)
    return results[0]._replace(text=text)


def _read_tools(record: dict[str, Any], columns: Columns, location: str) -> str:
    tools = None if columns.tools is None else record.get(columns.tools)
    if isinstance(tools, list | dict):
        return _dump_json(tools, str(columns.tools), location)
    return optional_column(record, columns.tools, location)


def _dump_json(value: object, name: str, location: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RecordError(location, "not JSON", f"{name!r}: {error}") from error
    return require_text(text, name, location)


def _take_system(
    said: list[_Message], record: dict[str, Any], columns: Columns, location: str
) -> tuple[str, list[_Message]]:
    """The system prompt, and the messages without the one that holds it."""
    column = optional_column(record, columns.system, location)
    if said and said[0].role == "system":
        return said[0].text, said[1:]
    return column, said


def _pair_up(said: list[_Message], column: str, tags: Tags, location: str) -> tuple[Turn, ...]:
    for number, message in enumerate(said):
        if message.role not in (_RESPONSE_ROLES if number % 2 else _PROMPT_ROLES):
            expected = (
                (tags.assistant_tag, tags.function_tag)
                if number % 2
                else (tags.user_tag, tags.observation_tag)
            )
            wanted = " or ".join(repr(name) for name in expected if name is not None)
            raise RecordError(
                location,
                "wrong role order",
                f"{column}[{message.place}] has role {message.tag!r} where {wanted} must be",
            )
        if number % 2 and not message.text:
            require_answer(message.text, f"{column}[{message.place}]", location)
    if not said:
        raise RecordError(location, "no turns", f"{column!r} holds no question and answer")
    if len(said) % 2:
        raise RecordError(
            location,
            "wrong role order",
            f"{column!r} ends with a {said[-1].role} message that nobody answers",
        )
    return tuple(
        Turn(prompt.role, prompt.text, response.role, response.text)
        for prompt, response in zip(said[::2], said[1::2], strict=True)
    )
