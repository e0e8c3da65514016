"""Builds that are interrupted: what is kept, what is told, and that the bytes come out the same."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from unit.token_builds import PAIRS, SUFFIXES, TEMPLATE, add_line, build, edit_metadata, files

from megatron_sdar.data.building import part_pool, shards
from megatron_sdar.data.building.part import PartReport
from megatron_sdar.data.building.part_pool import PartBuilder, build_parts
from megatron_sdar.data.building.plan import Part
from megatron_sdar.data.building.shards import merge_shards, shard_prefix
from megatron_sdar.data.sources.datasets import Columns, DatasetSpec, Layout
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


@pytest.mark.parametrize(
    "damage",
    ["no report", "empty report", "foreign report", "report of other files", "short file"],
)
def test_a_damaged_part_is_built_again(spec, tokenizer, tmp_path, monkeypatch, damage):
    build([spec], tmp_path / "whole", tokenizer, part_bytes=PART_BYTES)
    with monkeypatch.context() as patch:
        fail_at_part(patch, 3, OSError(errno.EIO, "Input/output error"))
        with pytest.raises(ValueError, match="Input/output error"):
            build([spec], tmp_path / "p", tokenizer, part_bytes=PART_BYTES)
    (report,) = tmp_path.glob("p.parts/000001-*.json")
    text = report.read_text()
    if damage == "no report":
        report.unlink()
    elif damage == "empty report":
        report.write_text("")
    elif damage == "foreign report":
        report.write_text('{"documents": 3}')
    elif damage == "report of other files":
        report.write_text(text.replace('"num_tokens": ', '"num_tokens": 1'))
    else:
        file = report.with_suffix(".bin")
        file.write_bytes(file.read_bytes()[:-10])
    assert build([spec], tmp_path / "p", tokenizer, part_bytes=PART_BYTES).num_resumed_parts == 1
    assert files(tmp_path / "p") == files(tmp_path / "whole")


def test_two_builds_of_one_prefix_do_not_mix(spec, tokenizer, tmp_path):
    (tmp_path / "p.parts").mkdir()
    with (tmp_path / "p.parts" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is building this dataset"):
            build([spec], tmp_path / "p", tokenizer)
    build([spec], tmp_path / "p", tokenizer)


def test_a_folder_of_somebody_else_is_left_alone(spec, tokenizer, tmp_path):
    (tmp_path / "p.parts").mkdir()
    (tmp_path / "p.parts" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"p\.parts: the folder is needed .* holds notes\.txt"):
        build([spec], tmp_path / "p", tokenizer)
    assert (tmp_path / "p.parts" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_build_that_is_stopped_while_files_are_named_goes_on(
    spec, tokenizer, tmp_path, monkeypatch, overwrite
):
    build([spec], tmp_path / "whole", tokenizer)
    if overwrite:
        build([spec], tmp_path / "p", tokenizer, max_samples=3)

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_metadata", stop)
        with pytest.raises(KeyboardInterrupt):
            build([spec], tmp_path / "p", tokenizer, overwrite=overwrite)
    with pytest.raises(ValueError, match="no complete tokenized dataset is there"):
        TokenizedDataset(tmp_path / "p")
    # The command that was interrupted, as it was; its files do not count as somebody else's.
    build([spec], tmp_path / "p", tokenizer)
    assert files(tmp_path / "p") == files(tmp_path / "whole")
    assert sorted(f.name for f in tmp_path.glob("p.*.tmp")) == []
    assert not (tmp_path / "p.parts").exists()


class ChattyBuilder(PartBuilder):
    """Fails in its first part while the others tell more progress than a pipe holds."""

    def build(self, part, prefix, on_progress):
        if prefix.endswith("0"):
            time.sleep(0.5)
            raise ValueError("bad record")
        for _ in range(20_000):
            on_progress(1, 1)
        return PartReport()


def test_an_error_does_not_wait_for_workers_that_nobody_listens_to(spec, tokenizer, tmp_path):
    builder = ChattyBuilder((spec,), tokenizer, TEMPLATE, "raise")
    parts = {i: Part(0, (), ()) for i in range(6)}
    prefixes = {i: f"{tmp_path}/{i}" for i in parts}
    with pytest.raises(ValueError, match="bad record"):
        list(build_parts(builder, parts, prefixes, 3, lambda *_: time.sleep(0.001)))


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


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_end_with_the_process_that_started_them(demo, long_source, tmp_path):
    if not Path(f"/proc/{os.getpid()}/task").exists():
        pytest.skip("children are read from /proc")
    command = tool_command(demo, long_source, tmp_path / "p")
    process = subprocess.Popen([*command, "--num-workers", "2"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("p.parts/*.json")):
        assert process.poll() is None, "finished before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = children(process.pid)
    process.kill()
    process.wait()
    assert len(workers) >= 2
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline, "workers outlive their build"
        time.sleep(0.05)


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


def test_a_shard_under_another_name_is_refused(spec, tokenizer, tmp_path):
    for shard in ((0, 2), (1, 2)):
        build([spec], tmp_path / "p", tokenizer, part_bytes=PART_BYTES, shard=shard)
    for suffix in SUFFIXES:
        first, second = (f"{shard_prefix(tmp_path / 'p', (i, 2))}{suffix}" for i in (0, 1))
        Path(second).write_bytes(Path(first).read_bytes())
    with pytest.raises(ValueError, match=r"00001-of-00002\.json: it is not shard 1 of 2"):
        merge_shards(tmp_path / "p", 2)


def test_shards_of_other_part_sizes_are_refused(spec, tokenizer, tmp_path):
    build([spec], tmp_path / "p", tokenizer, part_bytes=300, shard=(0, 2))
    build([spec], tmp_path / "p", tokenizer, part_bytes=900, shard=(1, 2))
    with pytest.raises(
        ValueError, match=r"differs from the first: part_bytes \(was 300, now 900\)"
    ):
        merge_shards(tmp_path / "p", 2)


def test_a_column_may_be_missing_in_one_shard_but_not_in_all(tokenizer, tmp_path):
    records = [{"prompt": "p", "response": "r"}] * 9 + [
        {"prompt": "p", "response": "r", "persona": "x"}
    ]
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    for column in ("persona", "missing"):
        layout = Layout("alpaca", Columns("prompt", None, "response", system=column))
        spec = DatasetSpec("d", (file,), layout, (column,))
        for index in range(2):
            shard = {"part_bytes": 100, "shard": (index, 2)}
            summary = build([spec], tmp_path / column, tokenizer, **shard)
            if index == 0:
                assert f"dataset 0 has the column {column}" in summary.format()
        if column == "persona":
            assert merge_shards(tmp_path / column, 2).num_documents == 10
        else:
            with pytest.raises(ValueError, match=r"column 'missing' is in no record of d\.jsonl"):
                merge_shards(tmp_path / column, 2)
        few = build([spec], tmp_path / f"{column}-few", tokenizer, max_samples=3)
        assert f"none of the records read of dataset 0 has the column {column}" in few.format()


def test_shards_without_any_document_do_not_merge(tokenizer, tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text('{"prompt": "p", "response": ""}\n')
    spec = DatasetSpec("d", (file,), PAIRS)
    for index in range(2):
        build([spec], tmp_path / "p", tokenizer, shard=(index, 2), on_error="skip")
    with pytest.raises(ValueError, match=r"d: no document was read: .* \(1 empty answer\)"):
        merge_shards(tmp_path / "p", 2)


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
