"""Every size that SDAR has, at reduced width, there and back: names, shapes and bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_sdar.benchmark.model_shapes import MODEL_CONFIGS, narrow_config, write_random_model
from tools.convert_checkpoint import main

# export.md's and transformers' counts: layers * tensors of a layer, and embedding, norm, head.
TENSORS = {"1.7b": 28 * 11 + 3, "4b": 36 * 11 + 3, "8b": 36 * 11 + 3, "30b-a3b": 18_867}


def read_directory(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor; each may be there once."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors = load_file(path)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


@pytest.mark.parametrize("shape", TENSORS)
@pytest.mark.parametrize("source", ["SDAR", "Qwen3"])
def test_there_and_back_is_bitwise(tmp_path: Path, shape: str, source: str) -> None:
    config = narrow_config(MODEL_CONFIGS[shape], 128)
    tied = source == "Qwen3" and shape in ("1.7b", "4b")  # Qwen3 ties these two
    if source == "Qwen3":
        config |= {
            "model_type": "qwen3_moe" if shape == "30b-a3b" else "qwen3",
            "tie_word_embeddings": tied,
        }
        for key in ("block_size", "mask_token_id"):
            config.pop(key)
    model, native, back = (tmp_path / name for name in ("model", "native", "back"))
    write_random_model(model, config, file_bytes=10**6)
    if source == "Qwen3":
        complete = json.loads((model / "config.json").read_text()) | {"mask_token_id": 1100}
        (model / "config.json").write_text(json.dumps(complete))
    to_native = ["--from", str(model), "--to", str(native), "--format", "native", "--verify"]
    assert main(to_native) == 0
    assert main(["--from", str(native), "--to", str(back), "--format", "hf", "--verify"]) == 0
    before, after = read_directory(model), read_directory(back)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if tied:
        assert head not in before
        before[head] = before[embedding].clone()
    assert len(before) == TENSORS[shape]
    assert before.keys() == after.keys()
    if source == "Qwen3":  # never trained, so it is made the mean of the rows before it
        for name in (embedding, head):
            mean = before[name][:1100].double().mean(0)
            torch.testing.assert_close(after[name][1100].double(), mean, rtol=1e-2, atol=1e-4)
            before[name][1100] = after[name][1100]
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name].view(torch.int16), tensor.view(torch.int16)), name
    written = json.loads((back / "config.json").read_text())
    assert written["model_type"] == ("sdar_moe" if shape == "30b-a3b" else "sdar")
    assert written["tie_word_embeddings"] is False
    assert written["block_size"] == 4
