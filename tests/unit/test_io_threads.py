"""Jobs in threads: the first error ends all, order is kept, what is read once leaves the cache."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_sdar.checkpoint import io_threads, safetensors_files
from megatron_sdar.checkpoint.io_threads import Advance, Flusher, ahead, run_jobs
from megatron_sdar.checkpoint.safetensors_files import SafetensorsReader, full_ranges


def test_every_result_comes_with_its_job() -> None:
    done: list[int] = []

    def job(report: Advance, number: int) -> int:
        report(number)
        return number * 10

    jobs = [lambda report, n=n: job(report, n) for n in range(7)]
    assert sorted(run_jobs(jobs, 3, done.append)) == [(n, n * 10) for n in range(7)]
    assert sorted(done) == list(range(7))


def test_the_first_error_stops_the_others() -> None:
    started = threading.Event()
    ended: list[str] = []

    def endless(report: Advance) -> None:
        started.set()
        try:
            for _ in range(20_000):  # half a minute, for a test that fails instead of hanging
                report(1)
                time.sleep(0.001)
            ended.append("too late")
        finally:
            ended.append("endless")

    def failing(report: Advance) -> None:
        assert started.wait(60)
        raise OSError(28, "No space left on device")

    def never(report: Advance) -> None:
        ended.append("never")

    with pytest.raises(OSError, match="No space left"):
        list(run_jobs([endless, failing, *[never] * 50], 2, lambda _: None))
    assert "endless" in ended
    assert "too late" not in ended
    assert ended.count("never") < 50


def test_reading_ahead_keeps_the_order_and_runs_at_most_two_ahead() -> None:
    begun: list[int] = []

    def read(number: int) -> int:
        begun.append(number)
        return number

    values = ahead(read, range(6))
    taken = []
    for value in values:
        taken.append(value)
        assert max(begun) <= value + 2
    assert taken == list(range(6))
    assert list(ahead(read, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda n: 1 // n, [2, 1, 0, 1]))


def test_a_failing_disk_is_noticed_when_the_file_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with (tmp_path / "file").open("wb") as file:
        flusher = Flusher(file.fileno())
        flusher.add(Flusher._EVERY_BYTES - 1)
        flusher.close()  # too little to be sent
        flusher.add(1)
        with pytest.raises(OSError, match="Input/output error"):
            flusher.close()


def test_what_is_sent_to_disk_leaves_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[int] = []
    monkeypatch.setattr(io_threads, "forget_pages", forgotten.append)
    with (tmp_path / "file").open("wb") as file:
        flusher = Flusher(file.fileno())
        flusher.add(Flusher._EVERY_BYTES)
        flusher.close()
        assert forgotten == [file.fileno()]


@pytest.mark.parametrize("keep_cached", [True, False])
def test_large_reads_leave_the_cache_unless_they_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_cached: bool
) -> None:
    tensors = {"large": torch.rand(512, 1024), "small": torch.rand(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    forgotten: list[int] = []
    monkeypatch.setattr(
        safetensors_files,
        "forget_pages",
        lambda descriptor, offset, num_bytes: forgotten.append(num_bytes),
    )
    reader = SafetensorsReader(tmp_path / "model.safetensors", keep_cached)
    for name, tensor in tensors.items():
        assert torch.equal(reader.read(name, full_ranges(tuple(tensor.shape))), tensor)
    assert forgotten == ([] if keep_cached else [tensors["large"].nbytes])
