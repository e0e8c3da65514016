"""Tokenized datasets that are damaged: what is wrong, when it is opened, verified or read."""

import json
from pathlib import Path

import numpy as np
import pytest
from unit.token_builds import build, edit_metadata

from megatron_sdar.data.storage.indexed_writer import IndexedWriter
from megatron_sdar.data.storage.metadata import metadata_path
from megatron_sdar.data.storage.tokens import TokenizedDataset


def test_metadata_problems_are_named(spec, tokenizer, tmp_path):
    prefix = tmp_path / "p"
    build([spec], prefix, tokenizer)
    good = metadata_path(prefix).read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=rf"p\.json: .*{message}.*--overwrite"):
            TokenizedDataset(prefix)
        metadata_path(prefix).write_bytes(good)

    metadata_path(prefix).write_text("{")
    refused("not valid JSON")
    metadata_path(prefix).write_text("[]")
    refused("not metadata of format_version 2")
    edit_metadata(prefix, format_version=1)
    refused("not metadata of format_version 2")
    edit_metadata(prefix, num_tokens="many")
    refused("'num_tokens' is missing or of the wrong type: 'many'")
    edit_metadata(prefix, vocab_size=True)
    refused("'vocab_size' is missing or of the wrong type: True")
    edit_metadata(prefix, max_samples=7)
    refused("fingerprint does not match")
    content = json.loads(good)
    del content["skipped"]
    metadata_path(prefix).write_text(json.dumps(content))
    refused("'skipped' is missing")
    metadata_path(prefix).unlink()
    refused("no such file: no complete tokenized dataset")


def rewrite(prefix: Path, documents: list[list[int]], dtype: str = "i4") -> None:
    with IndexedWriter(prefix, dtype, overwrite=True) as writer:
        for tokens in documents:
            writer.add_documents(np.asarray(tokens, dtype=dtype), [len(tokens)])


@pytest.fixture
def built(spec, tokenizer, tmp_path) -> tuple[Path, list[list[int]], list[list[int]]]:
    """A dataset of two documents: its prefix, ids and labels."""
    prefix = tmp_path / "p"
    build([spec], prefix, tokenizer, max_samples=2)
    documents = [TokenizedDataset(prefix).get(i) for i in range(2)]
    return prefix, [ids.tolist() for ids, _ in documents], [b.tolist() for _, b in documents]


def test_parts_that_do_not_belong_together_are_refused(built):
    prefix, ids, labels = built
    TokenizedDataset(prefix).verify()
    rewrite(f"{prefix}.labels", [labels[0], labels[1][:-1]])
    with pytest.raises(ValueError, match=r"labels\.bin has .* tokens, p\.json counts"):
        TokenizedDataset(prefix)
    rewrite(f"{prefix}.labels", labels, "f4")
    with pytest.raises(ValueError, match=r"p\.labels\.idx: dtype float32 is not an integer"):
        TokenizedDataset(prefix)
    with IndexedWriter(f"{prefix}.labels", "i4", overwrite=True) as writer:
        for part in labels:
            writer.add_sequence(part)
        writer.end_document()
    with pytest.raises(ValueError, match=r"labels\.idx has 2 sequences in 1 documents, p\.json"):
        TokenizedDataset(prefix)
    rewrite(prefix, ids[:1])
    rewrite(f"{prefix}.labels", labels[:1])
    with pytest.raises(ValueError, match=r"p\.idx has 1 sequences in 1 documents, .* counts 2"):
        TokenizedDataset(prefix)


def test_verify_finds_what_opening_does_not_read(built):
    prefix, _, labels = built
    flat = [label for document in labels for label in document]
    rewrite(f"{prefix}.labels", [flat[:3], flat[3:]])
    dataset = TokenizedDataset(prefix)
    with pytest.raises(ValueError, match="tokens and labels differ in length"):
        dataset.verify()
    with pytest.raises(ValueError, match="document 0 has a label that is neither"):
        dataset.get(0)
    with IndexedWriter(f"{prefix}.labels", "i4", overwrite=True) as writer:
        writer.end_document()
        for part in labels:
            writer.add_sequence(part)
        writer.end_document()
    with pytest.raises(ValueError, match=r"p\.labels\.idx: not one sequence per document"):
        TokenizedDataset(prefix).verify()


@pytest.mark.parametrize("turns", [[1], [1, 1], [5, -5, 1, 1]])
def test_turns_that_do_not_add_up_are_refused(built, turns):
    prefix, ids, _ = built
    lengths = [len(part) for part in ids]
    rewrite(f"{prefix}.turns", [turns, [3, lengths[1] - 3]])
    dataset = TokenizedDataset(prefix)
    assert dataset.turns(1).tolist() == [3, lengths[1] - 3]
    with pytest.raises(ValueError, match=r"p\.turns\.bin: the turns of document 0 do not add up"):
        dataset.turns(0)


def test_bad_values_are_found_when_they_are_read(spec, tokenizer, tmp_path):
    prefix = tmp_path / "p"
    build([spec], prefix, tokenizer, max_samples=1)
    ids, labels = (part.tolist() for part in TokenizedDataset(prefix).get(0))
    rewrite(f"{prefix}.labels", [[*labels[:-1], labels[-1] + 1]])
    with pytest.raises(ValueError, match=r"p\.labels\.bin: document 0 has a label that is neither"):
        TokenizedDataset(prefix).get(0)
    rewrite(f"{prefix}.labels", [labels])
    for wrong in (-5, tokenizer.vocab_size):
        rewrite(prefix, [[wrong, *ids[1:]]])
        with pytest.raises(ValueError, match=r"p\.bin: document 0 has an id outside the vocab"):
            TokenizedDataset(prefix).get(0)
