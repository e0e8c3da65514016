"""Cached, batched decoding gives the reference sampler's tokens, each prompt as if alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from distributed.layouts import Layout

from megatron_sdar.generation import decoder
from megatron_sdar.generation.choice import candidates, revealed
from megatron_sdar.generation.decoder import generate_batch, generate_over_data_parallel
from megatron_sdar.generation.reference_sampler import generate
from megatron_sdar.generation.sampler_config import GenerationResult, SamplerConfig
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.model.partition import build_stages
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.model.weights import initialize, materialize
from megatron_sdar.parallel.mesh import ParallelMesh, build_mesh

ARCH = replace(Layout("decoder").arch, num_hidden_layers=2, initializer_range=0.3)
MASK_ID = 130
# Every offset in blocks of 8 (and of 4), the empty prompt, and several whole blocks.
LENGTHS = (9, 0, 3, 16, 5, 12, 1, 7, 2, 6, 4, 23)
METHODS: dict[str, dict[str, Any]] = {
    "one_token_per_step": {},
    "three_steps": {"denoising_steps": 3},
    "dynamic": {"remasking": "dynamic", "confidence_threshold": 0.2},
    "dynamic_two_steps": {
        "remasking": "dynamic",
        "confidence_threshold": 0.2,
        "denoising_steps": 2,
    },
    "drawn": {"temperature": 1.3, "seed": 4},
    "drawn_cut": {"temperature": 2.0, "top_k": 9, "top_p": 0.8, "seed": 5},
    "drawn_dynamic": {
        "temperature": 1.3,
        "top_p": 0.9,
        "remasking": "dynamic",
        "confidence_threshold": 0.2,
    },
}


@pytest.fixture(scope="module")
def mesh(single_process: None) -> ParallelMesh:
    return build_mesh(torch.device("cpu"), 1, 1)


def _stage(mesh: ParallelMesh, dtype: torch.dtype = torch.float64, trim: bool = True) -> SdarStage:
    options = ModelOptions(136, dtype, False, "full", "tiled", trim_last_layer=trim)
    (stage,) = build_stages(ARCH, mesh, options)
    materialize([stage], mesh.device)
    initialize([stage], 5)
    assert isinstance(stage, SdarStage)
    return stage


@pytest.fixture(scope="module")
def stage(mesh: ParallelMesh) -> SdarStage:
    return _stage(mesh)


def _config(block_length: int = 4, **changes: Any) -> SamplerConfig:
    settings = {"mask_token_id": MASK_ID, "stop_token_ids": (), "max_new_tokens": 11}
    return SamplerConfig(**{"block_length": block_length, **settings, **changes})


def _prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, MASK_ID, size=length).tolist() for length in lengths]


def _alone(
    stage: SdarStage, prompts: list[list[int]], config: SamplerConfig
) -> list[GenerationResult]:
    return [
        generate(stage, prompt, config, request_id=index) for index, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block_length", [4, 8])
def test_a_batch_is_the_reference_of_each(
    stage: SdarStage, mesh: ParallelMesh, block_length: int, method: str
) -> None:
    config, prompts = _config(block_length, **METHODS[method]), _prompts()
    assert generate_batch([stage], mesh, prompts, config) == _alone(stage, prompts, config)


@pytest.mark.parametrize("method", ["one_token_per_step", "drawn"])
def test_blocks_of_one_token(stage: SdarStage, mesh: ParallelMesh, method: str) -> None:
    config, prompts = _config(1, **METHODS[method]), _prompts((0, 1, 6))
    assert generate_batch([stage], mesh, prompts, config) == _alone(stage, prompts, config)


@pytest.mark.parametrize("trim", [True, False])
def test_in_float32_too(mesh: ParallelMesh, trim: bool) -> None:
    stage = _stage(mesh, torch.float32, trim)
    config, prompts = _config(8, denoising_steps=3), _prompts()
    assert generate_batch([stage], mesh, prompts, config) == _alone(stage, prompts, config)


def test_the_methods_differ(stage: SdarStage, mesh: ParallelMesh) -> None:
    # Otherwise the comparisons above would prove little.
    answers = {
        tuple(generate_batch([stage], mesh, _prompts(), _config(8, **changes))[0].ids)
        for changes in METHODS.values()
    }
    assert len(answers) == len(METHODS)


def test_order_and_company_do_not_matter(stage: SdarStage, mesh: ParallelMesh) -> None:
    config, prompts = _config(4, **METHODS["drawn_dynamic"]), _prompts()
    together = generate_batch([stage], mesh, prompts, config)
    order = [7, 2, 0, 10]
    some = [prompts[index] for index in order]
    others = generate_batch([stage], mesh, some, config, request_ids=order)
    assert others == [together[index] for index in order]
    # The draws do depend on the request.
    assert generate_batch([stage], mesh, some, config) != others


def test_equal_prompts_draw_apart(stage: SdarStage, mesh: ParallelMesh) -> None:
    results = generate_batch([stage], mesh, [_prompts()[0]] * 5, _config(temperature=1.0))
    assert len({result.ids for result in results}) == 5


def test_answers_that_stop_leave_the_others_alone(stage: SdarStage, mesh: ParallelMesh) -> None:
    free = generate_batch([stage], mesh, _prompts(), _config(8, max_new_tokens=29))
    # Tokens at which answers end early, in the middle and in the last slot of the batch.
    stops = (free[0].ids[2], free[4].ids[9], free[11].ids[0])
    config = _config(8, max_new_tokens=29, stop_token_ids=stops)
    results = generate_batch([stage], mesh, _prompts(), config)
    assert results == _alone(stage, _prompts(), config)
    assert 3 <= sum(result.stopped for result in results) < len(results)
    for result, whole in zip(results, free, strict=True):
        assert result.ids == whole.ids[: len(result.ids)]


def test_blocks_are_handed_over_as_they_are_finished(stage: SdarStage, mesh: ParallelMesh) -> None:
    heard: dict[int, list[tuple[int, ...]]] = {0: [], 1: []}
    results = generate_batch(
        [stage], mesh, _prompts((3, 8)), _config(8), lambda index, new: heard[index].append(new)
    )
    assert [len(block) for block in heard[0]] == [5, 6]
    assert [len(block) for block in heard[1]] == [8, 3]
    assert [sum(blocks, ()) for blocks in heard.values()] == [result.ids for result in results]


@pytest.mark.parametrize("tokens", [1, 20, 64])
def test_prompts_read_in_pieces(
    stage: SdarStage, mesh: ParallelMesh, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = _prompts((70, 3, 41, 40, 0, 12, 90))
    config = _config(4)
    expected = generate_batch([stage], mesh, prompts, config)
    monkeypatch.setattr(decoder, "PROMPT_TOKENS", tokens)
    lengths = []
    handle = stage.register_forward_pre_hook(
        lambda _, arguments: lengths.append(arguments[1].num_tokens)
    )
    assert generate_batch([stage], mesh, prompts, config) == expected
    handle.remove()
    assert expected == _alone(stage, prompts, config)
    assert max(lengths) <= max(tokens, 2 * 4 * len(prompts))


def test_every_forward_reveals_tokens(stage: SdarStage, mesh: ParallelMesh) -> None:
    sizes = []
    handle = stage.register_forward_pre_hook(
        lambda _, arguments: sizes.append(arguments[1].num_tokens)
    )
    (result,) = generate_batch([stage], mesh, _prompts((9,)), _config(4))
    handle.remove()
    # Eight prompt tokens; three unknown ones of a block; then whole blocks, whose first forward
    # computes the finished block before them once more.
    assert sizes == [8, 4, 4, 4, 8, 4, 4, 4, 8, 4, 4, 4]
    assert result.num_forwards == len(sizes) - 1
    assert result.tokens_per_forward == 1.0


def test_no_prompt_no_answer(stage: SdarStage, mesh: ParallelMesh) -> None:
    assert generate_batch([stage], mesh, [], _config()) == []
    assert generate_over_data_parallel([stage], mesh, [], _config()) == []


def test_over_data_parallel_in_one_process(stage: SdarStage, mesh: ParallelMesh) -> None:
    heard: list[int] = []
    prompts, config = _prompts((3, 5)), _config(temperature=1.0)
    results = generate_over_data_parallel(
        [stage], mesh, prompts, config, lambda index, _: heard.append(index), [4, 9]
    )
    assert results == generate_batch([stage], mesh, prompts, config, request_ids=[4, 9])
    assert set(heard) == {0, 1}


def test_the_model_is_left_as_it_was(stage: SdarStage, mesh: ParallelMesh) -> None:
    stage.train()
    seen = []
    handle = stage.register_forward_pre_hook(
        lambda module, _: seen.append((module.training, torch.is_grad_enabled()))
    )
    generate_batch([stage], mesh, _prompts((3,)), _config())
    handle.remove()
    assert set(seen) == {(False, False)}
    assert stage.training
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in stage.parameters())


def test_a_bad_prompt_is_named(stage: SdarStage, mesh: ParallelMesh) -> None:
    with pytest.raises(ValueError, match=r"^prompt 1: prompt token 1 is the mask token"):
        generate_batch([stage], mesh, [[3], [3, MASK_ID]], _config())
    with pytest.raises(ValueError, match=r"^max_new_tokens is 510 after a prompt of 3"):
        generate_batch([stage], mesh, [[3, 4, 5]], _config(max_new_tokens=510))


def test_damaged_weights_are_reported(mesh: ParallelMesh) -> None:
    stage = _stage(mesh)
    with torch.no_grad():
        stage.model.norm.weight._local_tensor[0] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        generate_batch([stage], mesh, _prompts((3, 4)), _config())


def test_vocabulary_padding_and_mask_are_never_produced(mesh: ParallelMesh) -> None:
    stage = _stage(mesh)
    with torch.no_grad():
        stage.lm_head.weight._local_tensor[ARCH.vocab_size - 1 :] = 1e3
    results = generate_batch([stage], mesh, _prompts(), _config(temperature=10.0))
    assert max(max(result.ids) for result in results) < MASK_ID


def _draws(**cut: Any) -> set[int]:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0, 5.0, 0.5]])
    config = _config(mask_token_id=4, temperature=2.0, **cut)
    return {
        int(candidates(logits, [1], config, [torch.Generator().manual_seed(seed)])[0])
        for seed in range(200)
    }


def test_top_k_and_top_p_cut_the_draw() -> None:
    assert _draws() == {0, 1, 2, 3, 5}
    assert _draws(top_k=2) == {1, 2}
    assert _draws(top_k=99) == {0, 1, 2, 3, 5}
    p = (torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0]) / 2).softmax(0)
    assert _draws(top_p=float(p[:2].sum()) + 1e-6) == {1, 2, 5}
    assert _draws(top_p=float(p[:2].sum()) - 1e-6) == {1, 2}
    assert _draws(top_k=3, top_p=1e-9) == {1}


def test_confidence_is_the_uncut_probability() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    config = _config(mask_token_id=0, temperature=3.0, top_k=1)
    _, confidences = candidates(logits, [1], config, [torch.Generator()])
    torch.testing.assert_close(confidences, torch.tensor([2.0, 1.0]).softmax(0)[:1])


def test_equal_but_for_rounding_means_the_earlier() -> None:
    unknown = torch.tensor([[True, True, False, True]])
    confidences = torch.tensor([0.5, 0.5 + 1e-7, 0.4])
    assert revealed(confidences, unknown, [1], _config()).tolist() == [[True, False, False, False]]
    surer = torch.tensor([0.5, 0.51, 0.4])
    assert revealed(surer, unknown, [1], _config()).tolist() == [[False, True, False, False]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": -1}, "top_k is -1; it must be at least 1, or 0"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": float("nan")}, "top_p is nan"),
    ],
)
def test_a_cut_out_of_range_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(**changes)
