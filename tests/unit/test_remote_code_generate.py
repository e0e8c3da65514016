"""`generate` of the shipped model decodes what the trainer's sampler decodes, token by token."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from unit.remote_models import (
    MASK_ID,
    decoding_pair,
    generated,
    modules_cache,
    random_ids,
    sampled,
    sampler_result,
)

from megatron_sdar.model.sdar import SdarStage

METHODS: dict[str, dict[str, Any]] = {
    "one_token_per_step": {},
    "all_at_once": {"denoising_steps": 1},
    "three_steps": {"denoising_steps": 3},
    "dynamic": {"remasking": "dynamic", "confidence_threshold": 0.2},
    "dynamic_two_steps": {
        "remasking": "dynamic",
        "confidence_threshold": 0.3,
        "denoising_steps": 2,
    },
}


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


@contextmanager
def _steps(model: Any) -> Iterator[list[bool]]:
    """One entry for every forward: whether it stored its block."""
    stored: list[bool] = []
    handle = model.model.register_forward_pre_hook(
        lambda _, __, arguments: stored.append(arguments["store_kv"]), with_kwargs=True
    )
    yield stored
    handle.remove()


# The sampler's tokens.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block_length", [4, 8])
@pytest.mark.parametrize("prompt_length", [1, 8, 14])
def test_tokens_are_the_samplers(
    stage: SdarStage, model: Any, prompt_length: int, block_length: int, method: str
) -> None:
    prompt = random_ids(prompt_length, prompt_length)
    settings = {"block_length": block_length, **METHODS[method]}
    expected = sampler_result(stage, prompt, **settings)
    with _steps(model) as stored:
        answer = generated(model, prompt, **settings)
    assert answer == list(expected.ids)
    assert len(answer) == 11
    assert stored.count(False) == expected.num_forwards
    # The prompt's whole blocks at once, then every block but the last.
    num_blocks = -(-(prompt_length % block_length + 11) // block_length)
    assert stored.count(True) == (prompt_length >= block_length) + num_blocks - 1


def test_the_methods_differ(model: Any) -> None:
    # Otherwise the comparison above would prove little.
    answers = {tuple(generated(model, random_ids(14, 14), **m)) for m in METHODS.values()}
    assert len(answers) == len(METHODS)


def test_the_empty_prompt(stage: SdarStage, model: Any) -> None:
    settings = {"block_length": 1}
    assert generated(model, [], **settings) == sampled(stage, [], **settings)


def test_a_prompt_read_in_pieces(
    stage: SdarStage, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding = sys.modules[type(model).__module__.replace("modeling", "decoding")]
    monkeypatch.setattr(decoding, "_PREFILL_TOKENS", 10)
    prompt = random_ids(43)
    assert generated(model, prompt) == sampled(stage, prompt)


@pytest.mark.parametrize("place", [0, 3, 4, 7, 10])
def test_the_answer_ends_with_the_first_eos_token(stage: SdarStage, model: Any, place: int) -> None:
    prompt = random_ids(6)
    stop = sampled(stage, prompt)[place]
    answer = generated(model, prompt, eos_token_id=[999, stop])
    assert answer == sampled(stage, prompt, stop_token_ids=(stop,))
    assert answer[-1] == stop


def test_draws_are_the_samplers_too(stage: SdarStage, model: Any) -> None:
    prompt = random_ids(6)
    answer = generated(model, prompt, temperature=2.0, seed=5)
    assert answer == sampled(stage, prompt, temperature=2.0, seed=5)
    assert answer != generated(model, prompt, temperature=2.0, seed=6)
    generator = torch.Generator().manual_seed(5)
    assert answer == generated(model, prompt, temperature=2.0, generator=generator)
    torch.manual_seed(5)
    assert answer == generated(model, prompt, do_sample=True, temperature=2.0)
    at_1 = sampled(stage, prompt, temperature=1.0, seed=5)
    assert generated(model, prompt, do_sample=True, seed=5) == at_1 != answer


def test_top_k_and_top_p_cut_the_draw(model: Any) -> None:
    prompt = random_ids(7)  # one unknown token in its block
    ids = torch.tensor([[*prompt, MASK_ID]])
    with torch.no_grad():
        logits = model(ids).logits[0, 7]
    logits[MASK_ID] = -torch.inf
    probabilities, order = (logits / 3).softmax(0).sort(descending=True)

    def drawn(**cut: Any) -> set[int]:
        settings = {"temperature": 3.0, "max_new_tokens": 1, **cut}
        return {generated(model, prompt, seed=seed, **settings)[0] for seed in range(120)}

    assert len(drawn()) > 20
    assert drawn(top_k=3) == set(order[:3].tolist())
    enough = probabilities[:3].sum().item()
    assert drawn(top_p=enough - 1e-6) == set(order[:3].tolist())
    assert drawn(top_k=5, top_p=1e-9) == {int(order[0])}


# Rows of several prompts.


def _batch(prompts: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    rows = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    masks = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows), torch.tensor(masks)


@pytest.mark.parametrize("method", METHODS)
def test_each_row_of_a_batch_is_what_it_is_alone(model: Any, method: str) -> None:
    prompts = [random_ids(length, length) for length in (3, 17, 8, 16)]
    alone = [generated(model, prompt, **METHODS[method]) for prompt in prompts]
    ids, mask = _batch(prompts, pad=9)
    rows = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=11, eos_token_id=[], **METHODS[method]
    )
    assert torch.equal(rows[:, :17], ids)
    assert rows[:, 17:].tolist() == alone


@pytest.mark.parametrize(("pad", "filler"), [({}, 999), ({"pad_token_id": 77}, 77)])
def test_a_row_that_ends_early_is_padded(model: Any, pad: dict[str, int], filler: int) -> None:
    prompts = [random_ids(length, length) for length in (5, 9, 12)]
    free = [generated(model, prompt) for prompt in prompts]
    stop = next(token for token in free[0][:3] if token not in free[1])
    ids, mask = _batch(prompts, pad=9)
    rows = model.generate(
        ids, attention_mask=mask, max_new_tokens=11, eos_token_id=[999, stop], **pad
    )
    ended = free[0][: free[0].index(stop) + 1]
    assert rows[0, 12:].tolist() == ended + [filler] * (11 - len(ended))
    assert rows[1, 12:].tolist() == free[1]


def test_a_row_that_ended_does_not_slow_the_others(model: Any) -> None:
    settings, long = METHODS["dynamic"], random_ids(8, 8)
    with _steps(model) as alone:
        expected = generated(model, long, **settings)
    # The first row knows 3 tokens of its first block, and its answer ends with the fourth.
    shorts = [random_ids(3, seed) for seed in range(9)]
    stops = [generated(model, short, **settings)[0] for short in shorts]
    short, stop = next(pair for pair in zip(shorts, stops, strict=True) if pair[1] not in expected)
    ids, mask = _batch([short, long], pad=9)
    with _steps(model) as together:
        rows = model.generate(
            ids, attention_mask=mask, max_new_tokens=11, eos_token_id=stop, **settings
        )
    assert rows[0, 8:].tolist() == [stop] * 11
    assert rows[1, 8:].tolist() == expected
    assert together.count(False) == alone.count(False) < 11


def test_equal_prompts_need_no_mask(model: Any) -> None:
    prompts = [random_ids(6), random_ids(6, 1)]
    rows = model.generate(torch.tensor(prompts), max_new_tokens=11, eos_token_id=[])
    assert rows[:, 6:].tolist() == [generated(model, prompt) for prompt in prompts]
