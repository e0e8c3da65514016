"""tools/convert_checkpoint.py: every source in every format, going on after a kill, refusals."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from unit.tiny_hf import (
    assert_same,
    make_config,
    make_stages,
    random_tensors,
    read_model,
    resign,
    write_model,
    write_moe_model,
)

from megatron_sdar.checkpoint import hf_export, native_import, safetensors_files
from megatron_sdar.checkpoint.hf_export import export_hf
from megatron_sdar.checkpoint.hf_import import load_hf_weights
from megatron_sdar.checkpoint.native import save_checkpoint
from megatron_sdar.checkpoint.run_directory import latest_checkpoint
from megatron_sdar.checkpoint.safetensors_files import TensorInfo
from megatron_sdar.checkpoint.shards import Chunk, ShardedTensors, write_index, write_shard
from tools.convert_checkpoint import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def checkpoint(model_dir: Path, tmp_path: Path, single_process: None) -> Path:
    stages, arch, mesh = make_stages(model_dir)
    load_hf_weights(stages, arch, model_dir, "keep")
    run = tmp_path / "run"
    return save_checkpoint(run, 5, stages, None, {}, make_config(run), arch, mesh, [model_dir])


def convert(source: Path, destination: Path, format: str, *options: str) -> int:
    return main(["--from", str(source), "--to", str(destination), "--format", format, *options])


def all_bytes(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


# Sources and formats.


def test_both_ways(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native, back = tmp_path / "native", tmp_path / "back"
    assert convert(model_dir, native, "native", "--verify") == 0
    out = capsys.readouterr().out
    assert f"source: Hugging Face sdar {model_dir}: 47 tensors in 2 files" in out
    assert "verified: format, and 47 tensors bitwise" in out
    assert convert(native, back, "hf", "--verify") == 0
    out = capsys.readouterr().out
    assert f"source: native checkpoint {native}: 47 tensors in 1 files" in out
    assert "verified: format, and 47 tensors bitwise" in out
    assert_same(read_model(back), random_tensors())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "model", "native"]


@pytest.mark.parametrize("model_type", ["sdar_moe", "qwen3_moe"])
@pytest.mark.parametrize("inside", ["fused", "per expert"])
def test_experts_both_ways(tmp_path: Path, model_type: str, inside: str) -> None:
    tensors = write_moe_model(tmp_path / "model", model_type=model_type)
    keep = ["--mask-token-init", "keep"]
    assert convert(tmp_path / "model", tmp_path / "native", "native", "--verify", *keep) == 0
    stored = ShardedTensors(tmp_path / "native/model")
    layer = "model.layers.1.mlp.experts"
    assert stored.tensors[f"{layer}.gate_up_proj"].shape == (6, 16, 48)
    assert stored.tensors[f"{layer}.down_proj"].shape == (6, 48, 8)
    gate_up = stored.read(f"{layer}.gate_up_proj", (slice(3, 4), slice(6, 11), slice(0, 48)))[0]
    assert torch.equal(gate_up[:2], tensors[f"{layer}.3.gate_proj.weight"][6:])
    assert torch.equal(gate_up[2:], tensors[f"{layer}.3.up_proj.weight"][:3])
    down = stored.read(f"{layer}.down_proj", (slice(2, 4), slice(5, 9), slice(0, 8)))
    for place, expert in enumerate((2, 3)):
        assert torch.equal(down[place], tensors[f"{layer}.{expert}.down_proj.weight"][5:9])
    if inside == "per expert":
        split_experts(tmp_path / "native", tensors)
    assert convert(tmp_path / "native", tmp_path / "back", "hf", "--verify") == 0
    assert_same(read_model(tmp_path / "back"), tensors)
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_sdar_moe.SDARMoeForCausalLM"
    assert config["model_type"] == "sdar_moe"


def split_experts(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the model by one whose experts are stored one by one."""
    shutil.rmtree(checkpoint / "model")
    (checkpoint / "model").mkdir()
    chunks = [
        Chunk(n, tuple(t.shape), (0,) * t.dim(), TensorInfo(tuple(t.shape), t.dtype))
        for n, t in tensors.items()
    ]
    write_shard(checkpoint / "model/shard-00000.safetensors", chunks, lambda c: tensors[c.name])
    write_index(checkpoint / "model")
    resign(checkpoint)


def test_missing_experts_are_listed_in_ranges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = write_moe_model(tmp_path / "model")
    for layer, expert in ((0, 1), (0, 2), (0, 4), (1, 1), (1, 2), (1, 4)):
        del tensors[f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"]
    write_moe_model(tmp_path / "broken", tensors)
    assert convert(tmp_path / "broken", tmp_path / "out", "native") == 1
    assert (
        "model.layers.{0-1}.mlp.experts.{1-2,4}.up_proj.weight: missing" in capsys.readouterr().err
    )


def test_experts_of_several_dtypes_need_a_choice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = write_moe_model(tmp_path / "model")
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    write_moe_model(tmp_path / "mixed", tensors)
    assert convert(tmp_path / "mixed", tmp_path / "native", "native") == 1
    assert "layers.1.mlp.experts.down_proj have dtypes torch.bfloat16, torch.float32; choose" in (
        capsys.readouterr().err
    )
    assert convert(tmp_path / "mixed", tmp_path / "native", "native", "--dtype", "float32") == 0
    assert convert(tmp_path / "native", tmp_path / "back", "hf") == 0
    assert_same(read_model(tmp_path / "back"), {n: t.float() for n, t in tensors.items()})


def test_hugging_face_to_hugging_face_unties_and_completes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = random_tensors()
    del tensors["lm_head.weight"]
    write_model(
        tmp_path / "qwen", tensors, model_type="qwen3", tie_word_embeddings=True, block_size=None
    )
    assert convert(tmp_path / "qwen", tmp_path / "out", "hf", "--verify", "--block-size", "8") == 0
    out = capsys.readouterr().out
    assert "lm_head.weight: untied, a copy of model.embed_tokens.weight" in out
    assert "<|MASK|> row 130: mean of rows 0 to 129" in out
    found = read_model(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    embedding = tensors["model.embed_tokens.weight"]
    mean = embedding[:130].double().mean(0).float()
    torch.testing.assert_close(found["lm_head.weight"][130], mean, rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["block_size"], config["tie_word_embeddings"]) == (8, False)
    assert config["model_type"] == "sdar"


def test_native_to_native_drops_the_moments_and_keeps_the_weights(
    checkpoint: Path, tmp_path: Path
) -> None:
    assert convert(checkpoint, tmp_path / "native", "native", "--dtype", "bfloat16") == 0
    export_hf(tmp_path / "native", tmp_path / "export")
    expected = {name: tensor.bfloat16() for name, tensor in random_tensors().items()}
    assert_same(read_model(tmp_path / "export"), expected)


def test_newest_checkpoint_of_a_run(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = checkpoint.parent
    export_hf(checkpoint, run, into_existing=True)  # as after training
    (run / "checkpoint-9").mkdir()
    assert convert(run, tmp_path / "out", "hf", "--dtype", "bfloat16") == 0
    out = capsys.readouterr().out
    assert f"source: native checkpoint {checkpoint}:" in out
    assert f"skipped {run / 'checkpoint-9'}: not a complete checkpoint" in out
    shutil.rmtree(checkpoint)
    assert convert(run, tmp_path / "from-export", "native") == 0
    out = capsys.readouterr().out
    assert f"source: Hugging Face sdar {run}" in out
    assert "skipped" in out


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--from", "nowhere", "--format", "hf"], "nowhere: no such directory"),
        (["--from", "empty", "--format", "hf"], "empty: holds no model: neither config.json"),
        (["--from", "torn", "--format", "hf"], "has no complete checkpoint: torn/checkpoint-1"),
        (["--from", "torn/checkpoint-1", "--format", "hf"], "has no COMMITTED file"),
        (
            ["--from", "model", "--format", "hf", "--make-vocab-size-divisible-by", "8"],
            "--make-vocab-size-divisible-by 8 goes with --format native only",
        ),
        (
            ["--from", "run", "--format", "hf", "--mask-token-init", "mean"],
            "--mask-token-init mean goes with a Hugging Face model only",
        ),
        (["--from", "run", "--format", "hf", "--block-size", "9"], "9 was asked for, run/checkp"),
        (
            ["--from", "model", "--format", "native", "--block-size", "0"],
            "--block-size 0: must be at least 1",
        ),
        (["--from", "model", "--format", "native", "--threads", "0"], "--threads 0: must be"),
        (["--from", "run", "--format", "hf", "--max-shard-size", "x"], "max_shard_size: 'x'"),
    ],
)
@pytest.mark.usefixtures("checkpoint")
def test_errors_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    what: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    os.makedirs("empty")
    os.makedirs("torn/checkpoint-1")
    assert main([*arguments, "--to", "out"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert what in error
    assert not Path("out").exists()


def test_help_runs_as_a_script() -> None:
    result = subprocess.run(
        [sys.executable, "tools/convert_checkpoint.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for option in ("--mask-token-init", "--verify", "--dry-run", "--threads", "examples:"):
        assert option in result.stdout


def test_dry_run_writes_nothing(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert convert(model_dir, tmp_path / "out", "native", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "47 tensors in 2 files" in out
    assert "in 1 files" in out
    assert "dry run: nothing was written" in out
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    assert convert(model_dir, tmp_path / "out", "native", "--dry-run") == 1
    assert "exists and is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_free_disk_is_checked_first(
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 7_000_000))
    assert convert(model_dir, tmp_path / "deep/er/out", "native", *options) == 1
    assert "its disk has 7.0 MB free; free some" in capsys.readouterr().err
    assert not list(tmp_path.glob("deep/er/out*"))


@pytest.mark.parametrize(
    "name",
    [
        "model/shard-00000.safetensors",
        "model/index.json",
        "hf/config.json",
        "hf/merges.txt",
    ],
)
@pytest.mark.parametrize("place", [0.3, 0.9])
def test_a_flipped_bit_is_named_by_file(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    place: float,
) -> None:
    flip_bit(checkpoint / name, place)
    assert convert(checkpoint, tmp_path / "out", "hf") == 1
    error = capsys.readouterr().err
    assert str(checkpoint / name) in error
    assert "damaged" in error
    assert not (tmp_path / "out").exists()


def flip_bit(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


# Going on after an interruption.

MANY_FILES = ["--max-shard-size", "40KB"]


class DiskFull:
    """Lets some blocks be written, then fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
        self.left = blocks
        self.names: list[str] = []
        write = safetensors_files.SafetensorsWriter.write

        def limited(
            writer: safetensors_files.SafetensorsWriter, name: str, block: torch.Tensor
        ) -> int:
            if self.left == 0:
                raise OSError(28, "No space left on device")
            self.left -= 1
            self.names.append(name)
            return write(writer, name, block)

        monkeypatch.setattr(safetensors_files.SafetensorsWriter, "write", limited)


@pytest.mark.parametrize("format", ["native", "hf"])
def test_goes_on_from_finished_files(
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    format: str,
) -> None:
    assert convert(model_dir, tmp_path / "whole", format, *MANY_FILES) == 0
    with monkeypatch.context() as context:
        DiskFull(context, 20)
        assert convert(model_dir, tmp_path / "out", format, *MANY_FILES, "--threads", "1") == 1
    error = capsys.readouterr().err
    assert "cannot write there: No space left on device" in error
    assert "finished files are kept in" in error
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as context:
        watch = DiskFull(context, -1)
        assert convert(model_dir, tmp_path / "out", format, *MANY_FILES) == 0
    assert len(watch.names) <= 47 - 10
    assert "going on: " in capsys.readouterr().out
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "whole"]


def test_finished_files_are_checked_and_belong_to_one_plan(
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt() -> None:
        with monkeypatch.context() as context:
            DiskFull(context, 20)
            assert convert(model_dir, tmp_path / "out", "hf", *MANY_FILES, "--threads", "1") == 1
        capsys.readouterr()

    interrupt()
    working = tmp_path / ".out.converting"
    flip_bit(sorted(working.glob("*.safetensors"))[1], 0.9)
    (working / "stray").touch()
    assert convert(model_dir, tmp_path / "out", "hf", *MANY_FILES) == 0
    assert "1 are damaged and written again" in capsys.readouterr().out
    assert_same(read_model(tmp_path / "out"), random_tensors())
    assert not (tmp_path / "out/stray").exists()

    shutil.rmtree(tmp_path / "out")
    interrupt()
    write_model(model_dir, {n: t + 1 for n, t in random_tensors().items()})
    assert convert(model_dir, tmp_path / "out", "hf", *MANY_FILES) == 0
    assert "an interrupted conversion with other options" in capsys.readouterr().out
    assert_same(read_model(tmp_path / "out"), {n: t + 1 for n, t in random_tensors().items()})

    shutil.rmtree(tmp_path / "out")
    interrupt()
    Path(tmp_path / ".out.converting.json").write_text("{")
    assert convert(model_dir, tmp_path / "out", "hf", *MANY_FILES) == 0
    assert "an interrupted conversion" in capsys.readouterr().out


def test_two_conversions_do_not_write_one_destination(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    working = tmp_path / ".out.converting"
    working.mkdir()
    (working / "theirs").touch()
    descriptor = os.open(working, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert convert(model_dir, tmp_path / "out", "hf") == 1
    assert "another conversion is writing it" in capsys.readouterr().err
    assert (working / "theirs").exists()
    os.close(descriptor)
    assert convert(model_dir, tmp_path / "out", "hf") == 0


def test_overwrite_replaces_only_when_all_is_written(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    assert convert(model_dir, target, "hf") == 0
    old = all_bytes(target)
    with monkeypatch.context() as context:
        DiskFull(context, 20)
        assert convert(model_dir, target, "hf", "--overwrite", *MANY_FILES) == 1
    assert all_bytes(target) == old
    (tmp_path / ".out.replaced").mkdir()  # as a kill between two renames leaves it
    assert convert(model_dir, target, "hf", "--overwrite", *MANY_FILES) == 0
    assert_same(read_model(target), random_tensors())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


# --verify.


def spoil_data(working: Path) -> None:
    path = sorted(working.rglob("*.safetensors"))[0]
    flip_bit(path, 0.95)


def spoil_shape(working: Path) -> None:
    path = sorted(working.rglob("*.safetensors"))[0]
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][None].contiguous()
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("format", "spoil", "what"),
    [
        ("hf", spoil_data, "differs from the source in rows"),
        ("native", spoil_data, "differs from the source in rows"),
        ("hf", spoil_shape, "model.norm.weight: has shape [1, 48], expected [48]"),
        ("hf", lambda path: (path / "extra.safetensors").write_bytes(b""), "not a whole safetens"),
        ("hf", lambda path: (path / "vocab.json").write_text("x"), "vocab.json: is not byte for"),
        (
            "native",
            lambda path: (path / "hf/vocab.json").write_text("[]"),
            "hf/vocab.json: damaged",
        ),
    ],
)
def test_verify_finds_what_went_wrong_on_disk(
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    format: str,
    spoil: Callable[[Path], object],
    what: str,
) -> None:
    target = hf_export.HfTarget if format == "hf" else native_import.NativeTarget
    finish = target.finish

    def finish_and_spoil(self: object, directory: Path, records: dict) -> None:
        finish(self, directory, records)
        spoil(directory)

    with monkeypatch.context() as context:
        context.setattr(target, "finish", finish_and_spoil)
        assert convert(model_dir, tmp_path / "out", format, "--verify") == 1
    assert what in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert convert(model_dir, tmp_path / "out", format, "--verify") == 0  # what is bad is redone


def test_latest_is_not_a_directory_being_converted(model_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".checkpoint-7.converting").mkdir()
    assert latest_checkpoint(run) is None
    assert convert(model_dir, run / "checkpoint-7", "native") == 0
    assert latest_checkpoint(run) == run / "checkpoint-7"
