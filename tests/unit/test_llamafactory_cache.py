"""A LLaMA-Factory tokenized_path gives back exactly the documents that were packed into it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_sft import QWEN3, require_golden, require_qwen3
from llamafactory_rows import Document, packed_row, write_cache, write_stream

from megatron_sdar.data.building.unpacked_cache import unpack_cache
from megatron_sdar.data.demo import make_demo_data
from megatron_sdar.data.sources.llamafactory_cache import (
    cache_files,
    is_llamafactory_cache,
    read_cached_documents,
)
from megatron_sdar.data.storage.tokens import TokenizedDataset
from megatron_sdar.data.tokenization.tokenizer import SdarTokenizer, load_tokenizer

PAD, VOCAB = 99, 100
# Prompt and answer, several turns, an answer first, one token, a prompt last; PAD inside a text.
DOCUMENTS: list[Document] = [
    ([5, 6, 7, 8, 9], [-100, -100, 7, 8, 9]),
    ([1, 2, 3, 4], [-100, 2, -100, 4]),
    ([11, 12, 13], [11, 12, 13]),
    ([21], [21]),
    ([31, PAD, 33, 34], [-100, PAD, 33, 34]),
    ([41, 42, 43], [-100, 42, -100]),
]
TURNS = [[2, 3], [1, 1, 1, 1], [0, 3], [0, 1], [1, 3], [1, 1, 1, 0]]


def rows(*, neat: bool = True) -> list[dict[str, list[int]]]:
    groups = DOCUMENTS[:2], DOCUMENTS[2:4], DOCUMENTS[4:]
    return [packed_row(group, 20, 4, PAD, neat=neat) for group in groups]


def read(folder: Path) -> list[tuple[list[int], list[int], list[int]]]:
    """(ids, labels, turns) of every document."""
    found = []
    for part in read_cached_documents(cache_files(folder), PAD, VOCAB):
        ends, turn_ends = np.cumsum(part.lengths)[:-1], np.cumsum(part.turn_counts)[:-1]
        found += zip(
            (each.tolist() for each in np.split(part.ids, ends)),
            (each.tolist() for each in np.split(part.labels, ends)),
            (each.tolist() for each in np.split(part.turns, turn_ends)),
            strict=True,
        )
    return found


EXPECTED = [(*document, turns) for document, turns in zip(DOCUMENTS, TURNS, strict=True)]


@pytest.mark.parametrize("neat", [True, False])
@pytest.mark.parametrize("files", [1, 2, 3])
def test_documents_come_back_without_padding(tmp_path: Path, neat: bool, files: int) -> None:
    assert read(write_cache(tmp_path / "cache", rows(neat=neat), files=files)) == EXPECTED


@pytest.mark.parametrize("missing", [("position_ids",), ("attention_mask",)])
def test_either_column_tells_documents_apart(tmp_path: Path, missing: tuple[str, ...]) -> None:
    kept = [{k: v for k, v in row.items() if k not in missing} for row in rows()]
    assert read(write_cache(tmp_path / "cache", kept)) == EXPECTED


def test_rows_that_are_not_packed_are_documents(tmp_path: Path) -> None:
    plain = [
        {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}
        for ids, labels in DOCUMENTS
    ]
    assert read(write_cache(tmp_path / "cache", plain)) == EXPECTED


def test_random_documents(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    documents: list[Document] = []
    for _ in range(60):
        ids = random.integers(0, PAD, random.integers(1, 12)).tolist()
        trained = random.random(len(ids)) < 0.6
        documents.append((ids, [i if t else -100 for i, t in zip(ids, trained, strict=True)]))
    packed = [packed_row(documents[n : n + 3], 48, 4, PAD) for n in range(0, 60, 3)]
    found = read(write_cache(tmp_path / "cache", packed, files=2))
    assert [(ids, labels) for ids, labels, _ in found] == documents
    assert all(sum(turns) == len(ids) for ids, _, turns in found)


def test_observed_rows_hold_the_documents_that_we_tokenise(tmp_path: Path) -> None:
    """Golden rows of LLaMA-Factory itself, taken apart, against our own tokens of their source."""
    packed = require_golden()["packed"]
    tokenizer = require_qwen3()
    summary = unpack_cache(write_cache(tmp_path / "c", packed["rows"]), tmp_path / "t", tokenizer)
    found = TokenizedDataset(summary.prefix)
    found.verify()
    padded = sorted(-(-length // 4) * 4 for length in found.lengths.tolist())
    remaining = list(packed["sample_lengths_in_file_order"])
    for length in padded:
        remaining.remove(length)
    texts = [each["messages"] for each in packed["data"]]
    for number in range(len(found)):
        ids, labels = found.get(number)
        text = tokenizer.decode(ids.tolist())
        (match,) = (
            messages for messages in texts if f"user\n{messages[0]['content']}<|im_end|>" in text
        )
        assert text.endswith(f"{match[1]['content']}<|im_end|>\n")
        prompt = found.turns(number)[0]
        assert (labels[:prompt] == -100).all()
        assert (labels[prompt:] == ids[prompt:]).all()
    assert QWEN3.is_dir()


@pytest.fixture
def tokenizer(tmp_path: Path) -> SdarTokenizer:
    make_demo_data(tmp_path / "demo", 10)
    return load_tokenizer(tmp_path / "demo/model")


def cache_for(tokenizer: SdarTokenizer, folder: Path, shift: int = 0) -> Path:
    document = ([5 + shift, tokenizer.mask_token_id, 7], [-100, tokenizer.mask_token_id, 7])
    return write_cache(folder, [packed_row([document], 8, 4, tokenizer.pad_token_id)])


def test_token_files_are_written_once_and_again_for_another_cache(
    tmp_path: Path, tokenizer: SdarTokenizer
) -> None:
    cache, prefix = cache_for(tokenizer, tmp_path / "cache"), tmp_path / "out/tokens"
    summary = unpack_cache(cache, prefix, tokenizer)
    assert (summary.num_documents, summary.num_tokens, summary.num_label_tokens) == (1, 3, 2)
    assert summary.num_mask_documents == 1
    dataset = TokenizedDataset(prefix)
    dataset.verify()
    assert dataset.metadata.recipe.is_plain_text is False
    written = prefix.with_suffix(".bin").stat().st_mtime_ns
    unpack_cache(cache, prefix, tokenizer)
    assert prefix.with_suffix(".bin").stat().st_mtime_ns == written
    unpack_cache(cache_for(tokenizer, tmp_path / "other", shift=1), prefix, tokenizer)
    assert TokenizedDataset(prefix).get(0)[0][0] == 6


def test_what_is_a_cache(tmp_path: Path) -> None:
    assert is_llamafactory_cache(write_cache(tmp_path / "cache", rows()))
    assert not is_llamafactory_cache(tmp_path)
    assert cache_files(tmp_path / "cache", "validation") == []
    both = write_cache(tmp_path / "both", rows(), validation=True)
    assert [file.parent.name for file in cache_files(both, "validation")] == ["validation"]


def damage_state(content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "train/state.json").write_text(content) and None


def change_row(**change: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        changed = [dict(row) for row in rows()]
        changed[2].update(change)
        write_stream(folder / "train/data-00000-of-00001.arrow", changed)

    return damage


ROW = rows()[2]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_state("{"), r"state\.json: cannot be read as JSON"),
        (damage_state("[]"), r"state\.json: expected a JSON object"),
        (damage_state("{}"), "_data_files does not list the Arrow files beside it"),
        (damage_state('{"_data_files": [{"filename": "../x.arrow"}]}'), "does not list the Arrow"),
        (change_row(labels=ROW["labels"][:-1]), "row 2: labels is not as long as input_ids"),
        (change_row(input_ids=[-1, *ROW["input_ids"][1:]]), "row 2: an id is outside the vocabula"),
        (change_row(input_ids=[100, *ROW["input_ids"][1:]]), "of 100; the cache was made with ano"),
        (change_row(labels=[7, *ROW["labels"][1:]]), "row 2: a label is neither its token nor"),
        (change_row(input_ids=[None, *ROW["input_ids"][1:]]), "row 2: input_ids has empty values"),
        (change_row(input_ids=None), "row 2: input_ids is .*, not lists of integers"),
        (lambda f: cut(f / "train/data-00000-of-00001.arrow"), "not a readable .arrow file"),
        (lambda f: (f / "train/data-00000-of-00001.arrow").unlink(), "No such file"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = write_cache(tmp_path / "cache", rows())
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read(folder)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def test_rows_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row 0: it has images; only text can be trained"):
        read(write_cache(tmp_path / "a", [{**row, "images": ["x.png"]} for row in rows()]))
    with pytest.raises(ValueError, match="there is no column labels; is this a cache of SFT"):
        read(write_cache(tmp_path / "b", [{"input_ids": [1, 2]}]))


def test_nothing_to_train(tmp_path: Path, tokenizer: SdarTokenizer) -> None:
    empty = packed_row([], 8, 4, tokenizer.pad_token_id)
    with pytest.raises(ValueError, match="holds no document"):
        unpack_cache(write_cache(tmp_path / "a", [empty]), tmp_path / "t", tokenizer)
    folder = write_cache(tmp_path / "b", [empty])
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["validation"]}))
    shutil.rmtree(folder / "train")
    with pytest.raises(ValueError, match="has no split called train"):
        unpack_cache(folder, tmp_path / "t", tokenizer)
