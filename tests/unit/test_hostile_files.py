"""Random damage of every kind of file, through the tool that reads it.

A run succeeds or ends in one readable error: never with an exception of a library, a hang, or
without end of memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.hostile_content import (
    hostile_bytes,
    hostile_header,
    hostile_index,
    hostile_json,
    hostile_marker,
)
from unit.tool_refusals import with_option
from unit.tool_runs import run_tool
from unit.tool_workplace import Workplace

pytestmark = pytest.mark.torture

_MEMORY = 3 * 2**30
_MODEL = (("--from", "model"), ("--model", "model"))
_CHECKPOINT = (("--from", "run/checkpoint-2"), ("--model", "run/checkpoint-2"))
_BOTH = (hostile_json, hostile_bytes)
Change = Callable[[bytes, int], bytes]
Target = tuple[str, str, Sequence[tuple[str, str]], Sequence[Change], int]
# Tool, file, options that make it read the file, changes, examples.
TARGETS: list[Target] = [
    ("convert_checkpoint", "model/config.json", _MODEL, _BOTH, 80),
    ("convert_checkpoint", "model/model.safetensors.index.json", _MODEL, _BOTH, 60),
    ("convert_checkpoint", "model/layer-0-ep-0-of-1.safetensors", _MODEL,
     (hostile_header, hostile_bytes), 80),
    ("convert_checkpoint", "run/checkpoint-2/COMMITTED", _CHECKPOINT,
     (hostile_marker, hostile_bytes), 80),
    ("convert_checkpoint", "run/checkpoint-2/model/index.json", _CHECKPOINT, _BOTH, 60),
    ("convert_checkpoint", "run/checkpoint-2/model/shard-00000.safetensors", _CHECKPOINT,
     (hostile_header, hostile_bytes), 40),
    ("convert_checkpoint", "run/checkpoint-2/hf/config.json", _CHECKPOINT, _BOTH, 30),
    ("merge_adapter", "lora/adapter_config.json", (), _BOTH, 80),
    ("merge_adapter", "lora/adapter_model.safetensors", (), (hostile_header, hostile_bytes), 40),
    ("inspect_data", "model/tokenizer.json", (), _BOTH, 120),
    ("inspect_data", "model/tokenizer_config.json", (), _BOTH, 60),
    ("inspect_data", "tokens.json", (), _BOTH, 60),
    ("inspect_data", "tokens.idx", (), (hostile_index, hostile_bytes), 60),
    ("inspect_data", "tokens.turns.idx", (), (hostile_index, hostile_bytes), 40),
    ("inspect_data", "tokens.bin", (), (hostile_bytes,), 30),
    ("preprocess_data", "dataset_info.json", (), _BOTH, 60),
    ("preprocess_data", "d.jsonl", (), (hostile_bytes,), 40),
    ("preprocess_data", "model/tokenizer.json", (), _BOTH, 30),
    ("explain_config", "run.yaml", (), (hostile_bytes,), 60),
    ("generate", "prompts.jsonl", (), _BOTH, 15),
    ("generate", "model/config.json", _MODEL, (hostile_json,), 15),
    ("replay_step", "run/skipped_steps/step-2.json", (), (hostile_json,), 25),
    ("pretrain", "run/checkpoint-2/trainer_state.json", (), (hostile_json,), 25),
    ("pretrain", "lora/checkpoint-2/base_model.json", (), _BOTH, 8),
]  # fmt: skip
_ARGUMENTS = {
    "explain_config": ["run.yaml"],
    "pretrain": ["run.yaml", "max_steps=3", "export_hf=false", "plot_loss=false"],
}


def ids(target: Target) -> str:
    return f"{target[0]} {target[1]}"


@pytest.mark.parametrize("target", TARGETS, ids=ids)
def test_random_damage(
    workplace: Workplace, tmp_path: Path, target: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    tool, file, options, changes, number = target
    arguments = _ARGUMENTS.get(tool) or workplace.arguments(tool)
    for option, value in options:
        arguments = with_option(arguments, option, value)
    if file.startswith("lora/checkpoint"):
        arguments = ["lora.yaml", *arguments[1:]]
    whole = (workplace.root / file).read_bytes()
    codes: list[int] = []

    @settings(
        max_examples=number,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        database=None,
    )
    @given(seed=st.integers(0, 2**32), change=st.sampled_from(list(changes)))
    def attempt(seed: int, change: Change) -> None:
        place = workplace.copy(tmp_path / "place")
        try:
            path = place.spoil(file, change(whole, seed))
            checkpoint = [p for p in path.parents if p.name.startswith("checkpoint-")]
            if checkpoint and path.name != "COMMITTED":
                place.resign(checkpoint[0])
            outcome = run_tool(tool, arguments, place.root, extra_bytes=_MEMORY, seconds=30)
            codes.append(outcome.code)
            problem = outcome.problem()
            assert outcome.code == 0 or problem is None, problem
            assert "error: " in outcome.stderr or outcome.code == 0, outcome.text
        finally:
            shutil.rmtree(place.root)

    attempt()
    with capsys.disabled():
        print(f"\n{ids(target)}: {len(codes)} damaged files, {codes.count(0)} still usable")
