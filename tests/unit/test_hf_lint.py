"""Each demand of the inference engines on an export is missed by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from unit.tiny_hf import write_model, write_moe_model

from megatron_sdar.checkpoint.hf_assets import HfAssets, collect_assets
from megatron_sdar.checkpoint.hf_lint import lint_export
from tools.convert_checkpoint import main

WEIGHTS = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense and a mixture-of-experts export."""
    folder = tmp_path_factory.mktemp("exports")
    write_model(folder / "dense-source")
    write_moe_model(folder / "moe-source")
    for name in ("dense", "moe"):
        source, target = str(folder / f"{name}-source"), str(folder / name)
        assert main(["--from", source, "--to", target, "--format", "hf"]) == 0
    return folder


@pytest.fixture
def dense(exports: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exports / "dense", tmp_path / "dense"))


@pytest.fixture
def moe(exports: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exports / "moe", tmp_path / "moe"))


def none_shipped() -> HfAssets:
    return HfAssets({}, {}, ())


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_what_the_exporter_writes_is_right(exports: Path) -> None:
    for name in ("dense", "moe"):
        assets = collect_assets([exports / f"{name}-source"])
        assert len(assets.files) >= 5
        assert lint_export(exports / name, assets) == []


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda c: c.pop("rope_scaling"), "rope_scaling is 'missing'; it must be None"),
        (lambda c: c.update(tie_word_embeddings=True), "tie_word_embeddings is True; it must be"),
        (lambda c: c.update(architectures=["Qwen3ForCausalLM"]), "architectures is ['Qwen3For"),
        (lambda c: c.update(model_type="qwen3"), "model_type is 'qwen3'; it must be 'sdar'"),
        (lambda c: c.pop("attention_bias"), "attention_bias is 'missing'"),
        (lambda c: c.update(sliding_window=4096), "sliding_window is 4096; it must be None"),
        (lambda c: c.pop("use_sliding_window"), "use_sliding_window is 'missing'"),
        (lambda c: c.pop("head_dim"), "head_dim is missing"),
        (lambda c: c.pop("block_size"), "block_size is missing"),
        (lambda c: c.pop("mask_token_id"), "mask_token_id is missing"),
        (lambda c: c.update(mask_token_id=131), "mask_token_id is 131, outside the vocabulary"),
        (lambda c: c.pop("bos_token_id"), "bos_token_id is missing"),
        (lambda c: c.pop("eos_token_id"), "eos_token_id is missing"),
        (lambda c: c.update(torch_dtype="bfloat16"), "torch_dtype is 'bfloat16', the tensors are"),
        (lambda c: c.pop("auto_map"), "auto_map lacks AutoConfig"),
        (
            lambda c: c["auto_map"].update(AutoModel="absent.Model"),
            "AutoModel is absent.Model, and there is no absent.py",
        ),
        (lambda c: c.update(rope_theta=None), "rope_theta is missing"),
        (
            lambda c: c.update(rope_theta=None, rope_parameters={"rope_theta": 10000.0}),
            "rope_theta is None; it must stand at the top",
        ),
        (lambda c: c.update(num_hidden_layers=3), "model.layers.3.mlp.up_proj.weight: unexpected"),
        (lambda c: c.update(vocab_size=140), "lm_head.weight: has shape [131, 48], expected [140"),
    ],
)
def test_config(dense: Path, edit: Callable[[dict[str, Any]], object], what: str) -> None:
    change(dense / "config.json", edit)
    assert what in "\n".join(lint_export(dense, none_shipped()))


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda c: c.pop("decoder_sparse_step"), "decoder_sparse_step is 'missing'; it must be 1"),
        (lambda c: c.pop("mlp_only_layers"), "mlp_only_layers is 'missing'; it must be []"),
        (lambda c: c.update(num_experts=5), "mlp.experts.5.up_proj.weight: unexpected"),
        (lambda c: c.pop("norm_topk_prob"), "norm_topk_prob is missing"),
    ],
)
def test_config_of_experts(moe: Path, edit: Callable[[dict[str, Any]], object], what: str) -> None:
    change(moe / "config.json", edit)
    assert what in "\n".join(lint_export(moe, none_shipped()))


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda i: i["weight_map"].pop("lm_head.weight"), "lm_head.weight is in model-00001-of"),
        (lambda i: i["weight_map"].update(extra=WEIGHTS), f"{INDEX}: extra is in no file"),
        (lambda i: i["metadata"].update(total_size=1), "total_size is 1, the tensors have"),
    ],
)
def test_index(dense: Path, edit: Callable[[dict[str, Any]], object], what: str) -> None:
    change(dense / INDEX, edit)
    assert what in "\n".join(lint_export(dense, none_shipped()))


def test_files_that_no_index_lists_count_too(dense: Path) -> None:
    tensors = load_file(dense / WEIGHTS)
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, dense / "old.safetensors")
    problems = "\n".join(lint_export(dense, none_shipped()))
    assert f"lm_head.weight: is in {WEIGHTS} and in old.safetensors" in problems


def test_a_head_that_is_missing(dense: Path) -> None:
    tensors = load_file(dense / WEIGHTS)
    del tensors["lm_head.weight"]
    save_file(tensors, dense / WEIGHTS)
    problems = "\n".join(lint_export(dense, none_shipped()))
    assert "lm_head.weight: missing" in problems
    assert f"{INDEX}: lm_head.weight is in no file" in problems


def test_carried_files_are_compared_byte_for_byte(dense: Path, exports: Path) -> None:
    assets = collect_assets([exports / "dense-source"])
    (dense / "merges.txt").write_text("a b")
    (dense / "chat_template.jinja").unlink()
    problems = lint_export(dense, assets)
    named = sorted(problem.partition(":")[0] for problem in problems)
    assert named == ["chat_template.jinja", "merges.txt"]


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_files_that_are_absent(dense: Path, name: str) -> None:
    (dense / name).unlink()
    (problem,) = lint_export(dense, none_shipped())
    assert f"{dense / name}: cannot read it" in problem


def test_a_weight_file_that_is_cut(dense: Path) -> None:
    path = dense / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    assert "not a whole safetensors file" in "\n".join(lint_export(dense, none_shipped()))
