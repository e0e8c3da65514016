"""configs/cluster: the Slurm script starts torchrun on every node, and the nodes find each other.

srun and scontrol are stand-ins: srun starts its command once per node, at the same time. That two
"nodes" of this machine then train together is a slow test.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from distributed.command import ROOT

from megatron_sdar.checkpoint.run_directory import read_marker
from megatron_sdar.data.demo import make_demo_data

CLUSTER = ROOT / "configs/cluster"
SRUN = """\
#!/usr/bin/env bash
set -e
[ "$1" = --kill-on-bad-exit=1 ] && shift
"$@" & first=$!
"$@" & second=$!
wait $first
wait $second
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """What Slurm sets, with its two programs in front of the PATH."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"srun": SRUN, "scontrol": "#!/bin/sh\necho localhost\necho other\n"}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    path = f"{tools}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": str(random.SystemRandom().randrange(10**6)),
        "NPROC_PER_NODE": "1",
        "MAX_RESTARTS": "0",
    }


def submit(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(CLUSTER / "slurm.sbatch"), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_every_node_gets_one_torchrun(tmp_path: Path, environment: dict[str, str]) -> None:
    torchrun = tmp_path / "bin/torchrun"
    # A file per node: two that append to one file at the same time mix their lines.
    torchrun.write_text(
        f'#!/bin/sh\n{{ printf "%s|" "$OMP_NUM_THREADS" "$@"; echo; }} > {tmp_path}/call.$$\n'
        "exit $FAILS\n"
    )
    torchrun.chmod(0o755)
    environment |= {"SLURM_JOB_ID": "1230007", "OMP_NUM_THREADS": "", "FAILS": "0"}
    assert submit(["my.yaml", "default_system=two words"], environment).returncode == 0
    line = (
        "1|--nnodes|2|--nproc_per_node|1|--rdzv_backend|c10d|--rdzv_endpoint|localhost:20007|"
        "--rdzv_id|1230007|--max_restarts|0|pretrain_sdar.py|my.yaml|default_system=two words|"
    )
    assert [call.read_text() for call in tmp_path.glob("call.*")] == [f"{line}\n"] * 2
    assert submit(["my.yaml"], environment | {"FAILS": "3"}).returncode == 3


@pytest.mark.slow
def test_two_nodes_train_together(tmp_path: Path, environment: dict[str, str]) -> None:
    make_demo_data(tmp_path / "demo", 60)
    values = {
        "model_name_or_path": str(tmp_path / "demo/model"),
        "train_from_scratch": True,
        "dataset": str(tmp_path / "demo/train.jsonl"),
        "cutoff_len": 256,
        "per_device_train_batch_size": 1,
        "max_steps": 1,
        "output_dir": str(tmp_path / "run"),
        "export_hf": False,
        "device": "cpu",
    }
    config = tmp_path / "run.json"
    config.write_text(json.dumps(values))
    result = submit([str(config), "max_steps=2", "tensor_model_parallel_size=2"], environment)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    marker = read_marker(tmp_path / "run/checkpoint-2")
    assert marker.layout == {"tp": 2, "pp": 1, "dp": 1}, "both nodes are one world"


@pytest.mark.parametrize("missing", ["HEAD_NODE", "NUM_NODES"])
def test_what_is_missing_is_said(environment: dict[str, str], missing: str) -> None:
    given = {"HEAD_NODE": "localhost", "NUM_NODES": "1"}
    given.pop(missing)
    script = ["bash", str(CLUSTER / "torchrun_multi_node.sh"), "x.yaml"]
    result = subprocess.run(
        script, env=environment | given, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert f"{missing}: set it to" in result.stderr


def test_without_a_config_both_say_how_they_are_used(environment: dict[str, str]) -> None:
    environment |= {"HEAD_NODE": "localhost", "NUM_NODES": "1"}
    for script in ("slurm.sbatch", "torchrun_multi_node.sh"):
        command = ["bash", str(CLUSTER / script)]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 2
        assert "CONFIG.yaml [key=value ...]" in result.stderr


def test_every_script_is_valid_bash() -> None:
    scripts = sorted(CLUSTER.iterdir())
    assert [path.name for path in scripts] == ["slurm.sbatch", "torchrun_multi_node.sh"]
    for path in scripts:
        subprocess.run(["bash", "-n", str(path)], check=True)
