"""An export without code of its source runs in transformers, with the trainer's logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from unit.remote_models import load_model, modules_cache, stage_logits
from unit.tiny_hf import make_config, make_stages, write_model, write_moe_model

from megatron_sdar.checkpoint.hf_import import load_hf_weights
from megatron_sdar.checkpoint.native import save_checkpoint
from tools.convert_checkpoint import main

IDS = [5, 77, 3, 40, 12, 9, 130, 130, 61, 1, 2, 90]


def to_hf(source: Path, target: Path) -> None:
    arguments = ["--from", str(source), "--to", str(target), "--format", "hf", "--verify"]
    assert main(arguments) == 0


@pytest.mark.usefixtures("single_process")
def test_a_model_trained_from_qwen3(tmp_path: Path) -> None:
    write_model(tmp_path / "qwen", model_type="qwen3", block_size=None)
    write_model(tmp_path / "shape", model_type="qwen3")  # with the block size that training adds
    stages, arch, mesh = make_stages(tmp_path / "shape", torch.float64)
    load_hf_weights(stages, arch, tmp_path / "qwen")
    run = tmp_path / "run"
    path = save_checkpoint(
        run, 3, stages, None, {}, make_config(run), arch, mesh, [tmp_path / "qwen"]
    )
    to_hf(path, tmp_path / "out")
    with modules_cache(tmp_path / "cache"):
        model = load_model(tmp_path / "out").eval()
        with torch.no_grad():
            found = model(torch.tensor([IDS])).logits[0]
    expected = stage_logits(stages[0], IDS, 4)[:, : arch.vocab_size]
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_model_with_experts_loads_and_keeps_its_logits(tmp_path: Path) -> None:
    write_moe_model(tmp_path / "moe")
    to_hf(tmp_path / "moe", tmp_path / "once")
    native = ["--from", str(tmp_path / "moe"), "--to", str(tmp_path / "n"), "--format", "native"]
    assert main(native) == 0
    to_hf(tmp_path / "n", tmp_path / "twice")
    logits = []
    for name in ("once", "twice"):
        with modules_cache(tmp_path / f"cache-{name}"):
            model = load_model(tmp_path / name).eval()
            with torch.no_grad():
                logits.append(model(torch.tensor([IDS])).logits)
    assert logits[0].std() > 0.1
    assert torch.equal(*logits)
