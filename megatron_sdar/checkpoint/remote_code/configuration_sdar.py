"""Configuration of SDAR block-diffusion language models, dense and mixture-of-experts.

Part of the model directory: needs only torch and transformers 5. Licence: Apache-2.0.
Invariant: no default stands in for a size, nor for rope_theta, whose usual fallback to 10000
ruins a model without a word; and what the model does not compute is refused. config.json keeps
rope_theta at its top level, where inference engines look for it.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

_NO_VALUE = object()
# What the model computes; config.json states it for inference engines.
_FIXED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}


class SDARConfig(PretrainedConfig):
    """config.json of a dense SDAR model.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
            num_key_value_heads, head_dim, max_position_embeddings, rms_norm_eps: as in Qwen3.
        rope_theta: base of the rotary angles; also read from rope_parameters.
        block_size: tokens that are denoised together; attention is causal between blocks.
        mask_token_id: the token that stands for one still to be generated.
        Others: see transformers.PretrainedConfig.

    Raises:
        ValueError: a value is missing, malformed or not available in this model.
    """

    model_type = "sdar"
    # Without this, older transformers compare with a config of defaults, and there are none.
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = ("past_key_values", "cache")

    def __init__(self, **values: Any) -> None:
        self.vocab_size = _size(values, "vocab_size")
        self.hidden_size = _size(values, "hidden_size")
        self.intermediate_size = _size(values, "intermediate_size")
        self.num_hidden_layers = _size(values, "num_hidden_layers")
        self.num_attention_heads = _size(values, "num_attention_heads")
        self.num_key_value_heads = _size(values, "num_key_value_heads")
        self.head_dim = _size(values, "head_dim")
        self.max_position_embeddings = _size(values, "max_position_embeddings")
        self.block_size = _size(values, "block_size")
        self.rms_norm_eps = _positive(values, "rms_norm_eps", "1e-6 for SDAR and Qwen3")
        self.rope_theta = _rope_theta(values)
        self.mask_token_id = _mask_token(values, self.vocab_size)
        self.initializer_range = values.pop("initializer_range", 0.02)
        self.use_cache = values.pop("use_cache", True)
        # transformers 4, which engines may run, has defaults of its own where these are not given.
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            values.setdefault(name, None)
        self.max_window_layers = values.pop("max_window_layers", self.num_hidden_layers)
        for name, only in _FIXED.items():
            if values.setdefault(name, only) not in (only, None):
                raise ValueError(
                    f"{name} is {values[name]!r} in config.json; only {only!r} is available"
                )
            values[name] = only
        # Qwen3 configs may hold a window that use_sliding_window turns off.
        values["sliding_window"] = None
        _check_heads(self)
        super().__init__(**values)
        # transformers' own place for it, for code that looks there. Not written: see to_dict.
        self.rope_parameters = {"rope_type": "default", "rope_theta": self.rope_theta}

    @property  # type: ignore[misc]
    def rope_scaling(self) -> None:
        """There is none. transformers 5 would answer with rope_parameters, which engines refuse."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """As transformers', but with what it knows of rotary embedding at the top level."""
        content = super().to_dict()
        content.pop("rope_parameters", None)
        return {**content, "rope_theta": self.rope_theta, "rope_scaling": self.rope_scaling}

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json gets: the dtype under its old name too, which engines read."""
        content = super().to_diff_dict()
        if content.get("dtype") is not None:
            content["torch_dtype"] = content["dtype"]
        return content


class SDARMoeConfig(SDARConfig):
    """config.json of a mixture-of-experts SDAR model, routed as Qwen3-MoE.

    Args:
        num_experts: experts of a sparse layer.
        num_experts_per_tok: how many of them compute each token.
        moe_intermediate_size: width of one expert; dense layers have intermediate_size.
        norm_topk_prob: whether the chosen experts' weights are scaled to sum to 1.
        decoder_sparse_step: every so many layers one is sparse.
        mlp_only_layers: indices of layers that are dense all the same.
        Others: see SDARConfig.

    Raises:
        ValueError: as for SDARConfig.
    """

    model_type = "sdar_moe"

    # Later transformers 5 make a configuration class without its own __init__ a dataclass.
    def __init__(self, **values: Any) -> None:
        self.num_experts = _size(values, "num_experts")
        self.num_experts_per_tok = _size(values, "num_experts_per_tok")
        self.moe_intermediate_size = _size(values, "moe_intermediate_size")
        self.decoder_sparse_step = _size(values, "decoder_sparse_step", 1)
        self.mlp_only_layers = list(values.pop("mlp_only_layers", None) or ())
        self.norm_topk_prob = values.pop("norm_topk_prob", None)
        if not isinstance(self.norm_topk_prob, bool):
            raise ValueError(
                f"norm_topk_prob is {self.norm_topk_prob!r} in config.json; write true or false "
                "(true for SDAR and Qwen3)"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok} in config.json, but there are "
                f"only num_experts={self.num_experts}; write a smaller number"
            )
        super().__init__(**values)

    def is_sparse(self, layer_idx: int) -> bool:
        """Whether this layer has experts."""
        return (
            layer_idx not in self.mlp_only_layers
            and (layer_idx + 1) % self.decoder_sparse_step == 0
        )


def _size(values: dict[str, Any], name: str, default: Any = _NO_VALUE) -> int:
    value = values.pop(name, default)
    if value is _NO_VALUE:
        raise ValueError(f"{name} is missing in config.json; write a positive integer")
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r} in config.json; write a positive integer")
    return value


def _positive(values: dict[str, Any], name: str, advice: str) -> float:
    value = values.pop(name, None)
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        found = "missing" if value is None else repr(value)
        raise ValueError(f"{name} is {found} in config.json; write a number above 0 ({advice})")
    return value


def _rope_theta(values: dict[str, Any]) -> float:
    """rope_theta from the top or, as transformers 5 writes other models, from a dict."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = values.pop(name, None)
        if rope is None:
            continue
        plain = isinstance(rope, dict) and (
            rope.get("rope_type", rope.get("type", "default")) == "default"
            and rope.get("partial_rotary_factor", 1) == 1
        )
        if not plain:
            raise ValueError(
                f"{name} is {rope!r} in config.json; only plain rotary embedding is available, "
                "write rope_theta and no scaling"
            )
        inner, outer = rope.get("rope_theta"), values.get("rope_theta")
        if None not in (inner, outer) and inner != outer:
            raise ValueError(
                f"rope_theta is {outer} in config.json, but {inner} in {name}; keep one"
            )
        values["rope_theta"] = outer if inner is None else inner
    return _positive(values, "rope_theta", "1000000 for SDAR and Qwen3")


def _mask_token(values: dict[str, Any], vocab_size: int) -> int:
    value = values.pop("mask_token_id", None)
    if type(value) is not int or not 0 <= value < vocab_size:
        raise ValueError(
            f"mask_token_id is {value!r} in config.json; write a token id below "
            f"vocab_size={vocab_size} (151669 for SDAR)"
        )
    return value


def _check_heads(config: SDARConfig) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads is {config.num_attention_heads} in config.json; write a "
            f"multiple of num_key_value_heads={config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise ValueError(
            f"head_dim is {config.head_dim} in config.json; rotary embedding needs an even one"
        )
