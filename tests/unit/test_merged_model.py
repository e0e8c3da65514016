"""Merged models: the adapter's logits, PEFT's bits, the same bits whoever reads which slice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from unit.lora_runs import IDS, LORA, SOME, assert_equal_logits, logits, lora_run, tensors
from unit.remote_models import load_model, modules_cache, stage_logits
from unit.tiny_hf import VOCAB, write_model

from megatron_sdar.checkpoint.adapter_config import AdapterConfig
from megatron_sdar.checkpoint.adapter_export import export_adapter
from megatron_sdar.checkpoint.merged_model import MergedModel
from megatron_sdar.checkpoint.safetensors_files import TensorInfo, full_ranges
from megatron_sdar.checkpoint.source_detection import open_adapted_model, open_source
from megatron_sdar.generation.loading import load_stages, model_tokenizer, open_model
from megatron_sdar.parallel.mesh import build_mesh
from megatron_sdar.training.step import trained_parameters
from tools.merge_adapter import main as merge

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_model(tmp_path / "base", tensors())
    return tmp_path / "base"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }  # fmt: skip


def test_the_merged_model_has_the_adapters_logits(tmp_path: Path, base: Path) -> None:
    run = lora_run(base, SOME)
    export_adapter(run.save(tmp_path / "run"), tmp_path / "adapter")
    arguments = ["--model", str(base), "--adapter", str(tmp_path / "adapter")]
    assert merge([*arguments, "--to", str(tmp_path / "merged"), "--verify"]) == 0
    with modules_cache(tmp_path / "cache"):
        assert_equal_logits(logits(load_model(tmp_path / "merged")), run)


def test_the_merged_weights_are_those_that_peft_makes_bit_for_bit(tmp_path: Path) -> None:
    write_model(
        tmp_path / "qwen", tensors(), files=1, model_type="qwen3",
        architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    export_adapter(lora_run(tmp_path / "qwen").save(tmp_path / "run"), tmp_path / "adapter")
    arguments = ["--model", str(tmp_path / "qwen"), "--adapter", str(tmp_path / "adapter")]
    for name, size in (("one", "5GB"), ("many", "20KB")):
        to = ["--to", str(tmp_path / name), "--max-shard-size", size, "--verify"]
        assert merge([*arguments, *to]) == 0
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 20
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen")
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload().state_dict()
    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")
    assert one.keys() == many.keys() == theirs.keys()
    stored = tensors()
    for name, tensor in theirs.items():
        assert torch.equal(one[name], tensor), name
        assert torch.equal(many[name], tensor), name
        is_adapted = name.split(".")[-2] in LORA.lora.targets
        assert torch.equal(tensor, stored[name]) != is_adapted, name


class _Drawn:
    """A base model or adapter of one weight [rows, columns] in memory."""

    directory = tokenizer_directory = Path("drawn")
    files = ()
    kind, notes, arch = "drawn", (), None
    config = AdapterConfig(LORA, "drawn")

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.values = tensors
        self.tensors = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}

    def read(
        self, name: str, ranges: tuple[slice, ...], dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        return self.values[name][ranges].clone().to(dtype or self.values[name].dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_slice_changes_a_bit(dtype: torch.dtype) -> None:
    """Products of other shapes round otherwise; ranks of any layout and files must not."""
    torch.manual_seed(0)
    rows, columns, rank, module = 700, 530, 61, "model.layers.0.mlp.up_proj"
    merged = MergedModel(
        _Drawn({f"{module}.weight": torch.randn(rows, columns).to(dtype)}),
        _Drawn({
            f"{module}.lora_A.weight": torch.randn(rank, columns),
            f"{module}.lora_B.weight": torch.randn(rows, rank),
        }),
    )  # fmt: skip
    name = f"{module}.weight"
    whole = merged.read(name, full_ranges((rows, columns)))
    assert whole.dtype == dtype
    for first, last in ((0, 1), (0, 256), (255, 257), (3, 700), (512, 512), (613, 700)):
        for left, right in ((0, 530), (0, 265), (17, 18), (301, 530)):
            part = merged.read(name, (slice(first, last), slice(left, right)))
            assert torch.equal(part, whole[first:last, left:right]), (first, last, left, right)


def test_a_merged_bf16_model_is_rounded_once(tmp_path: Path) -> None:
    stored = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    write_model(tmp_path / "base", stored)
    run = lora_run(tmp_path / "base")
    export_adapter(run.save(tmp_path / "run"), tmp_path / "adapter")
    arguments = ["--model", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter")]
    for dtype in ("bfloat16", "float32"):
        target = tmp_path / dtype
        assert merge([*arguments, "--to", str(target), "--dtype", dtype, "--verify"]) == 0
    wide, narrow, trained = (
        weights(tmp_path / "float32"), weights(tmp_path / "bfloat16"),
        trained_parameters(run.stages),
    )  # fmt: skip
    for name in ("model.layers.1.self_attn.k_proj", "model.layers.3.mlp.down_proj"):
        up, down = (trained[f"{name}.lora_{part}.weight"].full_tensor().detach() for part in "BA")
        exact = stored[f"{name}.weight"].double() + 7.0 / 3 * up.double() @ down.double()
        torch.testing.assert_close(wide[f"{name}.weight"].double(), exact, rtol=1e-6, atol=1e-6)
    for name, tensor in wide.items():
        assert torch.equal(narrow[name], tensor.bfloat16()), name
    assert torch.equal(narrow["lm_head.weight"], stored["lm_head.weight"])


def test_a_checkpoint_and_an_adapter_stand_for_the_adapted_model(
    tmp_path: Path, base: Path
) -> None:
    """To whoever decodes or evaluates; the tokenizer is the one it was trained with."""
    run = lora_run(base, SOME)
    checkpoint = run.save(tmp_path / "run")
    export_adapter(checkpoint, tmp_path / "adapter")
    expected = stage_logits(run.stages[0], IDS, 4)[:, :VOCAB]
    for place, tokenizer in (
        (tmp_path / "run", checkpoint / "hf"),
        (tmp_path / "adapter", tmp_path / "adapter"),
    ):
        source = open_model(place)
        assert source.tokenizer_directory == tokenizer
        holder = checkpoint if place.name == "run" else place
        assert f"model: {base} with the adapter {holder}" in source.notes
        (stage,) = load_stages(source, build_mesh(torch.device("cpu"), 1, 1), torch.float32)
        torch.testing.assert_close(stage_logits(stage, IDS, 4)[:, :VOCAB], expected)
    for path in (tmp_path / "adapter").iterdir():
        if not path.name.startswith("adapter_"):
            path.unlink()
    assert open_model(tmp_path / "adapter").tokenizer_directory == base
    with pytest.raises(ValueError, match=r"base.*tokenizer"):  # the tiny one is none that loads
        model_tokenizer(open_model(tmp_path / "adapter"))


def test_what_cannot_be_merged_is_said(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    export_adapter(lora_run(base).save(tmp_path / "run"), adapter)

    def refused(model: Path, source: Path, target: Path) -> str:
        arguments = ["--model", str(model), "--adapter", str(source), "--to", str(target)]
        assert merge([*arguments, "--overwrite"]) == 1
        return capsys.readouterr().err

    target = tmp_path / "merged"
    assert "holds no Hugging Face model" in refused(tmp_path, adapter, target)
    assert "holds no PEFT adapter" in refused(base, base, target)
    assert f"holds the source {adapter}" in refused(base, adapter, adapter)
    assert f"holds the source {base}" in refused(base, adapter, base)
    with pytest.raises(ValueError, match=r"holds an adapter, not a model; merge it"):
        open_source(adapter, None, None)
    other = tmp_path / "renamed"
    shutil.copytree(base, other)
    arguments = ["--model", str(other), "--adapter", str(adapter), "--to", str(target)]
    assert merge([*arguments, "--dry-run"]) == 0
    assert f"trained on {base}; make sure it is the same model" in capsys.readouterr().out
    shutil.rmtree(base)
    with pytest.raises(ValueError, match=r"adapter for .*base, and no model directory is there"):
        open_adapted_model(adapter)
