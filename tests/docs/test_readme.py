"""Every command of README.md runs, in the order in which a reader meets them, and does its work.

They run in a copy of the tracked tree, so that nothing is left behind in the checkout, and with
what a reader has: the project installed in the first `python` on PATH. `make` is told to use
that interpreter instead of making .venv; `make test` is this very run and is only checked to be
the pytest call.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from docs.reader import ACTIVATE, ROOT, Result, commands_of, run
from safetensors.torch import load_file

from megatron_sdar.checkpoint.run_directory import read_marker

MAKE_TEST = "make test"
COMMANDS = commands_of(ROOT / "README.md")
RUN = [command for command in COMMANDS if command not in (MAKE_TEST, ACTIVATE)]
# tests/unit run these two in a shorter form.
SLOW = ("tools/benchmark.py attention", "tools/benchmark.py step")


def test_the_first_commands_are_demo_and_test() -> None:
    assert COMMANDS[:2] == ["make demo", MAKE_TEST]


def test_make_test_is_pytest(checkout: Path) -> None:
    result = run(f"{MAKE_TEST} --dry-run PYTHON={sys.executable}", checkout)
    assert result.returncode == 0, result.stderr
    for which in ("not alone", "alone"):
        assert f"-m 'not slow and not backends and not torture and {which}'" in result.stdout


def test_make_makes_what_is_activated_before_it_is_needed(checkout: Path) -> None:
    assert COMMANDS.count(ACTIVATE) == 1
    needed = [place for place, line in enumerate(COMMANDS) if not line.startswith("make ")]
    assert needed[0] == COMMANDS.index(ACTIVATE)
    result = run("make demo --dry-run", checkout)
    assert result.returncode == 0, result.stderr
    environment = Path(ACTIVATE.removeprefix(". ")).parents[1]
    assert re.search(rf"^\S+ -m venv {re.escape(str(environment))}$", result.stdout, re.MULTILINE)
    assert f"{environment}/bin/python -m pip install -e" in result.stdout


def test_every_command_has_its_own_effect() -> None:
    found = [[key for key in EFFECTS if key in command] for command in RUN]
    assert sorted(found) == sorted([key] for key in EFFECTS), found


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(
            command,
            id=command[:60],
            marks=pytest.mark.slow if any(key in command for key in SLOW) else (),
        )
        for command in RUN
    ],
)
def test_command_runs_and_has_its_effect(
    command: str, checkout: Path, installed: bool, made_demo: Result
) -> None:
    made = command.startswith("make ")
    if not (made or installed):
        pytest.skip(f"{sys.executable} has not got this checkout installed, as .venv would")
    line = f"{command} PYTHON={sys.executable}" if made else command
    result = made_demo if command == "make demo" else run(line, checkout)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "Warning" not in result.stderr, result.stderr[-3000:]
    (effect,) = (EFFECTS[key] for key in EFFECTS if key in command)
    effect(checkout, result)


def test_a_fresh_start_is_no_resume(checkout: Path, installed: bool) -> None:
    """The check of the resumed run is not blind; runs last, since it starts demo/mine anew."""
    if not installed:
        pytest.skip(f"{sys.executable} has not got this checkout installed, as .venv would")
    (command,) = (command for command in RUN if "overwrite_output_dir=false" in command)
    result = run(command.replace("_dir=false", "_dir=true"), checkout)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(read_log(checkout / "demo/mine")) == 6
    with pytest.raises(AssertionError, match="no word of it"):
        run_was_resumed(checkout, result)
    with pytest.raises(AssertionError, match="other first steps"):
        log_was_continued(checkout)


def read_log(directory: Path) -> list[dict[str, Any]]:
    with (directory / "trainer_log.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face directory, each from the file that the index names."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        tensors = load_file(directory / file)
        assert set(tensors) == {n for n, home in index["weight_map"].items() if home == file}
        weights |= tensors
    return weights


def first_run(checkout: Path) -> Path:
    """What the torchrun command left, kept: later commands write to its output_dir."""
    return checkout.parent / "first-run"


def demo_left_everything(checkout: Path, result: Result) -> None:
    output = checkout / "demo/output"
    records = read_log(output)
    assert [record["step"] for record in records] == list(range(1, 61))
    for record in records:
        assert {"step", "loss", "grad_norm", "lr", "epoch"} <= set(record)
    first = sum(record["loss"] for record in records[:5]) / 5
    last = sum(record["loss"] for record in records[-5:]) / 5
    assert last < 0.5 * first, f"the loss went from {first} to {last}"
    assert (output / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    assert "lm_head.weight" in read_weights(output)
    for name in ("config.json", "tokenizer.json"):
        assert (output / name).exists(), name
    assert read_marker(output / "checkpoint-60").step == 60
    before, _, after = result.stdout.partition("HF model")
    assert "legend:" in before, "a packed row is shown"
    assert "####" in after or "<think>" in after, "the decoded answer is shown"


def data_is_tokenised(checkout: Path, result: Result) -> None:
    data = checkout / "demo/data"
    for suffix in (".bin", ".idx", ".labels.bin", ".labels.idx"):
        # make demo has tokenised the same file.
        ours = (data / f"mine{suffix}").read_bytes()
        assert ours == (data / f"arithmetic{suffix}").read_bytes() != b"", suffix
    documents = len((data / "train.jsonl").read_text(encoding="utf-8").splitlines())
    assert json.loads((data / "mine.json").read_text())["num_documents"] == documents
    assert re.search(rf"^documents +{documents:,}$", result.stdout, re.MULTILINE)
    for length in (256, 512):
        fill = rf"^rows of {length} +[\d,]+ rows, [\d.]+% full at block_length 4; 0 documents cut"
        assert re.search(fill, result.stdout, re.MULTILINE), result.stdout


def rows_were_shown(checkout: Path, result: Result) -> None:
    for text in ("legend:", "<|im_start|>user", "of 256 positions", "documents by length"):
        assert text in result.stdout, result.stdout[-3000:]
    assert (checkout / "demo/lengths.png").read_bytes().startswith(b"\x89PNG")


def shard_files(checkout: Path) -> list[str]:
    return sorted(file.name for file in (checkout / "demo/data").glob("shared.shard-*.json"))


def first_shard_was_built(checkout: Path, result: Result) -> None:
    del result
    assert shard_files(checkout) == ["shared.shard-00000-of-00002.json"]


def second_shard_was_built(checkout: Path, result: Result) -> None:
    del result
    assert len(shard_files(checkout)) == 2


def shards_became_one(checkout: Path, result: Result) -> None:
    del result
    data = checkout / "demo/data"
    for suffix in (".bin", ".idx", ".labels.bin", ".turns.bin"):
        ours = (data / f"shared{suffix}").read_bytes()
        assert ours == (data / f"mine{suffix}").read_bytes() != b"", suffix
    assert json.loads((data / "shared.json").read_text())["shard"] is None


def figures_were_written(checkout: Path, result: Result) -> None:
    figures = json.loads((checkout / "demo/figures.json").read_text())
    assert {
        "tokenize_vs_raw", "peak_rss_mb", "fill_1024", "fill_2048", "fill_4096", "fill_20480",
        "row_tokens_per_s", "loader_wait_share",
    } <= set(figures)  # fmt: skip
    lengths = (1024, 2048, 4096, 20480)
    assert all(figures[f"extra_rows_{length}"] >= 0 for length in lengths)
    assert all(0 < figures[f"fill_{length}"] <= 1 for length in lengths)
    assert figures["tokenize_vs_raw"] > 0
    assert figures["peak_rss_mb"] > 10
    assert figures["row_tokens_per_s"] > 0
    assert figures["loader_wait_share"] < 1
    assert "tokenize_vs_raw" in result.stdout


def attention_was_measured(checkout: Path, result: Result) -> None:
    figures = json.loads((checkout / "demo/attention.json").read_text())
    assert figures["speedup_vs_dense_1doc"] > 0
    assert figures["waste_128_1024"] <= 1.25
    assert figures["waste_256_2048"] <= 1.12
    assert figures["waste_long"] <= 1.02
    assert "dense SDPA" in result.stdout
    assert (checkout / "demo/attention.png").stat().st_size > 1000


def loss_was_measured(checkout: Path, result: Result) -> None:
    figures = json.loads((checkout / "demo/loss.json").read_text())
    assert 0 < figures["memory_ratio"] < 1
    assert "peak memory" in result.stdout


def step_was_measured(checkout: Path, result: Result) -> None:
    figures = json.loads((checkout / "demo/step.json").read_text())
    names = ["speedup_vs_peer_256", "floor_share_fp32", "memory_vs_peer_256"]
    names += [f"{layout}_cpu_ratio" for layout in ("apart2", "tp2", "pp2", "dp2")]
    assert all(figures[name] > 0 for name in names)
    assert all(layout["over_apart"] > 0 for layout in figures["layouts"])
    assert "answer tokens/s" in result.stdout
    assert (checkout / "demo/step.png").stat().st_size > 1000


def views_were_measured(checkout: Path, result: Result) -> None:
    figures = json.loads((checkout / "demo/views.json").read_text())
    assert len(figures["forms"]) == 5
    assert "efficiency" in result.stdout


def runs_were_compared(checkout: Path, result: Result) -> None:
    for run_name in ("output", "mine"):
        assert re.search(rf"\b{run_name}\b", result.stdout)
    assert (checkout / "demo/runs.png").stat().st_size > 1000


def kernels_were_compiled(checkout: Path, result: Result) -> None:
    del checkout
    assert re.search(r"swiglu backward bf16 1024 +. sm_90", result.stdout)
    assert "1 architecture" in result.stdout
    assert "no spills" in result.stdout


def mask_was_drawn(checkout: Path, result: Result) -> None:
    del result
    drawn = (checkout / "demo/mask.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert len(drawn) > 10_000
    assert (checkout / "docs/mask.png").exists(), "DESIGN.md shows it"


def keys_are_listed(checkout: Path, result: Result) -> None:
    del checkout
    assert result.stdout.startswith("usage: torchrun")
    for key in ("data_path", "tensor_model_parallel_size", "max_steps", "overwrite_output_dir"):
        assert re.search(rf"^ *{key}\b", result.stdout, re.MULTILINE), key


def four_steps_were_trained(checkout: Path, result: Result) -> None:
    del result
    output = checkout / "demo/mine"
    assert [record["step"] for record in read_log(output)] == [1, 2, 3, 4]
    marker = read_marker(output / "checkpoint-4")
    assert (marker.step, marker.has_optimizer) == (4, True)
    assert marker.layout == {"tp": 2, "pp": 1, "dp": 1}
    shutil.copytree(output, first_run(checkout), ignore=shutil.ignore_patterns("checkpoint-*"))
    assert read_weights(first_run(checkout))


def run_was_resumed(checkout: Path, result: Result) -> None:
    assert re.search(r"^resumed from \S*checkpoint-4\b", result.stdout, re.MULTILINE), (
        "no word of it: " + result.stdout
    )
    log_was_continued(checkout)
    assert read_marker(checkout / "demo/mine/checkpoint-6").step == 6


def log_was_continued(checkout: Path) -> None:
    records = read_log(checkout / "demo/mine")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    # The times in the records of a second start differ, even where the losses agree.
    assert records[:4] == read_log(first_run(checkout)), "other first steps"


def checkpoint_became_hugging_face(checkout: Path, result: Result) -> None:
    del result
    converted, exported = checkout / "demo/mine-hf", first_run(checkout)
    ours, theirs = read_weights(converted), read_weights(exported)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    for name in ("config.json", "tokenizer.json"):
        assert (converted / name).read_bytes() == (exported / name).read_bytes(), name


def hugging_face_became_native(checkout: Path, result: Result) -> None:
    del result
    native = checkout / "demo/mine-native"
    marker = read_marker(native)
    assert (marker.step, marker.has_optimizer) == (0, False)
    (shard,) = (native / "model").glob("*.safetensors")
    ours, theirs = load_file(shard), read_weights(checkout / "demo/mine-hf")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        rows, padding = ours[name].split((len(tensor), len(ours[name]) - len(tensor)))
        assert torch.equal(rows, tensor), name
        assert not padding.any(), name


def conversion_was_measured(checkout: Path, result: Result) -> None:
    figures = json.loads((checkout / "demo/convert.json").read_text())
    for name in (
        "speed_vs_cp_to_native", "speed_vs_cp_to_hf", "peak_rss_mb", "load_rss_vs_model",
        "async_block_share",
    ):  # fmt: skip
        assert figures[name] > 0
    assert figures["peak_rss_mb"] < 1000
    assert "conversion of tiny" in result.stdout


def transformers_decoded(checkout: Path, result: Result) -> None:
    del checkout
    assert result.stdout.strip().startswith("2 + 3 =")
    assert len(result.stdout.strip()) > len("2 + 3 =")


def text_was_generated(checkout: Path, result: Result) -> None:
    del checkout
    assert result.stdout.strip(), "only blank lines"
    assert re.search(r"^[1-9]\d* tokens, [1-9]\d* forwards", result.stderr, re.MULTILINE)


def several_prompts_were_answered(checkout: Path, result: Result) -> None:
    del checkout
    for prompt in ("2 + 3 =", "8 + 9 ="):
        assert prompt in result.stdout
    assert "answers ended by a stop token" in result.stderr


def keys_were_explained(checkout: Path, result: Result) -> None:
    del checkout
    for text in ("deepspeed", "data_parallel_sharding_strategy", "cutoff_len", "supported"):
        assert text in result.stdout, result.stdout


def machine_was_checked(checkout: Path, result: Result) -> None:
    del checkout
    assert result.stdout.rstrip().endswith("ready to train"), result.stdout


def model_was_evaluated(checkout: Path, result: Result) -> None:
    metrics = json.loads((checkout / "demo/evaluation/eval_results.json").read_text())
    # The demo's model has learned something: a uniform guess costs ln(vocabulary) = 6.9.
    assert 0 < metrics["eval_loss"] < 5
    assert metrics["eval_num_generated"] == 4
    assert len((checkout / "demo/evaluation/eval_samples.jsonl").read_text().splitlines()) == 4
    assert "eval_loss_t0.5" in result.stdout


def adapter_was_trained(checkout: Path, result: Result) -> None:
    output = checkout / "demo/lora"
    steps = [(record["step"], "eval_loss" in record) for record in read_log(output)]
    assert steps == [(1, False), (2, False), (2, True), (3, False), (4, False), (4, True)]
    assert (output / "adapter_model.safetensors").exists()
    assert list((output / "runs").glob("events.out.tfevents.*"))
    results = json.loads((output / "all_results.json").read_text())
    assert {"train_loss", "train_runtime", "eval_loss"} <= results.keys()
    state = json.loads((output / "trainer_state.json").read_text())
    assert (state["global_step"], len(state["log_history"])) == (4, 6)
    assert "PEFT adapter" in result.stdout


def adapter_was_merged(checkout: Path, result: Result) -> None:
    del result
    merged, base = (read_weights(checkout / "demo" / name) for name in ("merged", "output"))
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    assert changed
    assert all("_proj" in name for name in changed)


# By a part of the command that no other command has.
EFFECTS: dict[str, Callable[[Path, Result], None]] = {
    "make demo": demo_left_everything,
    "--output-prefix demo/data/mine --block-length": data_is_tokenised,
    "tools/inspect_data.py": rows_were_shown,
    "--shard 0/2": first_shard_was_built,
    "--shard 1/2": second_shard_was_built,
    "--merge 2": shards_became_one,
    "tools/benchmark.py data": figures_were_written,
    "tools/benchmark.py attention": attention_was_measured,
    "tools/benchmark.py loss": loss_was_measured,
    "tools/benchmark.py step": step_was_measured,
    "tools/benchmark.py views": views_were_measured,
    "tools/benchmark.py convert": conversion_was_measured,
    "AutoModelForCausalLM": transformers_decoded,
    "tools/compare_runs.py": runs_were_compared,
    "tools/compile_kernels.py": kernels_were_compiled,
    "tools/draw_mask.py": mask_was_drawn,
    "pretrain_sdar.py --help": keys_are_listed,
    "torchrun ": four_steps_were_trained,
    "overwrite_output_dir=false": run_was_resumed,
    "--format hf": checkpoint_became_hugging_face,
    "--format native": hugging_face_became_native,
    "--max-new-tokens 48": text_was_generated,
    "--remasking dynamic": several_prompts_were_answered,
    "tools/explain_config.py": keys_were_explained,
    "megatron_sdar.doctor": machine_was_checked,
    "tools/evaluate.py": model_was_evaluated,
    "finetuning_type=lora": adapter_was_trained,
    "tools/merge_adapter.py": adapter_was_merged,
}
