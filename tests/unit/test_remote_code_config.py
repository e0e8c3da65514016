"""config.json through the shipped configuration: the same values back, or an error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from unit.remote_models import ARCH, modules_cache, write_directory

EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.001,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
DENSE = ARCH.to_hf_config("bfloat16")
SPARSE = {
    **DENSE, "model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"], **EXPERTS,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_modules_cache(tmp_path: Path) -> Iterator[None]:
    with modules_cache(tmp_path / "modules"):
        yield


def _load(tmp_path: Path, content: dict[str, Any], **options: Any) -> Any:
    folder = write_directory(tmp_path / "tiny", content, {"unused": torch.zeros(1)})
    return AutoConfig.from_pretrained(folder, trust_remote_code=True, **options)


@pytest.mark.parametrize("content", [DENSE, SPARSE], ids=["dense", "moe"])
def test_every_value_survives_reading_and_writing(tmp_path: Path, content: dict[str, Any]) -> None:
    config = _load(tmp_path, content)
    assert config.rope_theta == config.rope_parameters["rope_theta"] == 250_000.0
    assert config.rope_scaling is None, "as inference engines expect it"
    assert (config.block_size, config.mask_token_id, config.dtype) == (4, 130, torch.bfloat16)
    config.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {name: written[name] for name in content} == content
    added = {"auto_map", "dtype", "pad_token_id", "transformers_version"}
    assert {*added} >= written.keys() - content.keys() >= {"auto_map", "dtype"}
    again = AutoConfig.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert again.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}


def test_what_is_unknown_is_kept(tmp_path: Path) -> None:
    config = _load(tmp_path, {**DENSE, "our_note": [1, 2]})
    config.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["our_note"] == [1, 2]


def test_use_cache_false_is_read(tmp_path: Path) -> None:
    # transformers drops this key before a model's own configuration sees it.
    assert _load(tmp_path, {**DENSE, "use_cache": False}).use_cache is False


@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
def test_rope_theta_where_transformers_5_writes_it(tmp_path: Path, place: str) -> None:
    content = {k: v for k, v in DENSE.items() if not k.startswith("rope")}
    rope = {"rope_type": "default", "rope_theta": 9e5}
    assert _load(tmp_path, {**content, place: rope}).rope_theta == 9e5


def test_a_window_that_is_off_is_no_window(tmp_path: Path) -> None:
    config = _load(tmp_path, {**DENSE, "sliding_window": 4096})
    assert config.sliding_window is None


def test_a_value_can_be_overridden_when_loading(tmp_path: Path) -> None:
    assert _load(tmp_path, DENSE, block_size=32).block_size == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": None}, "rope_theta is missing in config.json; write a number above 0 .100"),
        ({"rope_theta": 0}, "rope_theta is 0 in config.json; write a number above 0"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6' in config.json"),
        ({"rms_norm_eps": None}, "rms_norm_eps is missing in config.json"),
        ({"block_size": None}, "block_size is missing in config.json; write a positive integer"),
        ({"hidden_size": 48.0}, "hidden_size is 48.0 in config.json; write a positive integer"),
        ({"block_size": 0}, "block_size is 0 in config.json"),
        ({"mask_token_id": None}, "mask_token_id is None in config.json; write a token id below"),
        ({"mask_token_id": 131}, "mask_token_id is 131 in config.json; write a token id below voc"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta is 250000.0 .* but 5.0 in rope_par"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling is .*only plain rotary"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn' .*only plain rotary"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters is .*only plain"),
        ({"use_sliding_window": True}, "use_sliding_window is True in config.json; only False is"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True in config.json; only False"),
        ({"attention_bias": True}, "attention_bias is True in config.json; only False is avail"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1 in config.json; only 0.0 is avail"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu' in config.json; only 'silu' is available"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4 in config.json; write a multiple"),
        ({"head_dim": 15}, "head_dim is 15 in config.json; rotary embedding needs an even one"),
        ({"num_experts": None}, "num_experts is missing in config.json"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0 in config.json"),
        ({"norm_topk_prob": None}, "norm_topk_prob is None in config.json; write true or false"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9 in config.json, but there are only"),
    ],
)
def test_what_the_model_cannot_be_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    content = SPARSE if changes.keys() & EXPERTS.keys() else DENSE
    changed = {k: v for k, v in {**content, **changes}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        _load(tmp_path, changed)
