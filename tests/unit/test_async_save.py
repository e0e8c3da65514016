"""Saving in the background: what is saved, who waits for whom, and where failures surface."""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from unit.tiny_hf import make_config, make_optimizer, make_stages, write_model

from megatron_sdar.checkpoint import dcp_storage, native
from megatron_sdar.checkpoint import snapshot as snapshot_module
from megatron_sdar.checkpoint.native import load_checkpoint
from megatron_sdar.checkpoint.run_directory import complete_checkpoints
from megatron_sdar.checkpoint.shards import write_shard
from megatron_sdar.checkpoint.snapshot import HostCopies, Snapshot, take_snapshot
from megatron_sdar.training import checkpoints
from megatron_sdar.training.checkpoints import CheckpointWriter, size_text

pytestmark = pytest.mark.usefixtures("single_process")


class Training:
    """A model whose weights and moments are all the number of steps done."""

    def __init__(self, model_dir: Path, run: Path, **settings: Any) -> None:
        self.run = run
        self.stages, self.arch, self.mesh = make_stages(model_dir)
        self.optimizer = make_optimizer(self.stages)
        config = make_config(run)
        self.config = replace(
            config,
            model=replace(config.model, model_name_or_path=str(model_dir)),
            training=replace(config.training, **settings),
        )
        self.said: list[str] = []
        self.step: Any = SimpleNamespace(
            stages=self.stages, optimizer=self.optimizer, before_update=lambda: None
        )
        self.advance(0)

    def writer(self, several: bool = True, damaged: Sequence[Path] = ()) -> CheckpointWriter:
        return CheckpointWriter(
            self.config, self.arch, self.mesh, self.step, several, damaged, self.said.append
        )

    def advance(self, done: int) -> None:
        self.step.before_update()
        for tensor in [*self.stages[0].parameters(), *self.optimizer.moments().values()]:
            tensor._local_tensor.fill_(done)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "model"
    write_model(directory)
    return directory


@pytest.fixture
def training(model_dir: Path, tmp_path: Path) -> Training:
    return Training(model_dir, tmp_path / "run")


@contextmanager
def shards_held_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No shard is written before the event is set; leaving sets it."""
    go_on = threading.Event()

    def patient(*arguments: Any) -> Any:
        assert go_on.wait(60)
        return write_shard(*arguments)

    monkeypatch.setattr(dcp_storage, "write_shard", patient)
    yield go_on
    go_on.set()


def disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard")


def files_of(checkpoint: Path) -> dict[str, bytes]:
    return {
        path.relative_to(checkpoint).as_posix(): path.read_bytes()
        for path in checkpoint.rglob("*")
        if path.is_file()
    }


# What is saved.


def test_a_copy_is_not_the_live_weights_and_its_memory_is_used_again(training: Training) -> None:
    def snapshot(done: int) -> Any:
        training.advance(done)
        return take_snapshot(done, training.stages, training.optimizer, {})

    copies = HostCopies(snapshot(0), pinned=False)
    total = sum(tensor._local_tensor.nbytes for tensor in snapshot(0).tensors.values())
    assert total <= copies.num_bytes < total + 64 * len(snapshot(0).tensors)
    first = copies.fill(snapshot(1))
    places = {name: tensor._local_tensor.data_ptr() for name, tensor in first.tensors.items()}
    training.advance(2)
    for name, tensor in first.tensors.items():
        assert (tensor._local_tensor == 1).all(), name
        live = snapshot(2).tensors[name]
        assert isinstance(tensor, DTensor)
        assert (tensor.shape, tensor.dtype, tensor.placements, tensor.device_mesh) == (
            live.shape, live.dtype, live.placements, live.device_mesh,
        )  # fmt: skip
    second = copies.fill(snapshot(2))
    assert places == {n: t._local_tensor.data_ptr() for n, t in second.tensors.items()}
    assert set(second.weights) == set(dict(training.stages[0].named_parameters()))


def test_shards_of_every_size_fit_the_memory() -> None:
    """Empty ones, and such as do not fill a multiple of the alignment."""
    mesh = init_device_mesh("cpu", (1,))
    tensors = {
        name: DTensor.from_local(torch.rand(shape).to(dtype), mesh, [Replicate()])
        for name, shape, dtype in (
            ("a", (3,), torch.bfloat16),
            ("b", (0, 5), torch.float32),
            ("c", (7, 3), torch.float64),
            ("d", (1,), torch.float32),
        )
    }
    live = Snapshot(1, tensors, None, {})
    copied = HostCopies(live, pinned=False).fill(live)
    assert copied.moments is None
    for name, tensor in tensors.items():
        assert torch.equal(copied.weights[name]._local_tensor, tensor._local_tensor), name


def test_later_steps_do_not_leak_into_a_save(
    training: Training, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"interval": {"steps": 1}, "list": [1, 2]}
    with shards_held_up(monkeypatch) as go_on, training.writer() as writer:
        training.advance(1)
        path = writer.save(1, state, is_last=False)
        training.advance(2)
        state["interval"]["steps"] = 7  # type: ignore[index]
        state["list"].append(3)  # type: ignore[union-attr]
        assert not path.exists(), "training went on while nothing was written"
        go_on.set()
    again = Training(model_dir, training.run)
    loaded = load_checkpoint(path, again.stages, again.optimizer)
    assert loaded == {"interval": {"steps": 1}, "list": [1, 2], "step": 1}
    tensors = [*again.stages[0].parameters(), *again.optimizer.moments().values()]
    assert all((tensor._local_tensor == 1).all() for tensor in tensors)


@pytest.mark.parametrize("only_model", [False, True])
def test_the_bytes_are_those_of_a_save_in_the_foreground(
    model_dir: Path, tmp_path: Path, only_model: bool
) -> None:
    found = {}
    for async_save in (True, False):
        training = Training(model_dir, tmp_path / "run", save_only_model=only_model)
        torch.manual_seed(0)
        for tensor in [*training.stages[0].parameters(), *training.optimizer.moments().values()]:
            tensor._local_tensor.normal_()
        with training.writer(several=async_save) as writer:
            path = writer.save(3, {"a": 1}, is_last=False)
        found[async_save] = files_of(path)
        path.rename(tmp_path / f"kept-{async_save}")
    assert found[True] == found[False]
    assert any(name.startswith("optimizer/") for name in found[True]) != only_model


def test_memory_for_a_gpu_is_pinned_while_it_is_used(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(snapshot_module, "pin_memory", lambda *range: calls.append(("pin", *range)))
    monkeypatch.setattr(snapshot_module, "unpin_memory", lambda at: calls.append(("unpin", at)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(
        synchronize=lambda: calls.append(("wait",))
    ))  # fmt: skip
    live = take_snapshot(1, training.stages, training.optimizer, {})
    copies = HostCopies(live, pinned=True)
    place = min(t._local_tensor.data_ptr() for t in copies.fill(live).tensors.values())
    copies.release()
    assert calls == [("pin", place, copies.num_bytes), ("wait",), ("unpin", place)]


def test_too_little_memory_is_a_readable_error(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("Registering memory failed with cudaError: 2.\nMore.")

    monkeypatch.setattr(snapshot_module, "pin_memory", refuse)
    live = take_snapshot(1, training.stages, training.optimizer, {})
    with pytest.raises(ValueError, match=r"async_save: .* \(Reg.*: 2\.\); set async_save: false"):
        HostCopies(live, pinned=True)


# Who waits for whom.


def test_a_save_returns_before_the_copy_and_the_update_does_not(
    training: Training, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, go_on, updated = HostCopies.fill, threading.Event(), threading.Event()

    def held_up(self: HostCopies, snapshot: Snapshot) -> Snapshot:
        assert go_on.wait(60)
        return copy(self, snapshot)

    def update() -> None:
        training.advance(2)
        updated.set()

    monkeypatch.setattr(HostCopies, "fill", held_up)
    with training.writer() as writer:
        training.advance(1)
        path = writer.save(1, {}, is_last=False)
        thread = threading.Thread(target=update)
        thread.start()
        assert not updated.wait(0.3)
        go_on.set()
        assert updated.wait(60)
        thread.join()
    again = Training(model_dir, training.run)
    load_checkpoint(path, again.stages, again.optimizer)
    tensors = [*again.stages[0].parameters(), *again.optimizer.moments().values()]
    assert all((tensor._local_tensor == 1).all() for tensor in tensors)
    (line,) = [line for line in training.said if line.startswith("saved ")]
    assert float(line.rpartition("waited ")[2].split()[0]) >= 0.3


def test_a_copy_that_fails_does_not_hold_up_the_update(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: HostCopies, snapshot: Snapshot) -> Snapshot:
        raise ValueError("no copy")

    monkeypatch.setattr(HostCopies, "fill", fail)
    with training.writer() as writer:
        writer.save(1, {}, is_last=False)
        training.advance(2)
        with pytest.raises(ValueError, match="no copy"):
            writer.save(2, {}, is_last=False)


def test_the_second_save_waits_for_the_first_and_that_is_said_once(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*arguments: Any) -> Any:
        time.sleep(0.2)
        return write_shard(*arguments)

    monkeypatch.setattr(dcp_storage, "write_shard", slow)
    done_before = []
    with training.writer() as writer:
        for done in (1, 2, 3):
            writer.save(done, {}, is_last=done == 3)
            done_before.append(len(complete_checkpoints(training.run)))
    assert done_before == [0, 1, 3]
    (line,) = [line for line in training.said if line.startswith("training waited")]
    first = training.run / "checkpoint-1"
    match = re.fullmatch(rf"training waited (\d\.\d\d) s for {first} to be saved: .*", line)
    assert match is not None
    assert float(match[1]) >= 0.4
    waits = [line.rpartition("waited ")[2] for line in training.said if line.startswith("saved")]
    assert [float(wait.split()[0]) >= 0.4 for wait in waits] == [False, True, True]


def test_each_save_is_reported(training: Training) -> None:
    with training.writer() as writer:
        first, last = (writer.save(n, {}, is_last=n == 2) for n in (1, 2))
    allocation = training.said[0]
    saves = [line for line in training.said if line.startswith("saved ")]
    assert re.fullmatch(r"async_save: \d\.\d MB of host memory hold what this .*", allocation)
    assert len(saves) == 2
    for path, line in zip((first, last), saves, strict=True):
        pattern = rf"saved {path} \(\d\.\d MB in \d\.\d s, training waited \d\.\d\d s\)"
        assert re.fullmatch(pattern, line), line
    assert (size_text(123_456_789), size_text(5_000)) == ("0.1 GB", "0.0 MB")


def test_the_last_save_is_there_when_save_returns(training: Training) -> None:
    with training.writer() as writer:
        writer.save(1, {}, is_last=False)
        path = writer.save(2, {}, is_last=True)
        assert complete_checkpoints(training.run)[-1] == path
        assert "checkpoint" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(("setting", "several"), [(False, True), (True, False)])
def test_in_the_foreground_where_nothing_is_gained(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: bool, several: bool
) -> None:
    monkeypatch.setattr(checkpoints, "AsyncSaver", pytest.fail)
    monkeypatch.setattr(checkpoints, "mesh_for_thread", pytest.fail)
    training = Training(model_dir, tmp_path / "run", async_save=setting)
    with training.writer(several) as writer:
        path = writer.save(1, {}, is_last=False)
        assert path.is_dir()
    (line,) = training.said
    assert line.startswith(f"saved {path}")


def test_the_thread_has_a_group_of_its_own(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[str, object]] = []
    save = dcp.save

    def spy(tensors: object, **options: Any) -> object:
        used.append((threading.current_thread().name, options["process_group"]))
        return save(tensors, **options)

    monkeypatch.setattr(native.dcp, "save", spy)
    with training.writer() as writer:
        writer.save(1, {}, is_last=False)
        writer.save(2, {}, is_last=True)
    assert [name for name, _ in used] == ["checkpoint"] * 2 + ["MainThread"] * 2
    assert used[0][1] is not used[2][1]
    assert used[2][1] is training.mesh.control


# Failures.


def test_a_failure_surfaces_on_the_next_save(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    with training.writer() as writer:
        good = writer.save(1, {}, is_last=False)
        writer.save(2, {}, is_last=True)
        monkeypatch.setattr(dcp_storage, "write_shard", disk_full)
        bad = writer.save(3, {}, is_last=False)
        with pytest.raises(ValueError, match=rf"cannot save {bad}: .*No space left"):
            writer.save(4, {}, is_last=False)
        monkeypatch.undo()
        writer.save(5, {}, is_last=False)  # said once
    names = [path.name for path in complete_checkpoints(training.run)]
    assert names == ["checkpoint-1", "checkpoint-2", "checkpoint-5"]
    assert {path.name for path in training.run.iterdir()} == set(names)
    assert good.name in names


def test_a_failure_surfaces_at_the_end(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp_storage, "write_shard", disk_full)
    with pytest.raises(ValueError, match="No space left"), training.writer() as writer:
        writer.save(1, {}, is_last=False)


def test_a_failure_does_not_cost_the_last_save(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    with training.writer() as writer:
        monkeypatch.setattr(dcp_storage, "write_shard", disk_full)
        writer.save(1, {}, is_last=False)
        while writer._saver is not None and writer._saver.is_busy:
            time.sleep(0.01)
        monkeypatch.undo()
        last = writer.save(2, {}, is_last=True)
    assert complete_checkpoints(training.run) == [last]
    (line,) = [line for line in training.said if "was not saved" in line]
    assert line.startswith(f"{training.run / 'checkpoint-1'} was not saved: cannot save")


def test_a_bug_surfaces_as_what_it_is(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object) -> None:
        raise AssertionError("an invariant of ours")

    monkeypatch.setattr(dcp_storage, "write_shard", bug)
    with pytest.raises(dcp.CheckpointException, match="of ours"), training.writer() as writer:
        writer.save(1, {}, is_last=False)


@pytest.mark.parametrize("error", [FloatingPointError("not finite"), KeyboardInterrupt()])
def test_leaving_by_an_error_waits_for_the_save(
    training: Training, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def train() -> None:
        with training.writer() as writer:
            writer.save(1, {}, is_last=False)
            raise error

    path = training.run / "checkpoint-1"
    with shards_held_up(monkeypatch) as go_on:
        threading.Timer(0.3, go_on.set).start()
        with pytest.raises(type(error)):
            train()
        assert complete_checkpoints(training.run) == [path]
    assert training.said[-2] == f"waiting for {path} to be saved"
    assert training.said[-1].startswith(f"saved {path}")


def test_a_failure_does_not_hide_the_error_that_ends_the_run(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train() -> None:
        with training.writer() as writer:
            writer.save(1, {}, is_last=False)
            raise FloatingPointError("not finite")

    monkeypatch.setattr(dcp_storage, "write_shard", disk_full)
    with pytest.raises(FloatingPointError):
        train()
    assert training.said[-1].startswith("moreover: cannot save ")


# Old checkpoints.


def test_old_ones_go_after_the_new_one_is_there(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(model_dir, tmp_path / "run", save_total_limit=2)
    prune = checkpoints.prune_checkpoints
    there: list[list[str]] = []

    def spy(run: Path, *arguments: Any) -> list[Path]:
        there.append([path.name for path in complete_checkpoints(run)])
        return prune(run, *arguments)

    monkeypatch.setattr(checkpoints, "prune_checkpoints", spy)
    with training.writer() as writer:
        for done in (1, 2, 3):
            writer.save(done, {}, is_last=False)
    assert there[-1] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert [path.name for path in complete_checkpoints(training.run)] == there[-1][1:]


def test_a_save_that_fails_costs_no_old_one(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(model_dir, tmp_path / "run", save_total_limit=1)
    with training.writer() as writer:
        writer.save(1, {}, is_last=False)
        writer.save(2, {}, is_last=True)
    monkeypatch.setattr(dcp_storage, "write_shard", disk_full)
    with pytest.raises(ValueError, match="No space left"), training.writer() as writer:
        writer.save(3, {}, is_last=False)
    assert [path.name for path in training.run.iterdir()] == ["checkpoint-2"]


def test_damaged_ones_neither_count_nor_go(model_dir: Path, tmp_path: Path) -> None:
    training = Training(model_dir, tmp_path / "run", save_total_limit=2)
    with training.writer() as writer:
        good, bad = (writer.save(done, {}, is_last=False) for done in (1, 2))

    def names() -> list[str]:
        return sorted(path.name for path in training.run.iterdir())

    with training.writer(damaged=[bad]) as writer:
        writer.save(3, {}, is_last=True)
        assert good.exists(), "the limit of two is not used up by a damaged one"
        writer.save(4, {}, is_last=True)
        assert names() == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
        writer.save(2, {}, is_last=True)
        assert names() == ["checkpoint-2", "checkpoint-4"], "saved again, it counts"
