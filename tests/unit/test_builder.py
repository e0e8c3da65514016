"""Builds: what lands in the files, reuse and refusal, damage, and the preprocess tool."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_sdar.data import builder
from megatron_sdar.data.builder import build_dataset, ensure_dataset, summarize_dataset
from megatron_sdar.data.demo import make_demo_data
from megatron_sdar.data.metadata import metadata_path
from megatron_sdar.data.sources import (
    Columns,
    DatasetSpec,
    Layout,
    dataset_from_file,
    iter_conversations,
)
from megatron_sdar.data.template import TemplateOptions, encode_conversation
from megatron_sdar.data.tokenizer import SdarTokenizer, load_tokenizer
from megatron_sdar.data.tokens import IndexedDataset, IndexedWriter, TokenizedDataset

ROOT = Path(__file__).parents[2]
SUFFIXES = (".bin", ".idx", ".labels.bin", ".labels.idx", ".json")
OPTIONS = TemplateOptions()
PAIRS = Layout("alpaca", Columns("prompt", None, "response"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    make_demo_data(folder, 300)
    return folder


@pytest.fixture(scope="module")
def tokenizer(demo) -> SdarTokenizer:
    return load_tokenizer(demo / "model")


@pytest.fixture
def spec(demo, tmp_path) -> DatasetSpec:
    """The first 20 documents, in a file of the test's own."""
    lines = (demo / "train.jsonl").read_text().splitlines(keepends=True)[:20]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    return dataset_from_file(tmp_path / "train.jsonl")


def files(prefix: Path) -> dict[str, bytes]:
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES}


def add_line(spec: DatasetSpec, record: object) -> None:
    with spec.files[0].open("a") as stream:
        stream.write(json.dumps(record) + "\n")


def edit_metadata(prefix: Path, **changes: object) -> None:
    path = metadata_path(prefix)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Contents


def test_files_hold_every_conversation(spec, tokenizer, tmp_path):
    summary = build_dataset([spec, spec], tmp_path / "p", tokenizer, OPTIONS)
    dataset = TokenizedDataset(tmp_path / "p")
    expected = [encode_conversation(tokenizer, c, OPTIONS) for c in iter_conversations(spec)] * 2
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
    build_dataset([spec], tmp_path / "p", tokenizer, OPTIONS)
    assert IndexedDataset(tmp_path / "p").dtype == np.dtype("uint16")
    assert IndexedDataset(f"{tmp_path / 'p'}.labels").dtype == np.dtype("int32")


def test_metadata_says_what_was_built(spec, tokenizer, tmp_path):
    build_dataset([spec], tmp_path / "p", tokenizer, OPTIONS, max_samples=5)
    content = json.loads(metadata_path(tmp_path / "p").read_text())
    assert content["format_version"] == 1
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


@pytest.mark.parametrize(("workers", "chunk"), [(1, 3), (3, 3), (2, 1000), (4, 1)])
def test_chunks_and_workers_do_not_change_a_byte(
    spec, tokenizer, tmp_path, monkeypatch, workers, chunk
):
    build_dataset([spec], tmp_path / "a", tokenizer, OPTIONS)
    monkeypatch.setattr(builder, "_CHUNK_DOCUMENTS", chunk)
    build_dataset([spec], tmp_path / "b", tokenizer, OPTIONS, num_workers=workers)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_chunks_are_cut_by_size_too(spec, tokenizer, tmp_path, monkeypatch):
    batches = []
    encode_batch = SdarTokenizer.encode_batch
    monkeypatch.setattr(
        SdarTokenizer,
        "encode_batch",
        lambda self, texts: batches.append(len(texts)) or encode_batch(self, texts),
    )
    monkeypatch.setattr(builder, "_CHUNK_CHARACTERS", 1)
    build_dataset([spec], tmp_path / "p", tokenizer, OPTIONS)
    assert len(batches) == 20


def test_text_of_the_mask_token_is_counted_per_document(spec, tokenizer, tmp_path):
    add_line(spec, {"prompt": "<|MASK|><|MASK|>", "response": "a<|MASK|>"})
    add_line(spec, {"prompt": "p", "response": "<|MASK|>"})
    summary = build_dataset([spec], tmp_path / "p", tokenizer, OPTIONS)
    assert summary.num_mask_documents == 2
    assert "2 documents hold the text <|MASK|>" in summary.format()
    assert summarize_dataset(tmp_path / "p").num_mask_documents == 2


def test_progress_bar_moves_over_every_byte(spec, tokenizer, tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr(builder._ProgressBar, "advance", lambda self, n: moved.append(n))
    build_dataset([spec], tmp_path / "p", tokenizer, OPTIONS)
    assert sum(moved) == spec.files[0].stat().st_size


def test_progress_is_drawn_on_a_terminal_only(spec, tokenizer, tmp_path, monkeypatch, capsys):
    build_dataset([spec], tmp_path / "quiet", tokenizer, OPTIONS)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    build_dataset([spec], tmp_path / "off", tokenizer, OPTIONS, progress=False)
    assert capsys.readouterr().err == ""
    build_dataset([spec], tmp_path / "shown", tokenizer, OPTIONS)
    assert "tokenising" in capsys.readouterr().err


# Bad records


@pytest.mark.parametrize("line", [21, 22])
def test_bad_records_stop_the_build_and_leave_nothing(spec, tokenizer, tmp_path, line):
    # Line 21 fails when it is read, line 22 only when it is written in the template.
    add_line(spec, {"prompt": "p", "response": "" if line == 21 else "r"})
    add_line(spec, {"prompt": "p", "response": "r", "tools": "x"})
    with pytest.raises(ValueError, match=rf"train\.jsonl:{line}: "):
        build_dataset([spec], tmp_path / "out" / "p", tokenizer, OPTIONS)
    assert list((tmp_path / "out").iterdir()) == []


def test_skipped_records_are_counted_and_located(spec, tokenizer, tmp_path):
    add_line(spec, {"prompt": "p", "response": ""})
    add_line(spec, {"prompt": "p", "response": "r", "tools": "x"})
    summary = build_dataset([spec], tmp_path / "p", tokenizer, OPTIONS, on_error="skip")
    assert summary.num_documents == 20
    assert summary.skipped == {"empty answer": 1, "bad tools": 1}
    assert summary.skipped_locations["bad tools"] == [f"{spec.files[0]}:22"]
    assert TokenizedDataset(tmp_path / "p").metadata.skipped == summary.skipped
    text = summary.format()
    assert "2 records" in text
    assert f"1 empty answer, first at {spec.files[0]}:21" in text


@pytest.mark.parametrize(
    ("records_", "message"),
    [([], "the files are empty"), ([{"prompt": "p", "response": ""}], r"skipped \(1 empty answer")],
)
def test_build_without_documents_is_refused(tokenizer, tmp_path, records_, message):
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records_))
    good = DatasetSpec("d", (file,), PAIRS)
    with pytest.raises(ValueError, match=f"d: no document was read: .*{message}"):
        build_dataset([good], tmp_path / "p", tokenizer, OPTIONS, on_error="skip")
    assert not list(tmp_path.glob("p.*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"specs": []}, "no dataset is given"),
        ({"num_workers": 0}, "num_workers must be at least 1, got 0"),
        ({"max_samples": 0}, "max_samples must be at least 1"),
        ({"on_error": "x"}, "on_error must be one of"),
    ],
)
@pytest.mark.parametrize("function", [build_dataset, ensure_dataset])
def test_bad_arguments(spec, tokenizer, tmp_path, arguments, message, function):
    given = {"specs": [spec]} | arguments
    with pytest.raises(ValueError, match=message):
        function(given.pop("specs"), tmp_path / "p", tokenizer, OPTIONS, **given)


# Overwriting and reuse


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_existing_files_are_kept(spec, tokenizer, tmp_path, suffix):
    existing = tmp_path / f"p{suffix}"
    existing.write_text("mine")
    with pytest.raises(ValueError, match=r"exists already; .*overwrite"):
        build_dataset([spec], tmp_path / "p", tokenizer, OPTIONS)
    assert existing.read_text() == "mine"
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([existing.name, "train.jsonl"])


def test_failed_overwrite_leaves_the_old_dataset(spec, tokenizer, tmp_path):
    build_dataset([spec], tmp_path / "p", tokenizer, OPTIONS)
    before = files(tmp_path / "p")
    add_line(spec, {})
    with pytest.raises(ValueError, match="missing column"):
        build_dataset([spec], tmp_path / "p", tokenizer, OPTIONS, overwrite=True)
    assert files(tmp_path / "p") == before


def test_build_that_dies_while_renaming_counts_as_incomplete(
    spec, tokenizer, tmp_path, monkeypatch
):
    build_dataset([spec], tmp_path / "p", tokenizer, OPTIONS)
    finalize = IndexedWriter.finalize
    calls = []

    def die_second(self):
        calls.append(self)
        if len(calls) == 2:
            raise OSError("disk full")
        finalize(self)

    monkeypatch.setattr(IndexedWriter, "finalize", die_second)
    with pytest.raises(OSError, match="disk full"):
        build_dataset([spec], tmp_path / "p", tokenizer, OPTIONS, overwrite=True)
    with pytest.raises(ValueError, match="no complete tokenized dataset is there"):
        TokenizedDataset(tmp_path / "p")
    assert not list(tmp_path.glob("*.tmp"))


def test_same_inputs_are_reused(spec, tokenizer, tmp_path, monkeypatch):
    built = ensure_dataset([spec], tmp_path / "p", tokenizer, OPTIONS)
    monkeypatch.setattr(builder, "iter_conversations", None)
    reused = ensure_dataset([spec], tmp_path / "p", tokenizer, OPTIONS)
    assert reused.seconds == 0
    assert reused.tokens_per_second == 0
    assert (reused.num_tokens, reused.document_lengths) == (
        built.num_tokens,
        built.document_lengths,
    )
    assert "time" not in reused.format()


def test_moved_sources_are_the_same_sources(spec, tokenizer, tmp_path):
    ensure_dataset([spec], tmp_path / "p", tokenizer, OPTIONS)
    (tmp_path / "moved").mkdir()
    spec.files[0].rename(tmp_path / "moved" / "train.jsonl")
    moved = dataset_from_file(tmp_path / "moved" / "train.jsonl")
    assert ensure_dataset([moved], tmp_path / "p", tokenizer, OPTIONS).seconds == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("options", r"mask_history \(was False, now True\)"),
        ("max_samples", r"max_samples \(was None, now 3\)"),
        ("contents", r"dataset train \(files\)"),
        ("datasets", r"the datasets \(were 1, now 2\)"),
        ("tokenizer", "differently: the tokenizer;"),
        ("layout", r"dataset train \(layout\)"),
    ],
)
def test_other_inputs_are_refused_then_rebuilt(spec, tokenizer, tmp_path, demo, change, message):
    ensure_dataset([spec], tmp_path / "p", tokenizer, OPTIONS)
    specs, options, used, limit = [spec], OPTIONS, tokenizer, None
    if change == "options":
        options = TemplateOptions(mask_history=True)
    elif change == "max_samples":
        limit = 3
    elif change == "contents":
        text = spec.files[0].read_text()
        spec.files[0].write_text(text.replace("####", "=>=>"))
    elif change == "datasets":
        specs = [spec, spec]
    elif change == "tokenizer":
        make_demo_data(tmp_path / "other", 200, seed=9)
        used = load_tokenizer(tmp_path / "other" / "model")
    else:
        specs = [DatasetSpec(spec.name, spec.files, PAIRS)]
    arguments = (specs, tmp_path / "p", used, options)
    with pytest.raises(ValueError, match=rf"p\.json: .*{message}.*overwrite"):
        ensure_dataset(*arguments, max_samples=limit)
    before = (tmp_path / "p.json").read_text()
    assert ensure_dataset(*arguments, max_samples=limit, rebuild_stale=True).seconds > 0
    assert (tmp_path / "p.json").read_text() != before, "the own cache follows its inputs"
    assert ensure_dataset(*arguments, max_samples=limit, rebuild_stale=True).seconds == 0
    assert ensure_dataset(*arguments, max_samples=limit, overwrite=True).seconds > 0
    assert ensure_dataset(*arguments, max_samples=limit).seconds == 0


def test_dataset_with_left_out_records_is_not_taken_for_a_clean_one(spec, tokenizer, tmp_path):
    add_line(spec, {"prompt": "p", "response": ""})
    ensure_dataset([spec], tmp_path / "p", tokenizer, OPTIONS, on_error="skip")
    assert ensure_dataset([spec], tmp_path / "p", tokenizer, OPTIONS, on_error="skip").seconds == 0
    with pytest.raises(ValueError, match="built leaving out 1 bad records"):
        ensure_dataset([spec], tmp_path / "p", tokenizer, OPTIONS)


# Damage


def test_metadata_problems_are_named(spec, tokenizer, tmp_path):
    prefix = tmp_path / "p"
    build_dataset([spec], prefix, tokenizer, OPTIONS)
    good = metadata_path(prefix).read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=rf"p\.json: .*{message}.*--overwrite"):
            TokenizedDataset(prefix)
        metadata_path(prefix).write_bytes(good)

    metadata_path(prefix).write_text("{")
    refused("not valid JSON")
    metadata_path(prefix).write_text("[]")
    refused("not metadata of format_version 1")
    edit_metadata(prefix, format_version=2)
    refused("not metadata of format_version 1")
    edit_metadata(prefix, num_tokens="many")
    refused("'num_tokens' is missing or of the wrong type: 'many'")
    edit_metadata(prefix, vocab_size=True)
    refused("'vocab_size' is missing or of the wrong type: True")
    edit_metadata(prefix, max_samples=7)
    refused("fingerprint does not match")
    content = json.loads(good)
    del content["skipped"]
    metadata_path(prefix).write_text(json.dumps(content))
    refused("'skipped' is missing")
    metadata_path(prefix).unlink()
    refused("no such file: no complete tokenized dataset")


def rewrite(prefix: Path, documents: list[list[int]], dtype: str = "i4") -> None:
    with IndexedWriter(prefix, dtype, overwrite=True) as writer:
        for tokens in documents:
            writer.add_documents(np.asarray(tokens, dtype=dtype), [len(tokens)])


def test_parts_that_do_not_belong_together_are_refused(spec, tokenizer, tmp_path):
    prefix = tmp_path / "p"
    build_dataset([spec], prefix, tokenizer, OPTIONS, max_samples=2)
    good = TokenizedDataset(prefix)
    ids = [good.get(i)[0].tolist() for i in range(2)]
    labels = [good.get(i)[1].tolist() for i in range(2)]

    rewrite(f"{prefix}.labels", [labels[0], labels[1][:-1]])
    with pytest.raises(ValueError, match="tokens and labels differ in length"):
        TokenizedDataset(prefix)
    rewrite(f"{prefix}.labels", labels, "f4")
    with pytest.raises(ValueError, match=r"p\.labels\.idx: dtype float32 is not an integer"):
        TokenizedDataset(prefix)
    with IndexedWriter(f"{prefix}.labels", "i4", overwrite=True) as writer:
        for part in labels:
            writer.add_sequence(part)
        writer.end_document()
    with pytest.raises(ValueError, match=r"labels\.idx: not one sequence per document"):
        TokenizedDataset(prefix)
    rewrite(prefix, ids[:1])
    rewrite(f"{prefix}.labels", labels[:1])
    with pytest.raises(ValueError, match=r"counts 2 documents and .* the files have 1 and"):
        TokenizedDataset(prefix)


def test_bad_values_are_found_when_they_are_read(spec, tokenizer, tmp_path):
    prefix = tmp_path / "p"
    build_dataset([spec], prefix, tokenizer, OPTIONS, max_samples=1)
    ids, labels = (part.tolist() for part in TokenizedDataset(prefix).get(0))
    rewrite(f"{prefix}.labels", [[*labels[:-1], labels[-1] + 1]])
    with pytest.raises(ValueError, match=r"p\.labels\.bin: document 0 has a label that is neither"):
        TokenizedDataset(prefix).get(0)
    rewrite(f"{prefix}.labels", [labels])
    for wrong in (-5, tokenizer.vocab_size):
        rewrite(prefix, [[wrong, *ids[1:]]])
        with pytest.raises(ValueError, match=r"p\.bin: document 0 has an id outside the vocab"):
            TokenizedDataset(prefix).get(0)


# The tool


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_tool_builds_and_reports(demo, tokenizer, tmp_path):
    result = run_tool(
        *("--dataset", "arithmetic,arithmetic_test", "--dataset-dir", demo),
        *("--tokenizer", demo / "model", "--output-prefix", tmp_path / "p"),
        *("--enable-thinking", "none", "--default-system", "Be brief.", "--mask-history"),
        *("--cutoff-len", 64, 128, "--block-length", 8),
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    dataset = TokenizedDataset(tmp_path / "p")
    assert len(dataset) == 300
    template = dataset.metadata.recipe.template
    assert template["enable_thinking"] is None
    assert template["mask_history"] is True
    assert tokenizer.decode(dataset.get(0)[0].tolist()).startswith("<|im_start|>system\nBe brief.")
    assert "documents       300\n" in result.stdout
    assert "rows of 64" in result.stdout
    assert "full at block_length 8" in result.stdout


def test_tool_needs_overwrite_to_replace(demo, tmp_path):
    arguments = ("--input", demo / "test.jsonl", "--tokenizer", demo / "model", "--output-prefix")
    assert run_tool(*arguments, tmp_path / "p", "--max-samples", 3).returncode == 0
    again = run_tool(*arguments, tmp_path / "p")
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
    assert again.stderr.count("\n") == 1
    assert run_tool(*arguments, tmp_path / "p", "--overwrite").returncode == 0
    assert len(TokenizedDataset(tmp_path / "p")) == 30


def test_tool_help_teaches_by_example():
    result = run_tool("--help")
    assert result.returncode == 0
    assert "python tools/preprocess_data.py --input train.jsonl" in result.stdout
    assert "data_path: tokens/math" in result.stdout


def test_tool_imports_neither_torch_nor_transformers():
    code = (
        "import sys, megatron_sdar.data.builder; print({'torch', 'transformers'} & {*sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stderr
