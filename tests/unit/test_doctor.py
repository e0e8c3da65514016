"""python -m megatron_sdar.doctor: what is wrong is found, named and given a remedy."""

from __future__ import annotations

import json
import re
import socket
import tomllib
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from megatron_sdar.benchmark.model_shapes import MODEL_CONFIGS, write_random_model
from megatron_sdar.data.demo import make_demo_data
from megatron_sdar.doctor import __main__ as command
from megatron_sdar.doctor import machine, software, storage
from megatron_sdar.doctor.findings import MISSING, OK, SLOW, Finding, as_json, missing, ok, show
from megatron_sdar.doctor.run import Place, run
from megatron_sdar.training.memory_estimate import GIB

ROOT = Path(__file__).resolve().parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


# Software.


def test_needed_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = dict(
        re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in project["dependencies"]
    )
    del declared["triton"]  # optional on a CPU, so it has a check of its own
    assert declared == software.NEEDED
    assert project["requires-python"] == ">=" + ".".join(map(str, software._PYTHON))


@pytest.mark.parametrize(
    ("installed", "state"),
    [("2.13", OK), ("2.13.0+cu130", OK), ("2.14.0a1", OK), ("10.0", OK), ("2.12.1", MISSING)],
)
def test_versions(monkeypatch: pytest.MonkeyPatch, installed: str, state: str) -> None:
    monkeypatch.setattr(software.metadata, "version", lambda name: installed)
    assert software.library("torch", "2.13").state == state


def test_what_is_not_installed() -> None:
    found = software.library("no-such-library", "1.0")
    assert (found.state, found.remedy) == (MISSING, "pip install 'no-such-library>=1.0'")
    assert software.python_version((3, 10, 4)).state == MISSING
    assert software.python_version((3, 11, 0)).state == OK


def test_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "compiles for sm_90" in software.triton(CPU).text

    def fail(spec: object, arch: str) -> None:
        raise RuntimeError("ptxas is gone")

    monkeypatch.setattr(software, "compile_spec", fail)
    found = software.triton(CPU)
    assert found.state == SLOW
    assert "RuntimeError: ptxas is gone" in found.text
    monkeypatch.setattr(software.shutil, "which", lambda name: None)
    assert "no C compiler" in software.triton(GPU).text
    monkeypatch.setattr(software, "interpreting", lambda: True)
    assert software.triton(CPU).remedy == "unset TRITON_INTERPRET"
    monkeypatch.setattr(software, "find_spec", lambda name: None)
    assert (software.triton(CPU).state, software.triton(GPU).state) == (OK, SLOW)


def test_trackers_are_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "wanted_trackers", lambda names: ["mlflow"])
    assert software.trackers() == ok(
        "trackers", "installed: mlflow; optional: tensorboard, wandb, swanlab"
    )


# The machine.


def test_processors() -> None:
    assert machine.processors(4, 1, CPU).state == OK
    assert machine.processors(4, 8, CPU).remedy == "export OMP_NUM_THREADS=4 or less"


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.open_files(1024).remedy == "ulimit -n 4096"
    assert machine.open_files(-1).text == "no limit"
    assert machine.open_files(65536).state == OK
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 2**20))
    assert "--shm-size" in machine.shared_memory(tmp_path, GPU).remedy
    assert machine.shared_memory(tmp_path, CPU).state == OK
    assert "is not there" in machine.shared_memory(tmp_path / "none", GPU).text


def test_host_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.socket, "gethostbyname", lambda name: "10.0.0.1")
    assert machine.host_name("node0") == ok("host name", "node0 is 10.0.0.1")

    def unknown(name: str) -> str:
        raise socket.gaierror("not known")

    monkeypatch.setattr(machine.socket, "gethostbyname", unknown)
    assert "GLOO_SOCKET_IFNAME=lo" in machine.host_name("node0").remedy


def test_interfaces(tmp_path: Path) -> None:
    for name, state in {"lo": "unknown", "eth0": "up", "eth1": "down", "ib0": "up"}.items():
        (tmp_path / "net" / name).mkdir(parents=True)
        (tmp_path / "net" / name / "operstate").write_text(f"{state}\n")
    (tmp_path / "infiniband/mlx5_0").mkdir(parents=True)
    found = machine.interfaces(tmp_path / "net", tmp_path / "infiniband")
    assert found.text.startswith("eth0, ib0; InfiniBand: mlx5_0; for several nodes choose one: ")
    alone = machine.interfaces(tmp_path / "none", tmp_path / "none")
    assert alone.text == "none but lo; InfiniBand: none"


def test_a_process_group_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no interface")

    monkeypatch.setattr(machine, "start_process_group", fail)
    monkeypatch.setattr(machine, "stop_process_group", lambda: None)
    found = machine.process_group(CPU)
    assert (found.state, found.text) == (MISSING, "gloo: no interface")


def test_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What torch says of two cards, one of them half full, without bf16."""
    cuda = machine.torch.cuda
    monkeypatch.setattr(cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda, "get_device_name", lambda index: "H100")
    free = (79 * GIB, 40 * GIB)
    monkeypatch.setattr(cuda, "mem_get_info", lambda index: (free[index], 80 * GIB))
    monkeypatch.setattr(cuda, "is_bf16_supported", lambda: False)
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX Open Kernel Module  580.65.06  Release\n")
    monkeypatch.setattr(machine, "_DRIVER", driver)
    found = list(machine.gpus(GPU))
    assert [each.state for each in found] == [OK, OK, SLOW, SLOW]
    assert found[0].text.startswith("580.65.06, torch is built for")
    assert found[2].text == "H100, 40.0 of 80.0 GiB free"
    monkeypatch.setattr(machine.torch.version, "cuda", None)
    (found,) = machine.gpus(CPU)
    assert "this torch is built for CPUs" in found.text
    monkeypatch.setattr(machine, "_DRIVER", tmp_path / "none")
    assert [each.state for each in machine.gpus(CPU)] == [OK]


# Storage.


def test_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_write_speed", lambda path: 10.0**9)
    assert storage.storage(tmp_path / "new/run", 0).state == OK
    assert not (tmp_path / "new").exists(), "nothing is left"
    found = storage.storage(tmp_path, 2**70)
    assert found.state == MISSING
    assert "the run needs about" in found.text
    assert storage.storage(tmp_path, 1).state == OK
    (tmp_path / "file").write_text("")
    assert "is a file" in storage.storage(tmp_path / "file", 0).text
    monkeypatch.setattr(storage, "_write_speed", lambda path: 10.0**6)
    assert storage.storage(tmp_path, 0).state == SLOW

    def fail(path: Path) -> float:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(storage, "_write_speed", fail)
    assert "Permission denied" in storage.storage(tmp_path, 0).text


def test_the_speed_is_measured(tmp_path: Path) -> None:
    assert storage._write_speed(tmp_path) > 0
    assert list(tmp_path.iterdir()) == []


# A configuration.


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    make_demo_data(folder, 20)
    return folder


@pytest.fixture
def config(demo: Path, tmp_path: Path) -> Iterator[Path]:
    values = {
        "model_name_or_path": str(demo / "model"),
        "train_from_scratch": True,
        "dataset": str(demo / "train.jsonl"),
        "cutoff_len": 256,
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps(values))
    yield path
    assert not (tmp_path / "run").exists(), "nothing is left"


def examine(config: Path, *overrides: str, place: Place | None = None) -> dict[str, Finding]:
    return {each.name: each for each in run([str(config), *overrides], place or Place(CPU))}


def test_a_config_that_is_ready(config: Path) -> None:
    found = examine(config, "tensor_model_parallel_size=2")
    assert {each.state for each in found.values()} == {OK}
    names = ["config", "model", "tokenizer", "data", "sizes", "memory", "output_dir"]
    assert list(found) == names
    assert found["sizes"].text == (
        "2 processes = tensor 2 x pipeline 1 x data 1; "
        "8 rows of 512 tokens, copies included, per step"
    )
    assert found["config"].text == f"{config}: no error in any key"
    assert "random at first" in found["model"].text
    assert "2 on this host's CPU" in found["memory"].text


def test_warnings_are_listed(config: Path) -> None:
    given = ["flash_attn=fa2", "global_batch_size=32", "gradient_accumulation_steps=2"]
    found = examine(config, *given, "row_length=300")
    (first, warning) = found["config"].text.splitlines()
    assert "flash_attn is" in warning, first
    layout, changed = found["sizes"].text.splitlines()
    assert layout.endswith("32 rows of 300 tokens, copies included, per step")
    assert "by global_batch_size=32 on 1 processes; 2 is ignored" in changed
    assert {each.state for each in found.values()} == {OK}


@pytest.mark.parametrize(
    ("override", "name", "text"),
    [
        ("learning_rate=fast", "config", "learning_rate: 'fast' is not a finite number"),
        ("model_name_or_path=nowhere", "model", "nowhere/config.json: cannot read it"),
        ("train_from_scratch=false", "model", "safetensors"),
        ("dataset=gone.jsonl", "data", "gone.jsonl"),
        ("dataset=null", "data", "neither dataset nor data_path is given"),
        ("report_to=swanlab", "report_to", "report_to: swanlab is not installed"),
        ("pipeline_model_parallel_size=64", "sizes", "chunks need as many layers"),
        ("cutoff_len=255", "sizes", "is not a multiple of block_length"),
        ("lr_scheduler_kwargs={new: 1}", "sizes", "new"),
    ],
)
def test_what_is_missing_is_named(config: Path, override: str, name: str, text: str) -> None:
    found = examine(config, override)
    assert found[name].state == MISSING
    assert text in found[name].text
    assert found[name].remedy


def test_weights_that_are_there(demo: Path, config: Path, tmp_path: Path) -> None:
    model = json.loads((demo / "model/config.json").read_text())
    write_random_model(tmp_path / "model", model, torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((demo / "model" / name).read_bytes())
    overrides = (f"model_name_or_path={tmp_path / 'model'}", "train_from_scratch=false")
    assert "weights complete (sdar)" in examine(config, *overrides)["model"].text
    index = tmp_path / "model/model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    found = examine(config, *overrides)["model"]
    assert found.state == MISSING
    assert "model.norm.weight" in found.text


def test_a_model_that_does_not_fit(config: Path, demo: Path, tmp_path: Path) -> None:
    sizes = {"vocab_size", "mask_token_id", "bos_token_id", "eos_token_id"}
    shape = {key: value for key, value in MODEL_CONFIGS["8b"].items() if key not in sizes}
    demo_config = json.loads((demo / "model/config.json").read_text())
    folder = tmp_path / "8b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(demo_config | shape))
    overrides = (
        f"model_name_or_path={folder}", f"tokenizer_name_or_path={demo / 'model'}",
        "per_device_train_batch_size=1", "gradient_accumulation_steps=2", "bf16=true",
    )  # fmt: skip
    small, large = Place(CPU, 8, 24 * GIB), Place(CPU, 8, 80 * GIB)
    found = examine(config, *overrides, place=small)["memory"]
    assert found.state == MISSING
    assert found.remedy.startswith(
        "it will not fit: data_parallel_sharding_strategy: optim_grads_p"
    )
    assert examine(config, *overrides, place=large)["memory"].state == OK
    long = ("cutoff_len=32768", "recompute_granularity=none")
    remedy = examine(config, *overrides, *long, place=large)["memory"].remedy
    assert remedy.startswith(
        "it will not fit: recompute_granularity: full, or a smaller row_length"
    )


# The command.


def test_the_command_prints_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "software", lambda device: [ok("python", "3.12")])
    monkeypatch.setattr(command, "machine", lambda device: [missing("gpu", "none", "buy one")])
    monkeypatch.setattr(command, "storage", lambda path, needed: ok("output_dir", "here"))
    assert command.main(["--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["ready"] is False
    assert printed["findings"][1] == {
        "name": "gpu", "state": "missing", "text": "none", "remedy": "buy one"
    }  # fmt: skip
    monkeypatch.setattr(command, "machine", lambda device: [])
    assert command.main([]) == 0
    assert "ready to train" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--processes=0", "--device-memory=-1"])
def test_numbers_out_of_range(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main([option])
    assert option.split("=")[0] in capsys.readouterr().err


def test_findings_are_shown_with_their_remedy() -> None:
    stream = StringIO()
    found = [ok("a", "fine"), missing("b", "gone", "get it")]
    show(found, Console(file=stream, width=80))
    assert stream.getvalue().split() == ["ok", "a", "fine", "missing", "b", "gone", "->", "get",
                                         "it", "not", "ready:", "b"]  # fmt: skip
    assert json.loads(as_json(found[:1]))["ready"] is True
    with pytest.raises(AssertionError, match="a remedy for what is wrong"):
        Finding("b", MISSING, "gone")
