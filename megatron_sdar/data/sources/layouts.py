"""What a document is, and how a record is laid out.

Owns the types between reading and the template. A conversation always alternates a prompt (user
or observation) and a response (assistant or function), so a template never meets a bad role
order.
"""

from dataclasses import dataclass, field
from typing import NamedTuple


class Turn(NamedTuple):
    """One exchange. Roles: user or observation, answered by assistant or function."""

    prompt_role: str
    prompt_text: str
    response_role: str
    response_text: str


@dataclass(frozen=True)
class Conversation:
    """Turns in order, the system prompt ("" for none) and the tools (JSON text of a list, or "").

    `location` is file:line of the record, for messages. `left_out` says what the record holds
    that its layout does not use, in short fixed phrases that can be counted.
    """

    turns: tuple[Turn, ...]
    system: str = ""
    tools: str = ""
    location: str = "conversation"
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlainText:
    """A document for continued pretraining: all of `text` is trained on. Else as Conversation."""

    text: str
    location: str = "text"
    left_out: tuple[str, ...] = ()


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
    """Names inside a message: its two fields, and the value of each role (None: no such role)."""

    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str | None = "human"
    assistant_tag: str | None = "gpt"
    observation_tag: str | None = "observation"
    function_tag: str | None = "function_call"
    system_tag: str | None = "system"


OPENAI_TAGS = Tags("role", "content", "user", "assistant", "tool", "function_call", "system")


@dataclass(frozen=True)
class Layout:
    """How a record is laid out: its formatting with its columns and tags.

    formatting: alpaca, sharegpt or openai; or text, of which `columns.prompt` (and query) is the
    document, or, without one, the first message of `columns.messages`.
    """

    formatting: str = "alpaca"
    columns: Columns = field(default_factory=Columns)
    tags: Tags = field(default_factory=Tags)
