"""PREFIX.json: what a tokenized dataset was made of.

Owns the metadata file of a TokenizedDataset and the fingerprint over everything that decides
its tokens. The file is written last and atomically: its presence means the build is complete.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_sdar.regular_files import read_json, shown

FORMAT_VERSION = 2
COUNTS = ("num_documents", "num_tokens", "num_label_tokens", "num_mask_documents")
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the tokens of a dataset, as plain JSON values.

    `sources` holds one object per dataset: name, layout, num_samples and files (name, size,
    sha256). A file's folder is left out on purpose: moving the data does not change the tokens.
    `seed` is that of random samples, None where none is drawn. `shard` is [i, n, part bytes] for
    the i-th of n shares of the data, None for all of it.
    """

    tokenizer_fingerprint: str
    template: dict[str, Any]
    sources: list[dict[str, Any]]
    max_samples: int | None
    seed: int | None = None
    shard: list[int] | None = None

    @property
    def is_plain_text(self) -> bool:
        """Whether every dataset is continued-pretraining text rather than conversations."""
        return all(source["layout"]["formatting"] == "text" for source in self.sources)

    def fingerprint(self) -> str:
        """sha256 of the recipe: equal fingerprints give equal token files."""
        text = json.dumps({"format_version": FORMAT_VERSION} | asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def differences(self, other: "Recipe") -> list[str]:
        """What of this recipe differs in OTHER, as short readable phrases."""
        found = []
        if self.tokenizer_fingerprint != other.tokenizer_fingerprint:
            found.append("the tokenizer")
        for key in sorted(self.template.keys() | other.template.keys()):
            was, now = self.template.get(key), other.template.get(key)
            if was != now:
                found.append(f"{key} (was {was!r}, now {now!r})")
        for key in ("max_samples", "seed", "shard"):
            was, now = getattr(self, key), getattr(other, key)
            if was != now:
                found.append(f"{key} (was {was}, now {now})")
        if len(self.sources) != len(other.sources):
            found.append(f"the datasets (were {len(self.sources)}, now {len(other.sources)})")
        else:
            for was, now in zip(self.sources, other.sources, strict=True):
                keys = sorted(
                    key for key in was.keys() | now.keys() if was.get(key) != now.get(key)
                )
                if keys:
                    found.append(f"dataset {now.get('name')} ({', '.join(keys)})")
        return found


@dataclass(frozen=True)
class TokenizedMetadata:
    """The contents of PREFIX.json; `recipe` and its fingerprint say what the tokens came from.

    num_mask_documents counts documents whose own text holds the mask token. `left_out` counts
    records of which a part was left out, by what it was; `skipped` counts whole records by
    reason, `skipped_locations` has the first places of each. `unseen_columns` has, by number of
    the dataset, optional columns that dataset_info.json names and no record has.
    """

    num_documents: int
    num_tokens: int
    num_label_tokens: int
    num_mask_documents: int
    mask_token_id: int
    pad_token_id: int
    eos_token_id: int
    vocab_size: int
    recipe: Recipe
    unseen_columns: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_locations: dict[str, list[str]] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """The recipe's fingerprint."""
        return self.recipe.fingerprint()


def metadata_path(prefix: str | Path) -> Path:
    """PREFIX.json."""
    return Path(f"{prefix}.json")


def write_metadata(prefix: str | Path, metadata: TokenizedMetadata) -> None:
    """Write PREFIX.json in one step: it is there completely or not at all."""
    path = metadata_path(prefix)
    content = {
        "format_version": FORMAT_VERSION,
        "fingerprint": metadata.fingerprint,
        **asdict(metadata.recipe),
        **{f.name: getattr(metadata, f.name) for f in fields(metadata) if f.name != "recipe"},
    }
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write TEXT to PATH in one step: it is there completely or not at all."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with partial.open("x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_metadata(prefix: str | Path) -> TokenizedMetadata:
    """PREFIX.json. Raises ValueError, naming the file, when it is absent or not as written."""
    path = metadata_path(prefix)
    remedy = "build the dataset again with tools/preprocess_data.py --overwrite"
    if not path.is_file():
        raise ValueError(f"{path}: no such file: no complete tokenized dataset is there; {remedy}")
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from error
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: not metadata of format_version {FORMAT_VERSION}; {remedy}")
    recipe_types = {
        "tokenizer_fingerprint": str,
        "template": dict,
        "sources": list,
        "max_samples": int | None,
        "seed": int | None,
        "shard": list | None,
    }
    count_types = {f.name: int for f in fields(TokenizedMetadata) if f.type is int}
    expected = {
        **recipe_types,
        **count_types,
        "unseen_columns": dict,
        "left_out": dict,
        "skipped": dict,
        "skipped_locations": dict,
    }
    for name, kind in expected.items():
        value = content.get(name)
        if name not in content or not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(
                f"{path}: {name!r} is missing or of the wrong type: {shown(value)}; {remedy}"
            )
    for source in content["sources"]:
        layout = source.get("layout") if isinstance(source, dict) else None
        if not isinstance(layout, dict) or not isinstance(layout.get("formatting"), str):
            raise ValueError(
                f"{path}: 'sources' must be objects with a layout and its formatting; {remedy}"
            )
    metadata = TokenizedMetadata(
        recipe=Recipe(**{name: content[name] for name in recipe_types}),
        unseen_columns=content["unseen_columns"],
        left_out=content["left_out"],
        skipped=content["skipped"],
        skipped_locations=content["skipped_locations"],
        **{name: content[name] for name in count_types},
    )
    if content.get("fingerprint") != metadata.fingerprint:
        raise ValueError(f"{path}: its fingerprint does not match its contents; {remedy}")
    return metadata


def hash_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> tuple[int, str]:
    """(size in bytes, sha256) of PATH; ON_BYTES hears of every number of bytes read."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    return size, digest.hexdigest()
