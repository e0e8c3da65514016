"""Finished pieces of a build put together: parts to a dataset, shards to the whole.

Owns the last step of every build. The metadata goes first and comes back last: while it is
missing the dataset counts as incomplete.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_sdar.data.building.part import dtypes
from megatron_sdar.data.building.summary import BuildSummary, summarize_dataset
from megatron_sdar.data.readers.records import SkipReport
from megatron_sdar.data.storage.indexed import index_paths
from megatron_sdar.data.storage.indexed_writer import concatenate
from megatron_sdar.data.storage.metadata import (
    COUNTS,
    TokenizedMetadata,
    metadata_path,
    read_metadata,
    write_metadata,
)
from megatron_sdar.data.storage.tokens import COMPANIONS


def shard_prefix(prefix: str | Path, shard: tuple[int, int]) -> str:
    """Where shard (i, n) of the dataset PREFIX lies."""
    return f"{prefix}.shard-{shard[0]:05d}-of-{shard[1]:05d}"


def check_target(prefix: str, overwrite: bool) -> None:
    """Refuse a prefix that is none, and one whose files are there unless they may be replaced."""
    if prefix.endswith("/"):
        raise ValueError(f"{prefix}: a prefix must end in a file name, such as {prefix}train")
    paths = [path for suffix in COMPANIONS for path in index_paths(f"{prefix}{suffix}")]
    for path in (*paths, metadata_path(prefix)):
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists already; choose another prefix or ask to overwrite it")


def merge_shards(prefix: str | Path, num_shards: int, *, overwrite: bool = False) -> BuildSummary:
    """Put the NUM_SHARDS shards of PREFIX together: the files that one machine would have made.

    The shards stay where they are. Raises ValueError when one is missing or was made from other
    inputs or options than the first.
    """
    if num_shards < 1:
        raise ValueError(f"the number of shards must be at least 1, got {num_shards}")
    prefixes = [shard_prefix(prefix, (i, num_shards)) for i in range(num_shards)]
    missing = [p for p in prefixes if not metadata_path(p).exists()]
    if missing:
        raise ValueError(
            f"{metadata_path(missing[0])}: no such file: {len(missing)} of {num_shards} shards "
            f"are not built; run preprocess_data.py with --shard I/{num_shards} for each"
        )
    started = time.perf_counter()
    shards = [read_metadata(p) for p in prefixes]
    recipe = replace(shards[0].recipe, shard=None)
    for other, shard in zip(prefixes, shards, strict=True):
        differences = recipe.differences(replace(shard.recipe, shard=None))
        if differences:
            raise ValueError(
                f"{other}.json: this shard differs from the first: {'; '.join(differences)}; "
                "build every shard from the same inputs"
            )
    skipped = SkipReport()
    left_out: Counter[str] = Counter()
    for shard in shards:
        left_out.update(shard.left_out)
        skipped.merge(SkipReport(counts=shard.skipped, locations=shard.skipped_locations))
    metadata = replace(
        shards[0],
        recipe=recipe,
        left_out=dict(left_out),
        skipped=skipped.counts,
        skipped_locations=skipped.locations,
        **{name: sum(getattr(shard, name) for shard in shards) for name in COUNTS},
    )
    check_target(str(prefix), overwrite)
    join_parts(prefixes, prefix, metadata)
    return replace(summarize_dataset(prefix), seconds=time.perf_counter() - started)


def join_parts(parts: Sequence[str], prefix: str | Path, metadata: TokenizedMetadata) -> None:
    """Write PARTS behind each other as PREFIX, and METADATA last."""
    # From here until the metadata is written the dataset counts as incomplete.
    metadata_path(prefix).unlink(missing_ok=True)
    for suffix, dtype in zip(COMPANIONS, dtypes(metadata.vocab_size), strict=True):
        concatenate([f"{p}{suffix}" for p in parts], f"{prefix}{suffix}", dtype, overwrite=True)
    write_metadata(prefix, metadata)
