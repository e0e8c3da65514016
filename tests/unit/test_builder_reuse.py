"""Token files that are there already: kept, reused, refused or rebuilt."""

import pytest
from unit.token_builds import (
    PAIRS,
    SUFFIXES,
    TEMPLATE,
    add_line,
    build,
    edit_metadata,
    ensure,
    files,
)

from megatron_sdar.data.building import builder, shards
from megatron_sdar.data.demo import make_demo_data
from megatron_sdar.data.sources.datasets import DatasetSpec, dataset_from_file
from megatron_sdar.data.storage.tokens import TokenizedDataset
from megatron_sdar.data.templates.template import TemplateOptions
from megatron_sdar.data.tokenization.tokenizer import load_tokenizer


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_existing_files_are_kept(spec, tokenizer, tmp_path, suffix):
    existing = tmp_path / f"p{suffix}"
    existing.write_text("mine")
    with pytest.raises(ValueError, match=r"exists already; .*overwrite"):
        build([spec], tmp_path / "p", tokenizer)
    assert existing.read_text() == "mine"
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([existing.name, "train.jsonl"])


def test_failed_overwrite_leaves_the_old_dataset(spec, tokenizer, tmp_path):
    build([spec], tmp_path / "p", tokenizer)
    before = files(tmp_path / "p")
    add_line(spec, {})
    with pytest.raises(ValueError, match="missing column"):
        build([spec], tmp_path / "p", tokenizer, overwrite=True)
    assert files(tmp_path / "p") == before


def test_a_full_disk_while_parts_are_joined_leaves_the_old_dataset(
    spec, tokenizer, tmp_path, monkeypatch
):
    build([spec], tmp_path / "p", tokenizer)
    before = files(tmp_path / "p")
    concatenate = shards.concatenate
    calls = []

    def die_second(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("disk full")
        concatenate(*arguments, **options)

    monkeypatch.setattr(shards, "concatenate", die_second)
    with pytest.raises(ValueError, match=r"p: disk full; .* run the same command again"):
        build([spec], tmp_path / "p", tokenizer, overwrite=True, max_samples=5)
    assert files(tmp_path / "p") == before
    assert len(TokenizedDataset(tmp_path / "p")) == 20


def test_own_cache_without_its_metadata_is_rebuilt(spec, tokenizer, tmp_path):
    build([spec], tmp_path / "p", tokenizer)
    (tmp_path / "p.json").unlink()
    with pytest.raises(ValueError, match=r"p\.bin exists already; .*overwrite_cache: true"):
        ensure([spec], tmp_path / "p", tokenizer)
    assert ensure([spec], tmp_path / "p", tokenizer, rebuild_stale=True).num_documents == 20


def test_own_cache_of_an_older_format_is_rebuilt(spec, tokenizer, tmp_path):
    build([spec], tmp_path / "p", tokenizer)
    edit_metadata(tmp_path / "p", format_version=1)
    with pytest.raises(ValueError, match="not metadata of format_version 2"):
        ensure([spec], tmp_path / "p", tokenizer)
    assert ensure([spec], tmp_path / "p", tokenizer, rebuild_stale=True).seconds > 0
    assert ensure([spec], tmp_path / "p", tokenizer).seconds == 0


def test_same_inputs_are_reused(spec, tokenizer, tmp_path, monkeypatch):
    built = ensure([spec], tmp_path / "p", tokenizer)
    monkeypatch.setattr(builder, "build_parts", None)
    reused = ensure([spec], tmp_path / "p", tokenizer)
    assert reused.seconds == 0
    assert reused.tokens_per_second == 0
    assert (reused.num_tokens, reused.document_lengths) == (
        built.num_tokens,
        built.document_lengths,
    )
    assert "time" not in reused.format()


def test_moved_sources_are_the_same_sources(spec, tokenizer, tmp_path):
    ensure([spec], tmp_path / "p", tokenizer)
    (tmp_path / "moved").mkdir()
    spec.files[0].rename(tmp_path / "moved" / "train.jsonl")
    moved = dataset_from_file(tmp_path / "moved" / "train.jsonl")
    assert ensure([moved], tmp_path / "p", tokenizer).seconds == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("options", r"mask_history \(was False, now True\)"),
        ("max_samples", r"max_samples \(was None, now 3\)"),
        ("contents", r"dataset train \(files\)"),
        ("datasets", r"the datasets \(were 1, now 2\)"),
        ("tokenizer", "differently: the tokenizer;"),
        ("layout", r"dataset train \(layout\)"),
    ],
)
def test_other_inputs_are_refused_then_rebuilt(spec, tokenizer, tmp_path, demo, change, message):
    ensure([spec], tmp_path / "p", tokenizer)
    specs, template, used, limit = [spec], TEMPLATE, tokenizer, None
    if change == "options":
        template = TemplateOptions(mask_history=True)
    elif change == "max_samples":
        limit = 3
    elif change == "contents":
        text = spec.files[0].read_text()
        spec.files[0].write_text(text.replace("####", "=>=>"))
    elif change == "datasets":
        specs = [spec, spec]
    elif change == "tokenizer":
        make_demo_data(tmp_path / "other", 200, seed=9)
        used = load_tokenizer(tmp_path / "other" / "model")
    else:
        specs = [DatasetSpec(spec.name, spec.files, PAIRS)]
    arguments = (specs, tmp_path / "p", used, template)
    with pytest.raises(ValueError, match=rf"p\.json: .*{message}.*overwrite"):
        ensure(*arguments, max_samples=limit)
    before = (tmp_path / "p.json").read_text()
    assert ensure(*arguments, max_samples=limit, rebuild_stale=True).seconds > 0
    assert (tmp_path / "p.json").read_text() != before, "the own cache follows its inputs"
    assert ensure(*arguments, max_samples=limit, rebuild_stale=True).seconds == 0
    assert ensure(*arguments, max_samples=limit, overwrite=True).seconds > 0
    assert ensure(*arguments, max_samples=limit).seconds == 0


def test_dataset_with_left_out_records_is_not_taken_for_a_clean_one(spec, tokenizer, tmp_path):
    add_line(spec, {"prompt": "p", "response": ""})
    ensure([spec], tmp_path / "p", tokenizer, on_error="skip")
    assert ensure([spec], tmp_path / "p", tokenizer, on_error="skip").seconds == 0
    with pytest.raises(ValueError, match="built leaving out 1 bad records"):
        ensure([spec], tmp_path / "p", tokenizer)
