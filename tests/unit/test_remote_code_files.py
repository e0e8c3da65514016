"""The shipped files: saved again without a change, and run with only torch and transformers."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from unit.remote_models import (
    ARCH,
    difference,
    load_model,
    logits_of,
    make_stage,
    modules_cache,
    random_ids,
    stage_logits,
    stage_tensors,
    write_directory,
)

from megatron_sdar.architecture import load_architecture
from megatron_sdar.checkpoint.remote_code import remote_code
from megatron_sdar.model.sdar import SdarStage

ALLOWED_IMPORTS = {"torch", "transformers", *sys.stdlib_module_names}


@pytest.fixture(scope="module", autouse=True)
def _own_modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with modules_cache(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="module")
def stage(single_process: None) -> SdarStage:
    return make_stage(ARCH, 3, torch.float32)


@pytest.fixture(scope="module")
def folder(stage: SdarStage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense") / "tiny"
    return write_directory(path, ARCH.to_hf_config(), stage_tensors(stage))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(folder).eval()


def test_saving_and_loading_keeps_every_bit(model: Any, folder: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    before, after = (load_file(d / "model.safetensors") for d in (folder, tmp_path / "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name, path in remote_code("sdar").files.items():
        assert (tmp_path / "saved" / name).read_bytes() == path.read_bytes()
    again, ids = load_model(tmp_path / "saved").eval(), random_ids(20)
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))


PROGRAM = """
import sys
blocked = ("megatron_sdar", "sdar_kernels", "triton", "flash_attn", "einops", "numba")
sys.modules.update(dict.fromkeys(blocked))  # importing one of them fails
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.tensor([[int(token) for token in sys.argv[2].split(",")]])
with torch.no_grad():
    torch.save(model(ids).logits[0], "logits.pt")
print(model.generate(ids, max_new_tokens=6)[0].tolist())
"""


def test_the_directory_needs_only_torch_and_transformers(
    stage: SdarStage, model: Any, folder: Path, tmp_path: Path
) -> None:
    ids = random_ids(12)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, str(folder), ",".join(map(str, ids))],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert difference(logits, stage_logits(stage, ids, 4)) < 1e-5
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer == model.generate(torch.tensor([ids]), max_new_tokens=6)[0].tolist()


@pytest.mark.parametrize("model_type", ["sdar", "sdar_moe"])
def test_files_import_only_each_other_torch_and_transformers(model_type: str) -> None:
    code = remote_code(model_type)
    relative: dict[str, set[str]] = {}
    for name, path in code.files.items():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        relative[name] = {f"{node.module}.py" for node in froms if node.level}
        names = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
        names |= {str(node.module) for node in froms if not node.level}
        assert {name.split(".")[0] for name in names} <= ALLOWED_IMPORTS
        assert relative[name] <= code.files.keys() - {name}
    for place in code.auto_map.values():
        module, cls = place.split(".")
        assert f"class {cls}(" in code.files[f"{module}.py"].read_text()
        # Early transformers 5 copy only what the named module itself imports.
        if module.startswith("modeling"):
            assert relative[f"{module}.py"] == code.files.keys() - {f"{module}.py"}


def test_another_model_type_is_refused() -> None:
    with pytest.raises(ValueError, match="model_type is 'qwen3'; use sdar or sdar_moe"):
        remote_code("qwen3")


def test_the_trainer_reads_a_saved_config(folder: Path, model: Any, tmp_path: Path) -> None:
    model.config.save_pretrained(tmp_path)
    assert load_architecture(tmp_path) == load_architecture(folder) == ARCH
