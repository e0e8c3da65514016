"""Every command of README.md runs, in the order in which a reader meets them.

They run in a copy of the tracked tree, so that nothing is left behind in the checkout. `make
test` is this very run and is only checked to be the pytest call.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)
MAKE_TEST = "make test"


def readme_commands() -> list[str]:
    blocks = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


COMMANDS = readme_commands()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("readme") / "megatron_sdar"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "demo", "output", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, target, ignore=ignored)
    return target


def run(command: str, directory: Path, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    """Run a README command with this interpreter in place of the one of .venv."""
    scripts = Path(sys.executable).parent
    paths = [str(directory), str(directory / "kernels")]
    environment = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
    }
    if command.startswith("make"):
        command += f" PYTHON={sys.executable}"
    return subprocess.run(
        command,
        shell=True,
        cwd=directory,
        env=environment,
        text=True,
        capture_output=True,
        timeout=timeout,
        check=False,
    )


def test_the_first_commands_are_demo_and_test() -> None:
    assert COMMANDS[:2] == ["make demo", MAKE_TEST]


def test_make_test_is_pytest(checkout: Path) -> None:
    result = run(f"{MAKE_TEST} --dry-run", checkout)
    assert result.returncode == 0, result.stderr
    assert "-m pytest -m 'not slow'" in result.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != MAKE_TEST])
def test_command_runs(command: str, checkout: Path) -> None:
    result = run(command, checkout)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "Warning" not in result.stderr, result.stderr[-3000:]
    check = EFFECTS.get(command.split(" ")[0] + " " + command.split(" ")[1])
    if check is not None:
        check(checkout, result.stdout)


def demo_left_everything(checkout: Path, stdout: str) -> None:
    output = checkout / "demo" / "output"
    records = [json.loads(line) for line in (output / "trainer_log.jsonl").open()]
    assert len(records) == 60
    for record in records:
        assert {"step", "loss", "grad_norm", "lr", "epoch"} <= set(record)
    first = sum(record["loss"] for record in records[:5]) / 5
    last = sum(record["loss"] for record in records[-5:]) / 5
    assert last < 0.5 * first, f"the loss went from {first} to {last}"
    assert (output / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" in index["weight_map"]
    for name in ("config.json", "tokenizer.json", "checkpoint-60/COMMITTED"):
        assert (output / name).exists(), name
    assert "####" in stdout or "<think>" in stdout, "the decoded answer is shown"


def resumed(checkout: Path, stdout: str) -> None:
    if "overwrite_output_dir=false" in stdout or "resumed from" in stdout:
        records = [json.loads(line) for line in (checkout / "demo/mine/trainer_log.jsonl").open()]
        assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]


EFFECTS = {"make demo": demo_left_everything, "python pretrain_sdar.py": resumed}
