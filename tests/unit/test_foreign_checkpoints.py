"""Resuming from a checkpoint of another model, vocabulary or adapter: refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from unit.tool_runs import run_tool
from unit.tool_workplace import Workplace


def torture(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.torture)


SHAPE = r"run/checkpoint-2: does not hold this model:\n.*has shape \["
# A key of config.json, its other value, and words of the message.
MODELS = [
    ("hidden_size", 48, SHAPE),
    ("vocab_size", 1024, r"512 rows were saved and this run pads 1024 to 1024"),
    torture("intermediate_size", 64, SHAPE),
    torture("num_hidden_layers", 2, "does not hold this model:\n.*layers.{2-3}.*: unexpected"),
]


@pytest.mark.parametrize(("key", "value", "words"), MODELS)
def test_of_another_model(
    workplace: Workplace, tmp_path: Path, key: str, value: int, words: str
) -> None:
    place = workplace.copy(tmp_path / "place")
    config = json.loads((place.root / "model/config.json").read_text())
    assert config[key] != value
    place.spoil("model/config.json", json.dumps({**config, key: value}).encode())
    arguments = ["run.yaml", "max_steps=3", "train_from_scratch=true"]
    before = sorted(path.name for path in (place.root / "run").iterdir())
    outcome = run_tool("pretrain", arguments, place.root)
    assert outcome.problem(words) is None, outcome.text
    assert sorted(path.name for path in (place.root / "run").iterdir()) == before


ADAPTERS = [
    (["lora.yaml", "lora_rank=4"], "lora_rank is 2 there and 4 here"),
    torture(
        ["run.yaml", "resume_from_checkpoint=lora/checkpoint-2"],
        "lora/checkpoint-2: holds an adapter, and this run trains none",
    ),
    torture(
        ["lora.yaml", "resume_from_checkpoint=run/checkpoint-2"],
        "run/checkpoint-2: holds a model, and this run trains an adapter",
    ),
]


@pytest.mark.parametrize(("arguments", "words"), ADAPTERS)
def test_of_another_adapter(
    workplace: Workplace, tmp_path: Path, arguments: list[str], words: str
) -> None:
    place = workplace.copy(tmp_path / "place")
    outcome = run_tool("pretrain", [*arguments, "max_steps=3"], place.root)
    assert outcome.problem(words) is None, outcome.text


def test_of_an_adapter_beside_another_model(workplace: Workplace, tmp_path: Path) -> None:
    place = workplace.copy(tmp_path / "place")
    file = "model/layer-0-ep-0-of-1.safetensors"
    content = bytearray((place.root / file).read_bytes())
    content[-1] ^= 0x40  # another number in the last tensor
    place.spoil(file, bytes(content))
    outcome = run_tool("pretrain", ["lora.yaml", "max_steps=3"], place.root)
    assert outcome.problem("whose weights are not those of model") is None, outcome.text
