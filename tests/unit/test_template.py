"""The chat template against vectors observed from LLaMA-Factory, and its edges.

The expected strings of the small cases are written out by hand; ids come from a tokenizer
trained in the test, so they run without the Qwen3 files.
"""

import json

import numpy as np
import pytest
from unit.golden_sft import golden, read_case, require_golden, require_qwen3, template_options
from unit.turns import piece_turns

from megatron_sdar.data.demo import train_tokenizer
from megatron_sdar.data.loading.packing import pad_to_block
from megatron_sdar.data.readers.records import RecordError
from megatron_sdar.data.sources.conversations import Conversation, PlainText, Turn
from megatron_sdar.data.templates.template import (
    Piece,
    TemplateOptions,
    document_pieces,
    encode_conversation,
    join_pieces,
)
from megatron_sdar.data.tokenization.tokenizer import SdarTokenizer

EMPTY_THINK = "<think>\n\n</think>\n\n"
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def qwen3() -> SdarTokenizer:
    return require_qwen3()


@pytest.fixture(scope="module")
def small() -> SdarTokenizer:
    return SdarTokenizer(train_tokenizer(iter(["user assistant system hello"])), "test")


def chat(*answers: str, system: str = "", tools: str = "", role: str = "assistant"):
    turns = tuple(Turn("user", f"q{i}", role, text) for i, text in enumerate(answers))
    return Conversation(turns, system, tools, "data.jsonl:7")


def texts(conversation: Conversation, **options) -> list[tuple[str, bool]]:
    pieces = document_pieces(conversation, TemplateOptions(**options))
    return [(piece.text, piece.trained) for piece in pieces]


# Golden vectors


def test_golden_vectors_are_there():
    assert {"cases", "extra_cases"} <= require_golden().keys()
    assert len(golden("cases", "extra_cases")) >= 13


@pytest.mark.parametrize("case", golden("cases", "extra_cases"), ids=lambda case: case["name"])
def test_golden_vector(case, qwen3, tmp_path):
    conversation = read_case(case, tmp_path)

    aligned = case["aligned"]
    said = [(m["role"], m["content"]) for m in aligned["_prompt"] + aligned["_response"]]
    ours = [pair for t in conversation.turns for pair in ((t[0], t[1]), (t[2], t[3]))]
    assert ours == said
    assert (conversation.system, conversation.tools) == (aligned["_system"], aligned["_tools"])

    template = template_options(case)
    ids, labels = encode_conversation(qwen3, conversation, template)
    ids, labels = pad_to_block(ids, labels, case["block_length"], qwen3.pad_token_id)
    assert ids.tolist() == case["input_ids"]
    assert labels.tolist() == case["labels"]
    assert ids.dtype == labels.dtype == np.int32


# Thinking


@pytest.mark.parametrize(
    ("answer", "thinking", "expected"),
    [
        ("a", True, [(EMPTY_THINK, True), ("a<|im_end|>\n", True)]),
        ("a", None, [(EMPTY_THINK, False), ("a<|im_end|>\n", True)]),
        ("a", False, [(EMPTY_THINK, False), ("a<|im_end|>\n", True)]),
        ("<think>\nt\n</think>\n\na", True, [("<think>\nt\n</think>\n\na<|im_end|>\n", True)]),
        ("<think>\nt\n</think>\n\na", None, [("<think>\nt\n</think>\n\na<|im_end|>\n", True)]),
        ("<think>\nt\n</think>\n\n\na", False, [(EMPTY_THINK, False), ("a<|im_end|>\n", True)]),
        # Without the newlines the words are not the template's: a second block is added.
        ("<think>t</think>a", True, [(EMPTY_THINK, True), ("<think>t</think>a<|im_end|>\n", True)]),
        # One of the two words is enough to count as a thought.
        ("<think>\na", True, [("<think>\na<|im_end|>\n", True)]),
        ("a\n</think>\n\n", True, [("a\n</think>\n\n<|im_end|>\n", True)]),
        # Removing thoughts is lazy, so that two thoughts do not take the text between them.
        (
            "<think>\n1\n</think>\n\na<think>\n2\n</think>\n\nb",
            False,
            [(EMPTY_THINK, False), ("ab<|im_end|>\n", True)],
        ),
    ],
)
def test_thinking_modes(answer, thinking, expected):
    assert texts(chat(answer), enable_thinking=thinking) == [
        (PROMPT.format("q0"), False),
        *expected,
    ]


def test_thoughts_of_earlier_turns_are_kept():
    thought = "<think>\nt\n</think>\n\na"
    found = texts(chat(thought, thought))
    assert [text for text, trained in found if trained] == [thought + "<|im_end|>\n"] * 2


@pytest.mark.parametrize("thinking", [True, False, None])
def test_nothink_template_leaves_answers_alone(thinking):
    answer = "<think>\nt\n</think>\n\na"
    found = texts(chat("x", answer), template="qwen3_nothink", enable_thinking=thinking)
    assert [text for text, trained in found if trained] == [
        "x<|im_end|>\n",
        answer + "<|im_end|>\n",
    ]
    assert len(found) == 4


# What is trained on


def test_mask_history_trains_on_the_last_answer_only():
    found = texts(chat("a", "b"), mask_history=True)
    assert [trained for _, trained in found] == [False, False, False, False, True, True]


def test_train_on_prompt_trains_on_everything():
    found = texts(chat("a", "b", system="s"), train_on_prompt=True, enable_thinking=None)
    assert all(trained for _, trained in found)
    assert len(found) == 7


def test_join_pieces_labels_only_trained_pieces(small):
    ids, labels = join_pieces([[5, 6], [], [7]], [False, True, True])
    assert ids.tolist() == [5, 6, 7]
    assert labels.tolist() == [-100, -100, 7]


def test_pieces_are_tokenised_apart(small):
    conversation = chat("\nb")
    ids, _ = encode_conversation(small, conversation, TemplateOptions())
    pieces = [piece.text for piece in document_pieces(conversation, TemplateOptions())]
    assert ids.tolist() == [i for text in pieces for i in small.encode(text)]
    assert small.decode(ids.tolist()) == "".join(pieces)


# System and tools


def test_default_system_serves_conversations_without_one():
    options = {"template": "qwen3_nothink", "default_system": "D"}
    assert texts(chat("a"), **options)[0][0] == "<|im_start|>system\nD<|im_end|>\n"
    assert texts(chat("a", system="S"), **options)[0][0] == "<|im_start|>system\nS<|im_end|>\n"


def test_empty_tools_still_make_a_system_block():
    assert texts(chat("a", tools="[]"))[0][0] == "<|im_start|>system\n<|im_end|>\n"


def test_tools_are_wrapped_once():
    tools = json.dumps([{"name": "f\u00e9"}, {"type": "function", "function": {"name": "g"}}])
    system = texts(chat("a", tools=tools))[0][0]
    assert '<tools>\n{"type": "function", "function": {"name": "f\u00e9"}}\n' in system
    assert '\n{"type": "function", "function": {"name": "g"}}\n</tools>' in system


@pytest.mark.parametrize("tools", ["{}", "[3]", "nonsense", '"text"', "[" * 100_000])
def test_bad_tools_are_refused(tools):
    with pytest.raises(RecordError, match=r"data\.jsonl:7: bad tools: "):
        document_pieces(chat("a", tools=tools), TemplateOptions())


def test_function_calls_are_written_as_tool_calls():
    calls = '[{"name": "f", "arguments": {"a":1}, "id": 9}, {"name": "g", "arguments": "\u00e9"}]'
    (_, (think, _), (answer, _)) = texts(chat(calls, role="function"))
    assert think == EMPTY_THINK
    assert answer == (
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": "\u00e9"}\n</tool_call><|im_end|>\n'
    )


def test_thought_before_a_call_loses_its_newlines():
    content = '<think>\nt\n</think>\n\n{"name": "f", "arguments": {}}'
    (_, (answer, _)) = texts(chat(content, role="function"))
    assert answer == (
        '<think>\nt\n</think><tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>\n'
    )


def test_observation_is_wrapped():
    turn = Turn("observation", "o", "assistant", "a")
    assert texts(Conversation((turn,)))[0][0] == PROMPT.format(
        "<tool_response>\no\n</tool_response>"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("call f", "bad function call: not valid JSON"),
        ("3", "bad function call: a call must be"),
        ('{"name": "f"}', "bad function call: a call must be"),
        ('[{"arguments": {}}]', "bad function call: a call must be"),
        (r'{"name": "\ud800", "arguments": {}}', "invalid unicode"),
    ],
)
def test_bad_calls_are_refused(content, message):
    with pytest.raises(RecordError, match=f"data.jsonl:7: {message}"):
        document_pieces(chat(content, role="function"), TemplateOptions())


def test_lone_surrogate_in_tools_is_refused():
    with pytest.raises(RecordError, match="invalid unicode: 'tools'"):
        document_pieces(chat("a", tools=r'[{"name": "\udc00"}]'), TemplateOptions())


# Turns and plain text


def test_plain_text_is_one_trained_piece(small):
    options = TemplateOptions(enable_thinking=False, mask_history=True, default_system="S")
    pieces = document_pieces(PlainText("one\ntwo <|im_end|>"), options)
    assert pieces == [Piece("one\ntwo <|im_end|><|im_end|>", trained=True, answer=True)]
    ids, labels = encode_conversation(small, PlainText("one"), options)
    assert ids.tolist() == labels.tolist() == [*small.encode("one"), small.eos_token_id]
    assert piece_turns(pieces, [7]) == [0, 7]


@pytest.mark.parametrize(
    ("thinking", "expected"),
    [(True, [11, 101, 1, 101]), (None, [111, 1, 101, 1]), (False, [111, 1, 101, 1])],
)
def test_turns_count_the_thought_on_its_side(thinking, expected):
    pieces = document_pieces(chat("a", "b", system="s"), TemplateOptions(enable_thinking=thinking))
    sizes = {"<|im_start|>system\ns<|im_end|>\n": 10, EMPTY_THINK: 100}
    assert piece_turns(pieces, [sizes.get(piece.text, 1) for piece in pieces]) == expected


def test_turns_cover_the_document_whatever_is_trained(small):
    for options in (TemplateOptions(mask_history=True), TemplateOptions(train_on_prompt=True)):
        pieces = document_pieces(chat("a", "b", "c", system="s"), options)
        lengths = [len(small.encode(piece.text)) for piece in pieces]
        turns = piece_turns(pieces, lengths)
        assert len(turns) == 6
        assert sum(turns) == sum(lengths)


def test_turns_without_tokens_keep_their_place():
    pieces = [Piece("a", True, True), Piece("p", False, False), Piece("b", True, True)]
    assert piece_turns(pieces, [0, 2, 0]) == [0, 0, 2, 0]
    with pytest.raises(ValueError, match="shorter"):
        piece_turns(pieces, [1])


# Options


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="one of qwen3, qwen3_nothink, chat_template, got 'llama'"):
        TemplateOptions(template="llama")
    with pytest.raises(ValueError, match="mask_history and train_on_prompt are both true"):
        TemplateOptions(mask_history=True, train_on_prompt=True)
    with pytest.raises(
        ValueError, match=r"one of 0\.9\.4, 0\.9\.6 \(a string, in quotes\), got 0\.9"
    ):
        TemplateOptions(llamafactory_version=0.9)
    with pytest.raises(ValueError, match=r"'chat_template' and chat_template .* is missing"):
        TemplateOptions(template="chat_template")
    with pytest.raises(ValueError, match=r"'qwen3' and chat_template .* is given"):
        TemplateOptions(chat_template="{{ messages }}")
    with pytest.raises(ValueError, match="cannot be used: line 2: "):
        TemplateOptions(template="chat_template", chat_template="\n{% if %}")
    with pytest.raises(ValueError, match=r"writes eos_token, .* and none is given"):
        TemplateOptions(template="chat_template", chat_template="{{ eos_token }}")


# Block padding


@pytest.mark.parametrize(
    ("length", "block", "expected"), [(5, 4, 8), (8, 4, 8), (1, 64, 64), (3, 1, 3)]
)
def test_padding_is_labelled_and_fills_the_block(length, block, expected):
    ids = np.arange(length, dtype=np.int32)
    labels = np.full(length, -100, dtype=np.int32)
    padded, padded_labels = pad_to_block(ids, labels, block, 99)
    assert padded.tolist() == list(range(length)) + [99] * (expected - length)
    assert padded_labels.tolist() == [-100] * length + [99] * (expected - length)
    assert padded.dtype == padded_labels.dtype == np.int32
