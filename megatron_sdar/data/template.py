"""Chat templates: a conversation to token ids and labels.

Owns the strings of `qwen3` and `qwen3_nothink` and what is trained on. Every string piece is
tokenised on its own, as LLaMA-Factory does: joining pieces first would merge tokens across
their edges and give other ids. Nothing is truncated or padded here; rows decide that.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_sdar.data.conversations import Conversation, Turn, require_unicode
from megatron_sdar.data.records import RecordError
from megatron_sdar.data.tokenizer import SdarTokenizer
from megatron_sdar.diffusion.rows import IGNORED_LABEL

TEMPLATES = ("qwen3", "qwen3_nothink")

_THINK_OPEN = "<think>\n"
_THINK_CLOSE = "\n</think>\n\n"
_THOUGHT = re.compile(re.escape(_THINK_OPEN) + "(.*?)" + re.escape(_THINK_CLOSE), re.DOTALL)
_CALL_THOUGHT = re.compile(r"<think>(.*)</think>", re.DOTALL)
_TOOLS_HEAD = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    'within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, '
    '"arguments": <args-json-object>}\n</tool_call>'
)


@dataclass(frozen=True)
class TemplateOptions:
    """How conversations are written and which tokens are trained on.

    enable_thinking (qwen3 only): True adds an empty think block to an answer without one and
    trains on it; False removes thoughts and puts the empty block before the answer, untrained;
    None keeps answers and puts a missing block before them, untrained.
    mask_history: train on the last answer only. train_on_prompt: train on prompts too.
    """

    template: str = "qwen3"
    enable_thinking: bool | None = True
    mask_history: bool = False
    train_on_prompt: bool = False
    default_system: str | None = None

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise ValueError(
                f"template must be one of {', '.join(TEMPLATES)}, got {self.template!r}"
            )
        if self.mask_history and self.train_on_prompt:
            raise ValueError(
                "mask_history and train_on_prompt are both true: one trains on less than the "
                "answers, the other on more; set one of them to false"
            )


class Piece(NamedTuple):
    """A string that is tokenised on its own, and whether its tokens carry labels."""

    text: str
    trained: bool


def conversation_pieces(conversation: Conversation, options: TemplateOptions) -> list[Piece]:
    """The strings of CONVERSATION in order. Raises RecordError for tools or calls not in JSON."""
    pieces: list[Piece] = []
    system = conversation.system or options.default_system or ""
    if system or conversation.tools:
        tools = _format_tools(conversation) if conversation.tools else ""
        pieces.append(
            Piece(f"<|im_start|>system\n{system}{tools}<|im_end|>\n", options.train_on_prompt)
        )
    for index, turn in enumerate(conversation.turns):
        is_last = index == len(conversation.turns) - 1
        train_answer = is_last or not options.mask_history
        answer, think = turn.response_text, False
        if options.template == "qwen3":
            if options.enable_thinking is False:
                answer = _THOUGHT.sub("", answer).lstrip("\n")
            think = _THINK_OPEN not in answer and _THINK_CLOSE not in answer
        if turn.response_role == "function":
            answer = _format_calls(answer, conversation.location)
        pieces.append(Piece(_format_prompt(turn), options.train_on_prompt))
        if think:
            on_answer = options.enable_thinking is True
            trained = train_answer if on_answer else options.train_on_prompt
            pieces.append(Piece(_THINK_OPEN + _THINK_CLOSE, trained))
        pieces.append(Piece(f"{answer}<|im_end|>\n", train_answer))
    return pieces


def encode_conversation(
    tokenizer: SdarTokenizer, conversation: Conversation, options: TemplateOptions
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(ids int32 [n], labels int32 [n]) of the whole conversation; label -100 is not trained."""
    pieces = conversation_pieces(conversation, options)
    piece_ids = tokenizer.encode_batch([piece.text for piece in pieces])
    return join_pieces(piece_ids, [piece.trained for piece in pieces])


def join_pieces(
    piece_ids: Sequence[Sequence[int]], trained: Sequence[bool]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(ids, labels) int32 of the pieces end to end; labels are ids where trained, else -100."""
    lengths = [len(ids) for ids in piece_ids]
    flat = np.concatenate([np.asarray(ids, dtype=np.int32) for ids in piece_ids])
    labels = np.where(np.repeat(np.asarray(trained, dtype=bool), lengths), flat, IGNORED_LABEL)
    return flat, labels.astype(np.int32)


def _format_prompt(turn: Turn) -> str:
    text = turn.prompt_text
    if turn.prompt_role == "observation":
        text = f"<tool_response>\n{text}\n</tool_response>"
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def _format_tools(conversation: Conversation) -> str:
    tools = _parse_json(conversation.tools, "tools", conversation.location)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError(
            conversation.location, "bad tools", "'tools' must be the JSON text of a list of objects"
        )
    if not tools:
        return ""
    lines = [
        _dump_json(
            tool if tool.get("type") == "function" else {"type": "function", "function": tool},
            "tools",
            conversation.location,
        )
        for tool in tools
    ]
    return _TOOLS_HEAD + "".join(f"\n{line}" for line in lines) + _TOOLS_TAIL


def _format_calls(content: str, location: str) -> str:
    found = _CALL_THOUGHT.search(content)
    thought = found.group(0) if found else ""
    if thought:
        content = content.replace(thought, "")
    calls = _parse_json(content, "function call", location)
    texts = []
    for call in calls if isinstance(calls, list) else [calls]:
        if not (isinstance(call, dict) and "name" in call and "arguments" in call):
            raise RecordError(
                location,
                "bad function call",
                f'a call must be {{"name": ..., "arguments": ...}} or a list of them: {content!r}',
            )
        named = {"name": call["name"], "arguments": call["arguments"]}
        text = _dump_json(named, "function call", location)
        texts.append(f"<tool_call>\n{text}\n</tool_call>")
    return thought + "\n".join(texts)


def _parse_json(text: str, what: str, location: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(location, f"bad {what}", f"not valid JSON ({error}): {text!r}") from error


def _dump_json(value: object, what: str, location: str) -> str:
    # An escaped lone surrogate is plain ASCII in the record and shows up only here.
    return require_unicode(json.dumps(value, ensure_ascii=False), what, location)
