"""Token files from a LLaMA-Factory cache: its packed rows become documents that are packed anew.

Owns the conversion and its reuse: token files are kept as long as the cache's files are the same.
The template is whatever LLaMA-Factory used, so the recipe says only where the tokens came from.
"""

from contextlib import ExitStack
from pathlib import Path

import numpy as np

from megatron_sdar.data.building.part import dtypes
from megatron_sdar.data.building.summary import BuildSummary, summarize_dataset
from megatron_sdar.data.sources.llamafactory_cache import (
    CachedDocuments,
    cache_files,
    read_cached_documents,
)
from megatron_sdar.data.storage.indexed_writer import IndexedWriter
from megatron_sdar.data.storage.metadata import (
    Recipe,
    TokenizedMetadata,
    hash_file,
    metadata_path,
    read_metadata,
    write_metadata,
)
from megatron_sdar.data.storage.tokens import COMPANIONS
from megatron_sdar.data.tokenization.tokenizer import SdarTokenizer
from megatron_sdar.diffusion.rows import IGNORED_LABEL

TEMPLATE = "llamafactory_cache"


def unpack_cache(cache: str | Path, prefix: str | Path, tokenizer: SdarTokenizer) -> BuildSummary:
    """Write the training documents of CACHE as token files at PREFIX, or reuse those.

    Args:
        cache: what `is_llamafactory_cache` says yes to.
        prefix: of this run alone: other token files there are replaced.

    Raises ValueError for a damaged cache, one without a train split or without documents, and
    for ids that the tokenizer does not have.
    """
    files = cache_files(cache)
    if not files:
        raise ValueError(f"tokenized_path: {cache} has no split called train")
    recipe = _recipe(Path(cache), files, tokenizer)
    if metadata_path(prefix).exists() and read_metadata(prefix).recipe == recipe:
        return summarize_dataset(prefix)
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    metadata_path(prefix).unlink(missing_ok=True)
    counts = dict.fromkeys(
        ("num_documents", "num_tokens", "num_label_tokens", "num_mask_documents"), 0
    )
    with ExitStack() as stack:
        writers = [
            stack.enter_context(IndexedWriter(f"{prefix}{suffix}", dtype, overwrite=True))
            for suffix, dtype in zip(COMPANIONS, dtypes(tokenizer.vocab_size), strict=True)
        ]
        for found in read_cached_documents(files, tokenizer.pad_token_id, tokenizer.vocab_size):
            if len(found.lengths):
                _write(found, writers, counts, tokenizer.mask_token_id)
        if not counts["num_documents"]:
            raise ValueError(f"tokenized_path: {cache} holds no document")
    write_metadata(
        prefix,
        TokenizedMetadata(
            num_documents=counts["num_documents"],
            num_tokens=counts["num_tokens"],
            num_label_tokens=counts["num_label_tokens"],
            num_mask_documents=counts["num_mask_documents"],
            mask_token_id=tokenizer.mask_token_id,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            vocab_size=tokenizer.vocab_size,
            recipe=recipe,
        ),
    )
    return summarize_dataset(prefix)


def _recipe(cache: Path, files: list[Path], tokenizer: SdarTokenizer) -> Recipe:
    entries = []
    for file in files:
        size, digest = hash_file(file)
        entries.append({"name": file.name, "size": size, "sha256": digest})
    return Recipe(
        tokenizer_fingerprint=tokenizer.fingerprint(),
        # Turns that are not labelled need no room before those that are.
        template={"template": TEMPLATE, "mask_history": False},
        sources=[
            {
                "name": cache.name,
                "layout": {"formatting": TEMPLATE},
                "num_samples": None,
                "files": entries,
            }
        ],
        max_samples=None,
    )


def _write(
    found: CachedDocuments,
    writers: list[IndexedWriter],
    counts: dict[str, int],
    mask_token_id: int,
) -> None:
    tokens, labels, turns = writers
    lengths = found.lengths.tolist()
    tokens.add_documents(found.ids, lengths)
    labels.add_documents(found.labels, lengths)
    turns.add_documents(found.turns, found.turn_counts.tolist())
    counts["num_documents"] += len(lengths)
    counts["num_tokens"] += len(found.ids)
    counts["num_label_tokens"] += int(np.count_nonzero(found.labels != IGNORED_LABEL))
    masks = np.flatnonzero(found.ids == mask_token_id)
    ends = np.cumsum(found.lengths)
    counts["num_mask_documents"] += len(np.unique(np.searchsorted(ends, masks, side="right")))
