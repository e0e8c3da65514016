"""Small files read whole: what is no regular file, or too large, is named; nothing blocks."""

import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from unit.test_malformed_inputs import bounded
from unit.tool_refusals import with_option
from unit.tool_runs import run_tool
from unit.tool_workplace import Workplace

from megatron_sdar.regular_files import (
    IrregularFileError,
    check_regular,
    read_json,
    read_regular,
    read_regular_text,
    shown,
)

READERS: list[Callable[[Path], object]] = [read_regular, read_regular_text, read_json]
READERS.append(lambda path: check_regular(path, 2**20))


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("kind", "words"),
    [("pipe", "a named pipe"), ("folder", "a folder"), ("device", "a device"),
     ("socket", "a socket"), ("endless", "larger than")],
)  # fmt: skip
def test_irregular(tmp_path: Path, read: Callable, kind: str, words: str) -> None:
    path = tmp_path / "x.json"
    with socket.socket(socket.AF_UNIX) as server:
        match kind:
            case "pipe":
                os.mkfifo(path)
            case "folder":
                path.mkdir()
            case "device":
                path.symlink_to("/dev/zero")
            case "socket":
                server.bind(str(path))
            case _:
                path.touch()
                os.truncate(path, 2**40)
        # A socket cannot even be opened, which is an OSError that says so.
        with bounded(), pytest.raises((IrregularFileError, OSError)) as caught:
            read(path)
    assert str(path) in str(caught.value)
    if isinstance(caught.value, IrregularFileError):
        assert words in str(caught.value)
    else:
        assert kind == "socket"


@pytest.mark.parametrize("size", [0, 1, 10])
def test_up_to_the_limit(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"a" * size)
    link = tmp_path / "link"
    link.symlink_to("x")
    assert read_regular(path, size) == read_regular(link, size) == b"a" * size
    check_regular(link, size)
    path.write_bytes(b"a" * (size + 1))
    with pytest.raises(IrregularFileError, match=f"{size + 1} bytes, larger than the {size} that"):
        read_regular(path, size)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "absent")


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 10**6, b"1" * 5000, b'{"a": \x01}'])
def test_not_json(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with bounded(), pytest.raises(ValueError, match=r"x\.json: not valid JSON") as caught:
        read_json(path)
    assert caught.type is ValueError


def test_a_value_in_a_message() -> None:
    assert shown("a\n") == r"'a\n'"
    assert len(shown("x" * 10**6)) < 250
    assert shown("x" * 10**6).endswith("...")


# Hostile numbers and depths, in a process whose memory may grow by little.

_LITTLE = 400 * 2**20
_NESTED = b"[" * 10**6
_SHAPE = json.dumps({"a": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 4]}})
_HEADERS = (
    struct.pack("<Q", 2**60) + b"{}",
    struct.pack("<Q", 90_000_000) + b"{}",
    struct.pack("<Q", len(_SHAPE)) + _SHAPE.encode() + bytes(4),
)
_IDX = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 2**50, 2**50 + 1) + bytes(64)
HOSTILE = [
    *(("convert_checkpoint", "model/layer-0-ep-0-of-1.safetensors", content)
      for content in _HEADERS),
    ("inspect_data", "tokens.idx", _IDX),
    ("inspect_data", "tokens.labels.idx", _IDX),
    ("inspect_data", "tokens.json", _NESTED),
    ("inspect_data", "model/tokenizer.json", _NESTED),
    ("inspect_data", "model/tokenizer_config.json", _NESTED),
    ("preprocess_data", "dataset_info.json", _NESTED),
    ("preprocess_data", "d.jsonl", _NESTED),
    ("merge_adapter", "lora/adapter_config.json", _NESTED),
    ("convert_checkpoint", "model/config.json", _NESTED),
    ("convert_checkpoint", "model/model.safetensors.index.json", _NESTED),
    ("explain_config", "again.yaml", _NESTED),
]  # fmt: skip


@pytest.mark.parametrize(("tool", "file", "content"), HOSTILE, ids=range(len(HOSTILE)))
def test_in_little_memory(
    workplace: Workplace, tmp_path: Path, tool: str, file: str, content: bytes
) -> None:
    place = workplace.copy(tmp_path / "place")
    place.spoil(file, content)
    arguments = with_option(place.arguments(tool), "--from", "model")
    outcome = run_tool(tool, arguments, place.root, extra_bytes=_LITTLE, seconds=20)
    assert outcome.problem(Path(file).name) is None, outcome.text
