"""LLaMA-Factory files as they stand: no real key is unknown, and each value means what it says."""

import json
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from transformers import Seq2SeqTrainingArguments

from megatron_sdar.compat import IGNORED, REFUSED, RENAMED
from megatron_sdar.compat_defaults import THEIR_DEFAULTS
from megatron_sdar.compat_mapped import MAPPED
from megatron_sdar.config import SdarConfig, dump_resolved, judge, load_config, to_flat_dict
from megatron_sdar.config_yaml import Entry

BASE = "model_name_or_path: model\noutput_dir: out\n"
KEYS: dict[str, list[str]] = json.loads(
    (Path(__file__).parent / "llamafactory_keys.json").read_text(encoding="utf-8")
)
Load = Callable[..., SdarConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(text: str = "", *overrides: str, **options: bool) -> SdarConfig:
        path = tmp_path / "run.yaml"
        path.write_text(BASE + text, encoding="utf-8")
        return load_config([str(path), *overrides], **options)

    return load


def flat(config: SdarConfig) -> dict[str, Any]:
    return to_flat_dict(config)


# No real key is unknown.


@pytest.mark.parametrize("arguments", list(KEYS))
def test_every_key_of_llamafactory_is_known(arguments: str) -> None:
    unknown = [k for k in KEYS[arguments] if judge(Entry(k, None, "here")).kind == "unknown"]
    assert unknown == []


def test_every_key_of_the_installed_transformers_is_known() -> None:
    names = [argument.name for argument in fields(Seq2SeqTrainingArguments)]
    assert len(names) > 100
    assert [n for n in names if judge(Entry(n, None, "here")).kind == "unknown"] == []


def test_defaults_are_those_of_transformers_or_stand_in_the_table(load: Load) -> None:
    ours = flat(load())
    same = {"do_train", "lr_scheduler_kwargs", "metric_for_best_model"}  # after set-up there
    given = {"output_dir"}
    shared = [f for f in fields(Seq2SeqTrainingArguments) if f.name in ours.keys() - same - given]
    assert len(shared) > 30
    other = {f.name for f in shared if f.default is not MISSING and f.default != ours[f.name]}
    assert other <= THEIR_DEFAULTS.keys()
    for key, default in THEIR_DEFAULTS.items():
        assert ours[key] not in default.values, f"{key} is the same in both"


def test_a_key_stands_in_one_table_only() -> None:
    tables = [set(IGNORED), set(REFUSED), set(RENAMED), set(MAPPED)]
    assert sum(map(len, tables)) == len(set().union(*tables))


@pytest.mark.parametrize(
    "line",
    [
        "flash_attn: fa2", "enable_liger_kernel: true", "streaming: true", "buffer_size: 1024",
        "torch_compile: true", "tf32: true", "optim: adamw_torch_fused", "data_seed: 7",
        "dataloader_drop_last: true", "group_by_length: true", "average_tokens_across_devices: 1",
        "lora_rank: 8", "galore_rank: 16", "fsdp_config: {min_num_params: 0}", "fsdp: ''",
        "save_safetensors: true", "ignore_data_skip: true", "report_to: none",
    ],
)  # fmt: skip
def test_what_cannot_change_the_result_is_accepted(load: Load, line: str) -> None:
    assert load(line + "\n") == load()


# Values that become others.


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("use_cpu: true", "device", "cpu"),
        ("no_cuda: true", "device", "cpu"),
        ("no_cuda: false", "device", "auto"),
        ("pure_bf16: true", "bf16", True),
        ("pure_bf16: true\nbf16: true", "bf16", True),
        ("fsdp: full_shard auto_wrap", "data_parallel_sharding_strategy", "optim_grads_params"),
        ("fsdp: [shard_grad_op, auto_wrap]", "data_parallel_sharding_strategy", "optim_grads"),
        ("fsdp: no_shard", "data_parallel_sharding_strategy", "no_shard"),
        ("fsdp: true", "data_parallel_sharding_strategy", "optim_grads_params"),
        ("activation_checkpointing: false", "recompute_granularity", "none"),
        ("per_gpu_train_batch_size: 3", "per_device_train_batch_size", 3),
        ("deepspeed: {zero_optimization: {stage: 3}}", "data_parallel_sharding_strategy",
         "optim_grads_params"),
        ('lr_scheduler_kwargs: \'{"min_lr": 1e-6}\'', "lr_scheduler_kwargs", {"min_lr": 1e-6}),
        ("save_strategy: epoch\nnum_train_epochs: 4", "save_steps", 0.25),
        ("save_strategy: epoch\nnum_train_epochs: 4", "save_strategy", "steps"),
        ("ddp_timeout: 180000000", "ddp_timeout", 2147483),
        ("ddp_timeout: 1800", "ddp_timeout", 1800),
        ("save_steps: 0.1", "save_steps", 0.1),
        ("resume_from_checkpoint: out/checkpoint-3", "resume_from_checkpoint", "out/checkpoint-3"),
    ],
)  # fmt: skip
def test_mapped_values(load: Load, tmp_path: Path, line: str, key: str, value: object) -> None:
    config = load(line + "\n")
    assert flat(config)[key] == value
    dump_resolved(config, tmp_path / "resolved.yaml")
    assert load_config([str(tmp_path / "resolved.yaml")]) == config


@pytest.mark.parametrize("epochs", [1, 3, 7, 10, 49, 1000])
def test_an_epoch_of_saves_never_rounds_up_past_its_end(load: Load, epochs: int) -> None:
    from megatron_sdar.training.plan import steps_between

    share = load(f"save_strategy: epoch\nnum_train_epochs: {epochs}\n").training.save_steps
    assert all(steps_between(share, epochs * length) == length for length in (1, 2, 9, 123, 4567))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("use_cpu: 3", "run.yaml:3: use_cpu: 3 is not true or false"),
        ("use_cpu: true\ndevice: cuda", "run.yaml:4: device and use_cpu contradict each other; ke"),
        ("bf16: false\npure_bf16: true", "pure_bf16 and bf16 contradict each other; keep bf16"),
        ("fsdp: some_shard", "fsdp: 'some_shard' is not one of full_shard, hybrid_shard"),
        ("fsdp: auto_wrap", "use data_parallel_sharding_strategy"),
        ("fsdp: no_shard\ndeepspeed: ds_z3_config.json", "asks for ZeRO 3"),
        ("deepspeed: {zero_optimization: {stage: 5}}", "the mapping: zero_optimization.stage must"),
        ("lr_scheduler_kwargs: '{min'", "lr_scheduler_kwargs: '{min' is not valid JSON"),
        ("save_strategy: epoch\nmax_steps: 9", "does not say how long an epoch is; set save_strat"),
        ("per_gpu_train_batch_size: 0", "per_device_train_batch_size: 0 is out of range"),
        ("output_dir2: ${output_dir}/x", "OmegaConf's interpolation is not available, write the"),
        ("default_system: 'a ${oc.env:HOME}'", "OmegaConf's interpolation is not available"),
        ("fp16: true", "fp16: True is not supported; use bf16: true"),
        ("lr_scheduler_type: reduce_lr_on_plateau", "those that follow a metric"),
        ("optim: adamw_8bit", "AdamW is the optimizer"),
    ],
)
def test_refused_values_say_what_to_do(load: Load, text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load(text + "\n")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_mapped_and_clamped_keys_are_told(load: Load) -> None:
    lines = "fsdp: [full_shard, offload]\nddp_timeout: 180000000\nstreaming: true\nsave_strategy: "
    (fsdp, streaming, *others) = load(lines + "epoch\n").warnings
    assert "run.yaml:3: fsdp is taken as data_parallel_sharding_strategy: optim_grads_par" in fsdp
    assert "offloading is not available" in fsdp
    assert "streaming is ignored: documents are tokenised once" in streaming
    assert any("180000000 s is taken as 2147483 s, 24 days" in line for line in others)
    assert any("0.333333" in line for line in others)


def test_unknown_keys_pass_only_where_it_is_asked_for(load: Load) -> None:
    with pytest.raises(ValueError, match="unknown key 'new_thing'"):
        load("new_thing: 3\n")
    config = load("new_thing: 3\n", allow_unknown=True)
    assert config == load()
    assert "new_thing is ignored: it is unknown, and ALLOW_EXTRA_ARGS is set" in config.warnings[0]
    with pytest.raises(ValueError, match="fp16"):
        load("fp16: true\n", allow_unknown=True)


# JSON


def test_json_that_is_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    text = '{\n\t"model_name_or_path": "m",\n\t"output_dir": "o",\n'
    text += '\t"default_system": "\\ud83d\\ude00"'
    path.write_text(text + "}")
    assert load_config([str(path)]).data.default_system == "\N{GRINNING FACE}"
    path.write_text(text + ',\n"lerning_rate": 3}')
    with pytest.raises(ValueError, match=r"run\.json:5: unknown key 'lerning_rate'"):
        load_config([str(path)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1,}', "not valid JSON"),
        ("[1]", "expected an object"),
        ('{"seed": 1, "seed": 2}', "'seed' is given twice; keep one"),
        ('{"x": {"a": 1, "a": 2}}', "'a' is given twice; keep one"),
    ],
)
def test_malformed_json(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"run\.json: ") as error:
        load_config([str(path)])
    assert message in str(error.value)
