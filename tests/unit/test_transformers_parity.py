"""Our model is transformers' Qwen3 with the same weights: logits, loss and gradients, fp32.

Under a plain causal mask (block length 1), and under SDAR's mask, which transformers gets as a
dense additive mask with explicit positions.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from distributed.layouts import Layout
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from unit.packings import pack, random_document, rule_mask

from megatron_sdar.architecture import Architecture
from megatron_sdar.diffusion.noise import NoiseDraw
from megatron_sdar.diffusion.rows import Row, RowDocument, View, build_row
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.model.partition import build_stages
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.model.weights import initialize, materialize
from megatron_sdar.parallel.mesh import build_mesh
from megatron_sdar.training.batch import to_device

ARCH = replace(Layout("parity").arch, vocab_size=1003, rope_theta=1_000_000.0)
PADDED = 1024
CPU = torch.device("cpu")


def _hf_config(arch: Architecture) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.intermediate_size,
        num_hidden_layers=arch.num_hidden_layers,
        num_attention_heads=arch.num_attention_heads,
        num_key_value_heads=arch.num_key_value_heads,
        head_dim=arch.head_dim,
        rms_norm_eps=arch.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": arch.rope_theta},
        max_position_embeddings=arch.max_position_embeddings,
        tie_word_embeddings=arch.tie_word_embeddings,
        attention_bias=False,
        attention_dropout=0.0,
        attn_implementation="eager",
    )


@pytest.fixture(params=["untied", "tied"])
def models(
    request: pytest.FixtureRequest, single_process: None
) -> tuple[SdarStage, Qwen3ForCausalLM]:
    """The product's initialised stage (norm scales made random) and its copy in transformers."""
    arch = replace(ARCH, tie_word_embeddings=request.param == "tied")
    options = ModelOptions(PADDED, torch.float32, False, "none", "tiled")
    stages = build_stages(arch, build_mesh(CPU, 1, 1), options)
    materialize(stages, CPU)
    initialize(stages, seed=11)
    stage = stages[0]
    assert isinstance(stage, SdarStage)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in stage.parameters():
            if parameter.dim() == 1:  # scales of 1 would hide a forgotten or swapped norm
                size = parameter.shape[0]
                parameter._local_tensor.copy_(torch.rand(size, generator=generator) + 0.5)
    hf = Qwen3ForCausalLM(_hf_config(arch)).eval()
    incompatible = hf.load_state_dict(_weights(stage), strict=not arch.tie_word_embeddings)
    assert not incompatible.unexpected_keys
    assert set(incompatible.missing_keys) <= (
        {"lm_head.weight"} if arch.tie_word_embeddings else set()
    )
    hf.tie_weights()
    assert sum(p.numel() for p in hf.parameters()) == sum(
        value.numel() for value in _weights(stage).values()
    )
    return stage, hf


def _weights(stage: SdarStage) -> dict[str, Tensor]:
    return {
        name: _without_padding(name, parameter._local_tensor.detach())
        for name, parameter in stage.named_parameters()
    }


def _without_padding(name: str, value: Tensor) -> Tensor:
    is_vocabulary = name in ("model.embed_tokens.weight", "lm_head.weight")
    return value[: ARCH.vocab_size] if is_vocabulary else value


def _our_logits(stage: SdarStage, row: Row) -> Tensor:
    batch = to_device(row, CPU, 1.0)
    with torch.no_grad():
        return stage(None, batch.at(np.arange(row.num_tokens)), return_logits=True)


def _additive(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[
        None, None
    ]


def test_logits_under_a_causal_mask(models: tuple[SdarStage, Qwen3ForCausalLM]) -> None:
    stage, hf = models
    ids = np.random.default_rng(0).integers(0, ARCH.vocab_size, size=90).astype(np.int32)
    # A clean copy of blocks of one token sees exactly the tokens up to itself.
    row = build_row([RowDocument(ids, ids, 90, ())], 90, 1, 1000, 0)
    ours = _our_logits(stage, row)
    with torch.no_grad():
        theirs = hf(input_ids=torch.from_numpy(ids).long()[None]).logits[0]
    assert ours.shape == theirs.shape == (90, ARCH.vocab_size)
    assert theirs.std() > 0.5
    assert (ours - theirs).abs().max() < 1e-5


def _documents() -> list[RowDocument]:
    rng = np.random.default_rng(2)
    dropped = random_document(rng, 4, 6, drop=True)
    ids = rng.integers(1, 900, size=24).astype(np.int32)
    labels = ids.copy()
    labels[:5] = -100
    masked = (rng.random(24) < 0.6) & (labels != -100)
    views = tuple(View(NoiseDraw(0.6, masked), np.arange(6)) for _ in range(2))
    return [dropped, RowDocument(ids, labels, 6, views[:1]), random_document(rng, 4, 5, drop=False)]


def _hf_logits(hf: Qwen3ForCausalLM, row: Row, mask: Tensor) -> Tensor:
    return hf(
        input_ids=torch.from_numpy(row.input_ids)[None],
        position_ids=torch.from_numpy(row.position_ids)[None],
        attention_mask=_additive(mask),
    ).logits[0]


def test_logits_under_sdars_mask_on_a_packed_row(
    models: tuple[SdarStage, Qwen3ForCausalLM],
) -> None:
    stage, hf = models
    packing = pack(_documents(), 4, 7)
    mask = rule_mask(packing.tokens)
    ours = _our_logits(stage, packing.row)
    with torch.no_grad():
        theirs = _hf_logits(hf, packing.row, mask)
    assert (ours - theirs).abs().max() < 1e-5
    with torch.no_grad():
        causal = _hf_logits(hf, packing.row, torch.ones_like(mask).tril())
    assert (ours - causal).abs().max() > 1e-2, "the mask must matter"


def test_loss_and_gradients_under_sdars_mask(models: tuple[SdarStage, Qwen3ForCausalLM]) -> None:
    stage, hf = models
    packing = pack(_documents(), 4, 7)
    row, mask = packing.row, rule_mask(packing.tokens)
    ours = stage(None, to_device(row, CPU, 1.0 / row.num_label_tokens))
    ours.backward()
    picked = _hf_logits(hf, row, mask)[torch.from_numpy(row.loss_positions)]
    losses = torch.nn.functional.cross_entropy(
        picked, torch.from_numpy(row.target_ids), reduction="none"
    )
    theirs = (losses * torch.from_numpy(row.loss_weights)).sum() / row.num_label_tokens
    theirs.backward()
    assert abs(ours.item() - theirs.item()) < 1e-5 * theirs.item()
    expected = dict(hf.named_parameters())
    for name, parameter in stage.named_parameters():
        grad = _without_padding(name, parameter.grad._local_tensor)
        scale = expected[name].grad.abs().max()
        assert scale > 0, name
        error = ((grad - expected[name].grad).abs().max() / scale).item()
        assert error < 2e-5, f"{name}: relative error {error:.1e}"
