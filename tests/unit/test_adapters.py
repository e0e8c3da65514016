"""Adapters on disk: PEFT computes with them what the trainer does; checkpoints that hold them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from unit.lora_runs import LORA, SOME, assert_equal_logits, logits, lora_run, tensors
from unit.remote_models import load_model, modules_cache
from unit.tiny_hf import resign, write_model

from megatron_sdar.checkpoint import adapter_export
from megatron_sdar.checkpoint.adapter_config import read_adapter_config
from megatron_sdar.checkpoint.adapter_export import export_adapter
from megatron_sdar.checkpoint.adapters import CheckpointAdapter, PeftAdapter
from megatron_sdar.checkpoint.conversion import ConversionRequest
from megatron_sdar.checkpoint.conversion import convert as convert_request
from megatron_sdar.checkpoint.hf_import import load_adapter
from megatron_sdar.checkpoint.native import load_checkpoint
from megatron_sdar.checkpoint.source_detection import open_source
from megatron_sdar.model.finetuning import Finetuning
from megatron_sdar.training.step import trained_parameters
from tools.convert_checkpoint import main as convert

pytestmark = pytest.mark.usefixtures("single_process")

FILE = "adapter_model.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_model(tmp_path / "base", tensors())
    return tmp_path / "base"


# With PEFT


@pytest.mark.parametrize("finetuning", [LORA, SOME], ids=["lora", "some"])
def test_peft_on_sdar_computes_the_trainers_logits(
    tmp_path: Path, base: Path, finetuning: Finetuning
) -> None:
    run = lora_run(base, finetuning)
    checkpoint = run.save(tmp_path / "run")
    assert convert(["--from", str(base), "--to", str(tmp_path / "sdar"), "--format", "hf"]) == 0
    arguments = ["--from", str(checkpoint), "--to", str(tmp_path / "adapter"), "--format", "hf"]
    assert convert(arguments) == 0
    files = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert files == [
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "merges.txt",
        "tokenizer_config.json", "vocab.json",
    ]  # fmt: skip
    with modules_cache(tmp_path / "cache"):
        plain = load_model(tmp_path / "sdar")
        before = logits(plain)
        adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter")
        assert_equal_logits(logits(adapted), run)
    assert not torch.allclose(before, logits(adapted), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("tied", [False, True])
def test_peft_on_qwen3_computes_the_trainers_logits(tmp_path: Path, tied: bool) -> None:
    weights = tensors()
    if tied:
        del weights["lm_head.weight"]
    write_model(
        tmp_path / "qwen", weights, files=1, model_type="qwen3", tie_word_embeddings=tied,
        block_size=1, architectures=["Qwen3ForCausalLM"], bos_token_id=None,
    )  # fmt: skip
    run = lora_run(tmp_path / "qwen")
    export_adapter(run.save(tmp_path / "run"), tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen", attn_implementation="eager")
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert_equal_logits(logits(adapted), run, block_length=1)


def test_names_and_files_are_those_that_peft_writes(tmp_path: Path, base: Path) -> None:
    run = lora_run(base, SOME)
    export_adapter(run.save(tmp_path / "run"), tmp_path / "ours")
    write_model(
        tmp_path / "qwen", tensors(), files=1, model_type="qwen3", block_size=None,
        architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    config = LoraConfig(
        r=2, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True,
        modules_to_save=["embed_tokens", "norm", "lm_head"], task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "qwen"), config)
    theirs.save_pretrained(tmp_path / "theirs")
    names = [
        {name: tensor.shape for name, tensor in load_file(folder / FILE).items()}
        for folder in (tmp_path / "ours", tmp_path / "theirs")
    ]  # fmt: skip
    assert names[0] == names[1]
    written = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    own = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    for key, value in own.items():
        if key == "base_model_name_or_path":
            assert value == str(base)
        elif isinstance(value, list):
            assert set(written[key]) == set(value), key
        else:
            assert written[key] == value, key
    # And what PEFT wrote can be gone on from.
    load_adapter(run.stages, run.arch, tmp_path / "theirs")
    assert read_adapter_config(tmp_path / "theirs").finetuning == SOME


# Checkpoints


def test_a_checkpoint_holds_the_adapter_alone(tmp_path: Path, base: Path) -> None:
    run = lora_run(base)
    checkpoint = run.save(tmp_path / "run")
    adapter = CheckpointAdapter(checkpoint)
    assert set(adapter.tensors) == set(trained_parameters(run.stages))
    stored = sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors"))
    values = sum(p.numel() for p in trained_parameters(run.stages).values())
    assert stored < 3 * 4 * values + 2 * 60_000  # weights and two moments, and headers
    with pytest.raises(ValueError, match=r"--format native does not go with .*an adapter"):
        convert_request(ConversionRequest(checkpoint, tmp_path / "native", "native"))


def test_a_run_goes_on_only_beside_the_model_it_began_with(tmp_path: Path, base: Path) -> None:
    checkpoint = lora_run(base, seed=5).save(tmp_path / "run")
    moved = tmp_path / "moved"
    write_model(moved, tensors(), files=1)
    again = lora_run(moved, seed=6)
    state = load_checkpoint(checkpoint, again.stages, again.optimizer, adapter=again.origin)
    assert state["step"] == 3
    restored = {n: p.full_tensor() for n, p in trained_parameters(again.stages).items()}
    for name, parameter in trained_parameters(lora_run(base, seed=5).stages).items():
        assert torch.equal(restored[name], parameter.full_tensor()), name

    changed = tensors()
    changed["model.layers.2.self_attn.q_proj.weight"][0, 0] += 0.5
    write_model(tmp_path / "other", changed)
    other = lora_run(tmp_path / "other")
    with pytest.raises(ValueError, match=r"trained beside .*base, whose weights are not those of"):
        load_checkpoint(checkpoint, other.stages, other.optimizer, adapter=other.origin)


def test_other_adapters_and_other_kinds_of_run_are_refused(tmp_path: Path, base: Path) -> None:
    run, some = lora_run(base), lora_run(base, SOME)
    checkpoint = run.save(tmp_path / "run")
    message = r"lora_rank is 3 there and 2 here; lora_alpha is 7 there and 5 here; lora_target"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(checkpoint, some.stages, some.optimizer, adapter=some.origin)
    with pytest.raises(ValueError, match=r"holds an adapter, and this run trains none"):
        load_checkpoint(checkpoint, run.stages, run.optimizer)
    export_adapter(checkpoint, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter_name_or_path: .* lora_rank is 3 there and 2"):
        load_adapter(some.stages, some.arch, tmp_path / "adapter")


def test_a_checkpoint_whose_base_is_gone_or_changed_is_no_model(tmp_path: Path, base: Path) -> None:
    checkpoint = lora_run(base).save(tmp_path / "run")
    write_model(base, {name: tensor * 2 for name, tensor in tensors().items()})
    with pytest.raises(ValueError, match=r"but another model lies there now"):
        open_source(checkpoint, None, None)
    shutil.rmtree(base)
    with pytest.raises(ValueError, match=r"holds an adapter for .*base, where no model is"):
        open_source(checkpoint, None, None)


# Foreign and damaged files


def test_an_export_into_an_output_dir_replaces_an_older_one(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "run"
    export_adapter(lora_run(base, seed=5).save(out, 3), out, into_existing=True)
    first = load_file(out / "adapter_model.safetensors")
    run = lora_run(base, seed=6)
    export_adapter(run.save(out, 4), out, into_existing=True)
    second = PeftAdapter(out, run.arch)
    assert not (out / ".export.tmp").exists()
    assert len(second.tensors) == len(first)
    name = "model.layers.0.mlp.up_proj.lora_B.weight"
    assert not torch.equal(
        first[f"base_model.model.{name}"], second.read(name, (slice(0, 64), slice(0, 3)))
    )
    with pytest.raises(ValueError, match=r"holds the source .*checkpoint-4"):
        export_adapter(out / "checkpoint-4", out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, r"peft_type is 'IA3'; only LORA"),
        ({"use_dora": True}, r"use_dora: True is not supported"),
        ({"bias": "all"}, r"bias: 'all' is not supported"),
        ({"rank_pattern": {"q_proj": 4}}, r"rank_pattern: .* is not supported"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights: 'pissa' is not supported"),
        ({"a_key_of_tomorrow": 1}, r"a_key_of_tomorrow: 1 is not supported; only plain LoRA is"),
        ({"r": 0}, r"r is 0; it must be a positive integer"),
        ({"lora_alpha": "x"}, r"lora_alpha is 'x'; it must be a positive number"),
        ({"target_modules": []}, r"target_modules is empty"),
        ({"target_modules": ["q_proj", "wq"]}, r"target_modules has 'wq'; known are q_proj"),
        ({"target_modules": ".*_proj"}, r"target_modules has '.*_proj'"),
        ({"modules_to_save": ["score"]}, r"modules_to_save has 'score'"),
    ],
)
def test_each_problem_of_a_configuration(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    content = {"peft_type": "LORA", "r": 3, "lora_alpha": 7, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    assert read_adapter_config(tmp_path).lora.targets == ("q_proj",)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=message):
        read_adapter_config(tmp_path)


def _drop(weights: dict[str, torch.Tensor]) -> None:
    del weights["base_model.model.model.layers.2.mlp.up_proj.lora_A.weight"]


def _transpose(weights: dict[str, torch.Tensor]) -> None:
    name = "base_model.model.model.layers.2.mlp.up_proj.lora_A.weight"
    weights[name] = weights[name].T.contiguous()


def _add(weights: dict[str, torch.Tensor]) -> None:
    weights["score.weight"] = torch.ones(2)


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (_drop, r"layers.2.mlp.up_proj.lora_A.weight: missing"),
        (_transpose, r"has shape \[48, 3\], expected \[3, 48\]"),
        (_add, r"foreign tensor names"),
    ],
)
def test_an_adapter_with_other_tensors_is_refused(
    tmp_path: Path,
    base: Path,
    tamper: Callable[[dict[str, torch.Tensor]], None],
    message: str,
) -> None:
    run = lora_run(base)
    export_adapter(run.save(tmp_path / "run"), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    tamper(weights)
    save_file(weights, path)
    with pytest.raises(ValueError, match=message):
        PeftAdapter(tmp_path / "adapter", run.arch)
    path.unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors"):
        PeftAdapter(tmp_path / "adapter", run.arch)


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path, base: Path) -> None:
    checkpoint = lora_run(base).save(tmp_path / "run")
    path = checkpoint / "hf" / "adapter_config.json"
    path.write_bytes(path.read_bytes().replace(b'"r": 3', b'"r": 5'))
    with pytest.raises(ValueError, match=r"adapter_config.json: damaged"):
        export_adapter(checkpoint, tmp_path / "adapter")


def _change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("hf/adapter_config.json", {"r": 5}, r"does not fit hf/:\n.*expected \[5, 48\]"),
        ("hf/config.json", {"vocab_size": 140}, r"too few rows of the vocabulary"),
        ("base_model.json", {"name": "x"}, r"base_model.json: not the description of a model"),
    ],
)
def test_parts_of_a_checkpoint_that_contradict_each_other(
    tmp_path: Path, base: Path, file: str, changes: dict[str, object], message: str
) -> None:
    checkpoint = lora_run(base, SOME).save(tmp_path / "run")
    _change_json(checkpoint / file, **changes)
    resign(checkpoint)
    with pytest.raises(ValueError, match=message):
        open_source(checkpoint, None, None)


def test_an_export_that_is_not_what_was_to_be_written_does_not_appear(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = lora_run(base).save(tmp_path / "run")
    times = iter(range(10**6))  # what is read again to be compared is not what was written
    monkeypatch.setattr(adapter_export, "cast", lambda name, values, dtype: values + next(times))
    with pytest.raises(ValueError, match=r"lora_A.weight differs from the source in rows 0 to 2"):
        export_adapter(checkpoint, tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]
