"""The data section end to end: what a user writes in the YAML reaches the rows that are trained."""

import json
from pathlib import Path

import pytest
import yaml
from distributed.command import run_python, train

from megatron_sdar.data.demo import make_demo_data

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    make_demo_data(folder, 300)
    return folder


def settings(demo: Path, output: Path, **changes: object) -> list[str]:
    """The config file of a tiny run with CHANGES, written beside its output."""
    config = {
        "model_name_or_path": str(demo / "model"),
        "train_from_scratch": True,
        "dataset_dir": str(demo),
        "cutoff_len": 128,
        "block_length": 4,
        "per_device_train_batch_size": 1,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "save_only_model": True,
        "export_hf": False,
        "preprocessing_num_workers": 1,
        "output_dir": str(output),
        "device": "cpu",
        "learning_rate": 1e-3,
    } | changes
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return [str(path)]


def losses(output: Path) -> list[float]:
    lines = (output / "trainer_log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_blend_with_held_out_documents_is_the_same_with_workers_and_data_parallelism(
    demo, tmp_path
):
    blend = {
        "dataset": "arithmetic,arithmetic_test",
        "mix_strategy": "blend",
        "blend_weights": "0.5,0.5; 0.9,0.1 @2",
        "val_size": 12,
        "tokenized_path": str(tmp_path / "tokens"),
    }
    one = settings(demo, tmp_path / "one", **blend, gradient_accumulation_steps=2)
    alone = run_python([str(ROOT / "pretrain_sdar.py"), *one])
    assert alone.returncode == 0, alone.stderr
    assert "val_size=12: 12 documents are held out" in alone.stdout
    assert "dataset 0: " in alone.stdout
    assert "dataset 1: " in alone.stdout
    two = settings(demo, tmp_path / "two", **blend, dataloader_num_workers=2)
    both = train(2, two)
    assert both.returncode == 0, both.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert (tmp_path / "tokens.0-arithmetic.json").exists()
    assert (tmp_path / "tokens.1-arithmetic_test.json").exists()


def test_plain_text_is_trained_whole_and_long_documents_are_split(demo, tmp_path):
    questions = [json.loads(line) for line in (demo / "train.jsonl").open()]
    lines = [" ".join(record["prompt"] for record in questions[i : i + 20]) for i in range(40)]
    (tmp_path / "corpus.txt").write_text("\n".join(lines))
    run = settings(
        demo, tmp_path / "run", stage="pt", dataset=str(tmp_path / "corpus.txt"), max_steps=2
    )
    result = run_python([str(ROOT / "pretrain_sdar.py"), *run])
    assert result.returncode == 0, result.stderr
    assert "(100.0%)" in result.stdout
    assert "40 split, 0 tokens lost (truncate_mode: split)" in result.stdout
    assert len(losses(tmp_path / "run")) == 2


def test_mixing_and_published_rows_are_honoured(demo, tmp_path):
    run = settings(
        demo,
        tmp_path / "run",
        dataset="arithmetic,arithmetic_test",
        mix_strategy="interleave_under",
        interleave_probs="0.5,0.5",
        packing_algorithm="llamafactory",
        max_steps=1,
        preprocessing_num_workers=96,
    )
    result = run_python([str(ROOT / "pretrain_sdar.py"), *run])
    assert result.returncode == 0, result.stderr
    assert "preprocessing_num_workers: 96 is more than the" in result.stdout
    # The smaller dataset has 30 documents: the mixture ends when they are used up.
    documents = int(result.stdout.split(" documents in ")[0].rsplit(maxsplit=1)[-1])
    assert 30 < documents < 120


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenized_path": "."}, "tokenized_path: . is a folder, but neither one that"),
        ({"val_size": 300}, "val_size 300.0 takes 300 of 300 documents for validation"),
        ({"dataset": "arithmetic,arithmetic", "val_size": 5}, "val_size: one file is used twice"),
    ],
)  # fmt: skip
def test_a_mixture_that_does_not_fit_is_one_message(demo, tmp_path, changes, message):
    run = settings(demo, tmp_path / "run", **({"dataset": "arithmetic,arithmetic_test"} | changes))
    result = run_python([str(ROOT / "pretrain_sdar.py"), *run])
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert message in line


def test_token_files_of_another_stage_or_tokenizer_are_refused(demo, tmp_path):
    prefix = tmp_path / "tokens"
    tool = run_python(
        [
            *(str(ROOT / "tools" / "preprocess_data.py"), "--input", str(demo / "test.jsonl")),
            *("--tokenizer", str(demo / "model"), "--output-prefix", str(prefix)),
        ]
    )
    assert tool.returncode == 0, tool.stderr
    run = settings(demo, tmp_path / "run", data_path=str(prefix), stage="pt")
    result = run_python([str(ROOT / "pretrain_sdar.py"), *run])
    assert result.returncode == 1
    assert "stage is 'pt', the files hold conversations" in result.stderr
    make_demo_data(tmp_path / "other", 200, seed=9)
    other = str(tmp_path / "other" / "model")
    run = settings(demo, tmp_path / "run", data_path=str(prefix), tokenizer_name_or_path=other)
    result = run_python([str(ROOT / "pretrain_sdar.py"), *run])
    assert result.returncode == 1
    assert f"was made with another tokenizer than {other}" in result.stderr
