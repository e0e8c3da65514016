"""Builds: what lands in the files, progress, and bad records."""

import json
from itertools import pairwise

import numpy as np
import pytest
from unit.token_builds import PAIRS, TEMPLATE, add_line, build, files

from megatron_sdar.data.building import build_progress, builder, part, part_pool
from megatron_sdar.data.building.build_progress import BuildProgress
from megatron_sdar.data.building.summary import summarize_dataset
from megatron_sdar.data.readers.spans import read_file
from megatron_sdar.data.sources.conversations import read_document
from megatron_sdar.data.sources.datasets import Columns, DatasetSpec, Layout, dataset_from_file
from megatron_sdar.data.storage.indexed import IndexedDataset
from megatron_sdar.data.storage.metadata import metadata_path
from megatron_sdar.data.storage.tokens import TokenizedDataset
from megatron_sdar.data.templates.template import TemplateOptions, encode_conversation


def conversations(spec: DatasetSpec) -> list:
    return [
        read_document(record.value, spec.layout, record.location)
        for file in spec.files
        for record in read_file(file)
    ]


# Contents


def test_files_hold_every_conversation(spec, tokenizer, tmp_path):
    summary = build([spec, spec], tmp_path / "p", tokenizer)
    dataset = TokenizedDataset(tmp_path / "p")
    expected = [encode_conversation(tokenizer, c, TEMPLATE) for c in conversations(spec)] * 2
    assert len(dataset) == summary.num_documents == 40
    for index, (ids, labels) in enumerate(expected):
        stored_ids, stored_labels = dataset.get(index)
        assert stored_ids.tolist() == ids.tolist()
        assert stored_labels.tolist() == labels.tolist()
        assert stored_ids.dtype == stored_labels.dtype == np.int32
    assert dataset.lengths.tolist() == [len(ids) for ids, _ in expected]
    assert summary.num_tokens == sum(len(ids) for ids, _ in expected)
    assert summary.num_label_tokens == sum(int((labels != -100).sum()) for _, labels in expected)
    assert summary.skipped == {}
    assert summary.tokens_per_second == pytest.approx(summary.num_tokens / summary.seconds)


def test_small_vocabularies_are_stored_in_two_bytes(spec, tokenizer, tmp_path):
    build([spec], tmp_path / "p", tokenizer)
    assert IndexedDataset(tmp_path / "p").dtype == np.dtype("uint16")
    assert IndexedDataset(f"{tmp_path / 'p'}.labels").dtype == np.dtype("int32")


def test_metadata_says_what_was_built(spec, tokenizer, tmp_path):
    build([spec], tmp_path / "p", tokenizer, max_samples=5)
    content = json.loads(metadata_path(tmp_path / "p").read_text())
    assert content["format_version"] == 2
    assert content["tokenizer_fingerprint"] == tokenizer.fingerprint()
    assert content["template"]["template"] == "qwen3"
    assert content["num_documents"] == content["max_samples"] == 5
    assert content["mask_token_id"] == tokenizer.mask_token_id
    assert content["pad_token_id"] == tokenizer.pad_token_id
    assert content["eos_token_id"] == tokenizer.eos_token_id
    assert content["vocab_size"] == tokenizer.vocab_size
    (source,) = content["sources"]
    assert source["files"][0]["size"] == spec.files[0].stat().st_size
    assert str(tmp_path) not in json.dumps(content)


@pytest.mark.parametrize(("workers", "part_bytes"), [(1, 1), (1, 500), (1, 10**9), (2, 500)])
def test_workers_parts_and_chunks_do_not_change_a_byte(
    spec, tokenizer, tmp_path, monkeypatch, workers, part_bytes
):
    build([spec], tmp_path / "a", tokenizer)
    monkeypatch.setattr(part, "_CHUNK_CHARACTERS", 300)
    build([spec], tmp_path / "b", tokenizer, num_workers=workers, part_bytes=part_bytes)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_turns_add_up_to_the_document(spec, tokenizer, tmp_path):
    add_line(spec, {"instruction": "p", "output": "r", "history": [["a", "b"]]})
    layout = Layout("alpaca", Columns("instruction", None, "output", history="history"))
    file = tmp_path / "h.jsonl"
    file.write_text(json.dumps({"instruction": "p", "output": "r", "history": [["a", "b"]]}))
    template = TemplateOptions(mask_history=True, default_system="s")
    build([DatasetSpec("h", (file,), layout)], tmp_path / "p", tokenizer, template)
    dataset = TokenizedDataset(tmp_path / "p")
    ids, labels = dataset.get(0)
    turns = dataset.turns(0).tolist()
    assert len(turns) == 4
    assert sum(turns) == len(ids)
    starts = [0, *np.cumsum(turns)]
    texts = [tokenizer.decode(ids[i:j].tolist()) for i, j in pairwise(starts)]
    assert texts[0] == "<|im_start|>system\ns<|im_end|>\n" + chat_prompt("a")
    assert texts[1].endswith("b<|im_end|>\n")
    assert texts[2] == chat_prompt("p")
    assert texts[3].endswith("r<|im_end|>\n")
    # What is trained does not move the turns.
    assert (labels[: starts[3]] == -100).all()
    assert (labels[starts[3] :] >= 0).all()


def chat_prompt(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_plain_text_is_one_trained_answer(tokenizer, tmp_path):
    (tmp_path / "t.txt").write_text("one\n\ntwo words\n")
    spec = dataset_from_file(tmp_path / "t.txt", "pt")
    summary = build([spec], tmp_path / "p", tokenizer)
    dataset = TokenizedDataset(tmp_path / "p")
    assert len(dataset) == 2
    for index, text in enumerate(("one", "two words")):
        ids, labels = dataset.get(index)
        assert tokenizer.decode(ids.tolist()) == f"{text}<|im_end|>"
        assert labels.tolist() == ids.tolist()
        assert dataset.turns(index).tolist() == [0, len(ids)]
    assert summary.num_label_tokens == summary.num_tokens


def test_text_of_the_mask_token_is_counted_per_document(spec, tokenizer, tmp_path):
    add_line(spec, {"prompt": "<|MASK|><|MASK|>", "response": "a<|MASK|>"})
    add_line(spec, {"prompt": "p", "response": "<|MASK|>"})
    summary = build([spec], tmp_path / "p", tokenizer)
    assert summary.num_mask_documents == 2
    assert "2 documents hold the text <|MASK|>" in summary.format()
    assert summarize_dataset(tmp_path / "p").num_mask_documents == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_moves_over_every_byte_and_token(spec, tokenizer, tmp_path, monkeypatch, workers):
    told = {}

    class Watched(BuildProgress):
        def stage(self, name, total_bytes):
            super().stage(name, total_bytes)
            self.told = told.setdefault(name, [total_bytes, 0, 0])

        def advance(self, num_bytes, num_tokens=0):
            super().advance(num_bytes, num_tokens)
            self.told[1] += num_bytes
            self.told[2] += num_tokens

    monkeypatch.setattr(builder, "BuildProgress", Watched)
    build([spec], tmp_path / "p", tokenizer, num_workers=workers, part_bytes=900)
    size = spec.files[0].stat().st_size
    num_tokens = TokenizedDataset(tmp_path / "p").metadata.num_tokens
    assert told == {"hashing": [size, size, 0], "tokenising": [size, size, num_tokens]}


def test_progress_off_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(build_progress, "_LINE_SECONDS", 0.0)
    with BuildProgress(shown=True) as progress:
        progress.stage("tokenising", 200)
        progress.advance(50, 1234)
    assert capsys.readouterr().err.startswith("tokenising: 25%, 1,234 tokens, ")
    with BuildProgress(shown=False) as progress:
        progress.stage("tokenising", 200)
        progress.advance(50, 1234)
    assert capsys.readouterr().err == ""


def test_progress_is_drawn_on_a_terminal_only(spec, tokenizer, tmp_path, monkeypatch, capsys):
    build([spec], tmp_path / "quiet", tokenizer, progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    build([spec], tmp_path / "off", tokenizer, progress=False)
    assert capsys.readouterr().err == ""
    build([spec], tmp_path / "shown", tokenizer, progress=True)
    assert "tokenising" in capsys.readouterr().err


# Bad records


@pytest.mark.parametrize("line", [21, 22])
def test_bad_records_stop_the_build_and_leave_nothing(spec, tokenizer, tmp_path, line):
    # Line 21 fails when it is read, line 22 only when it is written in the template.
    add_line(spec, {"prompt": "p", "response": "" if line == 21 else "r"})
    add_line(spec, {"prompt": "p", "response": "r", "tools": "x"})
    with pytest.raises(ValueError, match=rf"train\.jsonl:{line}: "):
        build([spec], tmp_path / "out" / "p", tokenizer)
    assert list((tmp_path / "out").iterdir()) == []


def test_skipped_records_are_counted_and_located(spec, tokenizer, tmp_path):
    add_line(spec, {"prompt": "p", "response": ""})
    add_line(spec, {"prompt": "p", "response": "r", "tools": "x"})
    summary = build([spec], tmp_path / "p", tokenizer, on_error="skip")
    assert summary.num_documents == 20
    assert summary.skipped == {"empty answer": 1, "bad tools": 1}
    assert summary.skipped_locations["bad tools"] == [f"{spec.files[0]}:22"]
    assert TokenizedDataset(tmp_path / "p").metadata.skipped == summary.skipped
    text = summary.format()
    assert "2 records" in text
    assert f"1 empty answer, first at {spec.files[0]}:21" in text


def test_a_column_of_skipped_records_only_is_not_called_missing(tokenizer, tmp_path):
    records = [{"prompt": "p", "response": "r"}, {"prompt": "p", "response": "r", "history": "?"}]
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    layout = Layout("alpaca", Columns("prompt", None, "response", history="history"))
    spec = DatasetSpec("d", (file,), layout, ("history",))
    summary = build([spec], tmp_path / "p", tokenizer, on_error="skip")
    assert (summary.num_documents, summary.skipped) == (1, {"bad history": 1})


def test_small_inputs_start_no_processes(spec, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(part_pool, "ProcessPoolExecutor", None)
    monkeypatch.setattr(builder, "available_cores", lambda: 2)
    build([spec], tmp_path / "p", tokenizer, num_workers=None, part_bytes=500)
    monkeypatch.setattr(builder, "_POOL_BYTES", 1)
    with pytest.raises(TypeError, match="NoneType"):
        build([spec], tmp_path / "q", tokenizer, num_workers=None, part_bytes=500)


def test_what_a_record_loses_is_counted(tokenizer, tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "let me see", "tool_calls": [call]},
    ]
    file = tmp_path / "d.jsonl"
    file.write_text((json.dumps({"messages": messages}) + "\n") * 3)
    summary = build([dataset_from_file(file)], tmp_path / "p", tokenizer, part_bytes=1)
    ((what, count),) = summary.left_out.items()
    assert count == 3
    assert f"left out        {what}, in 3 records" in summary.format()
    assert summarize_dataset(tmp_path / "p").left_out == summary.left_out


@pytest.mark.parametrize(
    ("records_", "message"),
    [([], "the files are empty"), ([{"prompt": "p", "response": ""}], r"skipped \(1 empty answer")],
)
def test_build_without_documents_is_refused(tokenizer, tmp_path, records_, message):
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records_))
    good = DatasetSpec("d", (file,), PAIRS)
    with pytest.raises(ValueError, match=f"d: no document was read: .*{message}"):
        build([good], tmp_path / "p", tokenizer, on_error="skip")
    assert not list(tmp_path.glob("p.*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"specs": []}, "no dataset is given"),
        ({"num_workers": 0}, "num_workers must be at least 1, got 0"),
        ({"max_samples": 0}, "max_samples must be at least 1"),
        ({"on_error": "x"}, "on_error must be one of"),
        ({"shard": (2, 2)}, "shard 2/2: give I/N with I from 0 to N-1"),
    ],
)
def test_bad_arguments(spec, tokenizer, tmp_path, arguments, message):
    given = {"specs": [spec]} | arguments
    with pytest.raises(ValueError, match=message):
        build(given.pop("specs"), tmp_path / "p", tokenizer, **given)
    with pytest.raises(ValueError, match="must end in a file name"):
        build([spec], f"{tmp_path}/", tokenizer)


def test_a_named_column_that_no_record_has_is_refused(spec, tokenizer, tmp_path):
    layout = Layout("alpaca", Columns("question", "hint", "answer", system="persona"))
    record = {"question": "q", "answer": "a", "persona": "x"}
    records = [record, record | {"hint": "h"}]
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    good = DatasetSpec("d", (file,), layout, ("hint", "persona"))
    # Each part lacks one of them, the dataset has both.
    build([good], tmp_path / "p", tokenizer, part_bytes=1)
    misspelt = DatasetSpec("d", (file,), layout, ("hint", "persona", "tool"))
    with pytest.raises(ValueError, match=r"dataset d: column 'tool' is in no record of .*d\.jsonl"):
        build([misspelt], tmp_path / "q", tokenizer, part_bytes=1)
