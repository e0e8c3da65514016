"""Malformed checkpoint files and names that lead out of a checkpoint: refused by name."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from unit.malformed_checkpoints import CHECKPOINTS, CHUNK_ESCAPES, ESCAPES
from unit.malformed_configs import Case
from unit.test_malformed_inputs import ids, refused

from megatron_sdar.checkpoint.checksums import FileRecord, file_record
from megatron_sdar.checkpoint.run_directory import Marker, read_marker, write_marker
from megatron_sdar.checkpoint.shards import ShardedTensors


def marker(name: str, record: FileRecord) -> Marker:
    return Marker(1, 0, False, False, {}, {name: record})


@pytest.mark.parametrize("case", CHECKPOINTS, ids=ids(CHECKPOINTS))
def test_checkpoint_file(tmp_path: Path, case: Case) -> None:
    _, file, content, words = case
    (tmp_path / file).write_bytes(content)
    read = read_marker if file == "COMMITTED" else ShardedTensors
    refused(lambda: read(tmp_path), words, file, "shard-00000.safetensors")


@pytest.mark.parametrize("name", CHUNK_ESCAPES)
def test_a_chunk_lies_in_its_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / "index.json").write_bytes(CHUNK_ESCAPES[name])

    def read() -> None:
        ShardedTensors(tmp_path).read("a", (slice(0, 2),))

    refused(read, "not a plain file name", str(tmp_path))


@pytest.mark.parametrize("name", ESCAPES)
def test_a_marker_names_files_of_its_checkpoint(tmp_path: Path, name: str) -> None:
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / "model").mkdir(parents=True)
    (tmp_path / "outside").write_bytes(b"secret")
    (checkpoint / "link").symlink_to(tmp_path / "outside")
    write_marker(checkpoint, marker(name, file_record(checkpoint / name)))
    refused(lambda: read_marker(checkpoint), "outside of the checkpoint", "COMMITTED")


@pytest.mark.parametrize(
    "changes", [{"sequence": "x"}, {"step": -1}, {"step": True}, {"tied": 1}, {"sequence": 2**70}],
    ids=str,
)  # fmt: skip
def test_a_marker_with_a_true_checksum_and_wrong_types(tmp_path: Path, changes: dict) -> None:
    (tmp_path / "inside").write_bytes(b"weights")
    good = marker("inside", file_record(tmp_path / "inside"))
    write_marker(tmp_path, replace(good, **changes))
    refused(lambda: read_marker(tmp_path), "a value is of the wrong type", "COMMITTED")


def test_files_within_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "inside").write_bytes(b"weights")
    os.symlink("inside", tmp_path / "link")
    write_marker(tmp_path, marker("link", file_record(tmp_path / "link")))
    assert set(read_marker(tmp_path).files) == {"link"}
