"""Names to datasets: files, folders, recognition of plain files, and the real formats together."""

import json

import pytest
from data_files import write

from megatron_sdar.data.readers.records import RecordError
from megatron_sdar.data.readers.spans import read_file
from megatron_sdar.data.sources.datasets import (
    Conversation,
    DatasetSpec,
    PlainText,
    dataset_from_file,
    read_dataset_info,
    read_document,
    resolve_datasets,
)

GOOD = {"instruction": "q", "input": "", "output": "a"}
MESSAGES = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


def documents(spec: DatasetSpec) -> list[Conversation | PlainText]:
    """The documents of SPEC; a bad record raises."""
    found = []
    for file in spec.files:
        for record in read_file(file):
            if isinstance(record.value, RecordError):
                raise record.value
            found.append(read_document(record.value, spec.layout, record.location))
    return found


def entry_spec(folder, entry: dict, stage: str = "sft") -> DatasetSpec:
    """The spec of ENTRY in a dataset_info.json."""
    (folder / "dataset_info.json").write_text(json.dumps({"name": entry}))
    (spec,) = read_dataset_info(folder, ["name"], stage)
    return spec


# Plain files


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "i", "input": "x", "output": "o"}, ("i\nx", "o", "", "")),
        ({"question": "q", "answer": "a", "system": "s"}, ("q", "a", "s", "")),
        ({"prompt": "p", "response": "r", "tools": "[]"}, ("p", "r", "", "[]")),
        ({"prompt": "p", "response": "r", "text": "t"}, ("p", "r", "", "")),
        ({"messages": MESSAGES, "system": "s"}, ("u", "a", "s", "")),
        ({"conversations": MESSAGES}, ("u", "a", "", "")),
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
@pytest.mark.parametrize("name", ["d.jsonl", "d.json.zst", "d.parquet", "d.arrow"])
def test_plain_files_are_recognised(tmp_path, record, expected, name):
    spec = dataset_from_file(write(tmp_path / name, [record, record]))
    for conversation in documents(spec):
        turn = conversation.turns[0]
        found = (turn.prompt_text, turn.response_text, conversation.system, conversation.tools)
        assert found == expected
    assert (spec.name, spec.num_samples, spec.explicit_columns) == ("d", None, ())


def test_plain_openai_file_with_tool_calls(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        MESSAGES[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "t"},
        MESSAGES[1],
    ]
    (conversation,) = documents(
        dataset_from_file(write(tmp_path / "d.jsonl", [{"messages": messages}]))
    )
    roles = [(turn.prompt_role, turn.response_role) for turn in conversation.turns]
    assert roles == [("user", "function"), ("observation", "assistant")]


def test_csv_file_is_recognised(tmp_path):
    file = write(tmp_path / "d.csv.gz", [GOOD]).rename(tmp_path / "my.data.csv.gz")
    spec = dataset_from_file(file)
    assert documents(spec)[0].turns[0].prompt_text == "q"
    assert spec.name == "my.data"


def test_recognition_looks_past_a_damaged_first_line(tmp_path):
    (tmp_path / "d.jsonl").write_text('{broken\n{"prompt": "p", "response": "r"}\n')
    spec = dataset_from_file(tmp_path / "d.jsonl")
    assert spec.layout.columns.prompt == "prompt"
    with pytest.raises(RecordError, match=r"d\.jsonl:1: invalid JSON"):
        documents(spec)


def test_unrecognised_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"d\.jsonl: cannot tell .* has 'a', 'b'; use messages"):
        dataset_from_file(write(tmp_path / "d.jsonl", [{"a": 1, "b": 2}]))
    with pytest.raises(ValueError, match="the first record has no fields"):
        dataset_from_file(write(tmp_path / "d.jsonl", []))
    with pytest.raises(ValueError, match="plain text is for continued pretraining: set stage: pt"):
        dataset_from_file(write(tmp_path / "d.jsonl", [{"text": "x"}]))


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"text": "t", "prompt": "p", "response": "r"}, "t"),
        ({"instruction": "i", "input": "x", "output": "o"}, "i\nx"),
        ({"question": "q", "answer": "a"}, "q"),
        ({"messages": MESSAGES}, "u"),
        ({"conversations": [{"from": "human", "value": "h"}]}, "h"),
    ],
)
def test_plain_files_for_pretraining(tmp_path, record, text):
    spec = dataset_from_file(write(tmp_path / "d.jsonl", [record]), "pt")
    (document,) = documents(spec)
    assert isinstance(document, PlainText)
    assert document.text == text
    with pytest.raises(ValueError, match=r"use text, messages or conversations"):
        dataset_from_file(write(tmp_path / "e.jsonl", [{"body": "x"}]), "pt")


def test_text_files_need_no_entry(tmp_path):
    file = write(tmp_path / "d.txt.gz", [{"text": "one"}, {"text": ""}, {"text": "two"}])
    (spec,) = resolve_datasets([str(file)], tmp_path, "pt")
    assert [(d.text, d.location) for d in documents(spec)] == [
        ("one", f"{file}:1"),
        ("two", f"{file}:3"),
    ]
    with pytest.raises(ValueError, match=r"d\.txt\.gz: a \.txt file holds plain text .* stage: pt"):
        dataset_from_file(file)


# Names


def test_names_and_paths_resolve(tmp_path):
    write(tmp_path / "a.parquet", [{"question": "q", "answer": "a"}])
    columns = {"prompt": "question", "response": "answer"}
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"b": {"file_name": "a.parquet", "columns": columns}})
    )
    specs = resolve_datasets(["b", str(tmp_path / "a.parquet")], tmp_path)
    assert [spec.name for spec in specs] == ["b", "a"]
    first, second = (documents(spec) for spec in specs)
    assert first == second


@pytest.mark.parametrize("name", ["d.tsv", "d.jsonl.xz", "d.parquet.gz"])
def test_files_of_other_formats_are_refused(tmp_path, name):
    (tmp_path / name).write_text("")
    message = rf"{name}: it is none of the files that are read: \.jsonl, .*\.arrow; convert"
    with pytest.raises(ValueError, match=message):
        dataset_from_file(tmp_path / name)


def test_absent_file(tmp_path):
    with pytest.raises(ValueError, match=r"no\.jsonl: no such file or folder"):
        dataset_from_file(tmp_path / "no.jsonl")


def test_unknown_stage(tmp_path):
    file = write(tmp_path / "d.jsonl", [GOOD])
    for resolve in (
        lambda: dataset_from_file(file, "dpo"),
        lambda: read_dataset_info(tmp_path, [], "dpo"),
    ):
        with pytest.raises(ValueError, match="stage must be one of sft, pt: 'dpo'"):
            resolve()


# Folders


def test_folder_is_read_in_name_order_and_formats_mix(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    for number, name in enumerate(("a.jsonl", "b.csv", "c.json.gz", "d.parquet", "e.arrow")):
        write(folder / name, [GOOD | {"instruction": str(number)}])
    (folder / ".hidden").write_text("")
    (folder / ".cache").mkdir()
    spec = entry_spec(tmp_path, {"file_name": "parts"})
    assert [document.turns[0].prompt_text for document in documents(spec)] == list("01234")
    (folder / "f.tsv").write_text("")
    with pytest.raises(ValueError, match=r"name: file_name: .*f\.tsv: it is none of the files"):
        entry_spec(tmp_path, {"file_name": "parts"})


def test_folders_that_cannot_be_read(tmp_path):
    (tmp_path / "parts").mkdir()
    with pytest.raises(ValueError, match="parts is empty"):
        entry_spec(tmp_path, {"file_name": "parts"})
    (tmp_path / "parts" / "more.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"more\.jsonl: a folder in a folder is not read"):
        entry_spec(tmp_path, {"file_name": "parts"})
    with pytest.raises(ValueError, match=r"name: file_name: .*no\.jsonl: no such file"):
        entry_spec(tmp_path, {"file_name": "no.jsonl"})
