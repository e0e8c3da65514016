"""What the finetuning keys train: rules, LLaMA-Factory's and PEFT's choices, first values."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from unit.lora_runs import LORA, lora_run, tensors
from unit.test_diffusion_config import MODEL
from unit.tiny_hf import names_and_shapes, write_model

from megatron_sdar.architecture import load_architecture
from megatron_sdar.config import ModelConfig, SdarConfig, TrainingConfig, load_config, validate
from megatron_sdar.config_sections.finetuning import FinetuningConfig
from megatron_sdar.model.finetuning import EVERYTHING
from megatron_sdar.model.weights import initialize_factors
from megatron_sdar.parallel.lora import LoraOptions
from megatron_sdar.training.finetuning import describe_finetuning, resolve_finetuning
from megatron_sdar.training.initial_weights import fill_weights

Load = Callable[[str], SdarConfig]
LORA_RUN, FREEZE_RUN = "finetuning_type: lora\n", "finetuning_type: freeze\n"


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(text: str) -> SdarConfig:
        path = tmp_path / "run.yaml"
        path.write_text(f"model_name_or_path: model\noutput_dir: out\ndataset: a\n{text}\n")
        return load_config([str(path)])

    return load


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LORA_RUN, None),
        (LORA_RUN + "lora_target: []", "lora_target is empty; use all, or names such as q_proj"),
        (LORA_RUN + "lora_target: all,q_proj", "all with ['all', 'q_proj'] beside it"),
        (LORA_RUN + "lora_target: q_proj,down_proj", None),
        (LORA_RUN + "train_from_scratch: true", "trains beside the weights of model_name_or_path"),
        ("train_from_scratch: true", None),
        (LORA_RUN + "mask_token_init: mean", "mask_token_init: mean changes embeddings that the"),
        (LORA_RUN + "mask_token_init: mean_noise\nadditional_target: lm_head", "would not hold"),
        (LORA_RUN + "mask_token_init: mean\nadditional_target: embed_tokens,lm_head", None),
        (LORA_RUN + "mask_token_init: keep", None),
        (FREEZE_RUN, None),
        (FREEZE_RUN + "freeze_trainable_modules: []", "freeze_trainable_modules is empty"),
        (FREEZE_RUN + "freeze_trainable_modules: [all, mlp]", "all with ['all', 'mlp'] beside it"),
        (FREEZE_RUN + "freeze_trainable_layers: -{more}", "but the model has {layers} layers"),
        (FREEZE_RUN + "freeze_trainable_layers: {layers}", None),
        (FREEZE_RUN + "freeze_trainable_layers: 0", "would train nothing; set one of them"),
        (FREEZE_RUN + "freeze_trainable_layers: 0\nfreeze_extra_modules: norm", None),
        # Keys of another kind do not count.
        (FREEZE_RUN + "lora_target: []", None),
        (LORA_RUN + "freeze_trainable_layers: 0", None),
    ],
)
def test_each_rule_alone(load: Load, text: str, message: str | None) -> None:
    layers = MODEL.num_hidden_layers
    sizes = {"{layers}": str(layers), "{more}": str(layers + 1)}
    for name, size in sizes.items():
        text = text.replace(name, size)
        message = message and message.replace(name, size)
    if message is None:
        validate(load(text), MODEL, 1)
        return
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        validate(load(text), MODEL, 1)
    assert len(str(raised.value).splitlines()) == 2, "one rule alone"


def test_keys_of_another_finetuning_type_are_warned_of(load: Load) -> None:
    (warning,) = load("lora_rank: 16\nlora_alpha: 8").warnings
    assert warning == (
        "lora_rank, lora_alpha: no effect with finetuning_type: full (finetuning_type: lora uses "
        "them)"
    )
    assert load(LORA_RUN + "lora_rank: 16").warnings == ()
    (warning,) = load(LORA_RUN + "freeze_extra_modules: norm").warnings
    assert warning.startswith("freeze_extra_modules: no effect with finetuning_type: lora")
    assert load(FREEZE_RUN + "freeze_extra_modules: norm").warnings == ()


def test_the_keys_of_lora_are_peft_options() -> None:
    assert resolve_finetuning(FinetuningConfig(), 4) is EVERYTHING
    lora = FinetuningConfig(finetuning_type="lora")
    found = resolve_finetuning(lora, 4)
    assert found.lora == LoraOptions(8, 16, LORA.lora.targets)
    assert found.lora.scale == 2.0
    found = resolve_finetuning(
        replace(
            lora, lora_rank=16, lora_alpha=8, lora_dropout=0.1, use_rslora=True,
            lora_target=("down_proj", "q_proj"), additional_target=("norm",),
        ),
        4,
    )  # fmt: skip
    assert found.lora == LoraOptions(16, 8, ("q_proj", "down_proj"), 0.1, True)
    assert found.lora.scale == 2.0
    assert found.extra == {"norm"}


def llamafactory_freeze(names: list[str], config: FinetuningConfig, num_layers: int) -> set[str]:
    """What LLaMA-Factory's freeze tuning trains: names that hold one of its patterns."""
    count = config.freeze_trainable_layers
    layers = range(num_layers - count, num_layers) if count > 0 else range(-count)
    patterns = [
        f".{layer}.{'' if module == 'all' else module}"
        for module in config.freeze_trainable_modules
        for layer in layers
    ]
    patterns += config.freeze_extra_modules
    return {name for name in names if any(pattern in name for pattern in patterns)}


@pytest.mark.parametrize(
    "config",
    [
        FinetuningConfig(),
        FinetuningConfig(freeze_trainable_layers=-1),
        FinetuningConfig(freeze_trainable_layers=12, freeze_trainable_modules=("mlp",)),
        FinetuningConfig(freeze_trainable_modules=("self_attn", "input_layernorm")),
        FinetuningConfig(freeze_extra_modules=("norm",)),
        FinetuningConfig(
            freeze_trainable_layers=0, freeze_extra_modules=("embed_tokens", "norm", "lm_head")
        ),
    ],
)
def test_freeze_trains_what_llamafactory_does(config: FinetuningConfig) -> None:
    names = list(names_and_shapes({"num_hidden_layers": 12, "vocab_size": 131}))
    finetuning = resolve_finetuning(replace(config, finetuning_type="freeze"), 12)
    expected = llamafactory_freeze(names, config, 12)
    assert {name for name in names if finetuning.trains(name)} == expected
    assert 0 < len(expected) < len(names)
    before = {
        layer
        for layer in range(12)
        if any("embed" in name or 0 <= place(name) < layer for name in expected)
    }
    assert {layer for layer in range(12) if finetuning.trains_before(layer)} == before
    assert all(finetuning.stores(name) for name in names)


def place(name: str) -> int:
    """The decoder layer of a parameter, or -1."""
    return int(name.split(".")[2]) if ".layers." in name else -1


@pytest.mark.parametrize("extra", [(), ("norm",), ("embed_tokens", "lm_head")])
def test_lora_trains_what_peft_does_and_counts_as_it(
    tmp_path: Path, extra: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(
        tmp_path / "qwen", tensors(), files=1, model_type="qwen3",
        architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    targets = ("q_proj", "up_proj")
    config = LoraConfig(
        r=4, target_modules=list(targets), modules_to_save=list(extra) or None,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "qwen"), config)
    capsys.readouterr()
    model.print_trainable_parameters()
    theirs = capsys.readouterr().out.strip()
    arch = load_architecture(tmp_path / "qwen")
    ours = resolve_finetuning(
        FinetuningConfig(
            finetuning_type="lora", lora_rank=4, lora_target=targets, additional_target=extra
        ),
        arch.num_hidden_layers,
    )
    # PEFT counts modules_to_save twice among all: it keeps the original beside the copy.
    own = describe_finetuning(ours, arch)
    assert own.split(" || ")[0] == theirs.split(" || ")[0]
    assert (own == theirs) == (not extra)


# First values


@pytest.mark.usefixtures("single_process")
def test_factors_start_as_pefts_do(tmp_path: Path) -> None:
    write_model(tmp_path / "base", tensors())
    run = lora_run(tmp_path / "base")
    initialize_factors(run.stages, seed=1)
    first = {name: p.full_tensor().clone() for name, p in run.stages[0].named_parameters()}
    seen = set()
    for name, factor in first.items():
        if ".lora_B." in name:
            assert not factor.any(), name
        if ".lora_A." in name:
            # kaiming_uniform with a = sqrt(5): +-1 / sqrt(in features).
            bound = factor.shape[1] ** -0.5
            assert 0.9 * bound < factor.abs().max() <= bound, name
            assert abs(factor.mean()) < 0.25 * bound, name
            seen.add(factor.flatten()[0].item())
    assert len(seen) == 28, "every factor has values of its own"
    initialize_factors(run.stages, seed=2)
    name = "model.layers.0.mlp.up_proj.lora_A.weight"
    again = dict(run.stages[0].named_parameters())[name].full_tensor()
    assert not torch.equal(again, first[name])


@pytest.mark.usefixtures("single_process")
def test_a_mask_row_that_no_adapter_would_hold_is_pointed_out(tmp_path: Path) -> None:
    write_model(
        tmp_path / "qwen", tensors(), files=1, model_type="qwen3",
        architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    run = lora_run(tmp_path / "qwen")

    def said(extra: tuple[str, ...], **changes: object) -> str:
        lines: list[str] = []
        finetuning = FinetuningConfig(finetuning_type="lora", additional_target=extra)
        config = SimpleNamespace(
            model=ModelConfig(model_name_or_path=str(tmp_path / "qwen"), **changes),
            training=TrainingConfig(output_dir="o"), finetuning=finetuning,
        )  # fmt: skip
        fill_weights(run.stages, config, run.arch, False, lines.append)  # type: ignore[arg-type]
        return "\n".join(lines)

    text = said(())
    assert "never trained <|MASK|>, and an adapter does not hold it: better set" in text
    assert "<|MASK|> row 130: kept as stored" in text
    text = said((), mask_token_init="keep")
    assert "never trained" not in text
    text = said(("embed_tokens", "lm_head"))
    assert "never trained" not in text
    assert "<|MASK|> row 130: mean of rows 0 to 129" in text
