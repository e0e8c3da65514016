"""A tokenizer's own chat template: a conversation to alternating prompt and answer texts.

Owns where an answer begins and ends in what the template writes. The texts joined are the
rendering, letter for letter; the edges follow from comparing renderings (of the history with the
generation prompt, of other answers in the same place), never from knowing the template. Where
they do not follow exactly, the conversation is refused.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sdar.data.readers.records import RecordError
from megatron_sdar.data.sources.fields import require_unicode
from megatron_sdar.data.sources.layouts import Conversation
from megatron_sdar.data.sources.messages import BETWEEN_TOOL_RESULTS
from megatron_sdar.data.templates.tool_calls import parse_calls, parse_tools
from megatron_sdar.regular_files import read_json, read_regular_text

if TYPE_CHECKING:
    from megatron_sdar.data.templates.jinja_sandbox import JinjaTemplate

_THOUGHT = re.compile(r"<think>.*?</think>\n*", re.DOTALL)
_CALL_THOUGHT = re.compile(r"\s*<think>.*</think>\s*", re.DOTALL)
# Two answers that begin and end with different characters: what two renderings share cannot
# reach into the answer of both.
_OTHER_TEXTS = ("ab", "cd")
_OTHER_CALLS = (
    [{"type": "function", "function": {"name": "ab", "arguments": {"ab": "ab"}}}],
    [{"type": "function", "function": {"name": "cd", "arguments": {"cd": 12}}}],
)

Message = dict[str, Any]


def load_chat_template(directory: str | Path) -> str:
    """The Jinja text of the chat template in the model DIRECTORY (or beside that tokenizer.json).

    It is chat_template.jinja, or the "chat_template" of tokenizer_config.json (of several named
    ones "default", else "tool_use"). Raises ValueError when there is none.
    """
    directory = _directory(directory)
    file = directory / "chat_template.jinja"
    if file.exists():
        return read_regular_text(file)
    config = directory / "tokenizer_config.json"
    found = _read_config(config).get("chat_template") if config.exists() else None
    if isinstance(found, list):
        named = {
            entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)
        }
        found = named.get("default", named.get("tool_use"))
    if not isinstance(found, str):
        raise ValueError(
            f"{directory}: there is no chat template: neither chat_template.jinja nor a "
            "'chat_template' in tokenizer_config.json (a text, or a list with one named "
            "'default'); copy one there or set template to qwen3"
        )
    return found


def load_template_tokens(directory: str | Path) -> dict[str, str]:
    """`bos_token` and `eos_token`, where the tokenizer_config.json in DIRECTORY names them."""
    config = _directory(directory) / "tokenizer_config.json"
    entries = _read_config(config) if config.is_file() else {}
    tokens = {}
    for name in ("bos_token", "eos_token"):
        token = entries.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            tokens[name] = token
    return tokens


@lru_cache(maxsize=4)
def compile_chat_template(text: str) -> "JinjaTemplate":
    """TEXT compiled, once per process. Raises ValueError for a syntax error."""
    # Only users of a chat template pay for importing Jinja.
    from megatron_sdar.data.templates.jinja_sandbox import ChatTemplateError, JinjaTemplate

    try:
        return JinjaTemplate(text)
    except ChatTemplateError as error:
        raise ValueError(f"the chat template cannot be used: {error}") from error


def split_conversation(
    conversation: Conversation,
    chat_template: str,
    *,
    enable_thinking: bool | None = True,
    default_system: str | None = None,
    bos_token: str | None = None,
    eos_token: str | None = None,
) -> list[str]:
    """[prompt 1, answer 1, prompt 2, ...]; joined they are the rendered CONVERSATION.

    ENABLE_THINKING is handed to the template; False also removes thoughts from the answers, and
    without True an empty thought that the template writes belongs to the prompt. Raises
    RecordError where the template refuses the conversation, or leaves out a part of it, or where
    prompts and answers cannot be told apart.
    """
    location = conversation.location
    variables: dict[str, Any] = {"documents": None, "tools": None}
    if conversation.tools:
        variables["tools"] = parse_tools(conversation.tools, location) or None
    tokens = {"bos_token": bos_token, "eos_token": eos_token}
    variables |= {name: token for name, token in tokens.items() if token is not None}
    messages, answers = _make_messages(conversation, default_system, enable_thinking is False)
    rendering = _Rendering(
        compile_chat_template(chat_template), variables, messages, enable_thinking, location
    )
    return rendering.split(answers)


class _Rendering:
    """One conversation under one template."""

    def __init__(
        self,
        template: "JinjaTemplate",
        variables: dict[str, Any],
        messages: list[Message],
        enable_thinking: bool | None,
        location: str,
    ) -> None:
        self._template = template
        self._variables = variables
        self._messages = messages
        self._thinking = enable_thinking
        self._location = location
        self._full = require_unicode(self._render(messages), "chat template", location)

    def split(self, answers: Sequence[int]) -> list[str]:
        """The texts around and of the ANSWERS, which are places in the messages."""
        self._check_nothing_is_left_out()
        texts = []
        end = 0
        for index in answers:
            start = self._start(index)
            stop = len(self._full) if index == answers[-1] else self._stop(index, start)
            if not end <= start < stop:
                raise self._error(f"the answer in message {index} is not written in its place")
            texts += [self._full[end:start], self._full[start:stop]]
            end = stop
        return texts

    def _start(self, index: int) -> int:
        """Where the answer in message INDEX begins."""
        history = self._messages[:index]
        # None puts a missing thought before the answer, as the prompt of False does.
        for thinking in (False if self._thinking is None else self._thinking, None):
            prompt = self._render(history, generation=True, thinking=thinking)
            if self._full.startswith(prompt):
                return len(prompt)
        # The generation prompt may open a thought, and a later prompt may strip earlier ones: then
        # the answer begins where the template writes any other text for it.
        others = [self._render_with(index, {"content": text}) for text in _OTHER_TEXTS]
        start = min(_shared_prefix(self._full, other) for other in others)
        if any(
            not other.startswith(text, start)
            for other, text in zip(others, _OTHER_TEXTS, strict=True)
        ):
            raise self._error(
                f"what precedes the answer in message {index} changes with the answer or with "
                "what follows it, so prompt and answer cannot be told apart"
            )
        return start

    def _stop(self, index: int, start: int) -> int:
        """Where the answer in message INDEX, which begins at START, ends with its end marker."""
        # Most templates write an answer alike whatever follows: one rendering, not five.
        closed = self._render(self._messages[: index + 1])
        if len(closed) > start and self._full.startswith(closed):
            return len(closed)
        changes: list[Message] = [{"content": text} for text in _OTHER_TEXTS]
        if "tool_calls" in self._messages[index]:
            changes = [{"content": "", "tool_calls": calls} for calls in _OTHER_CALLS]
        tail = min(_shared_suffix(self._full, self._render_with(index, it)) for it in changes)
        ends = [self._render_with(index, it, until=index + 1) for it in changes]
        marker = ends[0][len(ends[0]) - _shared_suffix(*ends) :]
        stop = len(self._full) - tail
        if not self._full.startswith(marker, stop):
            raise self._error(
                f"the answer in message {index} ends differently when the conversation goes on, "
                "so answer and next prompt cannot be told apart"
            )
        return stop + len(marker)

    def _check_nothing_is_left_out(self) -> None:
        """Every content and every call must change the rendering when it changes."""
        for index, message in enumerate(self._messages):
            # Templates leave out system and tool messages; what users and answers say, if seen,
            # needs no second rendering.
            is_used = message["role"] in ("user", "assistant") and (
                message["content"].strip() in self._full
            )
            is_used = is_used or self._full != self._render_with(
                index, {**message, "content": message["content"] + _OTHER_TEXTS[0]}
            )
            if is_used and "tool_calls" in message:
                is_used = self._full != self._render_with(
                    index, {**message, "tool_calls": _OTHER_CALLS[0]}
                )
            if not is_used:
                raise self._error(f"the {message['role']} message {index} is left out")

    def _render_with(self, index: int, change: Message, until: int | None = None) -> str:
        """The rendering, up to message UNTIL, with CHANGE as message INDEX."""
        changed = {"role": self._messages[index]["role"], **change}
        return self._render([*self._messages[:index], changed, *self._messages[index + 1 : until]])

    def _render(
        self,
        messages: list[Message],
        *,
        generation: bool = False,
        thinking: bool | None = None,
    ) -> str:
        from megatron_sdar.data.templates.jinja_sandbox import ChatTemplateError

        variables = self._variables
        asked = thinking if generation else self._thinking
        if asked is not None:
            variables = {**variables, "enable_thinking": asked}
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=generation, **variables
            )
        except ChatTemplateError as error:
            raise self._error(str(error)) from error

    def _error(self, detail: str) -> RecordError:
        return RecordError(self._location, "chat template", detail)


def _make_messages(
    conversation: Conversation, default_system: str | None, remove_thoughts: bool
) -> tuple[list[Message], list[int]]:
    """(messages as chat templates expect them, the places of the answers)."""
    messages: list[Message] = []
    answers = []
    system = conversation.system or default_system
    if system:
        messages.append({"role": "system", "content": system})
    for turn in conversation.turns:
        if turn.prompt_role == "observation":
            results = turn.prompt_text.split(BETWEEN_TOOL_RESULTS)
            messages += [{"role": "tool", "content": text} for text in results]
        else:
            messages.append({"role": "user", "content": turn.prompt_text})
        answers.append(len(messages))
        answer: Message = {"role": "assistant", "content": turn.response_text}
        if turn.response_role == "function":
            found = _CALL_THOUGHT.match(turn.response_text)
            thought = found.group(0) if found else ""
            calls = parse_calls(turn.response_text[len(thought) :], conversation.location)
            answer["content"] = thought
            answer["tool_calls"] = [
                {"type": "function", "function": _with_object(call)} for call in calls
            ]
        if remove_thoughts:
            answer["content"] = _THOUGHT.sub("", answer["content"]).lstrip("\n")
        messages.append(answer)
    return messages, answers


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    """CALL with its arguments as an object, as templates expect them, if given as JSON text."""
    arguments = call["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _shared_prefix(left: str, right: str) -> int:
    """Length of the longest text that both begin with."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[:middle] == right[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _shared_suffix(left: str, right: str) -> int:
    """Length of the longest text that both end with."""
    return _shared_prefix(left[::-1], right[::-1])


def _directory(path: str | Path) -> Path:
    path = Path(path)
    return path.parent if path.is_file() else path


def _read_config(file: Path) -> dict[str, Any]:
    try:
        content = read_json(file)
    except ValueError as error:
        raise ValueError(f"{error}; copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must hold one JSON object, got {type(content).__name__}")
    return content
