"""The shipped mixture-of-experts model is transformers' Qwen3-MoE under SDAR's attention."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3MoeForCausalLM
from unit.remote_models import ARCH, load_model, modules_cache, random_ids, write_directory

NUM_EXPERTS, EXPERT_SIZE, LAYERS = 6, 24, 3
CONFIG = {
    **ARCH.to_hf_config(),
    "architectures": ["SDARMoeForCausalLM"],
    "model_type": "sdar_moe",
    "num_hidden_layers": LAYERS,
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": EXPERT_SIZE,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
SHAPES: dict[str, dict[str, Any]] = {
    "sparse": {},
    "unscaled": {"norm_topk_prob": False},
    "one_expert_per_token": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "every_second_layer": {"decoder_sparse_step": 2},
    "first_layer_dense": {"mlp_only_layers": [0]},
}


@pytest.fixture(autouse=True)
def _own_modules_cache(tmp_path: Path) -> Iterator[None]:
    with modules_cache(tmp_path / "modules"):
        yield


def _tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights under the names of published checkpoints, written out here."""
    h, d = 48, 16
    generator = torch.Generator().manual_seed(1)
    shapes = {"model.embed_tokens.weight": (131, h), "lm_head.weight": (131, h)}
    norms = {"model.norm.weight": h}
    for n in range(LAYERS):
        layer = f"model.layers.{n}"
        norms |= {f"{layer}.{x}_layernorm.weight": h for x in ("input", "post_attention")}
        norms |= {f"{layer}.self_attn.{x}_norm.weight": d for x in "qk"}
        for name, size in {"q": 4 * d, "k": 2 * d, "v": 2 * d}.items():
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (size, h)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (h, 4 * d)
        dense = n in config["mlp_only_layers"] or (n + 1) % config["decoder_sparse_step"]
        mlps = {f"{layer}.mlp": 64}
        if not dense:
            mlps = {f"{layer}.mlp.experts.{e}": EXPERT_SIZE for e in range(NUM_EXPERTS)}
            shapes[f"{layer}.mlp.gate.weight"] = (NUM_EXPERTS, h)
        for mlp, size in mlps.items():
            shapes[f"{mlp}.gate_proj.weight"] = shapes[f"{mlp}.up_proj.weight"] = (size, h)
            shapes[f"{mlp}.down_proj.weight"] = (h, size)
    tensors = {k: torch.randn(v, generator=generator) * 0.2 for k, v in shapes.items()}
    return tensors | {k: torch.rand(v, generator=generator) + 0.5 for k, v in norms.items()}


def _write(tmp_path: Path, **changes: Any) -> Path:
    config = {**CONFIG, **changes}
    return write_directory(tmp_path / "tiny", config, _tensors(config))


def _qwen3_moe(folder: Path, **options: Any) -> Any:
    """transformers' own model with the same weights."""
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    config |= {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    other = folder.parent / "qwen3_moe"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    return Qwen3MoeForCausalLM.from_pretrained(other, attn_implementation="eager", **options).eval()


@torch.no_grad()
def _logits(model: Any, ids: list[int], **arguments: Any) -> Tensor:
    return model(torch.tensor([ids]), **arguments).logits[0]


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_block_length_1_is_transformers_qwen3_moe(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = _write(tmp_path, **changes)
    model, ids = load_model(folder).eval(), random_ids(60)
    theirs = _logits(_qwen3_moe(folder), ids)
    assert theirs.std() > 0.5
    assert (_logits(model, ids, block_length=1) - theirs).abs().max() < 1e-5
    assert (_logits(model, ids) - theirs).abs().max() > 0.1, "SDAR's attention is another"


def test_bfloat16_routes_as_qwen3_moe(tmp_path: Path) -> None:
    folder = _write(tmp_path)
    ours = load_model(folder, dtype=torch.bfloat16).model.layers[1].mlp
    theirs = _qwen3_moe(folder, dtype=torch.bfloat16).model.layers[1].mlp
    x = torch.randn(1, 4000, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        expected = theirs(x)
        difference = (ours(x) - expected).norm(dim=-1)
    # Another expert changes most of a token's output. Probabilities rounded to bfloat16 are
    # often equal, and would let such a token slip in.
    assert (difference < 0.05 * expected.norm(dim=-1)).all()


def test_saving_and_loading_keeps_names_and_bits(tmp_path: Path) -> None:
    folder = _write(tmp_path)
    model = load_model(folder).eval()
    model.save_pretrained(tmp_path / "saved")
    before, after = (load_file(d / "model.safetensors") for d in (folder, tmp_path / "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = load_model(tmp_path / "saved").eval()
    ids = random_ids(20)
    assert torch.equal(_logits(again, ids), _logits(model, ids))


def test_every_weight_gets_a_gradient(tmp_path: Path) -> None:
    model = load_model(_write(tmp_path))
    ids = torch.tensor([random_ids(100)])
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_generation_reveals_the_most_confident_token_first(tmp_path: Path) -> None:
    model, prompt = load_model(_write(tmp_path)).eval(), random_ids(6)
    ids = [*prompt, 130, 130]
    while 130 in ids:
        logits = _logits(model, ids)
        logits[:, 130] = -torch.inf
        confidence, tokens = logits.softmax(-1).max(-1)
        unknown = [place for place, token in enumerate(ids) if token == 130]
        place = max(unknown, key=lambda place: confidence[place].item())
        ids[place] = int(tokens[place])
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=2, eos_token_id=[])
    assert answer[0].tolist() == ids
