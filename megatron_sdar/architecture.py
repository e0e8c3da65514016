"""The model's shape: what config.json says, under its Hugging Face names.

`load_architecture` accepts exactly the models whose computation is that of SDAR and Qwen3, dense or
with experts in every layer, and refuses every variant that would be got wrong. Models with experts
can be converted but not trained yet (`Architecture.require_dense`). No default stands in for a
size, and none for rope_theta, whose usual silent fallback ruins a model.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sdar.regular_files import read_json, shown


@dataclass(frozen=True)
class Experts:
    """What replaces the MLP of every layer in a mixture-of-experts model."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    router_aux_loss_coef: float


@dataclass(frozen=True)
class Architecture:
    """Shape of an SDAR model.

    `intermediate_size` is that of a dense layer, which no layer of a model with `experts` is.
    `vocab_size` counts the rows of the published embedding, before padding for tensor
    parallelism. `block_size` and `mask_token_id` are None when config.json lacks them, as the
    released SDAR checkpoints do; the caller completes them with `dataclasses.replace`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    initializer_range: float = 0.02
    model_type: str = "sdar"
    block_size: int | None = None
    mask_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    experts: Experts | None = None

    def require_dense(self, model_dir: str | Path) -> None:
        """ValueError for a model with experts, where only dense ones can be computed."""
        if self.experts is not None:
            raise ValueError(
                f"{Path(model_dir) / 'config.json'}: mixture-of-experts models "
                f"({self.experts.num_experts} experts) can be converted, but not trained or "
                "sampled yet; use a dense SDAR or Qwen3 model"
            )

    def to_hf_config(self, torch_dtype: str = "float32") -> dict[str, Any]:
        """Return the config.json that SGLang, LMDeploy, JetEngine and the remote code read.

        An export always holds lm_head.weight, so it is written as untied even where the training
        model ties its embeddings. `auto_map` is the exporter's to add when it ships the
        remote-code files. `torch_dtype` is the dtype of the tensors beside it. ValueError when
        block_size or mask_token_id is None.
        """
        unknown = [n for n in ("block_size", "mask_token_id") if getattr(self, n) is None]
        if unknown:
            raise ValueError(
                f"cannot write config.json: {' and '.join(unknown)} must be known; set them in "
                "the source config.json (4 and 151669 for the released SDAR models)"
            )
        eos = self.eos_token_id
        moe: dict[str, Any] = {}
        if self.experts is not None:
            moe = {**asdict(self.experts), "decoder_sparse_step": 1, "mlp_only_layers": []}
        return {
            "architectures": ["SDARMoeForCausalLM" if moe else "SDARForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "block_size": self.block_size,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.intermediate_size,
            "mask_token_id": self.mask_token_id,
            "max_position_embeddings": self.max_position_embeddings,
            "max_window_layers": self.num_hidden_layers,
            "model_type": "sdar_moe" if moe else "sdar",
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": None,
            "rope_theta": self.rope_theta,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": torch_dtype,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocab_size,
            **moe,
        }


def padded_vocab_size(vocab_size: int, divisible_by: int) -> int:
    """Return the number of embedding rows: vocab_size rounded up to a multiple."""
    return -(-vocab_size // divisible_by) * divisible_by


_MAX_BYTES = 2**20  # of config.json
_MAX_SIZE = 2**31 - 1  # of a dimension or a token id
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)

# Key -> (values this trainer computes, what happens otherwise). An absent key means the first.
_ONLY: Mapping[str, tuple[tuple[object, ...], str]] = {
    "hidden_act": (("silu",), "only SwiGLU with silu is available"),
    "attention_bias": ((False, None), "projections with bias are not available"),
    "attention_dropout": ((0, None), "attention dropout is not available"),
    "use_sliding_window": ((False, None), "sliding-window attention is not available"),
    "quantization_config": ((None,), "quantised weights cannot be trained, use the bf16 model"),
    "partial_rotary_factor": ((1, None), "partial rotary embedding is not available"),
}
_ONLY_MOE: Mapping[str, tuple[tuple[object, ...], str]] = {
    "decoder_sparse_step": ((1, None), "every layer must have experts"),
    "mlp_only_layers": (([], None), "every layer must have experts"),
}
_DENSE_TYPES, _MOE_TYPES = ("sdar", "qwen3"), ("sdar_moe", "qwen3_moe")


def load_architecture(model_dir: str | Path) -> Architecture:
    """Read MODEL_DIR/config.json of model_type sdar, qwen3, sdar_moe or qwen3_moe.

    ValueError names the file and lists everything that is missing, malformed or not supported.
    """
    path = Path(model_dir) / "config.json"
    content = _read_json(path)
    model_type = content.get("model_type")
    if model_type not in (*_DENSE_TYPES, *_MOE_TYPES):
        raise ValueError(
            f"{path}: model_type is {shown(model_type)}; use a model of type "
            f"{', '.join((*_DENSE_TYPES, *_MOE_TYPES))}"
        )

    problems = _unsupported(content, _ONLY)
    values: dict[str, Any] = {
        "model_type": model_type,
        "rope_theta": _rope_theta(content, problems),
    }
    for name in _SIZES:
        values[name] = _take(content, name, _is_size, "a positive integer", problems)
    values["rms_norm_eps"] = _take(content, "rms_norm_eps", _is_positive, "above 0", problems)
    values["tie_word_embeddings"] = _take(
        content, "tie_word_embeddings", _is_bool, "true or false", problems, False
    )
    values["initializer_range"] = _take(
        content, "initializer_range", _is_positive, "above 0", problems, 0.02
    )
    for name in ("block_size", "head_dim"):
        values[name] = _take(content, name, _is_size, "a positive integer", problems, None)
    for name in ("mask_token_id", "bos_token_id"):
        values[name] = _take(content, name, _is_token, "a token id", problems, None)
    eos = content.get("eos_token_id")
    ids = tuple(eos) if isinstance(eos, list) else (eos,)
    if eos is not None and not all(_is_token(item) for item in ids):
        problems.append(f"eos_token_id is {shown(eos)}; it must be a token id or a list of them")
    values["eos_token_id"] = ids if isinstance(eos, list) else eos
    values["experts"] = _experts(content, model_type in _MOE_TYPES, problems)
    if not problems:
        _check_heads(values, problems)
    if problems:
        raise ValueError("\n".join(f"{path}: {problem}" for problem in problems))
    return Architecture(**values)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path, _MAX_BYTES)
    except OSError as error:
        raise ValueError(
            f"{path}: cannot read it: {error.strerror or error}; "
            "model_name_or_path must be a local directory that holds config.json"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value <= _MAX_SIZE


def _is_token(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_SIZE


def _is_bool(value: object) -> bool:
    return type(value) is bool


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def _is_weight(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= sys.float_info.max


_REQUIRED = object()


def _take(
    content: Mapping[str, Any],
    name: str,
    holds: Any,
    wanted: str,
    problems: list[str],
    default: Any = _REQUIRED,
) -> Any:
    value = content.get(name)
    if value is None and default is not _REQUIRED:
        return default
    if value is None:
        problems.append(f"{name} is missing; it must be {wanted}")
    elif not holds(value):
        problems.append(f"{name} is {shown(value)}; it must be {wanted}")
    return value


def _experts(content: Mapping[str, Any], is_moe: bool, problems: list[str]) -> Experts | None:
    if not is_moe:
        counts = [key for key in ("num_experts", "num_local_experts") if content.get(key)]
        problems += [
            f"{key} is {shown(content[key])} in a dense model; model_type must then be one of "
            f"{', '.join(_MOE_TYPES)}"
            for key in counts
        ]
        return None
    problems += _unsupported(content, _ONLY_MOE)
    values = {
        name: _take(content, name, _is_size, "a positive integer", problems)
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    }
    normalized = _take(content, "norm_topk_prob", _is_bool, "true or false", problems)
    aux = _take(content, "router_aux_loss_coef", _is_weight, "0 or above", problems, 0.001)
    if not problems and values["num_experts_per_tok"] > values["num_experts"]:
        problems.append(
            f"num_experts_per_tok is {values['num_experts_per_tok']}, there are only "
            f"num_experts={values['num_experts']}"
        )
    return Experts(**values, norm_topk_prob=normalized, router_aux_loss_coef=aux)


def _unsupported(
    content: Mapping[str, Any], only: Mapping[str, tuple[tuple[object, ...], str]]
) -> list[str]:
    problems = [
        f"{key} is {shown(content[key])}; {advice}"
        for key, (values, advice) in only.items()
        if key in content and content[key] not in values
    ]
    layers = content.get("layer_types") or []
    if not isinstance(layers, list) or not all(isinstance(kind, str) for kind in layers):
        problems.append(f"layer_types is {shown(layers)}; it must be a list of names")
    elif kinds := set(layers) - {"full_attention"}:
        problems.append(f"layer_types has {sorted(kinds)}; only full_attention is available")
    return problems


def _rope_theta(content: Mapping[str, Any], problems: list[str]) -> Any:
    """rope_theta stands at the top, or inside rope_parameters (transformers 5)."""
    found = [content["rope_theta"]] if content.get("rope_theta") is not None else []
    for name in ("rope_parameters", "rope_scaling"):
        rope = content.get(name)
        if rope is None:
            continue
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else rope
        if not isinstance(rope, dict) or kind not in ("default", None):
            problems.append(f"{name} is {shown(rope)}; only plain rotary embedding is available")
        elif rope.get("partial_rotary_factor", 1) != 1:
            problems.append(f"{name} is {shown(rope)}; partial rotary embedding is not available")
        elif rope.get("rope_theta") is not None:
            found.append(rope["rope_theta"])
    if not found:
        problems.append("rope_theta is missing; it must be above 0 (1000000 for SDAR and Qwen3)")
        return None
    if any(theta != found[0] for theta in found):
        problems.append(f"rope_theta is given as {' and as '.join(map(str, found))}; keep one")
    if not _is_positive(found[0]):
        problems.append(f"rope_theta is {found[0]!r}; it must be above 0")
    return found[0]


def _check_heads(values: dict[str, Any], problems: list[str]) -> None:
    """Fill in head_dim and check what relates the sizes, which are all valid by now."""
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    if values["head_dim"] is None and values["hidden_size"] % heads:
        problems.append(
            f"head_dim is missing and hidden_size={values['hidden_size']} is not a multiple of "
            f"num_attention_heads={heads}; write head_dim"
        )
        return
    values["head_dim"] = values["head_dim"] or values["hidden_size"] // heads
    if values["head_dim"] % 2:
        problems.append(f"head_dim is {values['head_dim']}; rotary embedding needs an even one")
    if heads % kv_heads:
        problems.append(
            f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
        )
