"""Flipped bits: each is found before anything is used, and named by its file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex
from unit.tiny_hf import (
    local_weights,
    make_config,
    make_optimizer,
    make_stages,
    resign,
    write_model,
)

from megatron_sdar.checkpoint import dcp_storage, run_directory, safetensors_files, verification
from megatron_sdar.checkpoint.checksums import FileRecord, file_record
from megatron_sdar.checkpoint.dcp_storage import ShardStorageReader, ShardStorageWriter
from megatron_sdar.checkpoint.native import load_checkpoint, save_checkpoint
from megatron_sdar.checkpoint.resumption import resume_candidates
from megatron_sdar.checkpoint.run_directory import (
    DamagedCheckpointError,
    commit,
    read_marker,
)
from megatron_sdar.checkpoint.safetensors_files import SafetensorsReader
from megatron_sdar.checkpoint.shards import write_shard
from megatron_sdar.checkpoint.verification import share_of_files
from megatron_sdar.training.checkpoints import resume

pytestmark = pytest.mark.usefixtures("single_process")

EVERY_KIND = [
    "model/shard-00000.safetensors",
    "model/index.json",
    "optimizer/shard-00000.safetensors",
    "optimizer/index.json",
    "trainer_state.json",
    "config.yaml",
    "hf/config.json",
    "hf/vocab.json",
    "COMMITTED",
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "model"
    write_model(directory)
    return directory


def save(model_dir: Path, run: Path, step: int) -> Path:
    """A checkpoint in which every weight and moment is `step`."""
    stages, arch, mesh = make_stages(model_dir)
    optimizer = make_optimizer(stages)
    fill(stages, optimizer, step)
    state = {"loader": {"position": step}}
    config = make_config(run)
    return save_checkpoint(run, step, stages, optimizer, state, config, arch, mesh, [model_dir])


def fill(stages: list, optimizer: Any, value: float) -> None:
    for tensor in [*stages[0].parameters(), *optimizer.moments().values()]:
        tensor._local_tensor.fill_(value)


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(bytes(content))


def untouched(model_dir: Path) -> tuple[list, Any]:
    """A model and moments full of -1."""
    stages, _, _ = make_stages(model_dir)
    optimizer = make_optimizer(stages)
    fill(stages, optimizer, -1)
    return stages, optimizer


def complaint_of_loading(path: Path, model_dir: Path) -> str:
    """The error, before which nothing was filled."""
    stages, optimizer = untouched(model_dir)
    with pytest.raises(DamagedCheckpointError) as caught:
        load_checkpoint(path, stages, optimizer)
    assert all((tensor == -1).all() for tensor in local_weights(stages).values())
    assert all((m._local_tensor == -1).all() for m in optimizer.moments().values())
    return str(caught.value)


# Every kind of file, at its beginning, in its middle and at its end.


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", EVERY_KIND)
def test_a_flipped_bit_is_named_by_its_file(
    model_dir: Path, tmp_path: Path, name: str, where: float
) -> None:
    path = save(model_dir, tmp_path / "run", 5)
    flip(path / name, int(where * (file_record(path / name).num_bytes - 1)))
    complaint = complaint_of_loading(path, model_dir)
    assert complaint.startswith(f"{path / name}: ")
    assert "\n" not in complaint, "one file is damaged"


def test_header_and_data_of_a_shard_are_both_among_those(model_dir: Path, tmp_path: Path) -> None:
    """The positions above reach both parts of a shard."""
    shard = save(model_dir, tmp_path / "run", 5) / EVERY_KIND[0]
    (length,) = struct.unpack("<Q", shard.read_bytes()[:8])
    assert 0 < 8 + length < shard.stat().st_size // 2


def test_every_damaged_file_has_a_line(model_dir: Path, tmp_path: Path) -> None:
    path = save(model_dir, tmp_path / "run", 5)
    for name in ("optimizer/index.json", "trainer_state.json"):
        flip(path / name, 3)
    lines = complaint_of_loading(path, model_dir).splitlines()
    assert sorted(line.partition(": ")[0] for line in lines) == [
        str(path / "optimizer/index.json"),
        str(path / "trainer_state.json"),
    ]
    assert all("its checksum is" in line for line in lines)


def test_a_flipped_bit_anywhere_in_the_marker_is_noticed(model_dir: Path, tmp_path: Path) -> None:
    path = save(model_dir, tmp_path / "run", 5)
    marker = path / "COMMITTED"
    for position in range(0, marker.stat().st_size, 5):
        flip(marker, position, bit=position % 8)
        with pytest.raises(DamagedCheckpointError, match="COMMITTED"):
            read_marker(path)
        flip(marker, position, bit=position % 8)
    assert read_marker(path).step == 5


def test_marker_made_valid_by_hand_still_needs_its_checksum(
    model_dir: Path, tmp_path: Path
) -> None:
    path = save(model_dir, tmp_path / "run", 5)
    content = json.loads((path / "COMMITTED").read_text())
    (path / "COMMITTED").write_text(json.dumps({**content, "step": 6}, indent=2) + "\n")
    with pytest.raises(DamagedCheckpointError, match="checksum that it states of itself"):
        read_marker(path)


def test_without_a_resume_moments_do_not_matter(model_dir: Path, tmp_path: Path) -> None:
    path = save(model_dir, tmp_path / "run", 5)
    flip(path / "optimizer/shard-00000.safetensors", 1000)
    stages, _, _ = make_stages(model_dir)
    load_checkpoint(path, stages, None)
    assert all((tensor == 5).all() for tensor in local_weights(stages).values())


def test_not_verifying_reads_nothing_but_compares_sizes(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(model_dir, tmp_path / "run", 5)
    shard = path / "model/shard-00000.safetensors"
    flip(shard, shard.stat().st_size - 1, bit=6)
    monkeypatch.setattr(verification, "damaged_files", pytest.fail)
    stages, optimizer = untouched(model_dir)
    load_checkpoint(path, stages, optimizer, verify=False)
    differing = sum(int((t != 5).sum()) for t in local_weights(stages).values())
    assert differing == 1, "the flipped bit got in, as was asked for"
    with shard.open("ab") as file:
        file.write(b"x")
    with pytest.raises(DamagedCheckpointError, match="bytes, should have"):
        load_checkpoint(path, stages, None, verify=False)


# Who reads what.


def test_files_are_shared_out_by_bytes() -> None:
    sizes = {"a": 700, "b": 400, "c": 300, "d": 300, "e": 1, "f": 1, "g": 0}
    files = {name: FileRecord(size, "") for name, size in sizes.items()}
    for world_size in (1, 2, 3, 9):
        shares = [share_of_files(files, rank, world_size) for rank in range(world_size)]
        assert sorted(name for share in shares for name in share) == sorted(files), "each once"
        loads = [sum(record.num_bytes for record in share.values()) for share in shares]
        assert max(loads) <= max(700, -(-1702 // world_size) + 300)
    assert max(loads) == 700


def test_each_file_is_read_once(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(model_dir, tmp_path / "run", 5)
    seen: list[str] = []

    def spy(_: Path, files: dict, advance: Callable[[int], None]) -> list[str]:
        seen.extend(files)
        return []

    monkeypatch.setattr(verification, "damaged_files", spy)
    load_checkpoint(path, *untouched(model_dir))
    assert sorted(seen) == sorted(read_marker(path).files)


def test_reading_them_shows_progress(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(model_dir, tmp_path / "run", 5)
    bars: list[tuple[str, int, bool]] = []
    read: list[int] = []

    @contextmanager
    def spy(label: str, total: int, enabled: bool) -> Iterator[Callable[[int], None]]:
        bars.append((label, total, enabled))
        yield read.append

    monkeypatch.setattr(verification, "byte_progress", spy)
    load_checkpoint(path, *untouched(model_dir))
    total = sum(record.num_bytes for record in read_marker(path).files.values())
    assert bars == [("checking checkpoint-5", total, True)]
    assert sum(read) == total


# What is written down was taken while writing.


def test_shards_are_not_read_again_after_a_save(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def spy(path: Path) -> FileRecord:
        read.append(path.name)
        return file_record(path)

    monkeypatch.setattr(run_directory, "file_record", spy)
    path = save(model_dir, tmp_path / "run", 5)
    monkeypatch.undo()
    assert "index.json" in read
    assert not any(name.endswith(".safetensors") for name in read)
    for name, record in read_marker(path).files.items():
        assert file_record(path / name) == record, name


def test_a_file_that_changed_its_size_after_writing_is_an_error(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lossy(*arguments: Any) -> FileRecord | None:
        record = write_shard(*arguments)
        assert record is not None
        return replace(record, num_bytes=record.num_bytes + 7)

    monkeypatch.setattr(dcp_storage, "write_shard", lossy)
    with pytest.raises(ValueError, match=r"model/shard-00000.safetensors \(\d+ bytes, should have"):
        save(model_dir, tmp_path / "run", 5)
    assert list((tmp_path / "run").iterdir()) == []
    (tmp_path / "a").write_text("abc")
    with pytest.raises(ValueError, match=r"b \(missing, should have 3\)"):
        commit(
            tmp_path,
            step=1,
            sequence=0,
            has_optimizer=False,
            tied=False,
            layout={},
            known={"a": file_record(tmp_path / "a"), "b": file_record(tmp_path / "a")},
        )


# Which checkpoint a run goes on from.


def run_resume(run: Path, model_dir: Path, asked: bool | str | None = None) -> tuple:
    """What resume() takes, the state it returns and what it says."""
    stages, _, _ = make_stages(model_dir)
    optimizer = make_optimizer(stages)
    said: list[str] = []
    training = replace(make_config(run).training, resume_from_checkpoint=asked)
    candidates = resume_candidates(run, asked, False)
    step: Any = SimpleNamespace(stages=stages, optimizer=optimizer)
    resumed = resume(candidates, training, step, said.append)
    weight = float(next(iter(local_weights(stages).values())).flatten()[0])
    assert weight == resumed.state["step"] == resumed.state["loader"]["position"]
    assert list(resumed.damaged) == candidates[: len(said)]
    return resumed.path, said


@pytest.mark.parametrize("asked", [None, True])
def test_damage_sends_the_run_to_the_next_older_one(
    model_dir: Path, tmp_path: Path, asked: bool | None
) -> None:
    run = tmp_path / "run"
    paths = [save(model_dir, run, step) for step in (5, 10, 15)]
    assert run_resume(run, model_dir, asked) == (paths[2], [])
    flip(paths[2] / "optimizer/shard-00000.safetensors", 5000)
    flip(paths[2] / "trainer_state.json", 5)
    flip(paths[1] / "model/index.json", 50)
    path, said = run_resume(run, model_dir, asked)
    assert path == paths[0]
    assert len(said) == 2
    assert said[0].startswith(f"passed over: {paths[2] / 'optimizer/shard-00000.safetensors'}: ")
    assert said[0].endswith("(and 1 more)")
    assert said[1].startswith(f"passed over: {paths[1] / 'model/index.json'}: damaged")
    assert not any("\n" in line for line in said)


def test_damaged_marker_too(model_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    paths = [save(model_dir, run, step) for step in (5, 10)]
    flip(paths[1] / "COMMITTED", 100)
    assert run_resume(run, model_dir) == (paths[0], [])


@pytest.mark.parametrize("asked", [None, True])
@pytest.mark.parametrize("name", ["model/shard-00000.safetensors", "COMMITTED"])
def test_none_left_never_starts_afresh(
    model_dir: Path, tmp_path: Path, name: str, asked: bool | None
) -> None:
    run = tmp_path / "run"
    paths = [save(model_dir, run, step) for step in (5, 10)]
    for path in paths:
        flip(path / name, 200)
    with pytest.raises(ValueError) as caught:
        run_resume(run, model_dir, asked)
    assert all(str(path / name) in str(caught.value) for path in paths)
    assert resume_candidates(run, None, True) == [], "unless that is asked for"


@pytest.mark.parametrize("name", ["model/shard-00000.safetensors", "COMMITTED"])
def test_a_path_is_not_replaced_by_another(model_dir: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    paths = [save(model_dir, run, step) for step in (5, 10, 15)]
    flip(paths[1] / name, 200)
    with pytest.raises(ValueError) as caught:
        run_resume(run, model_dir, str(paths[1]))
    assert str(caught.value).startswith(f"resume_from_checkpoint: {paths[1] / name}: ")
    assert str(caught.value).endswith(f"; {paths[2]} is complete")
    for path in (paths[0], paths[2]):
        flip(path / "COMMITTED", 200)
    with pytest.raises(ValueError, match="there is no other complete one beside it"):
        run_resume(run, model_dir, str(paths[1]))


def test_what_cannot_be_resumed_for_another_reason_is_not_passed_over(
    model_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    save(model_dir, run, 5)
    path = save(model_dir, run, 10)
    index = json.loads((path / "model/index.json").read_text())
    del index["model.norm.weight"]
    (path / "model/index.json").write_text(json.dumps(index))
    resign(path)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: missing"):
        run_resume(run, model_dir)


# Reading into place.


def test_slices_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(60 * 7.0).reshape(60, 7)
    dcp.save({"a": values}, storage_writer=ShardStorageWriter(tmp_path))
    monkeypatch.setattr(safetensors_files, "BLOCK_BYTES", 5 * 7 * 4)
    rows: list[int] = []
    read = SafetensorsReader.read

    def spy(self: SafetensorsReader, name: str, ranges: tuple[slice, ...]) -> torch.Tensor:
        rows.append(ranges[0].stop - ranges[0].start)
        return read(self, name, ranges)

    monkeypatch.setattr(SafetensorsReader, "read", spy)
    target = {"a": torch.zeros(60, 7)}
    dcp.load(target, storage_reader=ShardStorageReader(tmp_path))
    assert torch.equal(target["a"], values)
    assert rows == [5] * 12
    reader = ShardStorageReader(tmp_path)
    reader.set_up_storage_reader(reader.read_metadata(), True)
    inner = torch.zeros(21, 3)
    reader._fill(inner, MetadataIndex("a", (0, 0)), (7, 2))
    assert torch.equal(inner, values[7:28, 2:5])
