"""The real thing, small: GSM8K with the Qwen3 tokenizer on TP2 x PP2, and its export.

Needs the real data beside the checkout; `make test-slow` runs it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distributed.command import train
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("shared")
def test_gsm8k_trains_on_tp2_pp2_and_its_export_reloads(tmp_path: Path) -> None:
    output = tmp_path / "gsm8k"
    result = train(
        4,
        [
            "configs/gsm8k_cpu.yaml",
            "tensor_model_parallel_size=2",
            "pipeline_model_parallel_size=2",
            f"output_dir={output}",
        ],
    )
    assert result.returncode == 0, result.stderr[-3000:]
    losses = [json.loads(line)["loss"] for line in (output / "trainer_log.jsonl").open()]
    first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    assert last < 0.75 * first, f"the loss went from {first} to {last}"

    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["SDARForCausalLM"]
    index = json.loads((output / "model.safetensors.index.json").read_text())
    weights = {}
    for name in sorted(set(index["weight_map"].values())):
        weights |= load_file(output / name)
    config.pop("model_type")
    model = Qwen3ForCausalLM(Qwen3Config(**config))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not missing
    assert not unexpected
    with torch.no_grad():
        logits = model(torch.arange(8)[None]).logits
    assert torch.isfinite(logits).all()
