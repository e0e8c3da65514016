"""Reading Hugging Face directories: exactly the expected tensors, from nowhere else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from unit.tiny_hf import (
    MASK_ID,
    VOCAB,
    local_weights,
    make_stages,
    random_tensors,
    write_model,
)

from megatron_sdar.architecture import load_architecture
from megatron_sdar.checkpoint import hf_import, hf_source
from megatron_sdar.checkpoint.hf_import import load_hf_weights
from megatron_sdar.checkpoint.hf_source import HfModel
from megatron_sdar.checkpoint.tensor_names import model_tensor_shapes

pytestmark = pytest.mark.usefixtures("single_process")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load(directory: Path, dtype: torch.dtype = torch.float32, **options: object) -> dict:
    stages, arch, _ = make_stages(directory, dtype, tied=bool(options.pop("tied", False)))
    load_hf_weights(stages, arch, directory, **options)
    return local_weights(stages)


def complaint(directory: Path, **options: object) -> str:
    with pytest.raises(ValueError) as caught:
        load(directory, **options)
    return str(caught.value)


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_every_tensor_arrives_and_padding_is_zero(
    tmp_path: Path, files: int, stored: torch.dtype
) -> None:
    expected = write_model(tmp_path, random_tensors(stored), files)
    weights = load(tmp_path, torch.float64)
    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        got = weights[name]
        if name in (EMBEDDING, HEAD):
            assert got.shape[0] == 136
            assert not got[VOCAB:].any()
            got = got[:VOCAB]
        assert torch.equal(got, tensor.double()), name


def test_expected_names_are_the_models_parameters(tmp_path: Path) -> None:
    write_model(tmp_path)
    stages, arch, _ = make_stages(tmp_path, divisor=1)
    parameters = {n: tuple(p.shape) for n, p in stages[0].named_parameters()}
    assert model_tensor_shapes(arch) == parameters


def test_report_says_what_was_done(tmp_path: Path) -> None:
    tensors = random_tensors()
    del tensors[HEAD]
    write_model(tmp_path, tensors, model_type="qwen3", tie_word_embeddings=True)
    stages, arch, _ = make_stages(tmp_path)
    text = load_hf_weights(stages, arch, tmp_path).format()
    assert "47 tensors" in text
    assert "2 files" in text
    assert "lm_head.weight: untied, a copy of model.embed_tokens.weight" in text
    assert "<|MASK|> row 130: mean of rows 0 to 129" in text


def test_all_differences_are_named_in_one_error(tmp_path: Path) -> None:
    tensors = random_tensors()
    for layer in (0, 1, 3):
        del tensors[f"model.layers.{layer}.self_attn.q_norm.weight"]
    tensors["model.layers.2.self_attn.q_proj.bias"] = torch.zeros(3)
    tensors["model.norm.weight"] = torch.zeros(7)
    write_model(tmp_path, tensors)
    text = complaint(tmp_path)
    assert str(tmp_path) in text
    assert "model.layers.{0-1,3}.self_attn.q_norm.weight: missing" in text
    assert "model.layers.2.self_attn.q_proj.bias: unexpected" in text
    assert "model.norm.weight: has shape [7], expected [48]" in text
    assert len(text.splitlines()) == 4


def test_untied_model_without_head_is_incomplete(tmp_path: Path) -> None:
    tensors = random_tensors()
    del tensors[HEAD]
    write_model(tmp_path, tensors)
    assert "lm_head.weight: missing" in complaint(tmp_path)


# Tied embeddings.


@pytest.mark.parametrize("target_tied", [False, True])
@pytest.mark.parametrize("with_head", [False, True])
def test_tied_source_fills_head(tmp_path: Path, target_tied: bool, with_head: bool) -> None:
    tensors = random_tensors()
    tensors[HEAD] = tensors[EMBEDDING].clone()
    written = tensors if with_head else {n: t for n, t in tensors.items() if n != HEAD}
    write_model(tmp_path, written, tie_word_embeddings=True)
    weights = load(tmp_path, tied=target_tied)
    assert torch.equal(weights[EMBEDDING][:VOCAB], tensors[EMBEDDING])
    if not target_tied:
        assert torch.equal(weights[HEAD], weights[EMBEDDING])


def test_tied_source_with_another_head_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors[HEAD] = tensors[EMBEDDING].clone()
    tensors[HEAD][-1, -1] += 1
    write_model(tmp_path, tensors, tie_word_embeddings=True)
    assert "ties the embeddings, yet lm_head.weight differs" in complaint(tmp_path)
    tensors[HEAD] = torch.zeros(3, 48)
    write_model(tmp_path, tensors, tie_word_embeddings=True)
    assert "lm_head.weight: has shape [3, 48]" in complaint(tmp_path)


# The <|MASK|> row.


@pytest.mark.parametrize(("model_type", "becomes_mean"), [("qwen3", True), ("sdar", False)])
def test_auto_initialises_the_mask_row_of_qwen3_only(
    tmp_path: Path, model_type: str, becomes_mean: bool
) -> None:
    tensors = write_model(tmp_path, model_type=model_type)
    weights = load(tmp_path)
    for name in (EMBEDDING, HEAD):
        mean = tensors[name][:MASK_ID].double().mean(0).float()
        expected = mean if becomes_mean else tensors[name][MASK_ID]
        torch.testing.assert_close(weights[name][MASK_ID], expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(weights[name][:MASK_ID], tensors[name][:MASK_ID])


def test_mean_noise_is_the_mean_plus_seeded_noise(tmp_path: Path) -> None:
    tensors = write_model(tmp_path)
    first = load(tmp_path, mask_token_init="mean_noise", seed=1)
    again = load(tmp_path, mask_token_init="mean_noise", seed=1)
    other = load(tmp_path, mask_token_init="mean_noise", seed=2)
    noise = {}
    for name in (EMBEDDING, HEAD):
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name][MASK_ID], other[name][MASK_ID])
        noise[name] = first[name][MASK_ID] - tensors[name][:MASK_ID].mean(0)
        assert 0.1 < noise[name].std() < 0.3  # initializer_range is 0.2
    assert not torch.allclose(noise[EMBEDDING], noise[HEAD])


def test_mean_does_not_depend_on_how_the_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = write_model(tmp_path)
    arch = load_architecture(tmp_path)
    model = HfModel(tmp_path, arch, "mean")
    whole = model.read(EMBEDDING, (slice(0, 136), slice(0, 48)), torch.float32)
    for start, stop in ((128, 136), (130, 131)):
        part = HfModel(tmp_path, arch, "mean").read(
            EMBEDDING, (slice(start, stop), slice(0, 48)), torch.float32
        )
        assert torch.equal(part, whole[start:stop])
    without = HfModel(tmp_path, arch, "mean").read(EMBEDDING, (slice(0, 130), slice(0, 48)))
    assert torch.equal(without, tensors[EMBEDDING][:130])
    monkeypatch.setattr(hf_source, "_MEAN_ROWS", 7)
    blocks = HfModel(tmp_path, arch, "mean").read(EMBEDDING, (slice(0, 136), slice(0, 48)))
    torch.testing.assert_close(blocks, whole)


@pytest.mark.parametrize("mask_id", [None, 0, VOCAB])
def test_mask_row_needs_a_mask_token(tmp_path: Path, mask_id: int | None) -> None:
    write_model(tmp_path)
    arch = replace(load_architecture(tmp_path), mask_token_id=mask_id)
    with pytest.raises(ValueError, match="mask_token_init: mean needs a mask_token_id from 1 to"):
        HfModel(tmp_path, arch, "mean")
    assert HfModel(tmp_path, arch, "keep").report().num_tensors == 47


# Files.


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "a\\b"]
)
def test_index_may_not_leave_the_directory(tmp_path: Path, name: str) -> None:
    write_model(tmp_path / "model")
    save_file(random_tensors(), tmp_path / "secret.safetensors")
    path = tmp_path / "model" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    assert f"{name!r} is not a plain file name" in complaint(tmp_path / "model")


def test_links_out_of_the_directory_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "model", files=1)
    (tmp_path / "model/model.safetensors").rename(tmp_path / "weights.safetensors")
    (tmp_path / "model/model.safetensors").symlink_to(tmp_path / "weights.safetensors")
    assert "outside of the directory" in complaint(tmp_path / "model")


def test_a_snapshot_of_the_hub_cache_is_accepted(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    expected = write_model(snapshot, files=1)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(blobs / "abcd")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abcd")
    assert torch.equal(load(snapshot)["model.norm.weight"], expected["model.norm.weight"])


def test_index_that_disagrees_with_its_files(tmp_path: Path) -> None:
    write_model(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = index["weight_map"].pop("model.norm.weight")
    index["weight_map"]["model.extra.weight"] = file
    path.write_text(json.dumps(index))
    text = complaint(tmp_path)
    assert "not in their file: model.extra.weight" in text
    assert f"not in the index: model.norm.weight ({file})" in text


@pytest.mark.parametrize("content", ["[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "{"])
def test_malformed_index(tmp_path: Path, content: str) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in complaint(tmp_path)


def test_index_names_a_file_that_is_absent(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "layer-1-ep-0-of-1.safetensors").unlink()
    assert "layer-1-ep-0-of-1.safetensors: cannot read it" in complaint(tmp_path)


def test_no_weights_and_ambiguous_weights(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "2 .safetensors files but no model.safetensors.index.json" in complaint(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert "no .safetensors file" in complaint(tmp_path)


def test_truncated_and_quantised_weights(tmp_path: Path) -> None:
    write_model(tmp_path, files=1)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert f"{path}: not a whole safetensors file" in complaint(tmp_path)
    tensors = random_tensors()
    tensors["model.norm.weight"] = torch.zeros(48, dtype=torch.int8)
    write_model(tmp_path, tensors, files=1)
    assert "model.norm.weight has dtype I8" in complaint(tmp_path)


def test_reading_shows_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path)
    stages, arch, _ = make_stages(tmp_path)
    bars: list[tuple[str, int, bool]] = []
    done: list[int] = []

    @contextmanager
    def watched(label: str, total: int, enabled: bool) -> Iterator[Callable[[int], None]]:
        bars.append((label, total, enabled))
        yield done.append

    monkeypatch.setattr(hf_import, "byte_progress", watched)
    load_hf_weights(stages, arch, tmp_path)
    assert bars == [("reading weights", sum(done), True)]
    assert sum(done) == sum(weight.nbytes for weight in local_weights(stages).values())
