"""SIGKILL at random moments of conversions: nothing torn looks whole, and the work goes on."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_sdar.benchmark.model_shapes import MODEL_CONFIGS, narrow_config, write_random_model
from megatron_sdar.checkpoint.hf_export import HfTarget
from megatron_sdar.checkpoint.hf_lint import lint_export
from megatron_sdar.checkpoint.run_directory import damaged_files, read_marker
from megatron_sdar.checkpoint.source_detection import open_source

TRIALS = 20
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def converter(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
    process = subprocess.Popen(
        [sys.executable, "-m", "unit.killed_converter"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )
    with process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0


def run(
    converter: subprocess.Popen[str], seconds: float | None, source: Path, target: Path, form: str
) -> tuple[int, float]:
    """Exit status and seconds of one conversion into small files."""
    assert converter.stdin is not None
    assert converter.stdout is not None
    arguments = ["--from", str(source), "--to", str(target), "--format", form]
    arguments += ["--max-shard-size", "150KB", "--overwrite"]
    converter.stdin.write(json.dumps([seconds, arguments]) + "\n")
    converter.stdin.flush()
    status, lived = json.loads(converter.stdout.readline())
    return status, lived


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def complaints(target: Path, form: str) -> list[str]:
    """What is wrong with a finished conversion, by the rules of its format."""
    if form == "native":
        return damaged_files(target, read_marker(target).files)
    return lint_export(target, HfTarget(open_source(target, None, None), None, 10**9).assets)


def test_twenty_kills(converter: subprocess.Popen[str], tmp_path: Path) -> None:
    source = tmp_path / "model"
    write_random_model(source, narrow_config(MODEL_CONFIGS["1.7b"], 32), file_bytes=10**6)
    whole, durations = {}, {}
    for form in ("native", "hf"):
        status, durations[form] = run(converter, None, source, tmp_path / f"whole-{form}", form)
        assert status == 0
        whole[form] = contents(tmp_path / f"whole-{form}")
        assert len(whole[form]) > 20
    chance = random.Random(5)
    killed_midway = 0
    for trial in range(TRIALS):
        form = ("native", "hf")[trial % 2]
        target = tmp_path / f"out-{form}"
        if trial == TRIALS // 2:  # from here on a finished one is there to be replaced
            shutil.copytree(tmp_path / f"whole-{form}", target, dirs_exist_ok=True)
        old = contents(target) if target.exists() else None
        status, _ = run(converter, chance.uniform(0, durations[form]), source, target, form)
        assert status in (0, -9)
        working = target.with_name(f".{target.name}.converting")
        if target.exists():
            assert contents(target) in (old, whole[form])
            assert complaints(target, form) == []
        if status == -9 and any(working.rglob("*.safetensors")):
            killed_midway += 1
            if contents(working) != whole[form]:  # else killed while it was given its name
                with pytest.raises(ValueError):
                    open_source(working, None, None)
        if status == 0 and trial < TRIALS // 2:
            shutil.rmtree(target)
    assert killed_midway >= TRIALS // 4
    for form in ("native", "hf"):
        target = tmp_path / f"out-{form}"
        assert run(converter, None, source, target, form)[0] == 0
        assert contents(target) == whole[form]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model", "whole-native", "whole-hf", "out-native", "out-hf"}
