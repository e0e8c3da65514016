"""Whole runs of LoRA and freeze: what they leave behind, and resuming in this and other layouts.

Bitwise in the layout that saved, 1e-9 elsewhere, dropout and saving in the background included.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from distributed.world import run_world
from safetensors.torch import load_file
from torch import Tensor

from megatron_sdar.checkpoint.adapters import CheckpointAdapter
from megatron_sdar.checkpoint.safetensors_files import full_ranges
from megatron_sdar.checkpoint.shards import ShardedTensors
from megatron_sdar.config import load_config, validate
from megatron_sdar.data.demo import make_demo_data
from megatron_sdar.parallel.mesh import build_mesh
from megatron_sdar.training.run import TrainingRun
from megatron_sdar.training.setup import resolve_architecture
from tools.merge_adapter import main as merge

pytestmark = pytest.mark.usefixtures("single_process")

SETTINGS = {
    "dataset": "arithmetic", "cutoff_len": 128, "max_steps": 4, "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2, "logging_steps": 1, "save_strategy": "steps",
    "save_steps": 2, "fp64": True, "device": "cpu", "learning_rate": 1e-2, "warmup_steps": 0,
    "preprocessing_num_workers": 1, "plot_loss": False, "peak_tflops_per_device": 0.1,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "lora": {
        "finetuning_type": "lora", "lora_rank": 3, "lora_dropout": 0.2,
        "additional_target": ["norm"],
    },
    "freeze": {
        "finetuning_type": "freeze", "freeze_trainable_layers": 1,
        "freeze_extra_modules": ["norm"],
    },
}  # fmt: skip
ELSEWHERE = {
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {
        "data_parallel_sharding_strategy": "optim_grads_params", "gradient_accumulation_steps": 1,
    },
}  # fmt: skip
# Each kind of run in two of them.
MOVES = [("lora", "tp2"), ("lora", "pp2"), ("freeze", "tp2"), ("freeze", "dp2")]


def write(folder: Path, name: str, **changes: Any) -> Path:
    config = {
        "model_name_or_path": str(folder / "base"), "dataset_dir": str(folder),
        "tokenized_path": str(folder / "tokens"), "output_dir": str(folder / name),
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config | SETTINGS | changes))
    return path


def run(path: Path) -> None:
    """What the entry script does, on every rank of the world there is."""
    config = load_config([str(path)])
    arch = resolve_architecture(config)
    validate(config, arch, dist.get_world_size())
    parallel = config.parallel
    mesh = build_mesh(
        torch.device("cpu"),
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        False,
    )
    TrainingRun(config, arch, mesh).run()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, single_process: None) -> Path:
    """The demo's data, a model to start from, and a run of each kind."""
    folder = tmp_path_factory.mktemp("finetuning")
    make_demo_data(folder, 60)
    scratch = {"model_name_or_path": str(folder / "model"), "train_from_scratch": True}
    run(write(folder, "base", **scratch, max_steps=1, fp64=False))
    for name, keys in KINDS.items():
        run(write(folder, name, **keys))
    return folder


def from_the_middle(folder: Path, kind: str, name: str, **changes: Any) -> Path:
    """The configuration of a run that goes on from another's second step."""
    shutil.copytree(folder / kind / "checkpoint-2", folder / name / "checkpoint-2")
    return write(folder, name, **(KINDS[kind] | changes))


def stored(checkpoint: Path) -> dict[str, Tensor]:
    """Weights and moments."""
    found = {}
    for part in ("model", "optimizer"):
        tensors = ShardedTensors(checkpoint / part)
        for name, info in tensors.tensors.items():
            found[name] = tensors.read(name, full_ranges(info.shape))
    return found


def log(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, Tensor]:
    files = sorted(output.glob("model*.safetensors"))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_bitwise_like_the_whole(folder: Path, kind: str) -> None:
    run(from_the_middle(folder, kind, f"{kind}_again"))
    expected, found = (stored(folder / name / "checkpoint-4") for name in (kind, f"{kind}_again"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    middle = stored(folder / kind / "checkpoint-2")
    assert not torch.equal(middle["model.norm.weight"], found["model.norm.weight"])


@pytest.fixture(scope="module")
def moved(folder: Path) -> Path:
    """Runs of two processes that go on from checkpoints of one."""
    jobs = []
    for kind, layout in MOVES:
        path = from_the_middle(folder, kind, f"{kind}_{layout}", **ELSEWHERE[layout])
        jobs.append((run, (path,)))
    run_world(2, jobs, folder / "world")
    return folder


@pytest.mark.parametrize(("kind", "layout"), MOVES)
def test_another_layout_goes_on_with_the_same_numbers(moved: Path, kind: str, layout: str) -> None:
    expected, found = (stored(moved / name / "checkpoint-4") for name in (kind, f"{kind}_{layout}"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = float(tensor.abs().max())
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-9, atol=1e-9 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    losses = [[line["loss"] for line in log(moved / name)[-2:]] for name in
              (kind, f"{kind}_{layout}")]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


def test_a_lora_run_leaves_adapters_only(folder: Path) -> None:
    output, base = folder / "lora", weights(folder / "base")
    checkpoint = output / "checkpoint-4"
    adapter = CheckpointAdapter(checkpoint)
    norms = {name for name in base if name.endswith("norm.weight")}
    factors = {
        f"{name.removesuffix('.weight')}.lora_{part}.weight"
        for name in base if "_proj" in name for part in "AB"
    }  # fmt: skip
    assert set(adapter.tensors) == norms | factors
    moments = ShardedTensors(checkpoint / "optimizer").tensors
    assert {name.rpartition(".")[0] for name in moments} == norms | factors
    trained = sum(tensor.numel() for tensor in stored(checkpoint).values()) // 3
    size = sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors"))
    assert size < 3 * 8 * trained + 2 * 40_000 < 0.2 * 3 * 8 * sum(t.numel() for t in base.values())
    names = sorted(path.name for path in output.iterdir())
    assert "adapter_config.json" in names
    assert not any(name.startswith(("model", "config")) for name in names), names
    exported = load_file(output / "adapter_model.safetensors")
    for name in adapter.tensors:
        tensor = stored(checkpoint)[name] if name == "model.norm.weight" else None
        assert f"base_model.model.{name}" in exported
        assert tensor is None or torch.equal(exported[f"base_model.model.{name}"], tensor)


def test_a_freeze_run_leaves_a_model_whose_frozen_weights_are_the_bases(folder: Path) -> None:
    before, after = weights(folder / "base"), weights(folder / "freeze")
    assert before.keys() == after.keys()
    trained = {name for name in before if ".layers.3." in name or name.endswith("norm.weight")}
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained
    moments = ShardedTensors(folder / "freeze" / "checkpoint-4" / "optimizer").tensors
    assert {name.rpartition(".")[0] for name in moments} == trained


def test_the_users_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(write(folder, "lora", **KINDS["lora"], overwrite_output_dir=False))
    text = capsys.readouterr().out
    assert "trainable params: " in text
    assert " || all params: " in text
    assert "nothing left to train" in text
    assert f"PEFT adapter      {folder / 'lora'} (adapter_config.json, safetensors)" in text


def test_training_goes_on_from_an_adapter(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its first loss is that of the merged model."""
    once = {"max_steps": 1, "save_strategy": "no", "seed": 7}
    keys = KINDS["lora"] | {"lora_dropout": 0.0}
    run(write(folder, "more", **keys, **once, adapter_name_or_path=str(folder / "lora")))
    assert f"adapter: that of {folder / 'lora'}" in capsys.readouterr().out
    arguments = ["--model", str(folder / "base"), "--adapter", str(folder / "lora")]
    assert merge([*arguments, "--to", str(folder / "merged"), "--dtype", "float64"]) == 0
    run(write(folder, "from_merged", model_name_or_path=str(folder / "merged"), **once))
    run(write(folder, "from_base", **once))
    (more,), (merged,), (base,) = (
        log(folder / name) for name in ("more", "from_merged", "from_base")
    )
    assert more["loss"] == pytest.approx(merged["loss"], rel=1e-6)  # merged sums are float32
    assert more["loss"] != pytest.approx(base["loss"], rel=1e-2)
    missing = write(folder, "missing", **keys, **once, adapter_name_or_path=str(folder / "base"))
    with pytest.raises(ValueError, match=r"base: holds no PEFT adapter"):
        run(missing)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("lora", {"finetuning_type": "full"}, r"holds an adapter, and this run trains none"),
        ("freeze", KINDS["lora"], r"holds a model, and this run trains an adapter"),
        ("lora", {"lora_rank": 4}, r"lora_rank is 3 there and 4 here"),
        ("freeze", {"finetuning_type": "full"}, r"does not fit what this run trains of the model"),
        ("freeze", {"freeze_trainable_layers": 2}, r"layers.2.* missing"),
    ],
)
def test_another_kind_of_run_is_refused(
    folder: Path, kind: str, changes: dict[str, Any], message: str, request: Any
) -> None:
    path = from_the_middle(folder, kind, f"other_{request.node.callspec.id}", **changes)
    with pytest.raises(ValueError, match=message):
        run(path)


def test_an_adapter_without_moments_is_not_resumed(folder: Path) -> None:
    keys = KINDS["lora"] | {"save_only_model": True}
    run(write(folder, "light", **keys, max_steps=2))
    assert not (folder / "light" / "checkpoint-2" / "optimizer").exists()
    with pytest.raises(ValueError, match=r"holds no optimizer .* result as adapter_name_or_path"):
        run(write(folder, "light", **keys, overwrite_output_dir=False))
