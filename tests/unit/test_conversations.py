"""One record to one document: the alpaca and text layouts, sharegpt, and their bad records."""

import pytest

from megatron_sdar.data.readers.records import RecordError
from megatron_sdar.data.sources.conversations import (
    Columns,
    Conversation,
    Layout,
    PlainText,
    Tags,
    Turn,
    read_document,
)
from megatron_sdar.data.sources.layouts import OPENAI_TAGS

ALPACA = Layout()
FULL_ALPACA = Layout("alpaca", Columns("p", "q", "r", history="h", system="s", tools="t"))
SHAREGPT = Layout("sharegpt")
TEXT = Layout("text", Columns(prompt="text", query=None))
FIRST_MESSAGE = Layout("text", Columns(prompt=None, query=None, messages="conversations"))
PAIR = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
PLACE = "d.jsonl:7"


def read(record: dict, layout: Layout = ALPACA) -> Conversation | PlainText:
    return read_document(record, layout, PLACE)


def turns(record: dict, layout: Layout = ALPACA) -> list[tuple[str, str, str, str]]:
    return [tuple(turn) for turn in read(record, layout).turns]


# Alpaca


def test_alpaca_defaults_use_no_other_columns():
    record = {"instruction": "Do.", "input": "cat", "output": "chat", "system": "x", "tools": "y"}
    expected = Conversation((Turn("user", "Do.\ncat", "assistant", "chat"),), "", "", PLACE)
    assert read(record) == expected


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"instruction": "Hi"}, "Hi"),
        ({"instruction": "Hi", "input": ""}, "Hi"),
        ({"instruction": "Hi", "input": None}, "Hi"),
        ({"instruction": "Hi", "input": "x"}, "Hi\nx"),
        ({"instruction": None, "input": "x"}, "x"),
        ({"instruction": "", "input": ""}, ""),
    ],
)
def test_alpaca_prompt_and_query(record, prompt):
    assert turns(record | {"output": "a"}) == [("user", prompt, "assistant", "a")]


def test_alpaca_history_system_and_tools():
    record = {"p": "P", "r": "R", "h": [["a", "b"], ["c", "d"]], "s": "S", "t": "[]"}
    found = read(record, FULL_ALPACA)
    assert [turn.prompt_text for turn in found.turns] == ["a", "c", "P"]
    assert [turn.response_text for turn in found.turns] == ["b", "d", "R"]
    assert (found.system, found.tools, found.left_out) == ("S", "[]", ())


@pytest.mark.parametrize(
    ("record", "reason", "detail"),
    [
        ({"r": "R"}, "missing column", "no 'p'; it has 'r'"),
        ({"p": "P"}, "missing column", "no 'r'; it has 'p'"),
        ({}, "missing column", "it has no fields"),
        ({"p": 3, "r": "R"}, "non-string content", "'p' must be a string, got int"),
        ({"p": "P", "r": None}, "non-string content", "'r' must be a string, got NoneType"),
        ({"p": "P", "q": [], "r": "R"}, "non-string content", "store it as JSON text"),
        ({"p": "P", "r": "R", "t": []}, "non-string content", "'t'.*got list; store it as JSON"),
        ({"p": "P", "r": "R", "s": 1}, "non-string content", "'s'"),
        ({"p": "P", "r": ""}, "empty answer", "'r' is an empty string"),
        ({"p": "a\ud800", "r": "R"}, "invalid unicode", r"\\ud800\) at character 1"),
        ({"p": "P", "r": "R\udfff"}, "invalid unicode", "'r' holds half of a surrogate pair"),
        ({"p": "P", "r": "R", "h": "x"}, "bad history", "'h' must be a list of"),
        ({"p": "P", "r": "R", "h": [["a"]]}, "bad history", r"h\[0\] must be a pair"),
        ({"p": "P", "r": "R", "h": ["ab"]}, "bad history", r"h\[0\] must be a pair"),
        ({"p": "P", "r": "R", "h": [[1, "a"]]}, "non-string content", r"'h\[0\]\[0\]'"),
        ({"p": "P", "r": "R", "h": [["a", ""]]}, "empty answer", r"'h\[0\]\[1\]'"),
    ],
)
def test_bad_alpaca_record(record, reason, detail):
    with pytest.raises(RecordError, match=rf"^d\.jsonl:7: {reason}: .*{detail}") as caught:
        read(record, FULL_ALPACA)
    assert (caught.value.location, caught.value.reason) == (PLACE, reason)


# Sharegpt


def test_sharegpt_defaults_with_tool_roles():
    messages = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": "{}"},
        {"from": "observation", "value": "\u00e9"},
        {"from": "gpt", "value": "a"},
    ]
    record = {"conversations": messages, "system": "unused"}
    assert turns(record, SHAREGPT) == [
        ("user", "q", "function", "{}"),
        ("observation", "\u00e9", "assistant", "a"),
    ]
    assert read(record, SHAREGPT).system == ""


def test_leading_system_message_wins_over_the_column():
    layout = Layout("sharegpt", Columns(messages="conversations", system="sys", tools="tools"))
    system = [{"from": "system", "value": "inner"}]
    inner = read({"conversations": system + PAIR, "sys": "outer", "tools": "[]"}, layout)
    outer = read({"conversations": PAIR, "sys": "outer"}, layout)
    assert (inner.system, inner.tools) == ("inner", "[]")
    assert (outer.system, outer.tools) == ("outer", "")
    assert inner.turns == outer.turns == (Turn("user", "q", "assistant", "a"),)


def test_a_role_without_a_tag_is_out_of_order():
    tags = Tags("role", "content", "user", "assistant", None, None, None)
    messages = [{"role": r, "content": "x"} for r in ("system", "user", "assistant")]
    layout = Layout("sharegpt", Columns(messages="m"), tags)
    with pytest.raises(RecordError, match=r"m\[0\] has role 'system' where 'user' must be"):
        read({"m": messages}, layout)


BAD_MESSAGES = [
    ("x", "bad messages", "must be a list of messages, got str"),
    (None, "bad messages", "got NoneType"),
    (["x"], "bad messages", r"\[0\] must be an object, got str"),
    ([{"from": "human"}], "missing column", "no 'value'; it has 'from'"),
    ([{"value": "x"}], "missing column", "no 'from'"),
    ([{"from": "human", "value": None}], "non-string content", r"conversations\[0\].value"),
    ([{"from": None, "value": "x"}], "non-string content", r"conversations\[0\].from"),
    ([{"from": "human", "value": "\udc00"}], "invalid unicode", r"conversations\[0\].value"),
    ([], "no turns", "holds no question and answer"),
    ([{"from": "system", "value": "s"}], "no turns", "holds no question"),
    (PAIR[:1], "wrong role order", "ends with a user message that nobody answers"),
    (PAIR[::-1], "wrong role order", r"\[0\] has role 'gpt' where 'human' or 'observation'"),
    (PAIR + PAIR[1:], "wrong role order", r"\[2\] has role 'gpt'"),
    ([PAIR[0], PAIR[0]], "wrong role order", "'gpt' or 'function_call' must be"),
    ([{"from": "bot", "value": "x"}], "wrong role order", "'bot'"),
    (
        [{"from": "system", "value": "s"}, PAIR[1]],
        "wrong role order",
        r"conversations\[1\] has role 'gpt'",
    ),
    ([PAIR[0], {"from": "gpt", "value": ""}], "empty answer", r"conversations\[1\]"),
]


@pytest.mark.parametrize(("messages", "reason", "detail"), BAD_MESSAGES)
def test_bad_sharegpt_messages(messages, reason, detail):
    with pytest.raises(RecordError, match=rf"^d\.jsonl:7: {reason}: .*{detail}"):
        read({"conversations": messages}, SHAREGPT)


def test_no_messages_column():
    with pytest.raises(RecordError, match="the record has no 'conversations'; it has 'text'"):
        read({"text": "x"}, SHAREGPT)


def test_tool_calls_are_for_openai():
    messages = [PAIR[0], PAIR[1] | {"tool_calls": [{}]}]
    with pytest.raises(RecordError, match=r"conversations\[1\] has tool_calls, which only 'form"):
        read({"conversations": messages}, SHAREGPT)


# Text


def test_text_column_and_prompt_with_query():
    assert read({"text": " x\n", "y": 1}, TEXT) == PlainText(" x\n", PLACE)
    layout = Layout("text", Columns("instruction", "input"))
    assert read({"instruction": "a", "input": "b", "output": "c"}, layout).text == "a\nb"
    assert read({"instruction": "a", "output": "c"}, layout).text == "a"


@pytest.mark.parametrize(
    ("record", "reason", "detail"),
    [
        ({"text": ""}, "empty text", "'text' has no text to train on"),
        ({"text": None}, "empty text", "'text'"),
        ({"body": "x"}, "missing column", "no 'text'; it has 'body'"),
        ({"text": ["x"]}, "non-string content", "got list"),
        ({"text": "\ud800"}, "invalid unicode", "'text'"),
    ],
)
def test_bad_text_record(record, reason, detail):
    with pytest.raises(RecordError, match=rf"^d\.jsonl:7: {reason}: .*{detail}"):
        read(record, TEXT)


def test_first_message_as_text():
    system = {"from": "system", "value": "s"}
    assert read({"conversations": PAIR[:1]}, FIRST_MESSAGE) == PlainText("q", PLACE)
    later = PlainText("q", PLACE, ("messages after the first",))
    assert read({"conversations": PAIR}, FIRST_MESSAGE) == later
    assert read({"conversations": [system, *PAIR]}, FIRST_MESSAGE) == later
    assert read({"conversations": [system, PAIR[1]]}, FIRST_MESSAGE).text == "a"
    calls = {"conversations": [PAIR[0], {"from": "gpt", "value": None, "tool_calls": [{}]}]}
    assert read(calls, FIRST_MESSAGE) == later
    openai = {"conversations": [{"role": "user", "content": "u"}]}
    assert read(openai, FIRST_MESSAGE) == PlainText("u", PLACE)
    assert read(openai, Layout("text", FIRST_MESSAGE.columns, OPENAI_TAGS)).text == "u"


@pytest.mark.parametrize(
    ("messages", "reason", "detail"),
    [
        ([], "empty text", "'conversations' holds no message with text"),
        ([{"from": "system", "value": "s"}], "empty text", "holds no message"),
        ([{"from": "human", "value": ""}], "empty text", r"conversations\[0\] has no text"),
        (["x"], "bad messages", "must be an object"),
    ],
)
def test_bad_first_message(messages, reason, detail):
    with pytest.raises(RecordError, match=rf"{reason}: .*{detail}"):
        read({"conversations": messages}, FIRST_MESSAGE)
