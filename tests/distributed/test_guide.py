"""The two files of SDAR's LLaMA-Factory guide run as they stand, by the guide's launch line.

guide/*.yaml hold the published values. Only what a user replaces is replaced: paths, and the row
length, since the model is a small one; six steps are enough (20 in `make test-slow`).
"""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
import yaml
from distributed.command import ROOT, run_python
from safetensors.torch import load_file
from unit.llamafactory_rows import packed_row, write_cache

from megatron_sdar.benchmark.model_shapes import write_random_model
from megatron_sdar.config import load_config
from megatron_sdar.data.demo import make_demo_data
from megatron_sdar.data.tokenization.tokenizer import load_tokenizer

GUIDE = Path(__file__).parent / "guide"
FILES = ("sdar_4b_math_cot_full.yaml", "sdar_8b_full.yaml")
CUTOFF = 256
steps_of_the_run = pytest.mark.parametrize("steps", [6, pytest.param(20, marks=pytest.mark.slow)])


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A small SDAR with weights, and LLaMA-Factory's data folder with open_r1_math."""
    folder = tmp_path
    make_demo_data(folder / "demo", 200)
    config = json.loads((folder / "demo/model/config.json").read_text())
    write_random_model(folder / "model", config, torch.float32)
    for file in (folder / "demo/model").iterdir():
        if file.name != "config.json":
            shutil.copy(file, folder / "model")
    (folder / "data").mkdir()
    with (folder / "data/open_r1_math.jsonl").open("w") as stream:
        for line in (folder / "demo/train.jsonl").read_text().splitlines():
            record = json.loads(line)
            messages = [
                {"role": "user", "content": record["prompt"]},
                {"role": "assistant", "content": record["response"]},
            ]
            stream.write(json.dumps({"messages": messages}) + "\n")
    entry = {
        "file_name": "open_r1_math.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role", "content_tag": "content", "user_tag": "user",
            "assistant_tag": "assistant", "system_tag": "system",
        },
    }  # fmt: skip
    (folder / "data/dataset_info.json").write_text(json.dumps({"open_r1_math": entry}))
    return folder


def write_config(name: str, work: Path, tokenized_path: Path) -> Path:
    """The guide's file with its paths replaced; nothing is added."""
    values = yaml.safe_load((GUIDE / name).read_text())
    assert values["cutoff_len"] == 20480
    values |= {
        "model_name_or_path": str(work / "model"),
        "tokenized_path": str(tokenized_path),
        "output_dir": str(work / "saves" / name),
        "cutoff_len": CUTOFF,
    }
    path = work / name
    path.write_text(yaml.safe_dump(values))
    return path


def launch(num_processes: int, config: Path, work: Path, steps: int) -> str:
    """The guide's torchrun line, in the folder in which it is given; returns what is printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = f"--nnodes 1 --node_rank 0 --nproc_per_node {num_processes} --master_addr 127.0.0.1"
    script = [str(ROOT / "pretrain_sdar.py"), str(config), f"max_steps={steps}"]
    torchrun = ["-m", "torch.distributed.run", *line.split(), "--master_port", str(port)]
    result = run_python([*torchrun, *script], cwd=work)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def check_run(config: Path, printed: str, steps: int) -> list[float]:
    output = Path(yaml.safe_load(config.read_text())["output_dir"])
    records = [json.loads(line) for line in (output / "trainer_log.jsonl").open()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == steps
    for name in ("model.safetensors.index.json", "training_loss.png", "config.json"):
        assert (output / name).exists(), name
    assert (output / f"checkpoint-{steps}/COMMITTED").exists()
    assert "only the ZeRO stage of the name ds_z2_config.json (no such file)" in printed
    return losses


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


@steps_of_the_run
def test_the_4b_file_trains_on_two_processes(work: Path, steps: int) -> None:
    config = write_config(FILES[0], work, work / "cache/tokens")
    printed = launch(2, config, work, steps)
    losses = check_run(config, printed, steps)
    # A few steps of 1e-5 move the loss less than its noise; what they do to weights shows.
    assert all(0 < loss < 100 for loss in losses)
    before, after = (exported(folder) for folder in (work / "model", work / "saves" / FILES[0]))
    matrices = [name for name in before if name.endswith("proj.weight")]
    assert all(not torch.equal(after[name], before[name].to(after[name])) for name in matrices)
    for key in ("freeze_vision_tower", "freeze_language_model"):
        assert re.search(rf"warning: \S+:\d+: {key} is ignored: ", printed)
    assert "96 is more than the" in printed
    assert "x dp 2 (vpp 1, optim_grads)" in printed
    assert (work / "cache/tokens.bin").exists()


@steps_of_the_run
def test_the_8b_file_trains_on_a_cache_that_llamafactory_wrote(work: Path, steps: int) -> None:
    tokenizer = load_tokenizer(work / "model")
    documents = []
    for line in (work / "data/open_r1_math.jsonl").read_text().splitlines():
        question, answer = (m["content"] for m in json.loads(line)["messages"])
        prompt = tokenizer.encode(
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = tokenizer.encode(f"{answer}<|im_end|>\n")
        documents.append(([*prompt, *ids], [-100] * len(prompt) + ids))
    assert max(len(ids) for ids, _ in documents) <= CUTOFF - 4
    rows = [packed_row([each], CUTOFF, 4, tokenizer.pad_token_id) for each in documents]
    cache = write_cache(work / "tokenized_data", rows, files=3, validation=True)
    config = write_config(FILES[1], work, cache)
    printed = launch(1, config, work, steps)
    check_run(config, printed, steps)
    assert "exactly its documents are trained" in printed
    assert f"the validation split of {cache} is not read" in printed
    assert re.search(rf"^documents +{len(documents)}$", printed, re.MULTILINE)
    assert "lr_scheduler_type: constant has no warm-up" in printed


@pytest.mark.parametrize("name", FILES)
def test_the_files_need_no_change_to_be_read(name: str) -> None:
    config = load_config([str(GUIDE / name)])
    assert config.parallel.data_parallel_sharding_strategy == "optim_grads"
    assert config.training.recompute_granularity == "full"
    assert config.optim.learning_rate == 1e-5
    assert config.data.truncate_mode == "drop"
