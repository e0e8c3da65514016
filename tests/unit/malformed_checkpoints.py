"""Files of a checkpoint that must be refused: (name, file, content, words)."""

import json

from unit.malformed_configs import Case


def _index(dtype: object = "F32", shape: object = (2,), **chunk: object) -> bytes:
    whole = {"file": "shard-00000.safetensors", "offset": [0], "shape": [2]}
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "chunks": [whole | chunk]}}).encode()


_BROKEN = [
    ("cut", b'{"a": '),
    ("deep", b"[" * 200_000),
    ("not UTF-8", b"\xff"),
    ("long number", b'{"a": ' + b"1" * 5000 + b"}"),
    ("list", b"[]"),
    ("number", b"5"),
]

CHECKPOINTS: list[Case] = [
    *((f"{file} {name}", file, text, file) for file in ("index.json", "COMMITTED")
      for name, text in _BROKEN),
    ("index entry is a number", "index.json", b'{"a": 5}', "not an index"),
    ("index entry is empty", "index.json", b'{"a": {}}', "not an index"),
    ("dtype unknown", "index.json", _index("I7"), "not an index"),
    ("dtype is a list", "index.json", _index(["F32"]), "not an index"),
    ("shape is text", "index.json", _index(shape="ab"), "not an index"),
    ("shape is negative", "index.json", _index(shape=[-2]), "not an index"),
    ("offset is negative", "index.json", _index(offset=[-2]), "negative"),
    ("offset is 2^70", "index.json", _index(offset=[2**70]), "cannot read it"),
    ("chunk file is a number", "index.json", _index(file=5), "file must be a name"),
    ("chunk file is a list", "index.json", _index(file=["a"]), "file must be a name"),
    ("chunks are missing", "index.json", b'{"a": {"dtype": "F32", "shape": [2]}}', "not an index"),
    ("no chunk", "index.json", b'{"a": {"dtype": "F32", "shape": [2], "chunks": []}}', "gap"),
    ("gap", "index.json", _index(shape=[3]), "cannot read it"),
    ("marker of another version", "COMMITTED", b'{"format_version": 99}', "format_version is 99"),
    ("marker version is a list", "COMMITTED", b'{"format_version": []}', r"format_version is \[\]"),
    ("marker without files", "COMMITTED", b"{}", "format_version is None"),
]  # fmt: skip
ESCAPES = ("../outside", "/etc/passwd", "model/../../outside", "link")
CHUNK_ESCAPES = {name: _index(file=name) for name in ("../a.safetensors", "/etc/passwd", "a/b")}
