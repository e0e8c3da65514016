"""The openai layout: what LLaMA-Factory's converter makes of tool calls and tool messages."""

import json

import pytest

from megatron_sdar.data.readers.records import RecordError
from megatron_sdar.data.sources.conversations import Columns, Conversation, Layout, read_document
from megatron_sdar.data.sources.layouts import OPENAI_TAGS, Tags

LAYOUT = Layout("openai", Columns(messages="messages", system="sys", tools="tools"), OPENAI_TAGS)
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
WEATHER = {"name": "weather", "arguments": {"city": "K\u00f6ln"}}
CLOCK = {"name": "clock", "arguments": '{"zone": "CET"}', "strict": True}
CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "1", "type": "function", "function": WEATHER},
        {"id": "2", "type": "function", "function": CLOCK},
    ],
}
RESULTS = [
    {"role": "tool", "tool_call_id": "1", "content": "rain"},
    {"role": "tool", "tool_call_id": "2", "content": "noon"},
]


def read(messages: object, layout: Layout = LAYOUT, **others: object) -> Conversation:
    found = read_document({"messages": messages} | others, layout, "d.jsonl:7")
    assert isinstance(found, Conversation)
    return found


def test_calls_and_results_of_a_whole_conversation():
    found = read([{"role": "system", "content": "s"}, USER, CALLS, *RESULTS, ANSWER])
    assert found.system == "s"
    assert [(t.prompt_role, t.response_role) for t in found.turns] == [
        ("user", "function"),
        ("observation", "assistant"),
    ]
    # Arguments stay what they are: an object or JSON text; so do other keys of the function.
    assert found.turns[0].response_text == json.dumps([WEATHER, CLOCK], ensure_ascii=False)
    assert found.turns[1].prompt_text == "rain\n</tool_response>\n<tool_response>\nnoon"
    assert found.left_out == ()


def test_one_result_is_not_joined():
    found = read([USER, CALLS, RESULTS[0], ANSWER])
    assert found.turns[1].prompt_text == "rain"


def test_calls_without_a_content_key():
    bare = {key: value for key, value in CALLS.items() if key != "content"}
    assert read([USER, bare]).turns[0].response_role == "function"


@pytest.mark.parametrize("nothing", [None, []])
def test_no_calls_is_an_answer(nothing):
    assert read([USER, ANSWER | {"tool_calls": nothing}]).turns[0].response_role == "assistant"


def test_what_the_published_converter_leaves_out_is_named():
    said = read([USER, CALLS | {"content": "Let me see."}, *RESULTS, ANSWER])
    assert said.left_out == ("text beside tool_calls",)
    assert said.turns[0].response_text.startswith("[{")
    ended = read([USER, CALLS, *RESULTS])
    assert ended.left_out == ("tool messages that nobody answers",)
    assert len(ended.turns) == 1


def test_function_role_may_hold_calls_or_text():
    written = {"role": "function_call", "content": json.dumps(WEATHER)}
    assert read([USER, written]).turns[0].response_text == json.dumps(WEATHER)
    assert read([USER, CALLS | {"role": "function_call"}]).turns[0].response_role == "function"


@pytest.mark.parametrize("tools", [[WEATHER], WEATHER])
def test_tools_may_be_json_values(tools):
    assert read([USER, ANSWER], tools=tools).tools == json.dumps(tools, ensure_ascii=False)


@pytest.mark.parametrize(("tools", "expected"), [("[]", "[]"), (None, ""), ("", "")])
def test_tools_as_text_or_absent(tools, expected):
    assert read([USER, ANSWER], tools=tools, sys="S").tools == expected
    assert read([USER, ANSWER], sys="S").system == "S"


def test_without_tags_both_ways_of_naming_are_read():
    layout = Layout("openai", Columns(messages="messages"), Tags())
    plain = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert read([USER, CALLS, *RESULTS, ANSWER], layout).turns[1].prompt_role == "observation"
    assert read(plain, layout).turns == read([USER, ANSWER], layout).turns


@pytest.mark.parametrize(
    ("messages", "reason", "detail"),
    [
        ([USER, CALLS, ANSWER], "wrong role order", r"messages\[2\] has role 'assistant'"),
        ([USER, USER], "wrong role order", r"\[1\] has role 'user'"),
        ([RESULTS[0]], "no turns", "holds no question"),
        ([USER, RESULTS[0], ANSWER], "wrong role order", r"\[1\] has role 'tool'"),
        ([USER], "wrong role order", "ends with a user message"),
        ([{"role": "developer", "content": "x"}], "wrong role order", "'developer'"),
        ([USER, ANSWER | {"content": ""}], "empty answer", r"messages\[1\]"),
        ([USER, ANSWER | {"content": None}], "non-string content", r"messages\[1\].content"),
        ([USER, ANSWER | {"content": [{"type": "text"}]}], "non-string content", "got list"),
        ([USER, "x"], "bad messages", "must be an object, got str"),
        ([USER | {"tool_calls": [{}]}, ANSWER], "bad tool_calls", "of role 'user' makes no calls"),
        ([USER, CALLS | {"tool_calls": "x"}], "bad tool_calls", r"\[1\].tool_calls must be a list"),
        ([USER, CALLS | {"tool_calls": ["x"]}], "bad tool_calls", "must be a list of"),
        ([USER, CALLS | {"tool_calls": [{"id": 1}]}], "bad tool_calls", "must be a list of"),
        ([USER, {"tool_calls": [{}]}], "missing column", "no 'role'"),
        (
            [USER, CALLS | {"tool_calls": [{"function": {"name": "\ud800"}}]}],
            "invalid unicode",
            "tool_calls",
        ),
    ],
)
def test_bad_openai_messages(messages, reason, detail):
    with pytest.raises(RecordError, match=rf"^d\.jsonl:7: {reason}: .*{detail}"):
        read(messages)


def test_tools_that_json_cannot_hold():
    # A table may hold values, such as bytes, that a .json file cannot.
    with pytest.raises(RecordError, match="not JSON: 'tools': Object of type bytes"):
        read([USER, ANSWER], tools=[b"x"])
    with pytest.raises(RecordError, match="non-string content: 'tools' must be a string, got int"):
        read([USER, ANSWER], tools=3)
