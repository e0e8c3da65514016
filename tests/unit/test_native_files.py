"""Native checkpoints on disk: strict loading, torn saves, resume rules, pruning."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from unit.tiny_hf import (
    local_weights,
    make_config,
    make_optimizer,
    make_stages,
    random_tensors,
    resign,
    write_model,
)

from megatron_sdar.checkpoint import dcp_storage, native, run_directory
from megatron_sdar.checkpoint.agreement import dcp_errors_as_value_errors
from megatron_sdar.checkpoint.dcp_storage import ShardStorageReader, ShardStorageWriter
from megatron_sdar.checkpoint.native import load_checkpoint, save_checkpoint
from megatron_sdar.checkpoint.resumption import resume_candidates
from megatron_sdar.checkpoint.run_directory import (
    incomplete_checkpoints,
    latest_checkpoint,
    prune_checkpoints,
)
from megatron_sdar.checkpoint.safetensors_files import (
    SafetensorsReader,
    SafetensorsWriter,
    TensorInfo,
)
from megatron_sdar.checkpoint.shards import Chunk, ShardedTensors, write_index, write_shard
from megatron_sdar.config import load_config

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    return tmp_path / "model"


def save(
    model_dir: Path,
    output_dir: Path,
    step: int = 5,
    with_optimizer: bool = True,
    dtype: torch.dtype = torch.float32,
    state: dict | None = None,
) -> Path:
    stages, arch, mesh = make_stages(model_dir, dtype)
    optimizer = make_optimizer(stages) if with_optimizer else None
    if optimizer is not None:
        for index, moment in enumerate(optimizer.moments().values()):
            moment._local_tensor.fill_(index)
    return save_checkpoint(
        output_dir,
        step,
        stages,
        optimizer,
        {"loader": {"epoch": 3}} if state is None else state,
        make_config(output_dir),
        arch,
        mesh,
        [model_dir, model_dir],
    )


def load_complaint(path: Path, model_dir: Path, resume: bool = True, **options: object) -> str:
    stages, _, _ = make_stages(model_dir, **options)
    with pytest.raises(ValueError) as caught:
        load_checkpoint(path, stages, make_optimizer(stages) if resume else None)
    return str(caught.value)


# What is in a checkpoint.


def test_round_trip(model_dir: Path, tmp_path: Path) -> None:
    path = save(model_dir, tmp_path / "run")
    assert path == tmp_path / "run/checkpoint-5"
    stages, _, _ = make_stages(model_dir)
    expected = local_weights(stages)
    for parameter in stages[0].parameters():
        parameter._local_tensor.fill_(-1)
    optimizer = make_optimizer(stages)
    assert load_checkpoint(path, stages, optimizer) == {"loader": {"epoch": 3}, "step": 5}
    for name, tensor in local_weights(stages).items():
        assert torch.equal(tensor, expected[name]), name
    for index, moment in enumerate(optimizer.moments().values()):
        assert (moment._local_tensor == index).all()
    steps = {float(state["step"]) for state in optimizer.optimizer.state.values()}
    assert steps == {5.0}


def test_only_safe_formats_and_everything_beside_the_weights(
    model_dir: Path, tmp_path: Path
) -> None:
    path = save(model_dir, tmp_path / "run")
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert files == {
        "COMMITTED",
        "config.yaml",
        "trainer_state.json",
        "model/index.json",
        "model/shard-00000.safetensors",
        "optimizer/index.json",
        "optimizer/shard-00000.safetensors",
        "hf/config.json",
        "hf/tokenizer_config.json",
        "hf/vocab.json",
        "hf/merges.txt",
        "hf/chat_template.jinja",
        "hf/generation_config.json",
        "hf/LICENSE",
    }
    assert (path / "hf/tokenizer_config.json").read_bytes() == b'{"a": 1}\r\n'
    assert load_config([str(path / "config.yaml")]) == make_config(tmp_path / "run")
    marker = json.loads((path / "COMMITTED").read_text())
    assert marker["layout"] == {"tp": 1, "pp": 1, "dp": 1}
    assert set(marker["files"]) == files - {"COMMITTED"}


def test_state_that_json_cannot_hold_becomes_null(model_dir: Path, tmp_path: Path) -> None:
    state = {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": 1}}
    path = save(model_dir, tmp_path / "run", with_optimizer=False, state=state)
    stages, _, _ = make_stages(model_dir)
    loaded = load_checkpoint(path, stages, None)
    assert loaded == {"a": None, "b": [1.5, None], "c": {"d": 1}, "step": 5}


def test_torch_distributed_checkpoint_reads_the_files(model_dir: Path, tmp_path: Path) -> None:
    path = save(model_dir, tmp_path / "run")
    stages, _, _ = make_stages(model_dir)
    expected = local_weights(stages)
    target = {name: torch.full_like(tensor, -1) for name, tensor in expected.items()}
    reader = dcp.HuggingFaceStorageReader(str(path / "model"))
    dcp.load(target, storage_reader=reader)
    for name, tensor in expected.items():
        assert torch.equal(target[name], tensor), name


# The storage, as DCP sees it.


def test_storage_moves_with_the_checkpoint_id(tmp_path: Path) -> None:
    first, second = ({"a": torch.full((3, 2), value), "b": torch.ones(4)} for value in (1.0, 2.0))
    writer = ShardStorageWriter(tmp_path / "first")
    dcp.save(first, storage_writer=writer)
    dcp.save(second, storage_writer=writer, checkpoint_id=tmp_path / "deep/second")
    reader = ShardStorageReader(tmp_path / "first")
    target = {"a": torch.zeros(3, 2), "b": torch.zeros(4, dtype=torch.float64)}
    dcp.load(target, storage_reader=reader)
    assert torch.equal(target["a"], first["a"])
    assert torch.equal(target["b"], torch.ones(4, dtype=torch.float64)), "cast to the target's"
    dcp.load(target, storage_reader=reader, checkpoint_id=str(tmp_path / "deep/second"))
    assert torch.equal(target["a"], second["a"])
    files = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert files == ["index.json", "shard-00000.safetensors"]
    with pytest.raises(ValueError, match=r"gone/index\.json: cannot read it"):
        reader.reset(tmp_path / "gone")


@pytest.mark.parametrize("storage", [ShardStorageWriter, ShardStorageReader])
def test_storage_is_for_paths(storage: type, tmp_path: Path) -> None:
    assert storage.validate_checkpoint_id(tmp_path)
    assert storage.validate_checkpoint_id("runs/checkpoint-5/model")
    assert not storage.validate_checkpoint_id("s3://bucket/model")


def test_rank_that_does_not_see_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardStorageWriter, "set_up_storage_writer", lambda *_: None)
    writer = ShardStorageWriter(tmp_path / "elsewhere")
    with (
        pytest.raises(ValueError, match=r"elsewhere: not there on every machine; every process"),
        dcp_errors_as_value_errors(),
    ):
        dcp.save({"a": torch.ones(2)}, storage_writer=writer)


def test_shards_that_the_coordinator_does_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even a tensor of which no piece at all is there is missed."""
    monkeypatch.setattr(dcp_storage, "write_shard", lambda *_: None)
    with (
        pytest.raises(ValueError, match=r"model: a has 0 of 2 elements there; every process"),
        dcp_errors_as_value_errors(),
    ):
        dcp.save({"a": torch.ones(2)}, storage_writer=ShardStorageWriter(tmp_path / "model"))
    assert not (tmp_path / "model/index.json").exists()


def test_a_bug_is_not_passed_off_as_a_user_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object) -> None:
        raise AssertionError("an invariant of ours")

    monkeypatch.setattr(dcp_storage, "write_shard", bug)
    with (
        pytest.raises(dcp.CheckpointException, match=r"line(.|\n)*an invariant of ours"),
        dcp_errors_as_value_errors(),
    ):
        dcp.save({"a": torch.ones(2)}, storage_writer=ShardStorageWriter(tmp_path / "model"))


# Loading is strict.


def test_other_layers_and_other_padding_are_refused(model_dir: Path, tmp_path: Path) -> None:
    path = save(model_dir, tmp_path / "run")
    write_model(tmp_path / "small", num_hidden_layers=3)
    text = load_complaint(path, tmp_path / "small")
    assert "model.layers.3.mlp.up_proj.weight: unexpected" in text
    write_model(tmp_path / "big", num_hidden_layers=6)
    text = load_complaint(path, tmp_path / "big")
    assert "model.layers.{4-5}.mlp.up_proj.weight: missing" in text
    text = load_complaint(path, model_dir, divisor=128)
    assert "model.embed_tokens.weight: has shape [136, 48], expected [256, 48]" in text
    assert "136 rows were saved and this run pads 131 to 256; set make_vocab_size_div" in text


def test_moments_that_do_not_fit_are_refused(model_dir: Path, tmp_path: Path) -> None:
    path = save(model_dir, tmp_path / "run")
    index = path / "optimizer/index.json"
    content = json.loads(index.read_text())
    del content["model.norm.weight.exp_avg_sq"]
    index.write_text(json.dumps(content))
    resign(path)
    assert "model.norm.weight.exp_avg_sq: missing" in load_complaint(path, model_dir)


def test_resume_needs_moments_but_step_zero_does_not(model_dir: Path, tmp_path: Path) -> None:
    path = save(model_dir, tmp_path / "run", with_optimizer=False)
    assert "holds no optimizer state" in load_complaint(path, model_dir)
    path = save(model_dir, tmp_path / "run", step=0, with_optimizer=False)
    stages, _, _ = make_stages(model_dir)
    optimizer = make_optimizer(stages)
    for moment in optimizer.moments().values():
        moment._local_tensor.fill_(1)
    load_checkpoint(path, stages, optimizer)
    assert not any(moment._local_tensor.any() for moment in optimizer.moments().values())


def test_precision_may_widen_but_a_resume_may_not_round(model_dir: Path, tmp_path: Path) -> None:
    path = save(model_dir, tmp_path / "wide", dtype=torch.float64)
    assert "resuming would round them" in load_complaint(path, model_dir)
    stages, _, _ = make_stages(model_dir)
    load_checkpoint(path, stages, None)
    path = save(model_dir, tmp_path / "narrow")
    stages, _, _ = make_stages(model_dir, torch.float64)
    load_checkpoint(path, stages, make_optimizer(stages))


def first_chunk(entry: dict) -> dict:
    return entry["model.norm.weight"]["chunks"][0]


@pytest.mark.parametrize(
    ("tamper", "what"),
    [
        (lambda entry: entry["model.norm.weight"]["chunks"].clear(), "leave a gap"),
        (lambda entry: first_chunk(entry).update(shape=[47]), "is not what index.json says"),
        (lambda entry: first_chunk(entry).update(file="../a"), "is not a plain file name"),
        (lambda entry: first_chunk(entry).pop("offset"), "not an index of shards"),
        (lambda entry: first_chunk(entry).update(offset=["0"]), "not an index of shards"),
        (lambda entry: first_chunk(entry).update(offset=[]), "leave a gap"),
        (lambda entry: first_chunk(entry).update(offset=[1]), "leave a gap or overlap"),
        (lambda entry: entry["model.norm.weight"]["chunks"].append(first_chunk(entry)), "overlap"),
        (lambda entry: entry["model.norm.weight"].update(dtype="I8"), "not an index of shards"),
    ],
)
def test_damaged_index(
    model_dir: Path, tmp_path: Path, tamper: Callable[[dict], object], what: str
) -> None:
    path = save(model_dir, tmp_path / "run")
    index = path / "model/index.json"
    content = json.loads(index.read_text())
    tamper(content)
    index.write_text(json.dumps(content))
    resign(path)
    assert what in load_complaint(path, model_dir)


@pytest.mark.parametrize("folder", ["model", "optimizer"])
@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda shard: shard.unlink(), "cannot read it"),
        (lambda shard: os.truncate(shard, shard.stat().st_size - 1), "not a whole safetensors"),
        (lambda shard: os.truncate(shard, 7), "not a whole safetensors"),
    ],
)
def test_shard_damaged_behind_the_marker(
    model_dir: Path, tmp_path: Path, folder: str, spoil: Callable[[Path], object], what: str
) -> None:
    """No weight stays what it was without a word, even where the marker vouches for the file."""
    path = save(model_dir, tmp_path / "run")
    shard = path / folder / "shard-00000.safetensors"
    spoil(shard)
    resign(path)
    complaint = load_complaint(path, model_dir)
    assert complaint.startswith(f"{shard}: {what}")


@pytest.mark.parametrize("name", ["model/index.json", "trainer_state.json"])
def test_file_that_the_marker_forgot(model_dir: Path, tmp_path: Path, name: str) -> None:
    path = save(model_dir, tmp_path / "run")
    (path / name).unlink()
    resign(path)
    assert f"{path / name}: cannot read it" in load_complaint(path, model_dir)


def test_shards_of_other_disks_are_missed(tmp_path: Path) -> None:
    chunk = Chunk("a", (4, 2), (0, 0), TensorInfo((2, 2), torch.float32))

    def values(_: Chunk) -> torch.Tensor:
        return torch.ones(2, 2)

    write_shard(tmp_path / "shard-00000.safetensors", [chunk], values)
    with pytest.raises(ValueError, match=r"a has 4 of 8 elements there; every process must see"):
        write_index(tmp_path)
    write_shard(tmp_path / "shard-00001.safetensors", [chunk], values)  # the same piece twice
    with pytest.raises(ValueError, match="a has 8 of 8"):
        write_index(tmp_path)
    write_shard(tmp_path / "shard-00001.safetensors", [replace(chunk, offset=(1, 0))], values)
    with pytest.raises(ValueError, match="a has 8 of 8"):  # an overlap and a gap
        write_index(tmp_path)
    write_shard(tmp_path / "shard-00001.safetensors", [replace(chunk, offset=(2, 0))], values)
    whole = TensorInfo((4, 2), torch.float32)
    with pytest.raises(ValueError, match=r"b has 0 of 8 elements there; every process must see"):
        write_index(tmp_path, {"a": whole, "b": whole})
    write_index(tmp_path, {"a": whole})
    write_index(tmp_path)
    found = ShardedTensors(tmp_path).read("a", (slice(0, 4), slice(0, 2)))
    assert torch.equal(found, torch.ones(4, 2))


def test_writer_notices_what_was_not_written(tmp_path: Path) -> None:
    infos = SafetensorsReader(
        write_model(tmp_path, files=1) and tmp_path / "model.safetensors"
    ).tensors
    with (
        pytest.raises(AssertionError, match="was not written"),
        SafetensorsWriter(tmp_path / "x", infos, {}),
    ):
        assert infos
    with (
        pytest.raises(AssertionError, match="more data than its shape"),
        SafetensorsWriter(tmp_path / "x", infos, {}) as writer,
    ):
        writer.write(next(iter(infos)), torch.zeros(10**6))


# Torn and damaged checkpoints.


def damage_cut(path: Path) -> None:
    shard = path / "model/shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: (path / "COMMITTED").unlink(), "has no COMMITTED"),
        (lambda path: (path / "COMMITTED").write_text("{"), "not valid JSON"),
        (lambda path: (path / "COMMITTED").write_text("[]"), "expected a JSON object"),
        (lambda path: (path / "COMMITTED").write_text('{"format_version": 9}'), "version is 9"),
        (lambda path: (path / "COMMITTED").write_text('{"format_version": 2}'), "not a marker"),
        (lambda path: (path / "optimizer/shard-00000.safetensors").unlink(), "(missing, should"),
        (damage_cut, "bytes, should have"),
    ],
)
def test_incomplete_checkpoint_is_skipped_and_named(
    model_dir: Path, tmp_path: Path, damage: Callable[[Path], object], what: str
) -> None:
    run = tmp_path / "run"
    good, bad = save(model_dir, run, 5), save(model_dir, run, 10)
    assert latest_checkpoint(run) == bad
    assert incomplete_checkpoints(run) == []
    damage(bad)
    assert latest_checkpoint(run) == good
    (reason,) = incomplete_checkpoints(run)
    assert str(bad) in reason
    assert what in reason
    assert what in load_complaint(bad, model_dir)
    with pytest.raises(ValueError, match="resume_from_checkpoint: "):
        resume_candidates(run, str(bad), False)


def test_a_save_that_dies_leaves_the_older_checkpoint(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    good = save(model_dir, run, 5)

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(native, "commit", die)
    with pytest.raises(KeyboardInterrupt):
        save(model_dir, run, 10)
    monkeypatch.undo()
    assert latest_checkpoint(run) == good
    assert "checkpoint-10.tmp: left over" in incomplete_checkpoints(run)[0]
    save(model_dir, run, 15)
    assert incomplete_checkpoints(run) == []
    assert not (run / "checkpoint-10.tmp").exists()


def test_full_disk_is_one_readable_error_and_leaves_nothing(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard")

    monkeypatch.setattr(dcp_storage, "write_shard", full)
    with pytest.raises(ValueError, match=r"cannot save .*checkpoint-5: .*No space left"):
        save(model_dir, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_output_dir_that_is_a_file(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match=r"cannot save .*run/checkpoint-5: "):
        save(model_dir, tmp_path / "run")


def test_missing_asset_directory(model_dir: Path, tmp_path: Path) -> None:
    stages, arch, mesh = make_stages(model_dir)
    gone = tmp_path / "gone"
    with pytest.raises(ValueError, match=f"{gone}: cannot read it"):
        save_checkpoint(
            tmp_path / "run", 1, stages, None, {}, make_config(tmp_path), arch, mesh, [gone]
        )


# Which checkpoint.


def test_saving_a_step_again_replaces_it(model_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save(model_dir, run, 5, with_optimizer=False, state={"run": 1})
    save(model_dir, run, 5, with_optimizer=False, state={"run": 2})
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-5"]
    stages, _, _ = make_stages(model_dir)
    assert load_checkpoint(run / "checkpoint-5", stages, None)["run"] == 2


def test_newest_is_the_one_saved_last(model_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (900, 1000, 100, 200):  # a fresh start over an old run
        save(model_dir, run, step, with_optimizer=False)
    assert latest_checkpoint(run) == run / "checkpoint-200"
    removed = prune_checkpoints(run, 3)
    assert removed == [run / "checkpoint-900"]
    assert prune_checkpoints(run, 1) == [run / "checkpoint-1000", run / "checkpoint-100"]
    assert [path.name for path in run.iterdir()] == ["checkpoint-200"]
    assert prune_checkpoints(run, 1) == []


def test_interrupted_pruning_leaves_nothing_that_looks_complete(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    old, new = (save(model_dir, run, step, with_optimizer=False) for step in (1, 2))

    def die(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_directory.shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoints(run, 1)
    monkeypatch.undo()
    assert str(old) in incomplete_checkpoints(run)[0]
    assert latest_checkpoint(run) == new


def test_resume_rules(model_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for value in (None, False):
        assert resume_candidates(run, value, False) == []
    with pytest.raises(ValueError, match=r"true, but .* \(no checkpoint-N there\)"):
        resume_candidates(run, True, False)
    run.mkdir()
    (run / "model.safetensors").write_text("")
    with pytest.raises(ValueError, match="holds a model but no checkpoint to resume from"):
        resume_candidates(run, None, False)
    assert resume_candidates(run, None, True) == []
    path = save(model_dir, run, 5, with_optimizer=False)
    for value in (None, False, True, str(path)):
        assert resume_candidates(run, value, False) == [path]
    assert resume_candidates(run, None, True) == []
    assert resume_candidates(run, True, True) == [path]
    shutil.rmtree(path / "model")
    with pytest.raises(ValueError, match=r"true, but .*shard-00000.safetensors \(missing"):
        resume_candidates(run, True, False)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*nowhere: not a complete"):
        resume_candidates(run, str(tmp_path / "nowhere"), False)


def test_values_survive_every_dtype_and_block_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_sdar.checkpoint import safetensors_files

    monkeypatch.setattr(safetensors_files, "BLOCK_BYTES", 100)
    tensors = {
        f"{dtype}": random_tensors(dtype)["model.layers.0.mlp.up_proj.weight"]
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    }
    chunks = [
        Chunk(name, tuple(tensor.shape), (0, 0), TensorInfo(tuple(tensor.shape), tensor.dtype))
        for name, tensor in tensors.items()
    ]
    write_shard(tmp_path / "shard-00000.safetensors", chunks, lambda chunk: tensors[chunk.name])
    write_index(tmp_path)
    stored = ShardedTensors(tmp_path)
    for name, tensor in tensors.items():
        part = stored.read(name, (slice(3, 60), slice(5, 40)))
        assert part.dtype == tensor.dtype
        assert torch.equal(part, tensor[3:60, 5:40])
