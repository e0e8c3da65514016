"""The shipped dense model is the trainer's model, in transformers and with nothing else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sdar_kernels.rms_norm import rms_norm
from transformers import AutoModel, DynamicCache, Qwen3Config, Qwen3ForCausalLM
from unit.remote_models import (
    ARCH,
    CPU,
    MASK_ID,
    difference,
    load_model,
    logits_of,
    make_stage,
    modules_cache,
    random_ids,
    stage_logits,
    stage_tensors,
    write_directory,
)

from megatron_sdar.diffusion.noise import NoiseDraw
from megatron_sdar.diffusion.rows import build_row, full_copies
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.training.batch import to_device


@pytest.fixture(scope="module", autouse=True)
def _own_modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with modules_cache(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="module")
def stage(single_process: None) -> SdarStage:
    return make_stage(ARCH, 3, torch.float32)


@pytest.fixture(scope="module")
def folder(stage: SdarStage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "tiny"
    return write_directory(path, ARCH.to_hf_config(), stage_tensors(stage))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(folder).eval()


def _qwen3(folder: Path) -> Qwen3ForCausalLM:
    """transformers' own model with the same weights."""
    names = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "max_position_embeddings",
    ]
    config = Qwen3Config(
        **{name: getattr(ARCH, name) for name in names},
        rope_parameters={"rope_type": "default", "rope_theta": ARCH.rope_theta},
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    qwen3 = Qwen3ForCausalLM(config).eval()
    qwen3.load_state_dict(load_file(folder / "model.safetensors"))
    return qwen3


# The trainer's numbers.


def test_logits_are_the_trainers(stage: SdarStage, model: Any) -> None:
    for length in (4, 36, 500):
        ids = random_ids(length)
        assert difference(logits_of(model, ids), stage_logits(stage, ids, 4)) < 1e-5


def test_another_block_length_reaches_the_mask(stage: SdarStage, model: Any) -> None:
    ids = random_ids(48)
    expected = stage_logits(stage, ids, 16)
    assert difference(logits_of(model, ids, block_length=16), expected) < 1e-5
    assert difference(logits_of(model, ids), expected) > 0.1


def test_a_noisy_block_behind_clean_ones_is_that_of_training(stage: SdarStage, model: Any) -> None:
    ids = np.array(random_ids(24), dtype=np.int32)
    masked = np.random.default_rng(1).random(24) < 0.5
    row = build_row([full_copies(ids, ids, 4, NoiseDraw(0.5, masked))], 48, 4, MASK_ID, 0)
    with torch.no_grad():
        batch = to_device(row, CPU, 1.0).at(np.arange(24, 48))
        trained = stage(None, batch, return_logits=True)
    noisy = np.where(masked, MASK_ID, ids)
    cache = DynamicCache()
    for start in range(0, 24, 4):
        block = slice(start, start + 4)
        whole = logits_of(model, np.concatenate([ids[:start], noisy[block]]).astype(np.int64))
        assert difference(whole[start:], trained[block]) < 1e-5
        # The same with cached clean blocks, which the noisy one does not join.
        noisy_block = torch.from_numpy(noisy[block]).long()
        cached = logits_of(model, noisy_block, past_key_values=cache, store_kv=False)
        assert difference(cached, trained[block]) < 1e-5
        assert cache.get_seq_length() == start
        logits_of(model, torch.from_numpy(ids[block]).long(), past_key_values=cache)


def test_block_length_1_is_transformers_qwen3(model: Any, folder: Path) -> None:
    qwen3, ids = _qwen3(folder), random_ids(60)
    assert difference(logits_of(model, ids, block_length=1), logits_of(qwen3, ids)) < 1e-5


# Masks, positions and the cache.


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model: Any, side: str) -> None:
    prompts = [random_ids(length, length) for length in (13, 7, 9, 0)]
    ids = torch.full((4, 13), 5)
    mask = torch.zeros_like(ids)
    places = [slice(13 - len(p), 13) if side == "left" else slice(len(p)) for p in prompts]
    for row, (prompt, place) in enumerate(zip(prompts, places, strict=True)):
        ids[row, place], mask[row, place] = torch.tensor(prompt).long(), 1
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    for row, prompt in enumerate(prompts[:3]):
        assert difference(logits[row, places[row]], logits_of(model, prompt)) < 1e-5
    # A row of padding alone must not turn into NaN, whatever a kernel makes of no key at all.
    module = sys.modules[type(model).__module__]
    _, seen = module._positions_and_mask(torch.zeros(4, 13, 48), mask, None, 0, 4)
    assert seen.any(-1).all()
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.float64])
def test_a_mask_of_4_dimensions_is_used_as_it_is(
    model: Any, folder: Path, kind: torch.dtype
) -> None:
    ids, generator = random_ids(20), torch.Generator().manual_seed(0)
    seen = (torch.rand(20, 20, generator=generator) < 0.3) | torch.eye(20, dtype=torch.bool)
    additive = torch.zeros(20, 20).masked_fill(~seen, torch.finfo(torch.float32).min)
    positions = torch.randint(0, 400, (1, 20), generator=generator)
    theirs = logits_of(
        _qwen3(folder), ids, attention_mask=additive[None, None], position_ids=positions
    )
    mask = (seen if kind == torch.bool else additive.to(kind))[None, None]
    ours = logits_of(model, ids, attention_mask=mask, position_ids=positions)
    assert difference(ours, theirs) < 1e-5


def test_explicit_positions_place_the_blocks(model: Any) -> None:
    ids = random_ids(10)
    positions = torch.arange(10)[None]
    assert torch.equal(logits_of(model, ids, position_ids=positions), logits_of(model, ids))
    for length in (10, 4):
        moved = logits_of(model, ids[:length], position_ids=positions[:, :length] + 2)
        # Two tokens, then whole blocks: the first two no longer see the next two.
        assert difference(moved[:2], logits_of(model, ids[:2])) < 1e-5
    cache = DynamicCache()
    logits_of(model, ids[:8], cache=cache)
    last = logits_of(model, ids[8:], cache=cache, position_ids=positions[:, 8:])
    assert difference(last, logits_of(model, ids)[8:]) < 1e-5


@pytest.mark.parametrize("pieces", [[4] * 6, [12, 4, 8], [20, 4]])
def test_pieces_of_whole_blocks_are_the_whole(model: Any, pieces: list[int]) -> None:
    ids, cache, parts = torch.tensor(random_ids(24)), None, []
    with torch.no_grad():
        for piece in ids.split(pieces):
            output = model(piece[None], past_key_values=cache, use_cache=True)
            cache = output[1]
            parts.append(output.logits[0])
    assert cache.get_seq_length() == 24
    assert difference(torch.cat(parts), logits_of(model, ids)) < 1e-5


def test_a_cache_comes_when_asked_for(model: Any) -> None:
    ids = torch.tensor([random_ids(4)])
    with torch.no_grad():
        assert len(model(ids)) == 2, "config.use_cache is true"
        assert len(model(ids, use_cache=False)) == 1
    assert len(model.train()(ids)) == 1
    model.eval()


# What comes out.


def test_the_loss_is_at_the_same_position(model: Any) -> None:
    ids = torch.tensor([random_ids(8), random_ids(8, 1)])
    labels = torch.full_like(ids, -100)
    labels[0, 1], labels[1, 5], labels[1, 6] = 7, 8, 9
    with torch.no_grad():
        logits = model(ids).logits.double().log_softmax(-1)
        expected = -(logits[0, 1, 7] + logits[1, 5, 8] + logits[1, 6, 9])
        assert abs(model(ids, labels=labels).loss - expected / 3) < 1e-5
        assert abs(model(ids, labels=labels, num_items_in_batch=10).loss - expected / 10) < 1e-5
        assert model(ids, labels=torch.full_like(ids, -100)).loss == 0


def test_every_weight_gets_a_gradient(model: Any) -> None:
    ids = torch.tensor([random_ids(8)])
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    model.zero_grad()


def test_only_the_wanted_logits_are_computed(model: Any) -> None:
    ids = random_ids(9)
    whole = logits_of(model, ids)
    assert difference(logits_of(model, ids, logits_to_keep=2), whole[-2:]) < 1e-5
    wanted = torch.tensor([1, 7, 3])
    assert difference(logits_of(model, ids, logits_to_keep=wanted), whole[wanted]) < 1e-5


def test_embeddings_instead_of_ids(model: Any) -> None:
    ids = torch.tensor([random_ids(9)])
    with torch.no_grad():
        logits = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert torch.equal(logits[0], logits_of(model, ids))


def test_auto_model_is_the_body(model: Any, folder: Path) -> None:
    body, ids = AutoModel.from_pretrained(folder, trust_remote_code=True), random_ids(9)
    with torch.no_grad():
        hidden = body(torch.tensor([ids])).last_hidden_state
        assert torch.equal(model.lm_head(hidden)[0], logits_of(model, ids))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "input_ids and inputs_embeds: give one"),
        ({"input_ids": [[1]], "inputs_embeds": [[1]]}, "input_ids and inputs_embeds: give one"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, r"has shape \(1, 1\); make it \(1, 2\)"),
        ({"input_ids": [[1]], "attention_mask": [[[[1]]]]}, "dtype torch.int64; make it torch.boo"),
        ({"input_ids": [[1]], "labels": [[1]], "logits_to_keep": 1}, "logits_to_keep: leave it"),
        ({"input_ids": [[1]], "output_attentions": True}, "output_attentions is True, which SDAR"),
        ({"input_ids": [[1]], "return_dict": False}, "return_dict is False, which SDAR"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    model: Any, arguments: dict[str, Any], message: str
) -> None:
    values = {k: torch.tensor(v) if type(v) is list else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        model(**values)


def test_bfloat16_keeps_angles_and_statistics_in_fp32(model: Any, folder: Path) -> None:
    rounded = load_model(folder, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    ids = random_ids(8)
    # Far from 0, where angles in bfloat16 would be off by a whole radian.
    positions = torch.arange(400, 408)[None]
    exact = logits_of(model, ids, position_ids=positions)
    logits = logits_of(rounded, ids, position_ids=positions)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).norm() < 0.03 * exact.norm()
    norm = rounded.model.norm
    x = torch.randn(100, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        assert torch.equal(norm(x), rms_norm(x, norm.weight, norm.eps)), "as the trainer rounds"
