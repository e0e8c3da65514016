"""Files of a model directory that must be refused: (name, file, content, words)."""

import json
import struct

from unit.malformed_configs import Case
from unit.tiny_hf import CONFIG

_INDEX = "model.safetensors.index.json"
_SHARD = "layer-0-ep-0-of-1.safetensors"


def _header(content: object, length: int | None = None, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _tensor(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> bytes:
    return _header({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}, data=bytes(4))


_NUMBERS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip
_WRONG: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(_NUMBERS, (0, -1, 1.5, "8", [8], 10**30)),
    "rms_norm_eps": (0, "x", 10**400),
    "initializer_range": (-1, [1], 10**400),
    "rope_theta": (0, "x", [1], 10**400),
    "mask_token_id": (-1, "x", 10**30),
    "eos_token_id": ("x", [1, "x"], {}),
    "model_type": ("llama", 5, ["sdar"]),
    "layer_types": (5, [["a"]], {"a": 1}, ["sliding_attention"]),
    "rope_scaling": ("default", [], 5, {"rope_type": "yarn"}),
    "tie_word_embeddings": (1, "yes"),
    "block_size": (0, "x"),
    "head_dim": (15, "x"),
    "hidden_act": ("gelu", ["silu"]),
    "quantization_config": ({"bits": 4},),
}
_FILES: list[Case] = [
    ("config cut", "config.json", b'{"model_type": ', "not valid JSON"),
    ("config deep", "config.json", b"[" * 200_000, "not valid JSON"),
    ("config list", "config.json", b"[]", "expected a JSON object"),
    ("config not UTF-8", "config.json", b"\xff", "not valid JSON"),
    ("config long number", "config.json", b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
    ("config huge", "config.json", b" " * 2_000_000, "larger than"),
    ("index cut", _INDEX, b'{"weight_map"', "not valid JSON"),
    ("index deep", _INDEX, b"[" * 200_000, "not valid JSON"),
    ("index list", _INDEX, b"[]", "expected a JSON object"),
    ("index without map", _INDEX, b"{}", "weight_map must be"),
    (
        "index of a long name",
        _INDEX,
        b'{"weight_map": {"a": "' + b"x" * 100_000 + b'"}}',
        r"x' is not a plain file name of at most 255 bytes",
    ),
    ("index of numbers", _INDEX, b'{"weight_map": {"a": 5}}', "weight_map must be"),
    ("index of lists", _INDEX, b'{"weight_map": {"a": ["b"]}}', "weight_map must be"),
    *(
        (f"index names {name!r}", _INDEX, json.dumps({"weight_map": {"a": name}}).encode(), "plain")
        for name in ("../x.safetensors", "/etc/passwd", "a/b", "..", ".", "", "a\\b")
    ),
    ("index names no file", _INDEX, b'{"weight_map": {"a": "b"}}', "cannot read|not a whole"),
    ("weights empty", _SHARD, b"", "not a whole safetensors file|cannot read"),
    ("weights cut in length", _SHARD, b"\x01\x00", "not a whole"),
    ("header of 2^64", _SHARD, _header({}, 2**64 - 1), "not a whole"),
    ("header of 2^40", _SHARD, _header({}, 2**40), "not a whole"),
    ("header past the end", _SHARD, _header({}, 50), "not a whole"),
    ("header of a long text", _SHARD, _header({"a": "1" * 100_000}), "not a whole"),
    ("header not JSON", _SHARD, _header(b"pickle!!"), "not a whole"),
    ("header deep", _SHARD, _header(b"[" * 100_000), "not a whole"),
    ("header list", _SHARD, _header([]), "not a whole"),
    ("header not UTF-8", _SHARD, _header(b"\xff" * 8), "not a whole"),
    ("pickle", _SHARD, b"\x80\x04\x95" + bytes(64), "not a whole"),
    ("zip of torch", _SHARD, b"PK\x03\x04" + bytes(64), "not a whole"),
    ("unknown dtype", _SHARD, _tensor("X9"), "not a whole"),
    ("integer weights", _SHARD, _tensor("I32"), "dtype I32"),
    ("negative shape", _SHARD, _tensor(shape=[-1]), "not a whole"),
    ("shape overflows", _SHARD, _tensor(shape=[2**62, 2**62]), "not a whole"),
    ("shape larger than data", _SHARD, _tensor(shape=[5]), "not a whole"),
    ("offsets backward", _SHARD, _tensor(offsets=[4, 0]), "not a whole"),
    ("offsets past the end", _SHARD, _tensor(shape=[2], offsets=[0, 8]), "not a whole"),
    ("metadata of numbers", _SHARD, _header({"__metadata__": {"a": 5}}), "not a whole"),
    ("no tensors", _SHARD, _header({}), "disagrees with the files"),
]

MODELS: list[Case] = [
    *_FILES,
    *(
        (f"{key} is {str(v)[:30]}", "config.json", json.dumps({**CONFIG, key: v}).encode(), key)
        for key, values in _WRONG.items()
        for v in values
    ),
]
