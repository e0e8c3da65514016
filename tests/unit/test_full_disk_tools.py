"""Disks that are full or read-only under the tools and under a run, as a user meets them.

Each ends in one readable error that names the path; what was there before is untouched; once there
is room, the same command goes on.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from unit.test_full_disk import disk, fill_up, records
from unit.tool_runs import Outcome, run_tool
from unit.tool_workplace import Workplace

from megatron_sdar.architecture import load_architecture
from megatron_sdar.checkpoint import model_writer
from megatron_sdar.checkpoint.hf_source import HfModel
from megatron_sdar.data.building import builder
from megatron_sdar.data.building.build_options import BuildOptions
from megatron_sdar.data.sources.datasets import dataset_from_file
from megatron_sdar.data.storage.tokens import TokenizedDataset
from megatron_sdar.data.templates.template import TemplateOptions
from megatron_sdar.data.tokenization.tokenizer import load_tokenizer

__all__ = ["disk"]


@pytest.fixture
def place(workplace: Workplace, disk: Path, tmp_path: Path) -> Workplace:
    """A copy of which out/ and new/ lie on the small disk."""
    copy = workplace.copy(tmp_path / "place")
    for name in ("out", "new"):
        (disk / name).mkdir()
        (copy.root / name).symlink_to(disk / name)
    return copy


def refused(outcome: Outcome, *words: str) -> None:
    problem = outcome.problem()
    assert problem is None, problem
    for word in words:
        assert word in outcome.stderr, outcome.stderr


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def torture(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.torture)


WRITERS: dict[str, Callable[[Workplace], list[str]]] = {
    "convert_checkpoint": lambda place: place.arguments("convert_checkpoint"),
    "merge_adapter": lambda place: place.arguments("merge_adapter"),
    "preprocess_data": lambda place: place.arguments("preprocess_data"),
    "generate": lambda place: [
        *place.arguments("generate")[:4], "--output", "out/answers.jsonl", "--max-new-tokens", "4"
    ],
    "evaluate": lambda place: [
        *place.arguments("evaluate"), "--output-dir", "out/evaluated", "--generate-samples", "1"
    ],
    "pretrain": lambda place: ["run.yaml", "output_dir=out/run", "save_steps=2"],
}  # fmt: skip


# Each writes in a way of its own; the others load a model first, which takes long.
TOOLS = [
    tool if tool in ("convert_checkpoint", "preprocess_data") else torture(tool) for tool in WRITERS
]


@pytest.mark.parametrize("tool", TOOLS)
def test_a_full_disk_then_room(
    tool: str, place: Workplace, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Somebody else fills the disk behind the check that there is room.
    monkeypatch.setattr(model_writer, "_check_free_space", lambda destination, needed: None)
    ballast = fill_up(disk, 4096 if tool in ("convert_checkpoint", "merge_adapter") else 0)
    refused(run_tool(tool, WRITERS[tool](place), place.root), "No space left", "out/")
    ballast.unlink()
    if tool == "generate":  # an answer file that exists is never written over
        (place.root / "out/answers.jsonl").unlink(missing_ok=True)
    again = run_tool(tool, WRITERS[tool](place), place.root)
    assert again.code == 0, again.text
    assert not [name for name in listing(disk / "out") if ".tmp" in name or "converting" in name]


@pytest.mark.parametrize("tool", TOOLS)
def test_a_read_only_disk(tool: str, place: Workplace, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    refused(run_tool(tool, WRITERS[tool](place), place.root), "Read-only file system", "out/")


def test_an_export_that_fails_leaves_the_checkpoint_and_the_older_export(
    place: Workplace, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = ["--from", "run", "--to", "out/model", "--format", "hf", "--overwrite"]
    monkeypatch.setattr(model_writer, "_check_free_space", lambda destination, needed: None)
    assert run_tool("convert_checkpoint", convert, place.root).code == 0
    before = records(place.root / "run/checkpoint-2")
    exported = {path.name: path.read_bytes() for path in (disk / "out/model").iterdir()}
    fill_up(disk, 65536)
    refused(run_tool("convert_checkpoint", convert, place.root), "No space left", "out/model")
    assert records(place.root / "run/checkpoint-2") == before
    after = {path.name: path.read_bytes() for path in (disk / "out/model").iterdir()}
    assert after == exported
    HfModel(disk / "out/model", load_architecture(disk / "out/model"))


@pytest.mark.torture
def test_a_save_that_fails_then_a_resume(place: Workplace, disk: Path) -> None:
    """The second checkpoint does not fit: the run ends, goes on from the first once it does."""
    arguments = ["run.yaml", "output_dir=out/run", "max_steps=3", "async_save=false"]
    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
    refused(run_tool("pretrain", arguments, place.root), "cannot save", "No space left")
    first = place.root / "out/run/checkpoint-1"
    before = records(first)
    assert not (first.parent / "checkpoint-2").exists()
    refused(run_tool("pretrain", arguments, place.root), "cannot save", "No space left")
    assert records(first) == before
    subprocess.run(["mount", "-o", "remount,size=90m", str(disk)], check=True)
    whole = run_tool("pretrain", arguments, place.root)
    assert whole.code == 0, whole.text
    assert "checkpoint-1: step 1" in whole.stdout
    steps = [name for name in listing(first.parent) if name.endswith("COMMITTED")]
    assert len(steps) == 3


def test_tokenising_goes_on_where_the_disk_was_full(
    place: Workplace, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [dataset_from_file(place.root / "d.jsonl")]
    tokenizer = load_tokenizer(place.root / "model")
    options = BuildOptions(num_workers=1, part_bytes=1000)
    prefix = str(disk / "out/tokens")
    ballast = fill_up(disk, 100_000)
    with pytest.raises(ValueError, match=r"out/tokens.*No space left.*same command again"):
        builder.build_dataset(specs, prefix, tokenizer, TemplateOptions(), options)
    ballast.unlink()
    summary = builder.build_dataset(specs, prefix, tokenizer, TemplateOptions(), options)
    assert 0 < summary.num_resumed_parts < summary.num_parts
    there, whole = TokenizedDataset(prefix), TokenizedDataset(place.root / "tokens")
    for number in range(len(whole)):
        assert (there.get(number)[0] == whole.get(number)[0]).all()
