"""Prompts in words, from the command line or a file, and their token ids.

Invariant: a prompt's ids are exactly what training left untrained before the last answer, each
template piece tokenised on its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_sdar.data.sources.conversations import Conversation, Turn, require_unicode
from megatron_sdar.data.sources.layouts import OPENAI_TAGS, Columns
from megatron_sdar.data.sources.messages import read_openai
from megatron_sdar.data.templates.template import TemplateOptions, conversation_pieces
from megatron_sdar.data.tokenization.tokenizer import SdarTokenizer

# Fields that may hold the question, the first that is there.
TEXT_FIELDS = ("prompt", "question", "instruction")
_MAX_BYTES = 2**30  # of a file of prompts


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        text: the question, or with `raw` any text to go on from.
        place: what an error message calls it.
        system: system prompt, "" for none.
        conversation: of a record with messages, instead of text and system.
        record: what the file held, which goes into the output again.
    """

    text: str
    place: str = "--prompt"
    system: str = ""
    conversation: Conversation | None = None
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptOptions:
    """How prompts become ids.

    Attributes:
        raw: the text is continued as it is, without the chat template.
        enable_thinking: False puts an empty think block before the answer.
    """

    raw: bool = False
    enable_thinking: bool = True


def prompt_ids(tokenizer: SdarTokenizer, prompt: Prompt, options: PromptOptions) -> list[int]:
    """Ids of the prompt.

    Raises:
        ValueError: for a system prompt or messages without the template, and for text that is not
            Unicode.
    """
    if options.raw:
        if prompt.system:
            raise ValueError(
                f"{prompt.place}: a system prompt needs the chat template; leave out --system or "
                "--raw"
            )
        if prompt.conversation is not None:
            raise ValueError(f"{prompt.place}: messages need the chat template; leave out --raw")
        return tokenizer.encode(require_unicode(prompt.text, "prompt", prompt.place))
    conversation = prompt.conversation
    if conversation is None:
        require_unicode(prompt.system, "system", prompt.place)
        require_unicode(prompt.text, "prompt", prompt.place)
        turn = Turn("user", prompt.text, "assistant", "")
        conversation = Conversation((turn,), system=prompt.system)
    template = TemplateOptions(enable_thinking=options.enable_thinking)
    pieces = conversation_pieces(conversation, template)
    last = max(place for place, piece in enumerate(pieces) if not piece.trained)
    texts = [piece.text for piece in pieces[: last + 1]]
    return [token for ids in tokenizer.encode_batch(texts) for token in ids]


def read_prompts(path: Path, system: str) -> list[Prompt]:
    """The prompts of a JSONL file, one a line; empty lines are passed over.

    A record holds `messages` in the openai layout (an assistant's message at the end, the
    reference, is not shown to the model), or its question in one of TEXT_FIELDS, with
    `instruction` also an `input`; `system` beside it.

    Args:
        system: for records without one of their own.

    Raises:
        ValueError: with file and line, for a record that is none of these; the file is unreadable
            or holds no prompt.
    """
    try:
        with path.open("rb") as stream:  # may be a pipe: <(head -5 test.jsonl)
            if os.fstat(stream.fileno()).st_size > _MAX_BYTES:
                raise ValueError(f"{path}: larger than {_MAX_BYTES} bytes; split it")
            lines = stream.read().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read it ({error})") from error
    prompts = [
        _read(line, f"{path}:{number}", system)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not prompts:
        raise ValueError(f"{path}: holds no prompt; write one JSON object a line")
    return prompts


def _read(line: str, place: str, system: str) -> Prompt:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place}: a {type(record).__name__}, not an object with a prompt")
    if record.get("messages"):
        conversation = _conversation(record, place)
        conversation = replace(conversation, system=conversation.system or system)
        return Prompt("", place, conversation=conversation, record=record)
    name = next((name for name in TEXT_FIELDS if record.get(name)), None)
    own_system = record.get("system") or system
    more = (record.get("input") or "") if name == "instruction" else ""
    if name is None:
        raise ValueError(
            f"{place}: has neither messages nor {', '.join(TEXT_FIELDS)}; it has "
            f"{', '.join(record) or 'no field'}"
        )
    for field_name, text in ((name, record[name]), ("system", own_system), ("input", more)):
        if not isinstance(text, str):
            raise ValueError(f"{place}: {field_name} is a {type(text).__name__}, not text")
    text = f"{record[name]}\n{more}" if more else record[name]
    return Prompt(text, place, own_system, record=record)


def _conversation(record: dict[str, Any], place: str) -> Conversation:
    """The messages up to the answer that is to be written."""
    messages = record["messages"]
    if isinstance(messages, list) and isinstance(messages[-1], dict):
        # The reader wants whole turns; what stands in the last answer is left out below.
        is_answered = messages[-1].get("role") == "assistant"
        answer = {"role": "assistant", "content": "."}
        record = {**record, "messages": [*(messages[:-1] if is_answered else messages), answer]}
    conversation = read_openai(record, Columns(messages="messages"), OPENAI_TAGS, place)
    *earlier, last = conversation.turns
    turns = (*earlier, last._replace(response_text=""))
    return replace(conversation, turns=turns)
