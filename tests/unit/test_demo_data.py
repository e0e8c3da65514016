"""The demo data: same bytes every time, right arithmetic, files that other libraries load."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sdar.data.demo import make_demo_data, make_records
from megatron_sdar.data.readers.spans import read_file
from megatron_sdar.data.sources.conversations import read_document
from megatron_sdar.data.sources.datasets import Conversation, Turn, read_dataset_info
from megatron_sdar.data.templates.template import (
    TemplateOptions,
    conversation_pieces,
    encode_conversation,
)
from megatron_sdar.data.tokenization.tokenizer import load_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "make_demo_data.py"


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    make_demo_data(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_same_bytes_in_another_process_with_other_threads(demo, tmp_path):
    result = subprocess.run(
        [sys.executable, str(TOOL), "--output-dir", str(tmp_path)],
        env=os.environ | {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert contents(tmp_path) == contents(demo)
    assert len(contents(demo)) == 8
    assert result.stdout.count("wrote ") == 8


def test_another_seed_gives_other_questions():
    assert make_records(50, 0) == make_records(50, 0)
    assert make_records(50, 0) != make_records(50, 1)


def test_every_answer_is_right():
    for record in make_records(500, 5):
        final = int(record["response"].rpartition("#### ")[2])
        numbers = [int(n) for n in re.findall(r"\d+", record["prompt"])]
        if record["prompt"].startswith("What is"):
            assert final == numbers[0] + numbers[1]
            continue
        expected = (
            numbers[2] - numbers[0] * numbers[1]
            if "buys" in record["prompt"]
            else numbers[0] + numbers[1] - numbers[2]
        )
        assert final == expected >= 0
        for left, op, right, value in re.findall(
            r"(\d+) ([*+-]) (\d+) = (\d+)", record["response"]
        ):
            a, b = int(left), int(right)
            assert int(value) == {"*": a * b, "+": a + b, "-": a - b}[op]


def test_addition_steps_carry_correctly():
    records = [r for r in make_records(500, 6) if r["prompt"].startswith("What is")]
    assert len(records) > 50
    for record in records:
        digits, carry = "", 0
        for line in record["response"].splitlines()[1:4]:
            terms, _, value = line.partition(": ")[2].partition(" = ")
            numbers = [int(term) for term in terms.split(" + ")]
            assert sum(numbers) == int(value)
            assert numbers[2:] == ([carry] if carry else [])
            digits, carry = str(int(value) % 10) + digits, int(value) // 10
        assert int(f"{carry}{digits}") == int(record["response"].rpartition(" ")[2])


def test_train_and_test_share_no_question(demo):
    train, test = (
        [json.loads(line)["prompt"] for line in (demo / name).read_text().splitlines()]
        for name in ("train.jsonl", "test.jsonl")
    )
    assert (len(train), len(test)) == (1800, 200)
    assert len({*train, *test}) == 2000


def test_documents_are_short(demo):
    tokenizer = load_tokenizer(demo / "model")
    specs = read_dataset_info(demo, ["arithmetic", "arithmetic_test"])
    lengths = [
        len(encode_conversation(tokenizer, conversation, TemplateOptions())[0])
        for spec in specs
        for file in spec.files
        for record in read_file(file)
        for conversation in [read_document(record.value, spec.layout, record.location)]
    ]
    assert len(lengths) == 2000
    assert min(lengths) >= 40
    assert max(lengths) <= 120


def test_model_folder_agrees_with_its_tokenizer(demo):
    config = json.loads((demo / "model" / "config.json").read_text())
    tokenizer = load_tokenizer(demo / "model")
    assert config["vocab_size"] == tokenizer.vocab_size == 512
    assert config["mask_token_id"] == tokenizer.mask_token_id
    assert config["architectures"] == ["SDARForCausalLM"]
    assert config["rope_theta"] == 1000000
    generation = json.loads((demo / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    for token in ("<think>", "</think>", "<tool_call>", "</tool_response>"):
        assert len(tokenizer.encode(token)) == 1


def test_transformers_loads_the_tokenizer_and_writes_the_same_prompt(demo):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(demo / "model")
    ours = load_tokenizer(demo / "model")
    text = "What is 12 + 30?\n\n <think>\u00e9<|MASK|><|im_end|>"
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert (theirs.eos_token, theirs.pad_token, theirs.mask_token) == (
        "<|im_end|>",
        "<|endoftext|>",
        "<|MASK|>",
    )
    conversation = Conversation((Turn("user", "q", "assistant", "a"),), system="s")
    pieces = conversation_pieces(conversation, TemplateOptions(enable_thinking=False))
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    prompt = theirs.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False, tokenize=False
    )
    assert prompt == "".join(piece.text for piece in pieces if not piece.trained)


@pytest.mark.parametrize("count", [9, 100_001])
def test_size_out_of_range(tmp_path, count):
    with pytest.raises(ValueError, match=f"must be in 10 to 100000, got {count}"):
        make_demo_data(tmp_path, count)


def test_tool_reports_errors_in_one_line(tmp_path):
    result = subprocess.run(
        [sys.executable, str(TOOL), "--output-dir", str(tmp_path), "--num-documents", "1"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr == "error: num_documents must be in 10 to 100000, got 1\n"
