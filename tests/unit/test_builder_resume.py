"""Builds that are interrupted: what is kept, what is told, and that the bytes come out the same."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from unit.token_builds import add_line, build, edit_metadata, files

from megatron_sdar.data.building import part_pool
from megatron_sdar.data.building.shards import merge_shards, shard_prefix
from megatron_sdar.data.storage.tokens import TokenizedDataset
from megatron_sdar.data.tokenization.tokenizer import SdarTokenizer

ROOT = Path(__file__).parents[2]
PART_BYTES = 500


def fail_at_part(monkeypatch, number: int, error: OSError) -> None:
    build_part, calls = part_pool.build_part, []

    def build_or_fail(*arguments):
        calls.append(arguments)
        if len(calls) == number:
            raise error
        return build_part(*arguments)

    monkeypatch.setattr(part_pool, "build_part", build_or_fail)


def test_full_disk_keeps_the_finished_parts_and_goes_on_from_them(
    spec, tokenizer, tmp_path, monkeypatch
):
    build([spec], tmp_path / "whole", tokenizer, part_bytes=PART_BYTES)
    full = OSError(errno.ENOSPC, "No space left on device", "p.bin")
    with monkeypatch.context() as patch:
        fail_at_part(patch, 3, full)
        with pytest.raises(ValueError, match=r"p\.bin: No space left on device; .* are kept"):
            build([spec], tmp_path / "p", tokenizer, part_bytes=PART_BYTES)
    assert not (tmp_path / "p.json").exists()
    assert not list(tmp_path.glob("p.parts/*.tmp"))
    summary = build([spec], tmp_path / "p", tokenizer, part_bytes=PART_BYTES)
    assert summary.num_resumed_parts == 2
    assert f"resumed         2 of {summary.num_parts} parts were there" in summary.format()
    assert files(tmp_path / "p") == files(tmp_path / "whole")
    assert not (tmp_path / "p.parts").exists()


def test_parts_of_other_inputs_are_not_used(spec, tokenizer, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at_part(patch, 3, OSError(errno.EIO, "Input/output error"))
        with pytest.raises(ValueError, match="Input/output error"):
            build([spec], tmp_path / "p", tokenizer, part_bytes=PART_BYTES)
    add_line(spec, {"prompt": "p", "response": "r"})
    summary = build([spec], tmp_path / "p", tokenizer, part_bytes=PART_BYTES)
    assert summary.num_resumed_parts == 0
    assert summary.num_documents == 21


def test_a_part_without_its_report_is_built_again(spec, tokenizer, tmp_path, monkeypatch):
    build([spec], tmp_path / "whole", tokenizer, part_bytes=PART_BYTES)
    with monkeypatch.context() as patch:
        fail_at_part(patch, 3, OSError(errno.EIO, "Input/output error"))
        with pytest.raises(ValueError, match="Input/output error"):
            build([spec], tmp_path / "p", tokenizer, part_bytes=PART_BYTES)
    (tmp_path / "p.parts" / "000001.json").unlink()
    (tmp_path / "p.parts" / "000001.bin").write_bytes(b"half of it")
    assert build([spec], tmp_path / "p", tokenizer, part_bytes=PART_BYTES).num_resumed_parts == 1
    assert files(tmp_path / "p") == files(tmp_path / "whole")


def test_two_builds_of_one_prefix_do_not_mix(spec, tokenizer, tmp_path):
    (tmp_path / "p.parts").mkdir()
    with (tmp_path / "p.parts" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is building this dataset"):
            build([spec], tmp_path / "p", tokenizer)
    build([spec], tmp_path / "p", tokenizer)


class DyingTokenizer(SdarTokenizer):
    """Kills the process that tokenises with it, as the kernel does when memory runs out."""

    parent = os.getpid()

    def __init__(self, tokenizer: SdarTokenizer) -> None:
        self.__dict__ |= tokenizer.__dict__ | {"parent": os.getpid()}

    def encode_pieces(self, texts):
        assert os.getpid() != self.parent
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_told(spec, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"a worker process was killed .* with fewer workers"):
        build(
            [spec], tmp_path / "p", DyingTokenizer(tokenizer), num_workers=2, part_bytes=PART_BYTES
        )
    assert not (tmp_path / "p.json").exists()


def test_the_first_bad_part_speaks_for_all_workers(spec, tokenizer, tmp_path):
    for _ in range(12):
        add_line(spec, {"prompt": "p", "response": ""})
    with pytest.raises(ValueError, match=r"train\.jsonl:2\d: empty answer"):
        build([spec], tmp_path / "p", tokenizer, num_workers=2, part_bytes=100)


def tool_command(demo: Path, source: Path, prefix: Path) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(source)),
        *("--tokenizer", str(demo / "model"), "--output-prefix", str(prefix)),
    ]  # fmt: skip


@pytest.fixture
def long_source(demo, tmp_path) -> Path:
    """Eight parts of a MiB each."""
    text = (demo / "train.jsonl").read_text()
    source = tmp_path / "long.jsonl"
    source.write_text(text * (8 * 2**20 // len(text)))
    return source


def test_killed_tool_goes_on_where_it_stopped(demo, tokenizer, long_source, tmp_path):
    command = tool_command(demo, long_source, tmp_path / "p")
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("p.parts/*.json")):
            assert process.poll() is None, "finished before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "p.json").exists()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "parts were there" in again.stdout
    (tmp_path / "spec").mkdir()
    whole = subprocess.run(
        tool_command(demo, long_source, tmp_path / "whole"), capture_output=True, text=True
    )
    assert whole.returncode == 0, whole.stderr
    assert files(tmp_path / "p") == files(tmp_path / "whole")


def test_tool_on_a_disk_that_fills_up_leaves_no_dataset(demo, long_source, tmp_path):
    limited = (
        "import resource, runpy, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = tool_command(demo, long_source, tmp_path / "p")
    result = subprocess.run(
        [sys.executable, "-c", limited, *command[1:], "--num-workers", "1"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "File too large" in result.stderr
    assert "run the same command again" in result.stderr
    assert [f.name for f in tmp_path.glob("p.*")] in ([], ["p.parts"])


# Shards


def test_shards_that_do_not_belong_together_are_refused(spec, tokenizer, tmp_path):
    for shard in ((0, 2), (1, 2)):
        build([spec], tmp_path / "p", tokenizer, part_bytes=PART_BYTES, shard=shard)
    merge_shards(tmp_path / "p", 2)
    with pytest.raises(ValueError, match="exists already"):
        merge_shards(tmp_path / "p", 2)
    merge_shards(tmp_path / "p", 2, overwrite=True)
    with pytest.raises(ValueError, match="number of shards must be at least 1"):
        merge_shards(tmp_path / "p", 0)
    build(
        [spec], tmp_path / "p", tokenizer, part_bytes=PART_BYTES, shard=(1, 2), max_samples=19,
        overwrite=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"00001-of-00002\.json: this shard differs .*max_samples"):
        merge_shards(tmp_path / "p", 2, overwrite=True)


def test_a_shard_may_have_no_documents(spec, tokenizer, tmp_path):
    build([spec], tmp_path / "one", tokenizer)
    for index in range(3):
        build([spec], tmp_path / "p", tokenizer, shard=(index, 3))
    assert len(TokenizedDataset(shard_prefix(tmp_path / "p", (0, 3)))) == 0
    summary = merge_shards(tmp_path / "p", 3)
    assert summary.num_documents == 20
    assert files(tmp_path / "p") == files(tmp_path / "one")
    edit_metadata(tmp_path / "p", num_documents=19)
    with pytest.raises(ValueError, match="counts 19"):
        TokenizedDataset(tmp_path / "p")
