"""Replaying skipped steps: the rows, the weights, the guilty micro-batch and module.

One token's embedding is infinite, so only rows in which it is visible are not finite; which
micro-batches these are is known from the run itself, whose record keeps a loss for each.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from distributed.command import ROOT, run_python
from distributed.skipped_runs import Faults, in_place, run_with_faults
from distributed.world import run_world
from safetensors.torch import load_file, save_file

from megatron_sdar.data.demo import make_demo_data
from megatron_sdar.data.storage.tokens import TokenizedDataset
from megatron_sdar.parallel.mesh import LaunchInfo, build_mesh
from megatron_sdar.training.step_replay import (
    ReplayRequest,
    replay_micro_batches,
    resolve_replay,
)

SETTINGS = {
    "dataset": "arithmetic", "cutoff_len": 128, "max_steps": 4, "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 3, "save_strategy": "no", "device": "cpu",
    "learning_rate": 1e-2, "preprocessing_num_workers": 1, "export_hf": False,
    "report_mfu": False, "max_skipped_steps": 4,
}  # fmt: skip


def arguments(folder: Path, name: str, output: str = "", **changes: Any) -> list[str]:
    config = {
        "model_name_or_path": str(folder / "model"), "dataset_dir": str(folder),
        "tokenized_path": str(folder / "tokens"), "output_dir": str(folder / (output or name)),
    }  # fmt: skip
    (folder / name).mkdir(exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config | SETTINGS | changes))
    return [str(path)]


def rare_token(folder: Path) -> int:
    """One that stands in few of the documents."""
    tokens = TokenizedDataset(folder / "tokens")
    counts = Counter(
        int(token) for number in range(len(tokens)) for token in np.unique(tokens.get(number)[0])
    )
    return min((token for token, count in counts.items() if count >= 6), key=counts.__getitem__)


def poison_embedding(folder: Path) -> None:
    if dist.get_rank() == 0:
        (path,) = (folder / "first").glob("model*.safetensors")
        weights = load_file(path)
        weights["model.embed_tokens.weight"][rare_token(folder)] = math.inf
        save_file(weights, path, metadata={"format": "pt"})
    dist.barrier()


def replay(given: Sequence[str], record: Path, tp: int, result: Path, trains: bool) -> None:
    """Replay on this world; rank 0 keeps the reports and what was said."""
    launch = LaunchInfo(dist.get_rank(), dist.get_rank(), dist.get_world_size())
    said: list[str] = []
    request = ReplayRequest(given, record, trains)
    found, config, arch = resolve_replay(request, launch, said.append)
    mesh = build_mesh(torch.device("cpu"), tp, 1)
    reports = replay_micro_batches(request, config, arch, mesh, found, said.append)
    if launch.rank == 0:
        result.write_text(json.dumps({"reports": [asdict(r) for r in reports], "said": said}))


def replay_on_a_faulty_device(given: Sequence[str], record: Path, result: Path) -> None:
    """A step before the recorded one fails here, and did not in the run."""
    with in_place(Faults(poisoned={4: 1})), pytest.raises(ValueError) as refused:
        replay(given, record, 1, result, True)
    result.with_suffix(f".{dist.get_rank()}").write_text(str(refused.value))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    make_demo_data(folder, 60)
    first = arguments(folder, "first", train_from_scratch=True, max_steps=1, export_hf=True)
    poisoned = arguments(folder, "poisoned", model_name_or_path=str(folder / "first"))
    # Of step 5 neither checkpoint has the weights, and the first one lies behind a skipped step.
    keys = {"train_from_scratch": True, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    sound = arguments(folder, "sound", **keys)
    split = arguments(folder, "split", "sound", tensor_model_parallel_size=2, **keys)
    record = folder / "sound/skipped_steps/step-5.json"
    jobs: list[Any] = [
        (run_with_faults, (first, Faults())),
        (poison_embedding, (folder,)),
        (run_with_faults, (poisoned, Faults())),
        (run_with_faults, (sound, Faults(poisoned={2: 0, 5: 1}))),
        (replay, (sound, record, 1, folder / "untrained.json", False)),
        (replay, (sound, record, 1, folder / "trained.json", True)),
        (replay, (split, record, 2, folder / "split.json", True)),
        (replay_on_a_faulty_device, (sound, record, folder / "faulty.json")),
    ]
    run_world(2, jobs, folder)
    return folder


def read(path: Path) -> tuple[list[dict[str, Any]], str]:
    content = json.loads(path.read_text())
    return content["reports"], "\n".join(content["said"])


def losses(record: Path) -> list[float]:
    return [float(batch["loss"]) for batch in json.loads(record.read_text())["micro_batches"]]


def replayed_losses(path: Path) -> list[float]:
    return [report["loss"] for report in read(path)[0]]


def test_the_rows_and_the_weights_of_the_step_come_back(runs: Path) -> None:
    then = losses(runs / "sound/skipped_steps/step-5.json")
    assert len(then) == 6, "three micro-batches of two ranks"
    assert replayed_losses(runs / "trained.json") == pytest.approx(then, rel=1e-6)
    assert replayed_losses(runs / "split.json") == pytest.approx(then, rel=1e-4)
    _, said = read(runs / "trained.json")
    assert "running steps 4 to 4 first" in said
    assert f"weights: {runs / 'sound/checkpoint-3'}, exactly those of step 5" in said


def test_without_the_steps_between_it_says_how_far_the_weights_are(runs: Path) -> None:
    then = losses(runs / "sound/skipped_steps/step-5.json")
    reports, said = read(runs / "untrained.json")
    assert f"{runs / 'sound/checkpoint-3'}, 1 step before those of step 5;" in said
    assert [report["loss"] for report in reports] != pytest.approx(then, rel=1e-3)
    assert all(report["module"] is None and not report["parameters"] for report in reports)


def test_a_step_that_fails_only_here_ends_the_replay(runs: Path) -> None:
    for rank in (0, 1):
        text = (runs / f"faulty.{rank}").read_text()
        assert text.startswith("step 4 is not finite here (loss ")
        assert text.endswith("but was not skipped then; use the run's own layout and settings")


def test_the_tool_names_the_guilty_micro_batches_and_the_module(runs: Path) -> None:
    """In one process, of a run of two, from a checkpoint behind the step."""
    records = sorted((runs / "poisoned/skipped_steps").glob("step-*.json"))
    assert records, "the rare token was met"
    then = losses(records[-1])
    guilty = [number for number, loss in enumerate(then) if not math.isfinite(loss)]
    assert 0 < len(guilty) < 6, "some, not all; choose another token"
    done = run_python(
        [str(ROOT / "tools/replay_step.py"), str(runs / "poisoned.yaml"), str(records[-1]),
         "tensor_model_parallel_size=2"]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "one process: tp 2 x pp 1 become 1 x 1" in done.stdout
    assert "these weights are not finite: model.embed_tokens.weight" in done.stdout
    table = {
        int(cells[0]): cells
        for line in done.stdout.partition("\nmicro-batch ")[2].splitlines()
        if (cells := line.split()) and cells[0].isdigit()
    }
    assert list(table) == list(range(6))
    for number, cells in table.items():
        if number in guilty:
            assert cells[-2:] == ["no", "model.embed_tokens"]
        else:
            assert cells[-2:] == ["yes", "-"]
            assert float(cells[-4]) == pytest.approx(then[number], rel=1e-4)
    assert f"not finite: micro-batch {', '.join(map(str, guilty))}\n" in done.stdout
    tokens, token = TokenizedDataset(runs / "tokens"), rare_token(runs)
    named = json.loads(records[-1].read_text())["micro_batches"]
    for number in guilty:
        documents = [document["document"] for document in named[number]["documents"]]
        assert any(token in tokens.get(document)[0] for document in documents)
        (line,) = (
            line for line in done.stdout.splitlines()
            if line.startswith(f"documents of micro-batch {number}: ")
        )  # fmt: skip
        assert line.split(": ", 1)[1] == ", ".join(f"tokens:{number}" for number in documents)
