"""Where `generate` of the shipped model takes its settings from, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, pipeline
from unit.remote_models import (
    MASK_ID,
    decoding_pair,
    generated,
    load_model,
    make_stage,
    modules_cache,
    random_ids,
    sampled,
    stage_tensors,
    write_directory,
)

from megatron_sdar.architecture import load_architecture
from megatron_sdar.generation.reference_sampler import generate
from megatron_sdar.generation.sampler_config import SamplerConfig
from megatron_sdar.model.sdar import SdarStage


@pytest.fixture(scope="module", autouse=True)
def _own_modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with modules_cache(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="module")
def pair(single_process: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[SdarStage, Any]:
    return decoding_pair(tmp_path_factory.mktemp("decoding") / "tiny")


@pytest.fixture(scope="module")
def stage(pair: tuple[SdarStage, Any]) -> SdarStage:
    return pair[0]


@pytest.fixture(scope="module")
def model(pair: tuple[SdarStage, Any]) -> Any:
    return pair[1]


# Where settings come from.


def test_the_models_generation_config_says_where_to_stop(model: Any, stage: SdarStage) -> None:
    prompt = random_ids(6)
    stop = sampled(stage, prompt)[4]
    assert model.generation_config.eos_token_id == [129, 128], "from config.json"
    with pytest.MonkeyPatch.context() as patch:
        config = GenerationConfig(
            eos_token_id=stop, max_new_tokens=9, do_sample=True, temperature=3.0, top_k=20
        )
        patch.setattr(model, "generation_config", config)
        answer = generated(model, prompt, eos_token_id=None, max_new_tokens=None)
        free = generated(model, prompt, max_new_tokens=None)
    assert answer == sampled(stage, prompt, stop_token_ids=(stop,))
    assert free == sampled(stage, prompt, max_new_tokens=9), "its temperature is not for this"


def test_an_explicit_generation_config_is_followed(model: Any, stage: SdarStage) -> None:
    prompt = random_ids(6)
    settings = {"max_new_tokens": 7, "do_sample": True, "temperature": 3.0, "num_beams": 1}

    def answer(config: dict[str, Any], **changes: Any) -> list[int]:
        explicit = GenerationConfig(**config)
        given = {"max_new_tokens": None, "generation_config": explicit, "seed": 5, **changes}
        return generated(model, prompt, **given)

    drawn = sampled(stage, prompt, temperature=3.0, seed=5, max_new_tokens=7)
    greedy = sampled(stage, prompt, max_new_tokens=7)
    assert answer(settings) == drawn != greedy
    assert answer({**settings, "top_k": 1}) == answer({**settings, "top_p": 1e-9}) == greedy
    assert answer({**settings, "do_sample": False}) == greedy
    assert answer({**settings, "top_k": 1}, top_k=0) == drawn, "an argument comes first"
    assert answer(settings, temperature=0.0, do_sample=False) == greedy


def test_what_other_models_take_is_taken_where_it_is_off(model: Any) -> None:
    off = {"num_beams": 1, "use_cache": True, "stopping_criteria": [], "repetition_penalty": 1.0}
    prompt = random_ids(6)
    assert generated(model, prompt, **off, logits_processor=None) == generated(model, prompt)


def test_transformers_own_defaults_are_all_off(model: Any, stage: SdarStage) -> None:
    # Pipelines spell them out.
    defaults = GenerationConfig._get_default_generation_params()
    config = GenerationConfig(**defaults, max_new_tokens=7)
    answer = generated(model, random_ids(6), max_new_tokens=None, generation_config=config)
    assert answer == sampled(stage, random_ids(6), max_new_tokens=7)


def test_the_streamer_gets_prompt_and_blocks(model: Any) -> None:
    class Streamer:
        parts: list[list[int]] = []  # noqa: RUF012
        ended = False

        def put(self, value: Tensor) -> None:
            self.parts.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    prompt, streamer = random_ids(6), Streamer()
    answer = generated(model, prompt, streamer=streamer)
    assert streamer.parts == [prompt, answer[:2], answer[2:6], answer[6:10], answer[10:]]
    assert streamer.ended


def test_a_chat_from_template_to_text(demo: Path, single_process: None, tmp_path: Path) -> None:
    arch = load_architecture(demo / "model")
    stage, folder = make_stage(arch, 1, torch.float64), tmp_path / "chat"
    write_directory(folder, arch.to_hf_config("float64"), stage_tensors(stage))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(demo / "model" / name, folder / name)
    chat = load_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    message = [{"role": "user", "content": "What is 27 + 45?"}]
    inputs = tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    result = chat.generate(**inputs, max_new_tokens=9, eos_token_id=[])
    prompt = inputs["input_ids"][0].tolist()
    config = SamplerConfig(arch.block_size, tokenizer.mask_token_id, (), 9)
    assert result[0].tolist() == [*prompt, *generate(stage, prompt, config).ids]
    generator = pipeline("text-generation", model=chat, tokenizer=tokenizer)
    text = generator("0 1 2", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("0 1 2")


# What is refused.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": None}, "max_new_tokens is None; it must be an integer of at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be an integer of at least 1"),
        ({"block_length": 0}, "block_length is 0; it must be an integer of at least 1"),
        ({"denoising_steps": 0}, "denoising_steps is 0; it must be from 1 to block_length .4"),
        ({"denoising_steps": 5}, "denoising_steps is 5; it must be from 1 to block_length .4"),
        ({"remasking": "random"}, "remasking is 'random'; use static or dynamic"),
        ({"confidence_threshold": 1.5}, "confidence_threshold is 1.5; it is a probability"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0 or above"),
        ({"temperature": float("nan")}, "temperature is nan; it must be 0 or above"),
        ({"top_k": -1}, "top_k is -1; it must be an integer, 0 for all"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0, at most 1"),
        ({"do_sample": True, "temperature": 0}, "temperature is 0 but do_sample is True"),
        ({"do_sample": False, "temperature": 0.7}, "temperature is 0.7 but do_sample is False"),
        ({"mask_token_id": 151669}, "mask_token_id is 151669 but the model has only 131"),
        ({"seed": -1}, "seed is -1; it must be from 0"),
        ({"seed": 1, "generator": torch.Generator()}, "seed is 1 and there is a generator too"),
        ({"num_beams": 4}, "num_beams is 4, which SDAR's generate does not offer; leave it out"),
        ({"max_length": 40}, "max_length is 40, which .* give max_new_tokens instead"),
        ({"use_cache": False}, "use_cache is False, which SDAR's generate does not offer"),
        ({"generation_config": GenerationConfig(repetition_penalty=1.2)},
         "generation_config.repetition_penalty is 1.2, which SDAR's generate does not offer"),
        ({"max_new_tokens": 510}, "max_new_tokens is 510 after a prompt of 3 .* only 512"),
        ({"inputs": [[3, MASK_ID]]}, "input_ids hold the mask token .id 130"),
        ({"inputs": [[3, 131]]}, "input_ids hold id 131 but the model has only 131 token ids"),
        ({"inputs": [[3, -1]]}, "input_ids hold id -1 but the model has only 131 token ids"),
        ({"inputs": [3, 4]}, r"input_ids have shape \(2,\) and dtype torch.int64; make them"),
        ({"input_ids": [[3]]}, "inputs and input_ids: give one of them, and only one"),
        ({"inputs": None}, "inputs and input_ids: give one of them, and only one"),
        ({"attention_mask": [[1, 1]]}, r"attention_mask has shape \(1, 2\); make it that of"),
        ({"attention_mask": [[1, 1, 0]]}, "attention_mask has padding behind a token; pad on the"),
        ({"inputs": [[7, 3], [3, 3]], "pad_token_id": 7}, "attention_mask is None but some rows"),
        ({"inputs": [[3], [3]], "streamer": object()}, "streamer: it takes one prompt, not 2"),
    ],
)  # fmt: skip
def test_bad_values_are_refused(model: Any, changes: dict[str, Any], message: str) -> None:
    values = {"inputs": [[3, 4, 5]], "max_new_tokens": 4, **changes}
    for name in ("inputs", "input_ids", "attention_mask"):
        if isinstance(values.get(name), list):
            values[name] = torch.tensor(values[name])
    with pytest.raises(ValueError, match=message):
        model.generate(**values)


def test_damaged_weights_are_reported(model: Any) -> None:
    weight = model.model.norm.weight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight, "data", torch.full_like(weight, torch.nan))
        with pytest.raises(ValueError, match="logits are not finite"):
            model.generate(torch.tensor([[3]]), max_new_tokens=1)


def test_the_mask_token_is_never_produced(model: Any) -> None:
    prompt, other = random_ids(6), MASK_ID - 1
    head = model.lm_head.weight
    wanted = head.detach().clone()
    with torch.no_grad():
        hidden = model.model(torch.tensor([[*prompt, other, other]])).last_hidden_state
    wanted[MASK_ID] = hidden[0, -1] * 10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "data", wanted)
        assert MASK_ID not in generated(model, prompt)
        assert MASK_ID not in generated(model, prompt, temperature=5.0, seed=0)
        # The same logits without the exclusion would choose it: as an ordinary token it comes.
        assert MASK_ID in generated(model, prompt, mask_token_id=other)
