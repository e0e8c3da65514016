"""Documents to token pieces: what is written, what is trained on, what is whose turn.

Owns the strings of `qwen3` and `qwen3_nothink` and the labels of every template. Each piece is
tokenised on its own, as LLaMA-Factory does: joining pieces first would merge tokens across
their edges and give other ids. Nothing is truncated or padded here; rows decide that.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_sdar.data.sources.layouts import Conversation, PlainText, Turn
from megatron_sdar.data.templates.chat_template import compile_chat_template, split_conversation
from megatron_sdar.data.templates.tool_calls import dump_json, parse_calls, parse_tools
from megatron_sdar.data.tokenization.tokenizer import IM_END, SdarTokenizer
from megatron_sdar.diffusion.rows import IGNORED_LABEL

TEMPLATES = ("qwen3", "qwen3_nothink", "chat_template")
LLAMAFACTORY_VERSIONS = ("0.9.4", "0.9.6")

_THINK_OPEN = "<think>\n"
_THINK_CLOSE = "\n</think>\n\n"
_EMPTY_THOUGHT = _THINK_OPEN + _THINK_CLOSE
_THOUGHT = re.compile(re.escape(_THINK_OPEN) + "(.*?)" + re.escape(_THINK_CLOSE), re.DOTALL)
_CALL_THOUGHT = re.compile(r"<think>.*</think>", re.DOTALL)
_TAGGED_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
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

    enable_thinking (qwen3): True adds an empty think block to an answer without one and
    trains on it; False removes thoughts and puts the empty block before the answer, untrained;
    None keeps answers and puts a missing block before them, untrained.
    mask_history: train on the last answer only. train_on_prompt: train on prompts too.
    llamafactory_version: whose reading of thoughts counts. "0.9.4" is the published SDAR
    fine-tuning code. "0.9.6" knows a thought by its tags alone (`<think>cot</think>out`), keeps
    the newlines between a thought and the call after it, and with mask_history leaves the
    thoughts of earlier answers out, as at inference.
    chat_template, bos_token, eos_token: for template "chat_template" the Jinja text and what it
    may write as these tokens; enable_thinking is then handed to it.
    """

    template: str = "qwen3"
    enable_thinking: bool | None = True
    mask_history: bool = False
    train_on_prompt: bool = False
    default_system: str | None = None
    llamafactory_version: str = "0.9.4"
    chat_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None

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
        if self.llamafactory_version not in LLAMAFACTORY_VERSIONS:
            raise ValueError(
                f"llamafactory_version must be one of {', '.join(LLAMAFACTORY_VERSIONS)} (a "
                f"string, in quotes), got {self.llamafactory_version!r}"
            )
        if (self.template == "chat_template") != (self.chat_template is not None):
            raise ValueError(
                f"template is {self.template!r} and chat_template (its Jinja text) is "
                f"{'missing' if self.chat_template is None else 'given'}: the text belongs to "
                "template 'chat_template' and to no other"
            )
        if self.chat_template is not None:
            written = compile_chat_template(self.chat_template).variables
            if "eos_token" in written and self.eos_token is None:
                raise ValueError(
                    "the chat template writes eos_token, the end of an answer, and none is given; "
                    "set eos_token in the tokenizer_config.json beside it"
                )


class Piece(NamedTuple):
    """A string that is tokenised on its own.

    trained: its tokens carry labels. answer: it belongs to the answer of its (prompt, answer)
    pair; a piece that does not, after one that does, begins the next pair.
    """

    text: str
    trained: bool
    answer: bool


def document_pieces(document: Conversation | PlainText, options: TemplateOptions) -> list[Piece]:
    """The strings of DOCUMENT in order. Raises RecordError for what the template cannot write.

    A plain text is one trained piece that ends with <|im_end|>, as in LLaMA-Factory's stage pt.
    """
    if isinstance(document, PlainText):
        return [Piece(document.text + IM_END, True, True)]
    return conversation_pieces(document, options)


def conversation_pieces(conversation: Conversation, options: TemplateOptions) -> list[Piece]:
    """`document_pieces` of a conversation."""
    if options.chat_template is not None:
        return _chat_template_pieces(conversation, options, options.chat_template)
    pieces: list[Piece] = []
    train_prompt = options.train_on_prompt
    thinking = options.enable_thinking
    is_reasoning = options.template == "qwen3"
    is_new = options.llamafactory_version == "0.9.6"
    # How 0.9.6 recognises a thought, and that it leaves those of untrained answers out.
    opening, closing = ("<think>", "</think>") if is_new else (_THINK_OPEN, _THINK_CLOSE)
    discards_history = is_new and options.mask_history
    system = conversation.system or options.default_system or ""
    if system or conversation.tools:
        tools = _format_tools(conversation) if conversation.tools else ""
        pieces.append(
            Piece(f"<|im_start|>system\n{system}{tools}<|im_end|>\n", train_prompt, False)
        )
    last = len(conversation.turns) - 1
    for index, turn in enumerate(conversation.turns):
        is_history = index != last
        train_answer = not (is_history and options.mask_history)
        answer, think = turn.response_text, False
        if is_reasoning:
            is_discarded = is_history and discards_history
            if thinking is False or is_discarded:
                answer = _THOUGHT.sub("", answer).lstrip("\n")
            think = not is_discarded and opening not in answer and closing not in answer
        if turn.response_role == "function":
            answer = _format_calls(answer, conversation.location, is_new)
        pieces.append(Piece(_format_prompt(turn), train_prompt, False))
        if think:
            if thinking:
                pieces.append(Piece(_EMPTY_THOUGHT, train_answer, True))
            else:
                pieces.append(Piece(_EMPTY_THOUGHT, train_prompt, False))
        pieces.append(Piece(f"{answer}<|im_end|>\n", train_answer, True))
    return pieces


def _chat_template_pieces(
    conversation: Conversation, options: TemplateOptions, chat_template: str
) -> list[Piece]:
    texts = split_conversation(
        conversation,
        chat_template,
        enable_thinking=options.enable_thinking,
        default_system=options.default_system,
        bos_token=options.bos_token,
        eos_token=options.eos_token,
    )
    pieces = []
    for index in range(0, len(texts), 2):
        train_answer = not options.mask_history or index == len(texts) - 2
        pieces.append(Piece(texts[index], options.train_on_prompt, False))
        pieces.append(Piece(texts[index + 1], train_answer, True))
    return pieces


def encode_conversation(
    tokenizer: SdarTokenizer, conversation: Conversation | PlainText, options: TemplateOptions
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(ids int32 [n], labels int32 [n]) of the whole document; label -100 is not trained."""
    pieces = document_pieces(conversation, options)
    piece_ids = tokenizer.encode_pieces([piece.text for piece in pieces])
    return join_pieces(piece_ids, [piece.trained for piece in pieces])


def join_pieces(
    piece_ids: Sequence[ArrayLike], trained: Sequence[bool]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(ids, labels) int32 of the pieces end to end; labels are ids where trained, else -100."""
    arrays = [np.asarray(ids, dtype=np.int32) for ids in piece_ids]
    flat = np.concatenate(arrays)
    is_trained = np.repeat(np.asarray(trained, dtype=bool), [len(ids) for ids in arrays])
    return flat, np.where(is_trained, flat, np.int32(IGNORED_LABEL))


def _format_prompt(turn: Turn) -> str:
    text = turn.prompt_text
    if turn.prompt_role == "observation":
        text = f"<tool_response>\n{text}\n</tool_response>"
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def _format_tools(conversation: Conversation) -> str:
    tools = parse_tools(conversation.tools, conversation.location)
    if not tools:
        return ""
    lines = [
        dump_json(
            tool if tool.get("type") == "function" else {"type": "function", "function": tool},
            "tools",
            conversation.location,
        )
        for tool in tools
    ]
    return _TOOLS_HEAD + "".join(f"\n{line}" for line in lines) + _TOOLS_TAIL


def _format_calls(content: str, location: str, is_new: bool) -> str:
    """CONTENT, a thought or nothing and then calls in JSON, as the model writes it."""
    tagged = _TAGGED_CALL.search(content) if is_new else None
    if tagged:
        thought, calls_text = content.replace(tagged.group(0), ""), tagged.group(1)
    else:
        found = (_THOUGHT if is_new else _CALL_THOUGHT).search(content)
        thought = found.group(0) if found else ""
        calls_text = content.replace(thought, "") if thought else content
    texts = [
        f"<tool_call>\n{dump_json(call, 'function call', location)}\n</tool_call>"
        for call in parse_calls(calls_text, location)
    ]
    return thought + "\n".join(texts)
