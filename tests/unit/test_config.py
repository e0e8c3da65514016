"""The configuration: strict reading, LLaMA-Factory compatibility, cross-field rules, round trip."""

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_sdar.architecture import Architecture, load_architecture
from megatron_sdar.compat import IGNORED, REFUSED
from megatron_sdar.config import (
    SdarConfig,
    describe_keys,
    dump_resolved,
    load_config,
    to_flat_dict,
    validate,
)
from megatron_sdar.config_fields import SECTION_TYPES

ROOT = Path(__file__).resolve().parents[2]
BASE = "model_name_or_path: model\noutput_dir: out\n"
Load = Callable[..., SdarConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """load("key: value lines", "override=1", ...) on top of the two required keys."""

    def load(text: str = "", *overrides: str) -> SdarConfig:
        path = tmp_path / "run.yaml"
        path.write_text(BASE + text, encoding="utf-8")
        return load_config([str(path), *overrides])

    return load


def flat(config: SdarConfig) -> dict[str, Any]:
    return to_flat_dict(config)


# Reading values


def test_defaults_are_llama_factorys(load: Load) -> None:
    config = load()
    assert config.training.per_device_train_batch_size == 8
    assert config.training.num_train_epochs == 3.0
    assert config.optim.learning_rate == 5e-5
    assert config.optim.lr_scheduler_type == "linear"
    assert config.data.cutoff_len == 2048
    assert config.data.truncate_mode is None
    assert config.data.enable_thinking is True
    assert config.training.recompute_granularity == "full"
    assert config.parallel.data_parallel_sharding_strategy == "optim_grads"
    assert config.warnings == ()
    with pytest.raises(FrozenInstanceError):
        config.training.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("1E-5", 1e-5), ("1.0e-5", 1e-5), (".5", 0.5), ("3", 3.0), ("+2.", 2.0)],
)
def test_numbers_as_people_write_them(load: Load, text: str, value: float) -> None:
    from_file = load(f"learning_rate: {text}\n").optim.learning_rate
    from_argument = load("", f"learning_rate={text}").optim.learning_rate
    assert from_file == from_argument == value
    assert type(from_file) is float
    assert not isinstance(yaml.safe_load("1e-5"), float), "PyYAML alone would do"


def test_lists_and_comma_texts(load: Load) -> None:
    assert load("dataset: a, b\n").data.dataset == ("a", "b")
    assert load("dataset: [a, 'b,c']\n").data.dataset == ("a", "b,c")
    assert load("", "data_path=x,y").data.data_path == ("x", "y")
    assert load("", "dataset=123").data.dataset == ("123",)
    assert load("dataset: null\n").data.dataset == ()
    split = load("", "num_layers_per_pipeline_stage=[1, 2]").parallel
    assert split.num_layers_per_pipeline_stage == (1, 2)
    kwargs = load("", "lr_scheduler_kwargs={min_lr: 1e-6}").optim.lr_scheduler_kwargs
    assert kwargs == {"min_lr": 1e-6}


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("output_dir=007", "007"),
        ("output_dir=1e-5", "1e-5"),
        ("output_dir=a # b", "a # b"),
        ("output_dir='quoted'", "quoted"),
        ("output_dir=[half open", "[half open"),
        ("default_system=You are: kind", "You are: kind"),
        ("default_system=null", None),
        ("default_system=", None),
        ("resume_from_checkpoint=true", True),
        ("resume_from_checkpoint=out/checkpoint-3", "out/checkpoint-3"),
        ("resume_from_checkpoint=3", "3"),
        ("default_system=a=b", "a=b"),
    ],
)
def test_text_arguments_are_literal(load: Load, argument: str, value: object) -> None:
    assert flat(load("", argument))[argument.split("=")[0]] == value


def test_override_replaces_the_file(load: Load) -> None:
    assert load("seed: 1\n", "seed=2").training.seed == 2
    # A bad value that is replaced was never used.
    assert load("seed: x\n", "seed=2").training.seed == 2


def test_keys_with_dashes_and_switches(load: Load) -> None:
    guards = load("seed: 1\n", "--check-parallel", "--max_skipped-steps=7").guards
    assert guards.check_parallel is True
    assert guards.max_skipped_steps == 7
    with pytest.raises(ValueError, match=r"command line \(--seed\).*seed: True is not an integer"):
        load("", "--seed")
    for argument in ("2", "--", "--=2", "--seed "):
        with pytest.raises(ValueError, match=r"not of the form key=value"):
            load("seed: 1\n", argument)
    with pytest.raises(ValueError, match=r"command line \(--sead=2\): unknown key 'sead'"):
        load("seed: 1\n", "--sead=2")


def test_yaml_no_is_text_and_true_is_not(load: Load) -> None:
    assert load("save_strategy: no\n").training.save_strategy == "no"
    with pytest.raises(ValueError, match=r"bf16: 'yes' is not true or false"):
        load("bf16: yes\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seed: 1.5", "seed: 1.5 is not an integer"),
        ("seed: true", "seed: True is not an integer"),
        ("learning_rate: '1e-5'", "learning_rate: '1e-5' is not a finite number"),
        ("learning_rate: .inf", "learning_rate: inf is not a finite number"),
        ("learning_rate: .nan", "learning_rate: nan is not a finite number"),
        ("learning_rate: [1]", "learning_rate: [1] is not a finite number"),
        ("bf16: 1", "bf16: 1 is not true or false"),
        ("template: 3", "template: 3 is not text (put it in quotes)"),
        ("max_samples: many", "max_samples: 'many' is not an integer or null"),
        ("dataset: [a, 3]", "is not a list of names (or one text with commas)"),
        ("dataset: a,,b", "none of them empty"),
        ("num_layers_per_pipeline_stage: 1,2", "is not a list of integers or null"),
        ("lr_scheduler_kwargs: 3", "is not a mapping of plain values"),
        ("lr_scheduler_kwargs: {a: [1]}", "is not a mapping of plain values"),
        ("resume_from_checkpoint: 3", "is not true or false or text or null"),
    ],
)
def test_wrong_type_names_line_key_value_and_type(load: Load, line: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load(line + "\n")
    assert "run.yaml:3: " in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cutoff_len: 0", "cutoff_len: 0 is out of range; it must be at least 1"),
        ("learning_rate: 0", "learning_rate: 0.0 is out of range; it must be greater than 0"),
        ("warmup_ratio: 1.5", "warmup_ratio: 1.5 is out of range; it must be at most 1"),
        ("adam_beta2: 1", "adam_beta2: 1.0 is out of range; it must be less than 1"),
        ("num_layers_per_pipeline_stage: [2, 0]", "0 is out of range; it must be at least 1"),
        ("template: llama3", "template: llama3 is not supported; use qwen3 or qwen3_nothink"),
        ("lr_scheduler_type: step", "lr_scheduler_type: step is not supported; use constant or"),
        ("stage: dpo", "stage: dpo is not supported; use sft or pt; reward models"),
        ("finetuning_type: oft", "finetuning_type: oft is not supported; use full or lora or"),
        ("do_train: false", "do_train: false is not supported; use true; this program only"),
        ("context_parallel_size: 2", "context parallelism is not available yet"),
        ("expert_model_parallel_size: 2", "mixture-of-experts models are not available yet"),
        ("report_to: clearml", "report_to: clearml is not supported; use tensorboard or wandb"),
        ("report_to: [wandb, comet_ml]", "report_to: comet_ml is not supported"),
    ],
)
def test_out_of_range_says_what_is_in(load: Load, line: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load(line + "\n")
    assert "run.yaml:3: " in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("value", ["none", "null", "[]", "[none]", ""])
def test_report_to_none_in_every_spelling(load: Load, value: str) -> None:
    assert load(f"report_to: {value}\n").reporting.report_to == ()


# Reading files and arguments


def test_unknown_key_names_the_nearest(load: Load) -> None:
    with pytest.raises(ValueError) as error:
        load("lerning_rate: 1e-5\n")
    message = "unknown key 'lerning_rate'; did you mean 'learning_rate'?"
    assert str(error.value).endswith(f"run.yaml:3: {message}")
    with pytest.raises(ValueError, match=r"unknown key 'zzz'; --help lists every key"):
        load("", "zzz=1")


def test_duplicates_name_both_places(load: Load) -> None:
    with pytest.raises(ValueError, match=r"run\.yaml:5: 'seed' is already given on line 3"):
        load("seed: 1\nbf16: true\nseed: 2\n")
    with pytest.raises(ValueError, match=r"'a' is already given on line 3"):
        load("lr_scheduler_kwargs: {a: 1, a: 2}\n")
    with pytest.raises(ValueError, match=r"command line \(seed=2\): 'seed' is given twice"):
        load("", "seed=1", "seed=2")
    with pytest.raises(ValueError, match="'a' is already given"):
        load("", "lr_scheduler_kwargs={a: 1, a: 2}")


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("sed: 1\nbf16: 3\n")
    with pytest.raises(ValueError) as error:
        load_config([str(path)])
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert f"{path}: model_name_or_path is required" in lines[2]
    assert f"{path}: output_dir is required" in lines[3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found an empty file"),
        (b"# only a comment\n", "found an empty file"),
        (b"- a\n- b\n", "found a list"),
        (b"seed\n", "found 'seed'"),
        (b"seed: [1\n", "bad.yaml:2: not valid YAML"),
        (b"a: 1\n--- \nb: 2\n", "bad.yaml:2: not valid YAML"),
        (b"seed: \xff\n", "not valid YAML"),
        (b"1: 2\n", "bad.yaml:1: keys must be plain names, found '1'"),
        (b"[a]: 2\n", "bad.yaml:1: keys must be plain names, found a list"),
        (b"{a: b}: 2\n", "keys must be plain names, found a mapping"),
        (b"seed: !!python/object/apply:os.getcwd []\n", "bad.yaml:1: not valid YAML"),
        (b"a: &x {b: {c: *x}}\n", "not valid YAML"),
    ],
)
def test_malformed_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_config([str(path)])
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml: cannot read .*: No such file"):
        load_config([str(tmp_path / "none.yaml")])
    with pytest.raises(ValueError, match=r"cannot read .*: Is a directory"):
        load_config([str(tmp_path)])


@pytest.mark.parametrize("argv", [[], ["seed=1"], ["--help"]])
def test_the_file_comes_first(argv: list[str]) -> None:
    with pytest.raises(ValueError, match=r"YAML file first: CONFIG\.yaml key=value"):
        load_config(argv)


@pytest.mark.parametrize("argument", ["seed", "-seed=1", "=1", "a b=1", ""])
def test_malformed_arguments(load: Load, argument: str) -> None:
    with pytest.raises(ValueError, match="is not of the form key=value"):
        load("", argument)


def test_json_is_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"model_name_or_path": "m", "output_dir": "o", "bf16": True}))
    assert load_config([str(path)]).training.bf16 is True


# LLaMA-Factory


def test_ignored_keys_warn_with_their_reason(load: Load) -> None:
    config = load("".join(f"{key}: true\n" for key in IGNORED))
    assert len(config.warnings) == len(IGNORED)
    for line, (key, reason) in enumerate(IGNORED.items(), start=3):
        assert any(f"run.yaml:{line}: {key} is ignored: {reason}" in w for w in config.warnings)
    assert config == load()


@pytest.mark.parametrize("pattern", list(REFUSED))
def test_refused_keys_say_what_to_use(load: Load, pattern: str) -> None:
    key = pattern.replace("*", "thing")
    neutral, advice = REFUSED[pattern]
    with pytest.raises(ValueError) as error:
        load(f"{key}: 16.5\n")
    assert f"run.yaml:3: {key}: 16.5 is not supported; {advice}" in str(error.value)
    for value in (None, False, *neutral):
        assert load(f"{key}: {json.dumps(value)}\n").warnings == ()


def test_foreign_keys_are_not_ours() -> None:
    ours = set(flat(SdarConfig(**{name: _defaults(kind) for name, kind in SECTION_TYPES.items()})))
    assert not ours & set(IGNORED)
    assert not ours & set(REFUSED)


def _defaults(section: type) -> Any:
    return section(
        **{
            key.name: "x"
            for key in fields(section)
            if key.default is MISSING and key.default_factory is MISSING
        }
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "full"),
        ("recompute_granularity: none\n", "none"),
        ("disable_gradient_checkpointing: true\n", "none"),
        ("disable_gradient_checkpointing: false\n", "full"),
        ("gradient_checkpointing: false\n", "none"),
        ("gradient_checkpointing: true\n", "full"),
        ("gradient_checkpointing: false\ndisable_gradient_checkpointing: true\n", "none"),
    ],
)
def test_recompute_has_one_name_after_loading(load: Load, text: str, expected: str) -> None:
    training = load(text).training
    assert training.recompute_granularity == expected
    assert training.disable_gradient_checkpointing is False
    assert training.gradient_checkpointing is None


@pytest.mark.parametrize(
    "text",
    [
        "recompute_granularity: full\ngradient_checkpointing: false\n",
        "recompute_granularity: full\ndisable_gradient_checkpointing: true\n",
        "gradient_checkpointing: true\ndisable_gradient_checkpointing: true\n",
    ],
)
def test_recompute_contradictions(load: Load, text: str) -> None:
    with pytest.raises(ValueError, match="contradict each other; keep recompute_granularity"):
        load(text)


def test_packing_is_neat_packing(load: Load) -> None:
    assert load("packing: false\n").data.neat_packing is False
    assert load("packing: true\nneat_packing: true\n").data.neat_packing is True
    assert load("packing: null\n").data.neat_packing is True
    assert load("packing: false\n").data.packing is None
    with pytest.raises(ValueError, match=r"packing and neat_packing .* keep neat_packing"):
        load("packing: true\nneat_packing: false\n")


@pytest.mark.parametrize(
    ("stage", "strategy"),
    [(0, "no_shard"), (1, "optim_grads"), (2, "optim_grads"), (3, "optim_grads_params")],
)
def test_deepspeed_stage(load: Load, tmp_path: Path, stage: int, strategy: str) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    config = load(f"deepspeed: {path}\n")
    assert config.parallel.data_parallel_sharding_strategy == strategy
    assert config.parallel.deepspeed is None
    assert len(config.warnings) == 1
    assert strategy in config.warnings[0]
    named = load(f"deepspeed: examples/ds_z{stage}_config.json\n")
    assert named.parallel.data_parallel_sharding_strategy == strategy
    assert "no such file" in named.warnings[0]


def test_deepspeed_offload_and_absent_zero(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"a": 1}}}))
    assert "offloading" in load(f"deepspeed: {path}\n").warnings[1]
    assert "offloading" in load("deepspeed: ds_z3_offload_config.json\n").warnings[1]
    path.write_text("{}")
    assert load(f"deepspeed: {path}\n").parallel.data_parallel_sharding_strategy == "no_shard"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "zero_optimization.stage must be 0, 1, 2 or 3, found None"),
        ('{"zero_optimization": 3}', "must be 0, 1, 2 or 3, found None"),
        ('{"zero_optimization": {"stage": "auto"}}', "found 'auto'"),
        ('{"zero_optimization": {"stage": 4}}', "found 4"),
        ('{"zero_optimization": {"stage": true}}', "found True"),
    ],
)
def test_deepspeed_malformed(load: Load, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "zero.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"run\.yaml: deepspeed: ") as error:
        load(f"deepspeed: {path}\n")
    assert message in str(error.value)


def test_deepspeed_contradiction_and_unknown_name(load: Load) -> None:
    text = "deepspeed: ds_z3_config.json\ndata_parallel_sharding_strategy: no_shard\n"
    with pytest.raises(ValueError, match=r"asks for ZeRO 3 .* contradicts .*: no_shard"):
        load(text)
    with pytest.raises(ValueError, match=r"mine\.json does not exist and its name is not"):
        load("deepspeed: mine.json\n")


def test_warnings_of_keys_that_do_nothing(load: Load) -> None:
    assert "no model code is executed" in load("trust_remote_code: true\n").warnings[0]
    constant = load("lr_scheduler_type: constant\nwarmup_ratio: 0.1\n").warnings
    assert "constant_with_warmup uses them" in constant[0]
    assert load("lr_scheduler_type: constant\n").warnings == ()


# Writing


def test_round_trip_of_every_shipped_config(tmp_path: Path) -> None:
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert {path.name for path in paths} >= {"tiny_cpu.yaml", "gsm8k_cpu.yaml"}
    for path in paths:
        config = load_config([str(path)])
        assert config.warnings == ()
        dump_resolved(config, tmp_path / path.name)
        assert load_config([str(tmp_path / path.name)]) == config


_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
_AWKWARD = st.sampled_from(["1e-5", "no", "null", "true", "~", "1:30", "012", "a: b", " x ", "#"])


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    text=_TEXT | _AWKWARD,
    system=st.none() | _TEXT | _AWKWARD,
    names=st.lists(_TEXT.filter(bool) | _AWKWARD, max_size=3),
    rate=st.floats(min_value=1e-300, allow_infinity=False),
    eps=st.floats(1e-300, 0.999),
    seed=st.integers(0, 10**18),
    resume=st.none() | st.booleans() | _TEXT,
    kwargs=st.dictionaries(_TEXT, st.none() | st.booleans() | st.integers() | _TEXT, max_size=2),
)
def test_round_trip(
    tmp_path: Path,
    text: str,
    system: str | None,
    names: list[str],
    rate: float,
    eps: float,
    seed: int,
    resume: bool | str | None,
    kwargs: Mapping[str, Any],
) -> None:
    (tmp_path / "base.yaml").write_text(BASE)
    config = load_config([str(tmp_path / "base.yaml")])
    config = replace(
        config,
        model=replace(config.model, model_name_or_path=text),
        data=replace(config.data, default_system=system, dataset=tuple(names)),
        diffusion=replace(config.diffusion, noise_eps=eps),
        parallel=replace(config.parallel, num_layers_per_pipeline_stage=(1, seed + 1)),
        optim=replace(config.optim, learning_rate=rate, lr_scheduler_kwargs=kwargs),
        training=replace(config.training, seed=seed, resume_from_checkpoint=resume),
    )
    dump_resolved(config, tmp_path / "resolved.yaml")
    assert load_config([str(tmp_path / "resolved.yaml")]) == config
    # Readers of YAML 1.1 see the same text and numbers.
    assert yaml.safe_load((tmp_path / "resolved.yaml").read_text()) == flat(config)


@pytest.mark.parametrize("code", [0x09, 0x0A, 0x0D, 0x85, 0xA0, 0x2028, 0x2029, 0xFEFF, 0x1F600])
def test_round_trip_of_characters_that_yaml_folds(load: Load, tmp_path: Path, code: int) -> None:
    config = load()
    config = replace(config, data=replace(config.data, default_system=f"a{chr(code)}b"))
    dump_resolved(config, tmp_path / "resolved.yaml")
    assert load_config([str(tmp_path / "resolved.yaml")]) == config


def test_resolved_file_stands_alone(load: Load, tmp_path: Path) -> None:
    zero = tmp_path / "zero.json"
    zero.write_text('{"zero_optimization": {"stage": 3}}')
    text = f"deepspeed: {zero}\ngradient_checkpointing: false\npacking: false\n"
    config = load(text)
    dump_resolved(config, tmp_path / "resolved.yaml")
    zero.unlink()
    assert load_config([str(tmp_path / "resolved.yaml")]) == config


def test_description_lists_every_key_with_its_default(load: Load) -> None:
    text = describe_keys()
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 118
    for section in SECTION_TYPES.values():
        for key in fields(section):
            assert key.metadata["help"], key.name
            shown = "(required)" if key.name in ("model_name_or_path", "output_dir") else "= "
            assert f"\n  {key.name} {shown}" in text
    assert "\n  learning_rate = 5e-05 " in text
    assert "(cut | drop | split)" in " ".join(text.split())
    assert set(IGNORED) <= set(text.replace(",", " ").replace(":", " ").split())


# Rules between values

MODEL = Architecture(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=False,
    max_position_embeddings=4096,
    block_size=4,
    mask_token_id=999,
)


def violations(config: SdarConfig, model: Architecture = MODEL, world_size: int = 1) -> list[str]:
    with pytest.raises(ValueError, match="the configuration does not fit:") as error:
        validate(config, model, world_size)
    return str(error.value).splitlines()[1:]


def test_what_fits_passes(load: Load) -> None:
    validate(load("dataset: a\n"), MODEL, 1)
    validate(load("data_path: a\nblock_length: 4\n"), replace(MODEL, block_size=None), 7)
    for tp in (1, 2, 4):  # 4 > 2 key/value heads: each is replicated
        text = f"dataset: a\ntensor_model_parallel_size: {tp}\npipeline_model_parallel_size: 2\n"
        validate(load(text + "virtual_pipeline_model_parallel_size: 2\n"), MODEL, 4 * tp)
    split = "pipeline_model_parallel_size: 2\nnum_layers_per_pipeline_stage: [3, 1]\n"
    validate(load("dataset: a\n" + split), MODEL, 2)


@pytest.mark.parametrize(
    ("text", "change", "world_size", "message"),
    [
        ("data_path: b", {}, 1, "exactly one of dataset and data_path must be given, both are"),
        ("dataset: null", {}, 1, "exactly one of dataset and data_path must be given, neither is"),
        ("mask_history: true\ntrain_on_prompt: true", {}, 1, "exclude each other"),
        ("block_length: 8", {}, 1, "block_length=8 but config.json has block_size=4; make them"),
        ("", {"block_size": None}, 1, "block_length is not given and config.json has no block_si"),
        ("cutoff_len: 1023", {}, 1, "1023 is not a multiple of block_length=4; use 1020 or 1024"),
        ("cutoff_len: 3", {}, 1, "cutoff_len=3 is not a multiple of block_length=4; use 4"),
        ("", {"mask_token_id": None}, 1, "mask_token_id is unknown: config.json has none"),
        ("", {"mask_token_id": 1000}, 1, "outside the vocabulary of 1000; raise vocab_size in "
         "config.json to at least 1001"),
        ("tensor_model_parallel_size: 3\nsequence_parallel: false",
         {"vocab_size": 1152, "num_key_value_heads": 1}, 3,
         "=3 does not divide num_attention_heads=4; sizes that fit this model: 1, 2, 4"),
        ("tensor_model_parallel_size: 4", {"intermediate_size": 190}, 4,
         "=4 does not divide intermediate_size=190; sizes that fit this model: 1, 2"),
        ("tensor_model_parallel_size: 4",
         {"num_attention_heads": 12, "num_key_value_heads": 6}, 4,
         "neither divides num_key_value_heads=6 nor is a multiple of it; "
         "sizes that fit this model: 1, 2, 3, 6, 12"),
        ("tensor_model_parallel_size: 2\nmake_vocab_size_divisible_by: 3", {"vocab_size": 1005}, 2,
         "padded vocabulary of 1005 is not a multiple of tensor_model_parallel_size=2; "
         "set make_vocab_size_divisible_by: 6"),
        ("tensor_model_parallel_size: 4\nper_device_train_batch_size: 1\ncutoff_len: 6",
         {"block_size": 2, "num_key_value_heads": 4, "vocab_size": 1024},
         4, ""),
        ("tensor_model_parallel_size: 4\nper_device_train_batch_size: 1\ncutoff_len: 7",
         {"block_size": 7}, 4, "= 14 positions must divide by tensor_model_parallel_size=4; "
         "make cutoff_len a multiple of 4 or set sequence_parallel: false"),
        ("tensor_model_parallel_size: 4\nper_device_train_batch_size: 1\ncutoff_len: 7\n"
         "sequence_parallel: false", {"block_size": 7}, 4, ""),
        ("virtual_pipeline_model_parallel_size: 2", {}, 1,
         "virtual_pipeline_model_parallel_size=2 needs pipeline_model_parallel_size > 1"),
        ("pipeline_model_parallel_size: 3\nvirtual_pipeline_model_parallel_size: 2", {}, 3,
         "6 chunks need as many layers, the model has 4; use at most 4 chunks"),
        ("pipeline_model_parallel_size: 2\nnum_layers_per_pipeline_stage: [1, 1, 2]", {}, 2,
         "must have 2 entries (stages x chunks) that sum to 4 layers; it has 3 that sum to 4"),
        ("pipeline_model_parallel_size: 2\nnum_layers_per_pipeline_stage: [1, 2]", {}, 2,
         "it has 2 that sum to 3"),
        ("tensor_model_parallel_size: 2\npipeline_model_parallel_size: 2", {}, 6,
         "6 processes cannot be divided into groups of tensor 2 x pipeline 2 x context 1 = 4; "
         "launch 4 or 8 (any multiple of 4)"),
        ("tensor_model_parallel_size: 2", {}, 1, "= 2; launch 2 (any multiple of 2)"),
        ("semantics: paper\nnoisy_views: 2", {}, 1, "noisy_views=2 needs semantics=exact; the pa"),
        ("semantics: paper\nrow_length: 64", {}, 1, "row_length=64 needs semantics=exact; the pa"),
        ("row_length: 66\nblock_length: 4", {}, 1, "row_length=66 is not a multiple of block_len"),
        ("complementary_views: true", {}, 1, "needs at least two views, found noisy_views=1; us"),
        ("complementary_views: true\nnoisy_views: 3", {}, 1, ""),
        ("tensor_model_parallel_size: 2\nper_device_train_batch_size: 1\nrow_length: 21\n"
         "block_length: 7\ncutoff_len: 14", {"block_size": 7}, 2,
         "a row's 21 positions x per_device_train_batch_size = 21 positions must divide"),
        ("bf16: true\nfp64: true", {}, 1, "bf16 and fp64 exclude each other"),
        ("max_steps: 0", {}, 1, "max_steps=0 would train nothing"),
        ("save_steps: 2.5", {}, 1, "save_steps=2.5 must be a whole number of steps, or a frac"),
        ("logging_steps: 1.5", {}, 1, "logging_steps=1.5 must be a whole number of steps"),
        ("logging_steps: 0.5\nsave_steps: 1.0", {}, 1, ""),
        ("cutoff_len: 4096", {}, 1, ""),
        ("mix_strategy: interleave_under", {}, 1, "needs several datasets, 1 is given"),
        ("dataset: a,b\nmix_strategy: interleave_over\ninterleave_probs: 0.5,0.5", {}, 1, ""),
        ("dataset: a,b\ninterleave_probs: 0.5,0.5", {}, 1, "with mix_strategy=concat; set mix_st"),
        ("dataset: a,b\nmix_strategy: interleave_over\ninterleave_probs: half", {}, 1,
         "interleave_probs: 'half' is not a list of numbers such as 0.7,0.3"),
        ("dataset: a,b\nmix_strategy: interleave_over\ninterleave_probs: 0.5,0.3,0.2", {}, 1,
         "interleave_probs: [0.5, 0.3, 0.2] are 3 weights for 2 datasets"),
        ("dataset: a,b\nmix_strategy: blend\nmax_steps: 9", {}, 1,
         "blend and blend_weights go together, found mix_strategy=blend and blend_weights=None"),
        ("dataset: a,b\nblend_weights: 1,1", {}, 1, "found mix_strategy=concat and blend_weights"),
        ("dataset: a,b\nmix_strategy: blend\nblend_weights: 1,1", {}, 1, "set max_steps"),
        ("dataset: a,b\nmix_strategy: blend\nmax_steps: 9\nblend_weights: 3,1; 1,1 @5", {}, 1,
         ""),
        ("dataset: a,b\nmix_strategy: blend\nmax_steps: 9\nblend_weights: 3,1; 1 @5", {}, 1,
         "blend_weights: [1.0] are 1 weights for 2 datasets"),
        ("dataset: a,b\nmix_strategy: blend\nmax_steps: 9\nblend_weights: 3,1; 1,1 @x", {}, 1,
         "'1,1 @x' must end in the step its weights begin at"),
        ("dataset: a,b\nmix_strategy: blend\nmax_steps: 9\nblend_weights: 3,1; 1,1", {}, 1,
         "the weights begin at steps [0, 0]; the first must begin at 0"),
        ("dataset: a,b\nmix_strategy: interleave_over\ninterleave_probs: 0.7,0.7", {}, 1,
         "interleave_probs: [0.7, 0.7] must be greater than 0 and sum to 1, found 1.4"),
        ("dataset: a,b\nmix_strategy: interleave_over\ninterleave_probs: -1,2", {}, 1,
         "must be finite numbers that are not negative"),
        ("dataset: a,b\nmix_strategy: blend\nmax_steps: 9\nblend_weights: nan,1", {}, 1,
         "must be finite numbers that are not negative"),
        ("dataset: a,b\nmix_strategy: blend\nmax_steps: 9\nblend_weights: 1,1; 0,0 @3", {}, 1,
         "blend_weights: [0.0, 0.0] take rows from no dataset"),
        ("dataset: a,b\nmix_strategy: blend\nmax_steps: 9\nblend_weights: 1,0", {}, 1, ""),
        ("val_size: 2.5", {}, 1, "val_size=2.5 must be a whole number of documents"),
        ("val_size: 0.1", {}, 1, ""),
        ("packing_algorithm: llamafactory\ntruncate_mode: split", {}, 1, "not split"),
        ("packing_algorithm: llamafactory\nstage: pt", {}, 1, "the published pt stage cannot run"),
        ("cutoff_len: 4100", {}, 1, "cutoff_len=4100 exceeds the model's max_position_embeddings"),
    ],
)  # fmt: skip
def test_each_rule_alone(
    load: Load, text: str, change: dict[str, Any], world_size: int, message: str
) -> None:
    has_dataset = text.startswith("dataset")
    config = load(("" if has_dataset else "dataset: a\n") + text + "\n")
    model = replace(MODEL, **change)
    if not message:  # the neighbour that must pass
        validate(config, model, world_size)
        return
    found = violations(config, model, world_size)
    assert len(found) == 1, found
    assert message in found[0]


def test_all_violations_come_at_once(load: Load) -> None:
    text = "bf16: true\nfp64: true\ncutoff_len: 7\ntensor_model_parallel_size: 3\n"
    found = violations(load(text), world_size=4)
    assert len(found) == 8
    for part in ("dataset", "cutoff_len", "heads", "key_value", "padded", "positions", "processes"):
        assert any(part in line for line in found), part


def test_values_set_in_code_are_checked_too(load: Load) -> None:
    config = load("dataset: a\n")
    config = replace(
        config,
        parallel=replace(config.parallel, tensor_model_parallel_size=0, context_parallel_size=2),
        model=replace(config.model, make_vocab_size_divisible_by=0),
        data=replace(config.data, truncate_mode="squeeze"),
    )
    found = violations(config)
    assert len(found) == 4
    assert "truncate_mode: squeeze is not supported; use cut or drop or split" in found


def test_shipped_configs_fit_the_models_they_name() -> None:
    gsm8k = load_config([str(ROOT / "configs" / "gsm8k_cpu.yaml")])
    model = load_architecture(ROOT / gsm8k.model.model_name_or_path)
    validate(gsm8k, model, 1)
    two = replace(gsm8k, parallel=replace(gsm8k.parallel, tensor_model_parallel_size=2))
    validate(two, model, 2)
    entry = json.loads((ROOT / "configs" / "dataset_info.json").read_text())["gsm8k"]
    assert entry["columns"] == {"prompt": "question", "response": "answer"}

    tiny = load_config([str(ROOT / "configs" / "tiny_cpu.yaml")])
    demo = replace(model, vocab_size=600, mask_token_id=599)
    validate(tiny, demo, 4)
    validate(tiny, demo, 8)


def test_gsm8k_entry_points_at_the_shared_data() -> None:
    info = ROOT / "configs" / "dataset_info.json"
    path = info.parent / json.loads(info.read_text())["gsm8k"]["file_name"]
    if not path.exists():
        pytest.skip("needs shared/data/gsm8k beside the repository")
    record = json.loads(path.open(encoding="utf-8").readline())
    assert set(record) == {"question", "answer"}
