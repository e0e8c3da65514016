"""Content of files changed at random: bytes, and JSON whose values are replaced by hostile ones."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

from unit.test_readers_fuzz import mutate

from megatron_sdar.checkpoint.checksums import Checksum

_DEEP = "[" * 100_000
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 0.5, -0.0, 1e308,
    float("inf"), float("nan"), "", "x", "x" * 3000, "../x", "/etc/passwd", "a\0b", "\ud800",
    "\x1b[2J", "\u202e", [], {}, [[]], [None], [0], ["x"], [-1], [2**62, 2**62], {"a": 1}, {"": {}},
    [[[[[[1]]]]]], {"a": {"b": {"c": []}}},
)  # fmt: skip


def hostile_bytes(content: bytes, seed: int) -> bytes:
    """One to four bytes or runs of bytes changed, left out, put in, or all behind one cut off."""
    return mutate(content, seed)


def hostile_json(content: bytes, seed: int) -> bytes:
    """One to three places of a JSON text replaced, removed, doubled or nested deeply."""
    draw = random.Random(seed)
    value = json.loads(content)
    for _ in range(draw.randint(1, 3)):
        value = _changed(value, draw)
    text = json.dumps(value)
    if draw.randrange(12) == 0:
        text = text.replace("1", _DEEP, 1)
    if draw.randrange(12) == 0:
        text = text.replace("1", "1" * 5000, 1)
    return text.encode("utf-8")


def hostile_header(content: bytes, seed: int) -> bytes:
    """A safetensors file with such a header, whose length is true or hostile."""
    (length,) = struct.unpack("<Q", content[:8])
    header = hostile_json(content[8 : 8 + length], seed)
    draw = random.Random(seed + 1)
    stated = draw.choice([len(header)] * 6 + [0, 2**40, 2**60, 2**64 - 1])
    return struct.pack("<Q", stated) + header + content[8 + length :]


def hostile_index(content: bytes, seed: int) -> bytes:
    """An .idx with numbers of header or body replaced."""
    draw = random.Random(seed)
    changed = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        number = draw.choice([0, 1, 2**31 - 1, 2**50, 2**63 - 1, 2**64 - 1, draw.randrange(2**64)])
        place = draw.choice([9, 17, 18, 26, draw.randrange(34, len(content) - 8)])
        changed[place : place + 8] = struct.pack("<Q", number)
    return bytes(changed)


def hostile_marker(content: bytes, seed: int) -> bytes:
    """A COMMITTED that vouches for its hostile values with a true checksum."""
    fields = json.loads(content)
    del fields["checksum"]
    try:
        fields = json.loads(hostile_json(json.dumps(fields).encode(), seed))
    except (ValueError, RecursionError):
        return hostile_json(content, seed)
    if not isinstance(fields, dict):
        return json.dumps(fields).encode()
    own = Checksum()
    own.update(json.dumps(fields).encode())
    signed = {**fields, "checksum": own.record().xxh3_128}
    return json.dumps(signed, indent=2).encode() + b"\n"


def _changed(value: Any, draw: random.Random) -> Any:
    """A copy with one place changed, of any depth."""
    if isinstance(value, dict) and value and draw.randrange(8):
        key = draw.choice(list(value))
        changed = dict(value)
        match draw.randrange(8):
            case 0:
                del changed[key]
            case 1:
                changed[draw.choice(["", "x", "../x", "\0", "a" * 300])] = changed.pop(key)
            case 2:
                changed["unknown"] = draw.choice(VALUES)
            case _:
                changed[key] = _changed(value[key], draw)
        return changed
    if isinstance(value, list) and value and draw.randrange(8):
        place = draw.randrange(len(value))
        middle = [_changed(value[place], draw)] * draw.choice([0, 1, 1, 1, 2])
        return [*value[:place], *middle, *value[place + 1 :]]
    return draw.choice(VALUES)
