"""Pipes, devices, folders, endless files and links in the place of files: refused, never a hang.

Each tool runs in a process of its own, with a limit on its time and its memory.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from unit.tool_refusals import with_option
from unit.tool_runs import run_tool
from unit.tool_workplace import Workplace

_SPARSE = 2**43  # bytes that its author did not pay for
_MEMORY = 2**30
_CHECKPOINT = ("--from", "run/checkpoint-2")
# Files that a tool reads, and an option that makes it read them.
FILES: list[tuple[str, str, tuple[str, str] | None]] = [
    *(("convert_checkpoint", f"model/{name}", ("--from", "model")) for name in (
        "config.json", "model.safetensors.index.json", "layer-0-ep-0-of-1.safetensors")),
    *(("convert_checkpoint", f"run/checkpoint-2/{name}", _CHECKPOINT) for name in (
        "COMMITTED", "model/index.json", "model/shard-00000.safetensors", "hf/config.json")),
    *(("merge_adapter", f"lora/{name}", None) for name in (
        "adapter_config.json", "adapter_model.safetensors")),
    *(("preprocess_data", name, None) for name in (
        "dataset_info.json", "model/tokenizer.json", "model/tokenizer_config.json")),
    *(("inspect_data", name, None) for name in (
        "tokens.json", "tokens.bin", "tokens.idx", "tokens.labels.idx", "model/tokenizer.json")),
    ("generate", "model/config.json", ("--model", "model")),
    ("generate", "model/tokenizer.json", ("--model", "model")),
    ("evaluate", "tokens.turns.idx", None),
    ("replay_step", "run/skipped_steps/step-2.json", None),
    ("pretrain", "model/config.json", None),
    ("pretrain", "model/tokenizer_config.json", None),
    ("pretrain", "tokens.bin", None),
]  # fmt: skip
KINDS = ("folder", "device", "endless file")


def put(path: Path, kind: str) -> None:
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, _SPARSE)


@pytest.mark.parametrize(
    "kind", ["pipe", *(pytest.param(kind, marks=pytest.mark.torture) for kind in KINDS)]
)
@pytest.mark.parametrize("case", FILES, ids=lambda case: f"{case[0]} {case[1]}")
def test_in_place_of_a_file(workplace: Workplace, tmp_path: Path, case: tuple, kind: str) -> None:
    tool, file, option = case
    if (tool, file, kind) == ("pretrain", "model/tokenizer_config.json", "folder"):
        return  # it is not read, only copied, and folders are not
    place = workplace.copy(tmp_path / "place")
    put(place.root / file, kind)
    arguments = place.arguments(tool)
    if option is not None:
        arguments = with_option(arguments, *option)
    outcome = run_tool(tool, arguments, place.root, extra_bytes=_MEMORY, seconds=20)
    problem = outcome.problem(Path(file).name.partition(".")[0], "no complete checkpoint")
    assert problem is None, problem


# Links that lead out of a model directory. Those of the Hugging Face cache must work.


def as_in_the_cache(place: Workplace) -> Path:
    """The model as huggingface_hub stores it: links into a folder of blobs."""
    home = place.root / "models--a--b"
    snapshot, blobs = home / "snapshots" / "abc", home / "blobs"
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((place.root / "model").iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (blobs / "template").write_text("{{ 1 }}")
    link = snapshot / "additional_chat_templates" / "more.jinja"
    link.symlink_to("../../../blobs/template")
    return snapshot


def test_a_model_in_the_cache_works(workplace: Workplace, tmp_path: Path) -> None:
    place = workplace.copy(tmp_path / "place")
    snapshot = as_in_the_cache(place)
    convert = ["--from", str(snapshot), "--to", "out", "--format", "hf", "--verify"]
    outcome = run_tool("convert_checkpoint", convert, place.root)
    assert outcome.code == 0, outcome.text
    assert (place.root / "out/additional_chat_templates/more.jinja").read_text() == "{{ 1 }}"
    generate = with_option(place.arguments("generate"), "--model", str(snapshot))
    assert run_tool("generate", generate, place.root).code == 0


OUTWARD = (
    "layer-0-ep-0-of-1.safetensors", "tokenizer.json", "LICENSE", "modeling_sdar.py",
    "additional_chat_templates", "additional_chat_templates/more.jinja",
)  # fmt: skip


@pytest.mark.parametrize("in_cache", [False, True])
@pytest.mark.parametrize("name", OUTWARD)
def test_a_link_that_leads_out_is_not_followed_into_an_export(
    workplace: Workplace, tmp_path: Path, name: str, in_cache: bool
) -> None:
    place = workplace.copy(tmp_path / "place")
    model = as_in_the_cache(place) if in_cache else place.root / "model"
    (model / "additional_chat_templates").mkdir(exist_ok=True)
    secret = tmp_path / "elsewhere"
    shutil.copytree(place.root / "model", secret)
    (secret / "additional_chat_templates").mkdir(exist_ok=True)
    (secret / "additional_chat_templates" / "more.jinja").write_text("secret")
    (secret / "modeling_sdar.py").write_text("secret")
    path = model / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(secret / name)
    convert = ["--from", str(model), "--to", "out", "--format", "hf"]
    outcome = run_tool("convert_checkpoint", convert, place.root)
    assert outcome.problem(f"{name}: links to {secret}.*copy the file there") is None, outcome.text
    assert not (place.root / "out").exists()
