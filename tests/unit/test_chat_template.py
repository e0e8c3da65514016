"""A tokenizer's own chat template: the same text as transformers, cut at the answers.

Messages are written out here as a user of transformers writes them; small templates provoke what
the Qwen3 one does not do.
"""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template
from unit.golden_sft import QWEN3

from megatron_sdar.data.readers.records import RecordError
from megatron_sdar.data.sources.conversations import Conversation, Turn, read_document
from megatron_sdar.data.sources.layouts import OPENAI_TAGS, Columns, Layout
from megatron_sdar.data.templates.chat_template import load_chat_template, split_conversation
from megatron_sdar.data.templates.template import Piece, TemplateOptions, document_pieces

THOUGHT = "<think>\nt\n</think>\n\n"
EMPTY = "<think>\n\n</think>\n\n"
USER = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>\n"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"é": 1}}}]
CALLS = [{"name": "f", "arguments": {"a": "é"}}, {"name": "g", "arguments": {}}]


@pytest.fixture(scope="module")
def qwen3() -> str:
    if not QWEN3.is_dir():
        pytest.skip("the Qwen3 tokenizer is not beside the repository")
    return load_chat_template(QWEN3)


def chat(*texts: str, **fields: str) -> Conversation:
    pairs = zip(texts[::2], texts[1::2], strict=True)
    turns = tuple(Turn("user", question, "assistant", answer) for question, answer in pairs)
    return Conversation(turns, **fields, location="data.jsonl:7")


def messages_of(*texts: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def render(template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    """What transformers makes of MESSAGES."""
    texts, _ = render_jinja_template([messages], chat_template=template, **variables)
    return texts[0]


TOOL_CONVERSATION = Conversation(
    (
        Turn("user", "q", "function", THOUGHT + json.dumps(CALLS)),
        Turn("observation", "1\n</tool_response>\n<tool_response>\n2", "assistant", "a"),
        Turn("user", "again", "function", json.dumps(CALLS[0])),
        Turn("observation", "3", "assistant", "b"),
    ),
    system="S",
    tools=json.dumps(TOOLS),
)
TOOL_MESSAGES = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": THOUGHT, "tool_calls": [{"function": it} for it in CALLS]},
    {"role": "tool", "content": "1"},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": CALLS[0]}]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "b"},
]
WRITTEN_CALLS = [
    '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>',
    '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
]


@pytest.mark.parametrize("thinking", [True, False, None])
@pytest.mark.parametrize(
    ("texts", "answers"),
    [
        (("q", "a"), [EMPTY + "a"]),
        (("q", "a", "r", "b"), ["a", EMPTY + "b"]),
        # What the template strips from the history is not there to be trained on.
        (("q", THOUGHT + "a", "r", THOUGHT + "b"), ["a", THOUGHT + "b"]),
        (("q", "a", "r", "a", "s", "a"), ["a", "a", EMPTY + "a"]),
        (("ab", "ab", "cd", "cd"), ["ab", EMPTY + "cd"]),
        (("q", "<", "r", "a<|im_end|>\n"), ["<", EMPTY + "a<|im_end|>\n"]),
    ],
)
def test_qwen3(qwen3, texts, answers, thinking):
    found = split_conversation(chat(*texts), qwen3, enable_thinking=thinking)
    written = texts
    if thinking is False:
        written = [text.removeprefix(THOUGHT) for text in texts]
        answers = [answer.replace(THOUGHT, EMPTY) for answer in answers]
    assert "".join(found) == render(qwen3, messages_of(*written))
    if thinking is not True:
        # An empty thought of the template stands on the side of the prompt.
        answers = [answer.removeprefix(EMPTY) for answer in answers]
    assert found[1::2] == [answer + END for answer in answers]


def test_qwen3_system_prompt(qwen3):
    expected = render(qwen3, [{"role": "system", "content": "S"}, *messages_of("q", "a")])
    assert "".join(split_conversation(chat("q", "a", system="S"), qwen3)) == expected
    assert "".join(split_conversation(chat("q", "a"), qwen3, default_system="S")) == expected
    found = split_conversation(chat("q", "a", system="S"), qwen3, default_system="other")
    assert "".join(found) == expected


def test_qwen3_tools(qwen3):
    found = split_conversation(TOOL_CONVERSATION, qwen3)
    assert "".join(found) == render(qwen3, TOOL_MESSAGES, tools=TOOLS)
    assert found[1::2] == [
        "\n".join(WRITTEN_CALLS) + END,
        "a" + END,
        WRITTEN_CALLS[0] + END,
        EMPTY + "b" + END,
    ]


def test_qwen3_thought_before_a_call_in_the_last_exchange(qwen3):
    conversation = Conversation(TOOL_CONVERSATION.turns[:2], tools="[]")
    found = split_conversation(conversation, qwen3)
    assert "".join(found) == render(qwen3, TOOL_MESSAGES[1:6])
    assert found[1] == THOUGHT + "\n".join(WRITTEN_CALLS) + END


def test_several_results_of_an_openai_record_are_messages_again(qwen3):
    messages = [{"role": "user", "content": "q"}]
    calls = [{"function": {**call, "arguments": json.dumps(call["arguments"])}} for call in CALLS]
    messages += [{"role": "assistant", "content": None, "tool_calls": calls}]
    messages += TOOL_MESSAGES[3:6]
    layout = Layout("openai", Columns(messages="messages"), OPENAI_TAGS)
    conversation = read_document({"messages": messages}, layout, "data.jsonl:7")
    messages[1] = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": it} for it in CALLS],
    }
    found = split_conversation(conversation, qwen3)
    assert "".join(found) == render(qwen3, messages)


@pytest.mark.parametrize("arguments", ["[1]", "no JSON", "[" * 100_000])
def test_arguments_that_are_no_object_stay_text(qwen3, arguments):
    calls = json.dumps({"name": "f", "arguments": arguments})
    found = split_conversation(Conversation((Turn("user", "q", "function", calls),)), qwen3)
    assert f'"arguments": {arguments}}}' in found[1]


def test_pieces_and_labels(qwen3):
    options = {"template": "chat_template", "chat_template": qwen3, "enable_thinking": False}
    conversation = chat("q", "a", "r", THOUGHT + "b")
    texts = [USER.format("q"), "a" + END, USER.format("r") + EMPTY, "b" + END]

    def pieces(**more: bool) -> list[Piece]:
        return document_pieces(conversation, TemplateOptions(**options, **more))

    assert [piece.text for piece in pieces()] == texts
    assert [piece.answer for piece in pieces()] == [False, True, False, True]
    assert [piece.trained for piece in pieces()] == [False, True, False, True]
    assert [piece.trained for piece in pieces(mask_history=True)] == [False, False, False, True]
    assert [piece.trained for piece in pieces(train_on_prompt=True)] == [True] * 4


WORDS = st.lists(
    st.sampled_from(["a", "b", "ab", "cd", " ", "\n", "<", "<think>\n", "\n</think>\n\n", END]),
    min_size=1,
    max_size=5,
).map("".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=3), st.lists(WORDS, min_size=3, max_size=3))
def test_any_texts_decompose_exactly(qwen3, answers, prompts):
    texts = [text for pair in zip(prompts, answers, strict=False) for text in pair]
    found = split_conversation(chat(*texts), qwen3)
    assert "".join(found) == render(qwen3, messages_of(*texts))
    for prompt, answer, written, trained in zip(
        prompts, answers, found[::2], found[1::2], strict=False
    ):
        assert written == USER.format(prompt)
        assert trained.endswith(END)
        assert answer.split("</think>")[-1].lstrip("\n") in trained


# Other templates

LLAMA = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m.content | trim }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% else %}<A>"
    "{% set content = m.content %}{% if not loop.last and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ content }}<E>{% endif %}{% endfor %}{% if add_generation_prompt %}<A><think>\n{% endif %}"
)


def test_tokens_and_trimmed_contents():
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    found = split_conversation(chat("q ", " a\n", "r", "b"), LLAMA, **tokens)
    assert found == [
        "<s>[user]\nq</s>[assistant]\n",
        "a</s>",
        "[user]\nr</s>[assistant]\n",
        "b</s>",
    ]
    assert "".join(found) == render(LLAMA, messages_of("q ", " a\n", "r", "b"), **tokens)


def test_generation_prompt_that_opens_a_thought():
    thought = "<think>\nt\n</think>\n\n"
    found = split_conversation(chat("q", thought + "a", "r", thought + "b"), R1)
    assert found == ["<U>q<A>", "a<E>", "<U>r<A><think>\n", "t\n</think>\n\nb<E>"]
    # An answer without a thought cannot follow it: the prompt ends before.
    assert split_conversation(chat("q", "<think", "r", "<thin"), R1) == [
        "<U>q<A>",
        "<think<E>",
        "<U>r<A>",
        "<thin<E>",
    ]


def test_tool_results_are_messages_of_their_own():
    options = {"default_system": "S", "eos_token": "|"}
    template = LLAMA.replace("m.content", "(m.content ~ m.tool_calls)")
    found = split_conversation(Conversation(TOOL_CONVERSATION.turns[:2]), template, **options)
    assert found[2] == "[tool]\n1|[tool]\n2|[assistant]\n"


def test_calls_with_an_end_marker_of_their_own():
    template = LLAMA.replace(
        "{{ eos_token }}", "{{ m.tool_calls }}{{ '/' if m.tool_calls else '|' }}"
    )
    found = split_conversation(Conversation(TOOL_CONVERSATION.turns), template)
    assert [answer[-1] for answer in found[1::2]] == ["/", "|", "/", "|"]
    assert all(prompt.endswith("|[assistant]\n") for prompt in found[::2])


def test_results_that_must_follow_a_call(qwen3):
    tool = '{%- elif message.role == "tool" %}'
    strict = qwen3.replace(
        tool,
        tool + "{%- if messages[loop.index0 - 1].role == 'assistant' and not "
        "messages[loop.index0 - 1].tool_calls %}{{ raise_exception('no call') }}{%- endif %}",
    )
    assert strict != qwen3
    assert split_conversation(TOOL_CONVERSATION, strict) == split_conversation(
        TOOL_CONVERSATION, qwen3
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].nothing.more }}", "has no attribute 'nothing'"),
        ("{{ messages[9]['content'] }}", "list object has no element 9"),
        ("{{ strftime_now('%Y') }}", "put a fixed date into the template"),
        # The system message, and an answer, are nowhere.
        (LLAMA.replace("messages", "messages[1:]"), "the system message 0 is left out"),
        (
            "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}",
            "the assistant message 2 is left out",
        ),
        # The length before an answer depends on the answer.
        (
            "{% for m in messages %}<{{ m.content | length }}>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<0>{% endif %}",
            "what precedes the answer in message 2 changes",
        ),
        # The last answer has another end marker.
        (
            "{% for m in messages %}{{ m.role }}:{{ m.content }}"
            "{{ '<last>' if loop.last and m.role == 'assistant' else '<more>' }}{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}",
            "the answer in message 2 ends differently",
        ),
        (
            "{% for m in messages | reverse %}<{{ m.content }}>{% endfor %}",
            "the answer in message 4 is not written in its place",
        ),
    ],
)
def test_what_does_not_decompose_is_refused(template, message):
    with pytest.raises(RecordError, match=r"data.jsonl:7: chat template: ") as caught:
        split_conversation(chat("que", "ans", "re", "b", system="sys"), template)
    assert message in caught.value.detail


@pytest.mark.parametrize("role", ["function", "tool"])
def test_templates_without_tools_are_refused(qwen3, role):
    if role == "function":
        template, message = qwen3.replace("message.tool_calls", "false"), "assistant message 2"
    else:
        template, message = qwen3.replace('"tool"', '"result"'), "tool message 3"
    with pytest.raises(RecordError, match=f"chat template: the {message} is left out"):
        split_conversation(TOOL_CONVERSATION, template)


def test_bad_json_is_refused(qwen3):
    with pytest.raises(RecordError, match=r"data.jsonl:7: bad tools: not valid JSON"):
        split_conversation(chat("q", "a", tools="nonsense"), qwen3)
    for calls, message in [
        ("{}", "bad function call: a call must"),
        ("f", "bad function call: not"),
    ]:
        with pytest.raises(RecordError, match=message):
            split_conversation(Conversation((Turn("user", "q", "function", calls),)), qwen3)
    calls = r'{"name": "\ud800", "arguments": {}}'
    with pytest.raises(RecordError, match="invalid unicode: 'chat template'"):
        split_conversation(Conversation((Turn("user", "q", "function", calls),)), qwen3)
