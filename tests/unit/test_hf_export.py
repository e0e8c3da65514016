"""Native checkpoint -> Hugging Face directory and back, and tools/convert_checkpoint.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from unit.tiny_hf import (
    VOCAB,
    assert_same,
    local_weights,
    make_config,
    make_stages,
    random_tensors,
    read_model,
    resign,
    write_model,
)

from megatron_sdar.checkpoint import safetensors_files
from megatron_sdar.checkpoint.hf_export import export_hf, parse_size
from megatron_sdar.checkpoint.hf_import import load_hf_weights
from megatron_sdar.checkpoint.native import load_checkpoint, save_checkpoint
from megatron_sdar.checkpoint.native_import import import_hf
from megatron_sdar.checkpoint.remote_code import remote_code

pytestmark = pytest.mark.usefixtures("single_process")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def checkpoint(model_dir: Path, tmp_path: Path) -> Path:
    return save(model_dir, tmp_path / "run")


def save(model_dir: Path, output_dir: Path, tied: bool = False) -> Path:
    stages, arch, mesh = make_stages(model_dir, tied=tied)
    load_hf_weights(stages, arch, model_dir, "keep")
    return save_checkpoint(
        output_dir, 5, stages, None, {}, make_config(output_dir), arch, mesh, [model_dir]
    )


# Export.


def test_round_trip_is_bitwise_and_complete(
    model_dir: Path, checkpoint: Path, tmp_path: Path
) -> None:
    target = tmp_path / "export"
    report = export_hf(checkpoint, target)
    assert_same(read_model(target), random_tensors())
    assert {path.name for path in target.iterdir()} == {
        *remote_code("sdar").files,
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer_config.json",
        "vocab.json",
    }
    for name in set(report.copied) - set(remote_code("sdar").files):
        assert (target / name).read_bytes() == (model_dir / name).read_bytes()
    assert report.dropped_rows == 136 - VOCAB
    assert report.num_tensors == 47
    assert "47 tensors" in report.format()
    assert "5 padding rows left out" in report.format()


def test_config_has_what_every_engine_reads(checkpoint: Path, tmp_path: Path) -> None:
    export_hf(checkpoint, tmp_path / "export", "bfloat16")
    config = json.loads((tmp_path / "export/config.json").read_text())
    expected = {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "head_dim": 16,
        "attention_bias": False,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": [2, 1],
        "block_size": 4,
        "mask_token_id": 130,
    }
    assert {key: config[key] for key in expected} == expected


def test_source_without_code_gets_ours(checkpoint: Path, tmp_path: Path) -> None:
    export_hf(checkpoint, tmp_path / "export")
    config = json.loads((tmp_path / "export/config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_sdar.SDARConfig",
        "AutoModel": "modeling_sdar.SDARModel",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    }
    for name, path in remote_code("sdar").files.items():
        assert (tmp_path / "export" / name).read_bytes() == path.read_bytes()


def test_remote_code_travels_with_its_auto_map(model_dir: Path, tmp_path: Path) -> None:
    for name in ("modeling_sdar.py", "configuration_sdar.py"):
        (model_dir / name).write_text("raise SystemExit('executed')\n")
    checkpoint = save(model_dir, tmp_path / "a")
    export_hf(checkpoint, tmp_path / "a/export")
    config = json.loads((tmp_path / "a/export/config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_sdar.SDARConfig",
        "AutoModel": "modeling_sdar.SDARModel",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    }
    assert (tmp_path / "a/export/modeling_sdar.py").is_file()
    stated = {"AutoConfig": "configuration_sdar.Mine", "AutoModel": "absent.Model"}
    write_model(model_dir, auto_map=stated)
    export_hf(save(model_dir, tmp_path / "b"), tmp_path / "b/export")
    config = json.loads((tmp_path / "b/export/config.json").read_text())
    assert config["auto_map"] == {"AutoConfig": "configuration_sdar.Mine"}


def test_malformed_auto_map(model_dir: Path, tmp_path: Path) -> None:
    write_model(model_dir, auto_map=["x"])
    with pytest.raises(ValueError, match=r"auto_map is \['x'\]"):
        save(model_dir, tmp_path / "run")


def test_tokenizer_comes_from_one_directory_only(model_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer"
    (other / "additional_chat_templates").mkdir(parents=True)
    (other / "additional_chat_templates/tools.jinja").write_text("t")
    (other / "tokenizer.json").write_text("{}")
    (other / "generation_config.json").write_text("another")
    stages, arch, mesh = make_stages(model_dir)
    path = save_checkpoint(
        tmp_path / "run",
        5,
        stages,
        None,
        {},
        make_config(tmp_path),
        arch,
        mesh,
        [model_dir, other / "tokenizer.json"],
    )
    export_hf(path, tmp_path / "export")
    names = {
        p.relative_to(tmp_path / "export").as_posix()
        for p in (tmp_path / "export").rglob("*")
        if p.is_file() and p.suffix != ".safetensors"
    }
    assert names == {
        *remote_code("sdar").files,
        "LICENSE",
        "additional_chat_templates/tools.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
    }
    text = (tmp_path / "export/generation_config.json").read_text()
    assert text == '{"eos_token_id": [2, 1]}'


def test_links_out_of_a_model_directory_are_not_shipped(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    (model_dir / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"tokenizer.json: links to .*secret, outside"):
        save(model_dir, tmp_path / "run")


def test_tied_model_is_exported_with_its_head(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_model(tmp_path / "model", tensors, tie_word_embeddings=True)
    checkpoint = save(tmp_path / "model", tmp_path / "run", tied=True)
    export_hf(checkpoint, tmp_path / "export")
    assert_same(read_model(tmp_path / "export"), tensors)
    assert not json.loads((tmp_path / "export/config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float64"])
def test_dtype_of_the_export(checkpoint: Path, tmp_path: Path, dtype: str | torch.dtype) -> None:
    report = export_hf(checkpoint, tmp_path / "export", dtype)
    wanted = getattr(torch, str(dtype).removeprefix("torch."))
    assert report.dtype == wanted
    assert_same(
        read_model(tmp_path / "export"), {n: t.to(wanted) for n, t in random_tensors().items()}
    )


def test_values_too_large_for_the_dtype(model_dir: Path, tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["model.norm.weight"][3] = 1e6
    write_model(model_dir, tensors)
    checkpoint = save(model_dir, tmp_path / "run")
    with pytest.raises(ValueError, match=r"model.norm.weight: has values too large for torch.fl"):
        export_hf(checkpoint, tmp_path / "export", "float16")
    assert not (tmp_path / "export").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "run"]


def test_files_are_cut_at_the_size_and_indexed(checkpoint: Path, tmp_path: Path) -> None:
    report = export_hf(checkpoint, tmp_path / "export", max_shard_size="40KB")
    tensors = read_model(tmp_path / "export")
    assert_same(tensors, random_tensors())
    assert len(report.files) > 5
    assert report.files[0] == f"model-00001-of-{len(report.files):05d}.safetensors"
    for file in report.files:
        with safe_open(tmp_path / "export" / file, "pt") as opened:
            sizes = [tensors[name].nbytes for name in opened.keys()]  # noqa: SIM118
            assert opened.metadata() == {"format": "pt"}
        assert sum(sizes) <= 40_000 or len(sizes) == 1
    index = json.loads((tmp_path / "export/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), (77, 77), ("64kb", 64000)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-1GB", 0, "0.1"])
def test_sizes_that_are_none(text: str | int) -> None:
    with pytest.raises(ValueError, match="max_shard_size"):
        parse_size(text)


def test_memory_is_one_block(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing larger than a block is read or written, so peak memory ignores the model's size."""
    monkeypatch.setattr(safetensors_files, "BLOCK_BYTES", 2000)
    largest = 0
    write = safetensors_files.SafetensorsWriter.write

    def watch(self: safetensors_files.SafetensorsWriter, name: str, block: torch.Tensor) -> int:
        nonlocal largest
        largest = max(largest, block.nbytes)
        return write(self, name, block)

    monkeypatch.setattr(safetensors_files.SafetensorsWriter, "write", watch)
    export_hf(checkpoint, tmp_path / "export")
    assert 1000 < largest <= 2000
    assert_same(read_model(tmp_path / "export"), random_tensors())


def test_needs_no_process_group(checkpoint: Path, tmp_path: Path) -> None:
    """In a fresh process the tool runs alone, and never starts torch.distributed."""
    program = (
        "import sys, torch.distributed as dist\n"
        "from megatron_sdar.checkpoint.hf_export import export_hf\n"
        "export_hf(sys.argv[1], sys.argv[2])\n"
        "assert not dist.is_initialized()\n"
        "assert 'megatron_sdar.parallel.mesh' not in sys.modules\n"
    )
    arguments = [sys.executable, "-c", program, str(checkpoint), str(tmp_path / "export")]
    subprocess.run(arguments, check=True, cwd=ROOT)
    assert_same(read_model(tmp_path / "export"), random_tensors())


# Destinations.


def test_destination_is_refused_or_replaced(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "export"
    target.mkdir()
    export_hf(checkpoint, target)  # empty is fine
    (target / "vocab.json").write_text("old")
    with pytest.raises(ValueError, match="exists and is not empty"):
        export_hf(checkpoint, target)
    assert (target / "vocab.json").read_text() == "old"
    export_hf(checkpoint, target, overwrite=True)
    assert (target / "vocab.json").read_text() == "{}"
    (target / "config.json").unlink()
    with pytest.raises(ValueError, match="neither a model nor a checkpoint directory"):
        export_hf(checkpoint, target, overwrite=True)


def test_destinations_that_would_lose_data(checkpoint: Path, tmp_path: Path) -> None:
    for target in (checkpoint, checkpoint.parent, tmp_path):
        with pytest.raises(ValueError, match="holds the source"):
            export_hf(checkpoint, target, overwrite=True)
    other_run = tmp_path / "other"
    (other_run / "checkpoint-1").mkdir(parents=True)
    (other_run / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not replaced as a whole"):
        export_hf(checkpoint, other_run, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        export_hf(checkpoint, tmp_path / "file", overwrite=True)
    with pytest.raises(ValueError, match=r"cannot write there: Not a directory \(.*file/export"):
        export_hf(checkpoint, tmp_path / "file/export/deep")


def test_into_output_dir(checkpoint: Path, tmp_path: Path) -> None:
    run = checkpoint.parent
    (run / "trainer_log.jsonl").write_text("kept")
    export_hf(checkpoint, run, max_shard_size="40KB", into_existing=True)
    assert len(list(run.glob("*.safetensors"))) > 5
    export_hf(checkpoint, run, "bfloat16", into_existing=True)
    assert [path.name for path in run.glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]
    expected = {n: t.bfloat16() for n, t in random_tensors().items()}
    assert_same(read_model(run), expected)
    assert (run / "trainer_log.jsonl").read_text() == "kept"
    assert (run / "checkpoint-5").is_dir()
    assert not (run / ".export.tmp").exists()
    (run / "adapter.safetensors").write_text("")
    with pytest.raises(ValueError, match=r"holds adapter.safetensors"):
        export_hf(checkpoint, run, into_existing=True)


def test_into_output_dir_failing_midway_leaves_the_old_export(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = checkpoint.parent
    export_hf(checkpoint, run, into_existing=True)
    (run / ".export.tmp").mkdir()  # of an export that was killed

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_files.SafetensorsWriter, "write", full)
    with pytest.raises(ValueError, match="cannot write there: No space left on device"):
        export_hf(checkpoint, run, into_existing=True)
    assert_same(read_model(run), random_tensors())
    assert not (run / ".export.tmp").exists()


@pytest.mark.parametrize("dtype", ["int8", torch.int8, "auto"])
def test_unknown_dtype(checkpoint: Path, tmp_path: Path, dtype: str | torch.dtype) -> None:
    with pytest.raises(ValueError, match="is not available; use one of bfloat16"):
        export_hf(checkpoint, tmp_path / "export", dtype)


def test_checkpoint_that_does_not_fit_its_config(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "hf/config.json"
    text = path.read_text()
    for old, new, what in (
        ('"num_hidden_layers": 4', '"num_hidden_layers": 3', "layers.3.mlp.up_proj.weight: unex"),
        ('"vocab_size": 131', '"vocab_size": 999', "embed_tokens.weight: 136 rows, config.json"),
    ):
        path.write_text(text.replace(old, new))
        resign(checkpoint)
        with pytest.raises(ValueError, match=what):
            export_hf(checkpoint, tmp_path / "export")


# Import.


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_import_then_load_then_export(
    model_dir: Path, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    report = import_hf(model_dir, tmp_path / "native", dtype, make_vocab_size_divisible_by=8)
    assert "vocabulary: 131 rows padded to 136" in report.format()
    assert "left behind: README.md, trainer_log.jsonl" in report.format()
    expected = {n: t.to(dtype or t.dtype) for n, t in random_tensors().items()}
    stages, _, _ = make_stages(model_dir)
    assert load_checkpoint(tmp_path / "native", stages, None) == {"global_step": 0, "step": 0}
    for name, tensor in local_weights(stages).items():
        assert torch.equal(tensor[: len(expected[name])], expected[name].float()), name
        assert not tensor[len(expected[name]) :].any()
    export_hf(tmp_path / "native", tmp_path / "export")
    assert_same(read_model(tmp_path / "export"), expected)


def test_import_equals_loading_directly(model_dir: Path, tmp_path: Path) -> None:
    write_model(model_dir, model_type="qwen3")
    options = {"mask_token_init": "mean_noise", "seed": 4}
    import_hf(model_dir, tmp_path / "native", make_vocab_size_divisible_by=8, **options)
    direct, arch, _ = make_stages(model_dir)
    load_hf_weights(direct, arch, model_dir, **options)
    loaded, _, _ = make_stages(model_dir)
    load_checkpoint(tmp_path / "native", loaded, None)
    assert_same(local_weights(loaded), local_weights(direct))


def test_import_completes_what_config_lacks(model_dir: Path, tmp_path: Path) -> None:
    write_model(model_dir, block_size=None)
    report = import_hf(model_dir, tmp_path / "a")
    assert "block_size: 4, config.json has none" in report.format()
    import_hf(model_dir, tmp_path / "b", block_size=16)
    assert json.loads((tmp_path / "b/hf/config.json").read_text())["block_size"] == 16
    write_model(model_dir, mask_token_id=None)
    with pytest.raises(ValueError, match=r"has no mask_token_id, and 151669 .* is outside"):
        import_hf(model_dir, tmp_path / "c")
    write_model(model_dir)
    with pytest.raises(ValueError, match=r"block_size: 8 was asked for, .* says 4"):
        import_hf(model_dir, tmp_path / "c", block_size=8)


def test_import_finds_the_mask_token_in_the_tokenizer(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    write_model(model_dir, mask_token_id=None)
    tokenizer.save(str(model_dir / "tokenizer.json"))
    (model_dir / "tokenizer_config.json").write_text("{}")
    report = import_hf(model_dir, tmp_path / "native")
    assert "mask_token_id: 4, from the tokenizer" in report.format()
    assert json.loads((tmp_path / "native/hf/config.json").read_text())["mask_token_id"] == 4
