"""config.json in and out: what is read, what is refused, what an export promises."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sdar.architecture import Architecture, Experts, load_architecture, padded_vocab_size

ROOT = Path(__file__).resolve().parents[2]

# config.json of SDAR-4B as published (the keys that matter): no block_size, no mask_token_id.
RELEASED: dict[str, Any] = {
    "architectures": ["SDARForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "max_position_embeddings": 32768,
    "model_type": "sdar",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def write(tmp_path: Path, content: object) -> Path:
    (tmp_path / "config.json").write_text(
        content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
    )
    return tmp_path


def without(*keys: str, **changes: Any) -> dict[str, Any]:
    return {k: v for k, v in {**RELEASED, **changes}.items() if k not in keys}


def test_released_sdar(tmp_path: Path) -> None:
    assert load_architecture(write(tmp_path, RELEASED)) == Architecture(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1000000,
        tie_word_embeddings=False,
        max_position_embeddings=32768,
        initializer_range=0.02,
        model_type="sdar",
        block_size=None,
        mask_token_id=None,
        bos_token_id=151643,
        eos_token_id=151643,
    )


def test_what_may_be_absent(tmp_path: Path) -> None:
    absent = without(
        "head_dim", "initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id",
        "attention_bias", "hidden_act", "rope_scaling", "use_sliding_window",
    )  # fmt: skip
    model = load_architecture(write(tmp_path, absent))
    assert model.head_dim == 2560 // 32
    assert model.initializer_range == 0.02
    assert model.tie_word_embeddings is False
    assert (model.bos_token_id, model.eos_token_id) == (None, None)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": None},
    ],
)
def test_rope_theta_where_either_transformers_puts_it(tmp_path: Path, rope: dict[str, Any]) -> None:
    content = without("rope_theta", "rope_scaling") | rope
    assert load_architecture(write(tmp_path, content)).rope_theta == 5e5


def test_transformers_writes_what_we_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=131, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-6,
        tie_word_embeddings=True, max_position_embeddings=512, eos_token_id=[1, 2],
        rope_parameters={"rope_type": "default", "rope_theta": 123456.0},
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    model = load_architecture(tmp_path)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
                 "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "model_type",
                 "tie_word_embeddings", "max_position_embeddings",
                 "initializer_range"):  # fmt: skip
        assert getattr(model, name) == getattr(config, name), name
    assert model.rope_theta == 123456.0
    assert model.eos_token_id == (1, 2)


def test_transformers_reads_what_we_write(tmp_path: Path) -> None:
    """rope_theta above all: some readers fall back to 10000 without a word."""
    transformers = pytest.importorskip("transformers")
    ours = replace(load_architecture(write(tmp_path, RELEASED)), block_size=4, mask_token_id=151669)
    read = transformers.Qwen3Config.from_dict(ours.to_hf_config("bfloat16"))
    assert read.rope_parameters == {"rope_type": "default", "rope_theta": 1000000}
    assert str(read.dtype).endswith("bfloat16")
    assert read.sliding_window is None
    assert set(read.layer_types) == {"full_attention"}


MOE = {
    "model_type": "sdar_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}


@pytest.mark.parametrize("model_type", ["sdar_moe", "qwen3_moe"])
def test_experts_are_read_and_written_but_not_computed(tmp_path: Path, model_type: str) -> None:
    arch = load_architecture(write(tmp_path, {**RELEASED, **MOE, "model_type": model_type}))
    assert arch.experts == Experts(128, 8, 768, True, 0.001)
    written = replace(arch, block_size=4, mask_token_id=151669).to_hf_config()
    expected = {
        **MOE,
        "architectures": ["SDARMoeForCausalLM"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    assert {key: written[key] for key in expected} == expected
    (tmp_path / "again").mkdir()
    again = load_architecture(write(tmp_path / "again", written))
    assert again.experts == arch.experts
    with pytest.raises(ValueError, match=r"config.json: .* \(128 experts\) can be converted, but"):
        arch.require_dense(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; use a model of type sdar, qwen3, sdar_m"),
        ({"model_type": None}, "model_type is None"),
        ({**MOE, "num_experts": None}, "num_experts is missing; it must be a positive integer"),
        ({"num_experts": 128}, "num_experts is 128 in a dense model; model_type must then be one"),
        ({"num_local_experts": 8}, "num_local_experts is 8 in a dense model"),
        ({**MOE, "decoder_sparse_step": 2}, "decoder_sparse_step is 2; every layer must have"),
        ({**MOE, "mlp_only_layers": [3]}, "mlp_only_layers is [3]; every layer must have"),
        ({**MOE, "norm_topk_prob": None}, "norm_topk_prob is missing; it must be true or false"),
        ({**MOE, "num_experts_per_tok": 129}, "is 129, there are only num_experts=128"),
        ({**MOE, "router_aux_loss_coef": -1}, "router_aux_loss_coef is -1; it must be 0 or above"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only SwiGLU"),
        ({"attention_bias": True}, "attention_bias is True; projections with bias"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "has ['sliding_attention']"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "only plain rotary embedding"),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "only plain rotary embedding"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; only plain rotary embedding"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial rotary embedding is not"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is given as 1000000 and as 10000.0"),
        ({"rope_theta": 0}, "rope_theta is 0; it must be above 0"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6'; it must be above 0"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be a positive integer"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0; it must be a positive integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; it must be a positive integer"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1; it must be above 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
        ({"initializer_range": "x"}, "initializer_range is 'x'; it must be above 0"),
        ({"block_size": 0}, "block_size is 0; it must be a positive integer"),
        ({"head_dim": -2}, "head_dim is -2; it must be a positive integer"),
        ({"mask_token_id": "<MASK>"}, "mask_token_id is '<MASK>'; it must be a token id"),
        ({"bos_token_id": -1}, "bos_token_id is -1; it must be a token id"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id is [1, 'x']; it must be a token id or a list"),
        ({"head_dim": 63}, "head_dim is 63; rotary embedding needs an even one"),
        ({"head_dim": None, "hidden_size": 2561}, "head_dim is missing and hidden_size=2561 is"),
        ({"num_key_value_heads": 5}, "num_attention_heads=32 is not a multiple of num_key_value"),
    ],
)
def test_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_architecture(write(tmp_path, RELEASED | change))
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_everything_missing_is_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        load_architecture(write(tmp_path, {"model_type": "qwen3", "attention_bias": True}))
    lines = str(error.value).splitlines()
    assert len(lines) == 10
    for name in ("attention_bias", "rope_theta", "vocab_size", "hidden_size", "intermediate_size",
                 "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "max_position_embeddings", "rms_norm_eps"):  # fmt: skip
        assert any(f"config.json: {name} is " in line for line in lines), name


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ("[1]", "expected a JSON object, found list"), ("", "not valid")],
)
def test_malformed_json(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_architecture(write(tmp_path, content))


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: cannot read it: No such file"):
        load_architecture(tmp_path)
    with pytest.raises(ValueError, match=r"must be a local directory"):
        load_architecture("JetLM/SDAR-4B-Chat")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_architecture(tmp_path)


def test_export_holds_every_key_that_engines_read(tmp_path: Path) -> None:
    model = replace(
        load_architecture(write(tmp_path, RELEASED | {"model_type": "qwen3"})),
        block_size=8,
        mask_token_id=151669,
        tie_word_embeddings=True,
        eos_token_id=(151645, 151643),
    )
    written = model.to_hf_config(torch_dtype="bfloat16")
    promised = {
        **RELEASED,
        "block_size": 8,
        "mask_token_id": 151669,
        "eos_token_id": [151645, 151643],
        "tie_word_embeddings": False,
    }
    assert {key: written.get(key, "absent") for key in promised} == promised
    assert json.loads(json.dumps(written)) == written


@pytest.mark.parametrize("field", ["block_size", "mask_token_id"])
def test_export_needs_the_diffusion_keys(tmp_path: Path, field: str) -> None:
    unknown: dict[str, Any] = {field: None}
    model = load_architecture(write(tmp_path, RELEASED | {"block_size": 4, "mask_token_id": 1}))
    model.to_hf_config()
    with pytest.raises(ValueError, match=rf"cannot write config\.json: {field} must be known"):
        replace(model, **unknown).to_hf_config()


def test_export_round_trip(tmp_path: Path) -> None:
    content = RELEASED | {"block_size": 4, "mask_token_id": 151669, "eos_token_id": [1, 2]}
    model = load_architecture(write(tmp_path, content))
    assert load_architecture(write(tmp_path, model.to_hf_config())) == model


def test_shipped_model_is_what_we_would_export() -> None:
    directory = ROOT / "configs" / "models" / "gsm8k_tiny"
    model = load_architecture(directory)
    assert (model.block_size, model.mask_token_id, model.vocab_size) == (4, 151669, 151936)
    assert json.loads((directory / "config.json").read_text()) == model.to_hf_config()


@pytest.mark.parametrize(
    ("vocab", "divisor", "padded"),
    [(1, 128, 128), (128, 128, 128), (129, 128, 256), (151669, 128, 151680), (131, 1, 131)],
)
def test_padded_vocab_size(vocab: int, divisor: int, padded: int) -> None:
    assert padded_vocab_size(vocab, divisor) == padded
