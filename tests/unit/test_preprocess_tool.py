"""tools/preprocess_data.py as a user runs it."""

import subprocess
import sys
from pathlib import Path

from distributed.command import run_python
from unit.token_builds import files

from megatron_sdar.data.storage.tokens import TokenizedDataset

ROOT = Path(__file__).parents[2]


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_python([str(ROOT / "tools" / "preprocess_data.py"), *map(str, arguments)])


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


def test_tool_builds_shards_on_several_machines_and_merges_them(demo, tmp_path):
    source = ("--dataset", "arithmetic", "--dataset-dir", demo, "--tokenizer", demo / "model")
    assert run_tool(*source, "--output-prefix", tmp_path / "one").returncode == 0
    target = ("--output-prefix", tmp_path / "many")
    early = run_tool("--merge", 2, *target)
    assert "00000-of-00002.json: no such file: 2 of 2 shards are not built" in early.stderr
    for index in range(2):
        result = run_tool(*source, *target, "--shard", f"{index}/2")
        assert result.returncode == 0, result.stderr
    merged = run_tool("--merge", 2, *target)
    assert merged.returncode == 0, merged.stderr
    assert "documents       270\n" in merged.stdout
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_tool_takes_names_with_spaces_between(demo, tmp_path):
    arguments = ("--dataset-dir", demo, "--tokenizer", demo / "model", "--output-prefix")
    result = run_tool("--dataset", "arithmetic, arithmetic_test", *arguments, tmp_path / "p")
    assert result.returncode == 0, result.stderr
    empty = run_tool("--dataset", "arithmetic,", *arguments, tmp_path / "q")
    assert empty.stderr.startswith("error: --dataset 'arithmetic,': give names with commas")


def test_tool_checks_row_sizes_before_it_builds(demo, tmp_path):
    result = run_tool(
        *("--input", demo / "test.jsonl", "--tokenizer", demo / "model"),
        *("--output-prefix", tmp_path / "p", "--cutoff-len", 1001),
    )
    assert result.returncode == 1
    assert "cutoff_len 1001 is not a multiple of block_length 4" in result.stderr
    assert not list(tmp_path.iterdir())


def test_tool_reads_a_folder(demo, tmp_path):
    (tmp_path / "many").mkdir()
    for name in ("test", "train"):
        (tmp_path / "many" / f"{name}.jsonl").write_bytes((demo / f"{name}.jsonl").read_bytes())
    result = run_tool(
        *("--input", tmp_path / "many", "--tokenizer", demo / "model"),
        *("--output-prefix", tmp_path / "p"),
    )
    assert result.returncode == 0, result.stderr
    metadata = TokenizedDataset(tmp_path / "p").metadata
    assert metadata.num_documents == 300
    assert metadata.recipe.sources[0]["name"] == "many"


def test_tool_reads_plain_text(demo, tmp_path):
    (tmp_path / "corpus.txt").write_text("first document\nsecond one\n")
    result = run_tool(
        *("--stage", "pt", "--input", tmp_path / "corpus.txt", "--tokenizer", demo / "model"),
        *("--output-prefix", tmp_path / "p"),
    )
    assert result.returncode == 0, result.stderr
    assert "(100.0%)" in result.stdout


def test_tool_needs_a_tokenizer_and_a_shard_that_is_one(demo, tmp_path):
    arguments = ("--input", demo / "test.jsonl", "--output-prefix", tmp_path / "p")
    assert "--tokenizer is needed" in run_tool(*arguments).stderr
    bad = run_tool(*arguments, "--tokenizer", demo / "model", "--shard", "one")
    assert bad.stderr.startswith("error: --shard one: give I/N")


def test_worker_processes_import_nothing_heavy():
    code = (
        "import sys, megatron_sdar.data.building.builder\n"
        "print({'torch', 'transformers', 'pyarrow'} & {*sys.modules})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stderr
