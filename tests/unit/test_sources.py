"""Datasets to conversations: layouts, entries of dataset_info.json, and every refusal."""

import json
from pathlib import Path

import pytest

from megatron_sdar.data.sources import (
    Conversation,
    DatasetSpec,
    Layout,
    RecordError,
    SkipReport,
    Turn,
    dataset_from_file,
    iter_conversations,
    read_dataset_info,
    resolve_datasets,
)

OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}


def write_lines(file: Path, *records: object) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def read_entry(folder: Path, entry: dict, *records: object, **kwargs) -> list[Conversation]:
    """Conversations of RECORDS under a dataset_info.json ENTRY."""
    if records:
        write_lines(folder / "data.jsonl", *records)
    info = {"name": {"file_name": "data.jsonl"} | entry}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (spec,) = read_dataset_info(folder, ["name"])
    return list(iter_conversations(spec, **kwargs))


def turns(conversation: Conversation) -> list[tuple[str, str, str, str]]:
    return [tuple(turn) for turn in conversation.turns]


# Layouts


def test_alpaca_defaults(tmp_path):
    record = {"instruction": "Translate.", "input": "cat", "output": "chat", "system": "unused"}
    (conversation,) = read_entry(tmp_path, {}, record)
    assert turns(conversation) == [("user", "Translate.\ncat", "assistant", "chat")]
    assert (conversation.system, conversation.tools) == ("", "")
    assert conversation.location == f"{tmp_path / 'data.jsonl'}:1"


@pytest.mark.parametrize(
    ("extra", "prompt"),
    [({}, "Hi"), ({"input": ""}, "Hi"), ({"input": None}, "Hi"), ({"input": "x"}, "Hi\nx")],
)
def test_alpaca_without_input(tmp_path, extra, prompt):
    (conversation,) = read_entry(tmp_path, {}, {"instruction": "Hi", "output": "yes"} | extra)
    assert conversation.turns[0].prompt_text == prompt


def test_alpaca_query_alone(tmp_path):
    record = {"instruction": None, "input": "q", "output": "a"}
    assert read_entry(tmp_path, {}, record)[0].turns[0].prompt_text == "q"


def test_alpaca_history_system_and_tools(tmp_path):
    columns = {"prompt": "p", "response": "r", "history": "h", "system": "s", "tools": "t"}
    record = {"p": "P", "r": "R", "h": [["a", "b"], ["c", "d"]], "s": "S", "t": "[]", "input": "no"}
    (conversation,) = read_entry(tmp_path, {"columns": columns}, record)
    assert [turn.prompt_text for turn in conversation.turns] == ["a", "c", "P"]
    assert [turn.response_text for turn in conversation.turns] == ["b", "d", "R"]
    assert (conversation.system, conversation.tools) == ("S", "[]")


def test_sharegpt_defaults_with_tools(tmp_path):
    messages = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": "{}"},
        {"from": "observation", "value": "o"},
        {"from": "gpt", "value": "a"},
    ]
    (conversation,) = read_entry(
        tmp_path, {"formatting": "sharegpt"}, {"conversations": messages, "system": "unused"}
    )
    assert turns(conversation) == [
        ("user", "q", "function", "{}"),
        ("observation", "o", "assistant", "a"),
    ]
    assert conversation.system == ""


def test_leading_system_message_wins_over_the_column(tmp_path):
    entry = {
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "system": "sys"},
        "tags": OPENAI_TAGS,
    }
    question = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with_message = {"messages": [{"role": "system", "content": "inner"}, *question], "sys": "outer"}
    without = {"messages": question, "sys": "outer"}
    first, second = read_entry(tmp_path, entry, with_message, without)
    assert (first.system, second.system) == ("inner", "outer")
    assert first.turns == second.turns


def test_unlisted_tags_mean_absent(tmp_path):
    tags = {key: value for key, value in OPENAI_TAGS.items() if key != "system_tag"}
    entry = {"formatting": "sharegpt", "columns": {"messages": "m"}, "tags": tags}
    messages = [{"role": r, "content": "x"} for r in ("system", "user", "assistant")]
    with pytest.raises(RecordError, match=r"wrong role order: m\[0\] has role 'system'"):
        read_entry(tmp_path, entry, {"m": messages})


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "i", "input": "x", "output": "o"}, ("i\nx", "o", "", "")),
        ({"question": "q", "answer": "a", "system": "s"}, ("q", "a", "s", "")),
        ({"prompt": "p", "response": "r", "tools": "[]"}, ("p", "r", "", "[]")),
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
            ("u", "a", "", ""),
        ),
        (
            {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
            ("u", "a", "", ""),
        ),
        (
            {"messages": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
            ("u", "a", "", ""),
        ),
    ],
)
def test_plain_files_are_recognised(tmp_path, record, expected):
    spec = dataset_from_file(write_lines(tmp_path / "d.jsonl", record))
    (conversation,) = iter_conversations(spec)
    turn = conversation.turns[0]
    found = (turn.prompt_text, turn.response_text, conversation.system, conversation.tools)
    assert found == expected
    assert spec.name == "d"


def test_unrecognised_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"d\.jsonl: cannot tell .* has 'text'; use messages"):
        dataset_from_file(write_lines(tmp_path / "d.jsonl", {"text": "x"}))
    with pytest.raises(ValueError, match="the first record has no fields"):
        dataset_from_file(write_lines(tmp_path / "d.jsonl"))


def test_recognition_looks_past_a_damaged_first_line(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text('{broken\n{"prompt": "p", "response": "r"}\n')
    report = SkipReport()
    (conversation,) = iter_conversations(dataset_from_file(file), "skip", skipped=report)
    assert conversation.turns == (Turn("user", "p", "assistant", "r"),)
    assert report.counts == {"invalid JSON": 1}


def test_names_and_paths_resolve(tmp_path):
    write_lines(tmp_path / "a.jsonl", {"question": "q", "answer": "a"})
    (tmp_path / "dataset_info.json").write_text(
        json.dumps(
            {"b": {"file_name": "a.jsonl", "columns": {"prompt": "question", "response": "answer"}}}
        )
    )
    specs = resolve_datasets(["b", str(tmp_path / "a.jsonl")], tmp_path)
    assert [spec.name for spec in specs] == ["b", "a"]
    first, second = (next(iter_conversations(spec)) for spec in specs)
    assert first.turns == second.turns


# Files


def test_folder_is_read_in_name_order(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    write_lines(folder / "b.jsonl", {"instruction": "2", "output": "x"})
    write_lines(folder / "a.jsonl", {"instruction": "1", "output": "x"})
    (folder / ".hidden.csv").write_text("")
    found = read_entry(tmp_path, {"file_name": "parts"})
    assert [c.turns[0].prompt_text for c in found] == ["1", "2"]
    (folder / "c.csv").write_text("")
    with pytest.raises(ValueError, match=r"c\.csv: only \.jsonl and \.json"):
        read_entry(tmp_path, {"file_name": "parts"})


def test_empty_folder_and_absent_file(tmp_path):
    (tmp_path / "parts").mkdir()
    with pytest.raises(ValueError, match="parts is empty"):
        read_entry(tmp_path, {"file_name": "parts"})
    with pytest.raises(ValueError, match=r"name: file_name: .*no\.jsonl: no such file"):
        read_entry(tmp_path, {"file_name": "no.jsonl"})


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_json_list_keeps_line_numbers(tmp_path, bom):
    text = bom + '\n[\n  {"instruction": "\u00e9", "output": "1"},\n\n {"instruction": "b",\n'
    text += ' "output": "2"}, 3]\n'
    (tmp_path / "d.json").write_text(text, encoding="utf-8")
    report = SkipReport()
    found = read_entry(tmp_path, {"file_name": "d.json"}, on_error="skip", skipped=report)
    assert [c.location.rpartition(":")[2] for c in found] == ["3", "5"]
    assert [c.turns[0].prompt_text for c in found] == ["\u00e9", "b"]
    assert report.locations == {"not an object": [f"{tmp_path / 'd.json'}:6"]}


def test_json_suffix_with_lines_is_read_as_lines(tmp_path):
    write_lines(
        tmp_path / "d.json", {"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}
    )
    assert len(list(iter_conversations(dataset_from_file(tmp_path / "d.json")))) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}\n,{"a" 1}]', r"d\.json:2: invalid JSON: Expecting ':'"),
        ('[{"a": 1}\n{"a": 1}]', r"d\.json:2: invalid JSON: ',' or '\]' expected"),
        ('[{"a": 1},\n]', r"d\.json:2: invalid JSON"),
        ('[{"a": 1}', r"d\.json:1: invalid JSON: ',' or '\]' expected"),
        ("[", r"d\.json:1: invalid JSON"),
        ("[]\n[]", r"d\.json:2: invalid JSON: text after"),
        ('[\n{"a": ' + "[" * 100_000 + "]", r"d\.json:2: invalid JSON: maximum recursion"),
    ],
)
def test_damaged_json_list(tmp_path, text, message):
    (tmp_path / "d.json").write_text(text)
    spec = DatasetSpec("d", (tmp_path / "d.json",), Layout())
    with pytest.raises(ValueError, match=message):
        list(iter_conversations(spec, "skip", skipped=SkipReport()))


def test_json_list_with_invalid_utf8(tmp_path):
    (tmp_path / "d.json").write_bytes(b'[\n"\xff"]')
    with pytest.raises(ValueError, match=r"d\.json:2: invalid UTF-8: byte 0xff"):
        list(iter_conversations(DatasetSpec("d", (tmp_path / "d.json",), Layout())))


def test_empty_json_list_has_no_records(tmp_path):
    (tmp_path / "d.json").write_text(" [ ] \n")
    assert list(iter_conversations(DatasetSpec("d", (tmp_path / "d.json",), Layout()))) == []


def test_bom_blank_lines_crlf_and_unicode_separators(tmp_path):
    good = json.dumps({"question": "a\u2028b", "answer": "c"}, ensure_ascii=False)
    (tmp_path / "d.jsonl").write_bytes(f"\ufeff{good}\r\n\r\n  \n{good}".encode())
    found = list(iter_conversations(dataset_from_file(tmp_path / "d.jsonl")))
    assert [c.turns[0].prompt_text for c in found] == ["a\u2028b"] * 2
    assert found[1].location.endswith(":4")


# Bad records

GOOD = {"instruction": "q", "output": "a"}
PAIR = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b"{", "invalid JSON", "column 2"),
        (b"[" * 100_000, "invalid JSON", "recursion"),
        (b'{"output": "\xff"}', "invalid UTF-8", "byte 13 of the line is 0xff"),
        (b"[1]", "not an object", "got list"),
        (b'{"output": "a"}', "missing column", "no 'instruction'; it has 'output'"),
        (b'{"instruction": "q"}', "missing column", "no 'output'"),
        (b"{}", "missing column", "it has no fields"),
        (b'{"instruction": 3, "output": "a"}', "non-string content", "got int"),
        (b'{"instruction": "q", "output": null}', "non-string content", "got NoneType"),
        (b'{"instruction": "q", "input": [], "output": "a"}', "non-string content", "json.dumps"),
        (b'{"instruction": "q", "output": ""}', "empty answer", "'output' is an empty string"),
        (rb'{"instruction": "\ud800", "output": "a"}', "invalid unicode", r"\\ud800\) at char"),
    ],
)
def test_bad_alpaca_line_names_file_line_and_reason(tmp_path, line, reason, detail):
    good = json.dumps(GOOD).encode()
    (tmp_path / "data.jsonl").write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    with pytest.raises(ValueError, match=rf"data\.jsonl:2: {reason}: .*{detail}") as caught:
        read_entry(tmp_path, {})
    assert caught.value.reason == reason
    report = SkipReport()
    found = read_entry(tmp_path, {}, on_error="skip", skipped=report)
    assert len(found) == 2
    assert report.counts == {reason: 1}
    assert report.locations == {reason: [f"{tmp_path / 'data.jsonl'}:2"]}


@pytest.mark.parametrize(
    ("history", "detail"),
    [("x", "must be a list"), ([["a"]], r"h\[0\] must be a pair"), (["ab"], "must be a pair")],
)
def test_bad_history(tmp_path, history, detail):
    columns = {"prompt": "p", "response": "r", "history": "h"}
    record = {"p": "P", "r": "R", "h": history}
    with pytest.raises(RecordError, match=f"bad history: .*{detail}"):
        read_entry(tmp_path, {"columns": columns}, record)


def test_history_with_an_empty_answer(tmp_path):
    columns = {"prompt": "p", "response": "r", "history": "h"}
    with pytest.raises(RecordError, match=r"empty answer: 'h\[0\]\[1\]'"):
        read_entry(tmp_path, {"columns": columns}, {"p": "P", "r": "R", "h": [["a", ""]]})


@pytest.mark.parametrize(
    ("messages", "reason", "detail"),
    [
        ("x", "bad messages", "must be a list of messages, got str"),
        (["x"], "bad messages", r"\[0\] must be an object, got str"),
        ([{"from": "human"}], "missing column", "no 'value'; it has 'from'"),
        ([{"value": "x"}], "missing column", "no 'from'"),
        ([{"from": "human", "value": None}], "non-string content", r"conversations\[0\].value"),
        ([{"from": None, "value": "x"}], "non-string content", r"conversations\[0\].from"),
        ([], "no turns", "holds no question and answer"),
        ([{"from": "system", "value": "s"}], "no turns", "holds no question"),
        (PAIR[:1], "wrong role order", "ends with a user message"),
        (PAIR[::-1], "wrong role order", r"\[0\] has role 'gpt' where 'human' or 'observation'"),
        (PAIR + PAIR[1:], "wrong role order", r"\[2\] has role 'gpt'"),
        ([PAIR[0], PAIR[0]], "wrong role order", "'gpt' or 'function_call' must be"),
        ([{"from": "bot", "value": "x"}], "wrong role order", "'bot'"),
        ([PAIR[0], {"from": "gpt", "value": ""}], "empty answer", r"conversations\[1\]"),
        ([PAIR[0], PAIR[1] | {"tool_calls": [{}]}], "tool_calls", "write each call"),
    ],
)
def test_bad_messages(tmp_path, messages, reason, detail):
    with pytest.raises(RecordError, match=rf"data\.jsonl:1: {reason}: .*{detail}"):
        read_entry(tmp_path, {"formatting": "sharegpt"}, {"conversations": messages})


def test_tools_must_be_json_text(tmp_path):
    columns = {"prompt": "p", "response": "r", "tools": "t"}
    with pytest.raises(RecordError, match="'t' must be a string, got list; store it as JSON text"):
        read_entry(tmp_path, {"columns": columns}, {"p": "P", "r": "R", "t": []})


def test_skip_keeps_the_first_places_only(tmp_path):
    report = SkipReport(max_locations=2)
    records = [{"instruction": "q"}] * 4
    assert read_entry(tmp_path, {}, *records, on_error="skip", skipped=report) == []
    assert report.counts == {"missing column": 4}
    assert [p.rpartition(":")[2] for p in report.locations["missing column"]] == ["1", "2"]


def test_max_samples_counts_records_that_were_read(tmp_path):
    report = SkipReport()
    records = [GOOD, {"instruction": "q"}, GOOD, GOOD]
    found = read_entry(tmp_path, {}, *records, on_error="skip", skipped=report, max_samples=3)
    assert len(found) == 2
    assert report.counts == {"missing column": 1}


def test_progress_is_told_every_byte(tmp_path):
    lengths: list[int] = []
    read_entry(tmp_path, {}, GOOD, GOOD, on_read=lengths.append)
    assert sum(lengths) == (tmp_path / "data.jsonl").stat().st_size


def test_bad_on_error_arguments(tmp_path):
    with pytest.raises(ValueError, match="on_error must be one of raise, skip: 'ignore'"):
        read_entry(tmp_path, {}, GOOD, on_error="ignore")
    with pytest.raises(ValueError, match="needs a SkipReport"):
        read_entry(tmp_path, {}, GOOD, on_error="skip")


# dataset_info.json


def test_misspelt_optional_column_is_found_out(tmp_path):
    columns = {"prompt": "instruction", "response": "output", "system": "sytem"}
    entry = {"columns": columns}
    with pytest.raises(ValueError, match="dataset name: column 'sytem' is in no record"):
        read_entry(tmp_path, entry, GOOD | {"system": "s"}, GOOD)
    assert len(read_entry(tmp_path, entry, GOOD, GOOD | {"sytem": "s"})) == 2
    assert len(read_entry(tmp_path, entry, GOOD, GOOD, max_samples=1)) == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"hf_hub_url": "a/b"}, "'hf_hub_url' is not supported: download"),
        ({"ms_hub_url": "a/b"}, "'ms_hub_url' is not supported"),
        ({"om_hub_url": "a/b"}, "'om_hub_url' is not supported"),
        ({"script_url": "x"}, "are not run"),
        ({"cloud_file_name": "x"}, "copy the file here"),
        ({"subset": "x"}, "'subset' is not supported"),
        ({"folder": "x"}, "'folder' is not supported"),
        ({"num_samples": 5}, "use max_samples"),
        ({"ranking": True}, "preference data"),
        ({"split": "test"}, "'split' 'test' is not supported"),
        ({"formatting": "openai"}, "'openai' is not supported; use 'alpaca', or 'sharegpt'"),
        ({"file_name": None}, "'file_name' must name"),
        ({"file_name": "x.parquet"}, "no such file"),
        ({"colums": {}}, "unknown key 'colums'; did you mean 'columns'"),
        ({"zzz": {}}, "unknown key 'zzz'; known: file_name"),
        ({"columns": []}, "columns: must be an object"),
        ({"columns": {"prompt": "p"}}, "columns: response must be given"),
        ({"columns": {"messages": "m"}}, "columns: prompt, response must be given"),
        ({"columns": {"prompt": 1}}, "'prompt' must be a string, got int"),
        ({"columns": {"answer": "x"}}, "unknown name 'answer'; known: prompt"),
        ({"columns": {"images": "x"}}, "'images' is not supported: this trainer reads text only"),
        ({"columns": {"chosen": "x"}}, "'chosen' is not supported: preference data"),
        ({"formatting": "sharegpt", "columns": {"prompt": "x"}}, "messages must be given"),
        ({"formatting": "sharegpt", "tags": {"role_tag": "r"}}, "content_tag, user_tag, assistant"),
        ({"tags": {"bot_tag": "x"}}, "tags: unknown name 'bot_tag'"),
    ],
)
def test_bad_entry_is_refused_by_name(tmp_path, entry, message):
    with pytest.raises(ValueError, match=f"dataset_info.json: name: ?.*{message}"):
        read_entry(tmp_path, entry, GOOD)


def test_harmless_entry_keys_are_accepted(tmp_path):
    entry = {"ranking": False, "split": "train", "hf_hub_url": None, "columns": None, "tags": None}
    assert len(read_entry(tmp_path, entry, GOOD)) == 1


def test_bad_dataset_info_file(tmp_path):
    with pytest.raises(ValueError, match="no such file; set dataset_dir"):
        read_dataset_info(tmp_path, ["a"])
    file = tmp_path / "dataset_info.json"
    file.write_text("{")
    with pytest.raises(ValueError, match=r"dataset_info\.json: not valid JSON"):
        read_dataset_info(tmp_path, ["a"])
    file.write_text("[]")
    with pytest.raises(ValueError, match="must hold one object"):
        read_dataset_info(tmp_path, ["a"])
    file.write_text('{"gsm8k": 3}')
    with pytest.raises(ValueError, match="no dataset 'gsm8'; did you mean 'gsm8k'"):
        read_dataset_info(tmp_path, ["gsm8"])
    with pytest.raises(ValueError, match="no dataset 'zz'; it has gsm8k"):
        read_dataset_info(tmp_path, ["zz"])
    with pytest.raises(ValueError, match="gsm8k: an entry must be an object, got int"):
        read_dataset_info(tmp_path, ["gsm8k"])


def test_csv_file_is_refused(tmp_path):
    (tmp_path / "d.csv").write_text("")
    with pytest.raises(ValueError, match=r"convert it to \.jsonl"):
        dataset_from_file(tmp_path / "d.csv")
