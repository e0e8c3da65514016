"""Evaluation end to end: the oracle's numbers, in every layout, and nothing of training changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from distributed.command import error_lines, run_python, train
from distributed.oracle import NoisyDocument, loss
from safetensors.torch import load_file

from megatron_sdar.architecture import load_architecture
from megatron_sdar.config import load_config
from megatron_sdar.data.demo import make_demo_data
from megatron_sdar.data.storage.tokens import TokenizedDataset
from megatron_sdar.diffusion.evaluation_noise import evaluation_noises
from megatron_sdar.parallel.mesh import build_mesh
from megatron_sdar.training.evaluation_data import prepare_evaluation_sets

ROOT = Path(__file__).resolve().parents[2]
LEVELS = 3
TRAIN_ONLY = {
    "train_from_scratch": True, "dataset": "arithmetic", "cutoff_len": 128, "max_steps": 4,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "logging_steps": 1,
    "save_strategy": "no", "preprocessing_num_workers": 1, "fp64": True, "device": "cpu",
    "learning_rate": 1e-2, "warmup_steps": 0,
}  # fmt: skip
EVALUATED = TRAIN_ONLY | {
    "eval_dataset": "arithmetic_test", "eval_max_documents": 5, "eval_noise_levels": LEVELS,
    "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "eval_block_lengths": [4, 8],
    "eval_generate_samples": 3, "eval_generate_max_new_tokens": 8, "eval_on_each_dataset": True,
    "plot_loss": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    make_demo_data(folder, 60)
    return folder


def write(demo: Path, output: Path, settings: dict[str, Any]) -> list[str]:
    config = {
        "model_name_or_path": str(demo / "model"), "dataset_dir": str(demo),
        "tokenized_path": str(demo / "tokens"), "output_dir": str(output),
    }  # fmt: skip
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config | settings))
    return [str(path)]


def evaluations(output: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]
    found = [line for line in lines if "eval_loss" in line]
    assert len({line["step"] for line in found}) == len(found), "no step is evaluated twice"
    names = [name for name in found[0] if name.startswith("eval_") and name != "eval_runtime"]
    return {line["step"]: {name: line[name] for name in names} for line in found}


@pytest.fixture(scope="module")
def single(demo: Path) -> Path:
    output = demo / "single"
    done = run_python([str(ROOT / "pretrain_sdar.py"), *write(demo, output, EVALUATED)])
    assert done.returncode == 0, done.stderr
    assert "eval 4/4  eval_loss " in done.stdout
    assert "best evaluation   eval_loss " in done.stdout
    return output


def weights(output: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in sorted(output.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def test_training_goes_on_as_if_nothing_had_been_evaluated(demo: Path, single: Path) -> None:
    plain = demo / "plain"
    done = run_python([str(ROOT / "pretrain_sdar.py"), *write(demo, plain, TRAIN_ONLY)])
    assert done.returncode == 0, done.stderr
    found, expected = weights(single), weights(plain)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert sorted(evaluations(single)) == [0, 2, 4]


def documents(demo: Path, block: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """The evaluated documents, padded to whole blocks as the trainer does, label -100 for those."""
    dataset = TokenizedDataset(demo / "tokens.eval-0-arithmetic_test")
    pad = dataset.metadata.pad_token_id
    for number in range(5):
        ids, labels = dataset.get(number)
        missing = -ids.size % block
        yield (
            number,
            torch.from_numpy(np.pad(ids, (0, missing), constant_values=pad)).long(),
            torch.from_numpy(np.pad(labels, (0, missing), constant_values=pad)).long(),
        )


@pytest.mark.parametrize(("block", "suffix"), [(4, ""), (4, "_b4"), (8, "_b8")])
def test_the_loss_is_the_oracles(demo: Path, single: Path, block: int, suffix: str) -> None:
    arch = load_architecture(single)
    assert arch.mask_token_id is not None
    exported = {name: tensor.double() for name, tensor in weights(single).items()}
    by_level = []
    for level in range(LEVELS):
        noisy = []
        for number, ids, labels in documents(demo, block):
            maskable = (labels != -100).numpy()
            (noise,) = evaluation_noises(number, 0, maskable, [level], LEVELS)
            prob = float(np.max(noise.loss_prob))
            assert level / LEVELS <= prob <= (level + 1) / LEVELS + 1e-3
            divisors = torch.full((ids.numel(),), prob, dtype=torch.float64)
            noisy.append(NoisyDocument(ids, labels, torch.from_numpy(noise.masked), divisors))
        by_level.append(float(loss(exported, arch, noisy, block, arch.mask_token_id)))
    found = evaluations(single)[4]
    # The export is rounded to float32.
    assert found[f"eval_loss{suffix}"] == pytest.approx(np.mean(by_level), rel=1e-5)
    if not suffix:
        assert len({round(value, 3) for value in by_level}) == LEVELS
        levels = [found[f"eval_loss_t{level / LEVELS:g}"] for level in range(LEVELS)]
        assert levels == pytest.approx(by_level, rel=1e-5)
        assert found["eval_arithmetic_test_loss"] == found["eval_loss"]


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2,
             "gradient_accumulation_steps": 4, "per_device_eval_batch_size": 3}),
        pytest.param(
            4, {"tensor_model_parallel_size": 2, "sequence_parallel": True,
                "gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        pytest.param(
            4, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2,
                "gradient_accumulation_steps": 2, "data_parallel_sharding_strategy": "optim_grads"},
            marks=pytest.mark.slow),
        pytest.param(
            3, {"gradient_accumulation_steps": 4, "per_device_eval_batch_size": 2, "max_steps": 1,
                "data_parallel_sharding_strategy": "optim_grads_params"}, marks=pytest.mark.slow),
    ],
    ids=["tp2-pp2", "tp2-sp-dp2", "pp2-vpp2-dp2", "fsdp3"],
)  # fmt: skip
def test_layouts_agree(
    demo: Path, single: Path, tmp_path: Path, processes: int, changes: dict[str, Any]
) -> None:
    output = tmp_path / "run"
    done = train(processes, write(demo, output, EVALUATED | {"export_hf": False} | changes))
    assert done.returncode == 0, done.stderr
    expected, found = evaluations(single), evaluations(output)
    # Three replicas train other batches, but the first weights are the same.
    for step in [0] if processes == 3 else [0, 2, 4]:
        assert found[step] == pytest.approx(expected[step], rel=1e-9, abs=1e-9), step
    samples = [
        [json.loads(line) for line in (path / "eval_samples.jsonl").read_text().splitlines()]
        for path in (single, output)
    ]
    first = [[line for line in lines if line["step"] == 0] for lines in samples]
    assert first[0] == first[1]
    assert len(first[0]) == 3


@pytest.mark.usefixtures("single_process")
def test_what_truncation_leaves_out_is_said(demo: Path, single: Path, tmp_path: Path) -> None:
    prefix = demo / "tokens.eval-0-arithmetic_test"
    lengths = TokenizedDataset(prefix).lengths
    limit = 4 * int(np.median(lengths) // 4)
    changes = {"eval_data_path": str(prefix), "do_eval": True, "cutoff_len": limit,
               "truncate_mode": "drop"}  # fmt: skip
    config = load_config(write(demo, tmp_path / "run", TRAIN_ONLY | changes))
    mesh = build_mesh(torch.device("cpu"), 1, 1)
    said: list[str] = []
    (each,) = prepare_evaluation_sets(config, load_architecture(single), mesh, None, said.append)
    long = int((lengths > limit).sum())
    left = len(lengths) - long
    assert 0 < long < len(lengths)
    assert len(each.items) == left
    assert said[-1].startswith(
        f"evaluation set arithmetic_test: {left} documents; longer than cutoff_len={limit}: "
        f"{long} documents dropped"
    )


def test_answers_are_of_the_documents(demo: Path, single: Path) -> None:
    lines = [json.loads(line) for line in (single / "eval_samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 0, 0, 2, 2, 2, 4, 4, 4]
    asked = [json.loads(line) for line in (demo / "test.jsonl").read_text().splitlines()]
    for line in lines:
        question, answer = (asked[line["document"]][name] for name in ("prompt", "response"))
        assert question in line["prompt"]
        assert line["reference"].strip() == answer.strip()
        assert answer.strip() not in line["prompt"]
    right = sum(line["match"] for line in lines if line["step"] == 4)
    assert evaluations(single)[4]["eval_exact_match"] == pytest.approx(right / 3)
    results = json.loads((single / "eval_results.json").read_text())
    assert results["eval_loss"] == evaluations(single)[4]["eval_loss"]


def test_the_tool_gives_the_runs_numbers(demo: Path, single: Path, tmp_path: Path) -> None:
    """Of the exported model, on token files and on the dataset, in one process and in two."""
    tool = [str(ROOT / "tools" / "evaluate.py"), "--model", str(single), "--cutoff-len", "128"]
    tool += ["--max-documents", "5", "--noise-levels", str(LEVELS), "--dtype", "float64"]
    answers = ["--generate-samples", "3", "--max-new-tokens", "8", "--block-lengths", "4", "8"]
    prefix = ["--data-path", str(demo / "tokens.eval-0-arithmetic_test")]
    (tmp_path / "one").mkdir()
    samples = tmp_path / "one" / "eval_samples.jsonl"
    samples.write_text("of an earlier evaluation\n")
    one = run_python([*tool, *prefix, *answers, "--output-dir", str(tmp_path / "one")])
    assert one.returncode == 0, one.stderr
    assert [json.loads(line)["document"] for line in samples.read_text().splitlines()] == [0, 1, 2]
    named = ["--dataset", "arithmetic_test", "--dataset-dir", str(demo)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = run_python(
        [*torchrun, *tool, *named, "--tensor-parallel-size", "2", "--output-dir",
         str(tmp_path / "two"), "--batch-size", "2"]
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    expected = evaluations(single)[4]
    found = [
        json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("one", "two")
    ]
    for name in ("eval_loss", "eval_accuracy", "eval_loss_t0", "eval_loss_b8", "eval_exact_match"):
        # The export is rounded to float32.
        assert found[0][name] == pytest.approx(expected[name], rel=1e-5), name
        assert f"{name}  " in one.stdout
    assert found[1]["eval_loss"] == pytest.approx(found[0]["eval_loss"], rel=1e-9)
    bad = run_python([*tool, "--data-path", str(tmp_path / "none"), "--output-dir", str(tmp_path)])
    assert bad.returncode == 1
    assert error_lines(bad.stderr)[0].startswith(f"error: {tmp_path / 'none'}")
    assert run_python([*tool, "--output-dir", str(tmp_path)]).returncode == 2
    bad = run_python([*tool, *prefix, "--output-dir", str(single)])
    assert bad.returncode == 1
    assert f"--output-dir {single} is a training run's" in error_lines(bad.stderr)[0]


def test_the_best_is_kept_exported_and_remembered_and_training_stops(
    demo: Path, tmp_path: Path
) -> None:
    """A learning rate that soon ruins the model, on two ranks."""
    output = tmp_path / "run"
    settings = EVALUATED | {
        "max_steps": 40, "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "gradient_accumulation_steps": 2, "save_total_limit": 2, "load_best_model_at_end": True,
        "early_stopping_steps": 3, "eval_on_start": False, "eval_generate_samples": 0,
        "eval_block_lengths": [4], "learning_rate": 0.3, "async_save": True,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    arguments = write(demo, output, settings)
    # Killed by a step limit first: what was best before the resume must count after it.
    begun = train(2, [*arguments, "max_steps=2"])
    assert begun.returncode == 0, begun.stderr
    done = train(2, arguments)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    losses = {step: metrics["eval_loss"] for step, metrics in evaluations(output).items()}
    best = min(losses, key=lambda step: losses[step])
    last = max(losses)
    assert last == best + 3 < 40
    assert "stopped early     3 evaluations in a row were not better" in done.stdout
    assert f"from checkpoint-{best}, the best" in done.stdout
    kept = sorted(int(path.name[11:]) for path in output.glob("checkpoint-*"))
    assert kept == [best, last]
    exported = weights(output)
    for name, tensor in weights(output / f"checkpoint-{best}" / "hf").items():
        assert torch.equal(exported[name], tensor), name
    again = train(2, arguments)
    assert again.returncode == 0, again.stderr
    assert f"step {last} of 40 is done (early_stopping_steps): nothing left" in again.stdout
    assert {s: m["eval_loss"] for s, m in evaluations(output).items()} == losses
    # Elsewhere the best checkpoint does not exist: the best of what is saved there is exported.
    elsewhere = tmp_path / "elsewhere"
    changes = {"early_stopping_steps": None, "max_steps": last + 1, "async_save": False,
               "resume_from_checkpoint": str(output / f"checkpoint-{last}")}  # fmt: skip
    script = str(ROOT / "pretrain_sdar.py")
    resumed = run_python([script, *write(demo, elsewhere, settings | changes)])
    assert resumed.returncode == 0, resumed.stderr
    assert f"checkpoint-{best}, the best so far, is not there" in resumed.stdout
    for name, tensor in weights(elsewhere / f"checkpoint-{last + 1}" / "hf").items():
        assert torch.equal(weights(elsewhere)[name], tensor), name


def test_only_better_ones_and_the_last_are_saved(demo: Path, tmp_path: Path) -> None:
    """A learning rate that soon ruins the model, on two ranks; killed once, by a step limit."""
    output = tmp_path / "run"
    settings = EVALUATED | {
        "max_steps": 8, "eval_steps": 1, "save_strategy": "best", "gradient_accumulation_steps": 2,
        "eval_on_start": False, "eval_generate_samples": 0, "eval_block_lengths": [4],
        "learning_rate": 0.3, "lr_scheduler_type": "constant", "load_best_model_at_end": True,
    }  # fmt: skip
    arguments = write(demo, output, settings)
    for limit in (2, 8):
        done = train(2, [*arguments, f"max_steps={limit}"])
        assert done.returncode == 0, done.stderr
    losses = {step: metrics["eval_loss"] for step, metrics in evaluations(output).items()}
    better = [s for s in losses if all(losses[s] < losses[e] for e in losses if e < s)]
    assert len(better) < 8
    assert max(better) < 8, "the last one is saved though it is not better"
    found = sorted(int(path.name[11:]) for path in output.glob("checkpoint-*"))
    assert found == sorted({*better, 2, 8})
    assert f"from checkpoint-{better[-1]}, the best" in done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_dataset": "nowhere"}, "nowhere"),
        (
            {"metric_for_best_model": "eval_bleu"},
            "metric_for_best_model: eval_bleu is not measured; there are eval_accuracy, "
            "eval_accuracy_t0, eval_accuracy_t0.333333, eval_accuracy_t0.666667, "
            "eval_arithmetic_test_accuracy, eval_arithmetic_test_exact_match, "
            "eval_arithmetic_test_loss, eval_exact_match, eval_loss, eval_loss_b4, eval_loss_b8, "
            "eval_loss_t0, eval_loss_t0.333333, eval_loss_t0.666667, eval_num_generated, "
            "eval_runtime",
        ),
        ({"eval_dataset": "arithmetic_test,arithmetic_test"}, "are called 'arithmetic_test'"),
    ],
)
def test_mistakes_are_one_message(
    demo: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    settings = EVALUATED | {"max_steps": 2} | changes
    done = run_python([str(ROOT / "pretrain_sdar.py"), *write(demo, tmp_path / "run", settings)])
    assert done.returncode == 1
    (line,) = error_lines(done.stderr)
    assert message in line
    assert "step 1/2" not in done.stdout, "before anything is trained"
