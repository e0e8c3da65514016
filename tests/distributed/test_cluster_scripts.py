"""configs/cluster: the Slurm script starts torchrun on every node, and the nodes find each other.

srun and scontrol are stand-ins: srun starts its command once per node, at the same time. That two
"nodes" of this machine then train together is a slow test.
"""

from __future__ import annotations

import json
import os
import random
import signal
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
trap 'kill -USR1 $first $second' USR1
wait $first || wait $first
wait $second
"""

SCONTROL = """\
#!/bin/sh
[ "$1" = requeue ] && echo "requeued $2"
[ "$1" = show ] && printf "localhost\\nother\\n"
exit 0
"""
# A process that trains until it is asked to stop, under a torchrun that waits for it.
WORKER = f"""\
#!{sys.executable}
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda number, frame: sys.exit(0))
sys.stdout.write("training\\n")
sys.stdout.flush()
time.sleep(60)
sys.exit(9)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """What Slurm sets, with its two programs in front of the PATH."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
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
        "MAX_RELAUNCHES": "0",
        "RELAUNCH_DELAY": "0.1",
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
        f"[ $(ls {tmp_path}/call.* | wc -l) -ge ${{SUCCEEDS_AT:-0}} ] && exit $FAILS; exit 5\n"
    )
    torchrun.chmod(0o755)
    environment |= {"SLURM_JOB_ID": "1230007", "OMP_NUM_THREADS": "", "FAILS": "0"}
    environment |= {"TORCHRUN_ARGS": "--log-dir /x"}
    assert submit(["my.yaml", "default_system=two words"], environment).returncode == 0
    line = (
        "1|--nnodes|2|--nproc_per_node|1|--rdzv_backend|c10d|--rdzv_endpoint|localhost:20007|"
        "--rdzv_id|1230007|--max_restarts|0|--log-dir|/x|pretrain_sdar.py|my.yaml|"
        "default_system=two words|job_id=1230007|"
    )
    assert [call.read_text() for call in tmp_path.glob("call.*")] == [f"{line}\n"] * 2
    assert submit(["my.yaml"], environment | {"FAILS": "3"}).returncode == 3
    for path in tmp_path.glob("call.*"):
        path.unlink()
    # Both nodes start it again until a sixth start in all is one that succeeds.
    again = submit(["my.yaml"], environment | {"MAX_RELAUNCHES": "5", "SUCCEEDS_AT": "6"})
    assert again.returncode == 0, again.stderr
    assert "torchrun ended with exit code 5; relaunch 2 of 5 in 0.1 s" in again.stderr


@pytest.mark.parametrize("script", ["slurm.sbatch", "torchrun_multi_node.sh"])
def test_a_signal_reaches_the_training_processes_alone(
    tmp_path: Path, environment: dict[str, str], script: str
) -> None:
    launcher = f"#!/bin/sh\n{tmp_path}/bin/worker & wait $!; code=$?; echo $code; exit $code\n"
    for name, text in {"torchrun": launcher, "worker": WORKER}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment |= {"HEAD_NODE": "localhost", "NUM_NODES": "1", "RUN_ID": "7"}
    process = subprocess.Popen(
        ["bash", str(CLUSTER / script), "my.yaml"],
        env=environment | {"MAX_RELAUNCHES": "3"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    nodes = 2 if script == "slurm.sbatch" else 1
    for _ in range(nodes):
        assert process.stdout.readline() == "training\n"
    process.send_signal(signal.SIGUSR1)
    text, _ = process.communicate(timeout=30)
    requeued = f"requeued {environment['SLURM_JOB_ID']}\n" if nodes == 2 else ""
    assert (process.returncode, text) == (0, "0\n" * nodes + requeued)


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


@pytest.mark.parametrize("missing", ["HEAD_NODE", "NUM_NODES", "RUN_ID"])
def test_what_is_missing_is_said(environment: dict[str, str], missing: str) -> None:
    given = {"HEAD_NODE": "localhost", "NUM_NODES": "1", "RUN_ID": "7"}
    given.pop(missing)
    script = ["bash", str(CLUSTER / "torchrun_multi_node.sh"), "x.yaml"]
    result = subprocess.run(
        script, env=environment | given, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert f"{missing}: set it to" in result.stderr


def test_without_a_config_both_say_how_they_are_used(environment: dict[str, str]) -> None:
    environment |= {"HEAD_NODE": "localhost", "NUM_NODES": "1", "RUN_ID": "7"}
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
