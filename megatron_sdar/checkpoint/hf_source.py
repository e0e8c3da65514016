"""A Hugging Face model directory as a complete SDAR model: every tensor, any slice.

Owns which files are read (by the index when there is one), the insistence on exactly the
expected tensors, the untying of tied embeddings and the first value of the <|MASK|> row.
Invariant: what `read` returns depends on the directory, the architecture and the seed only,
never on who reads which slice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from rich.filesize import decimal
from torch import Tensor

from megatron_sdar.architecture import Architecture, load_architecture
from megatron_sdar.checkpoint.hf_assets import HfAssets, collect_assets, read_json_object
from megatron_sdar.checkpoint.model_source import with_padding
from megatron_sdar.checkpoint.safetensors_files import (
    Ranges,
    SafetensorsReader,
    TensorInfo,
    contained_file,
    row_blocks,
)
from megatron_sdar.checkpoint.tensor_names import (
    EMBEDDING,
    HEAD,
    VOCABULARY,
    differences,
    model_tensor_shapes,
)

INDEX_NAME = "model.safetensors.index.json"
MASK_TOKEN_INITS = ("auto", "mean", "mean_noise", "keep")
_MEAN_ROWS = 4096


@dataclass(frozen=True)
class ImportReport:
    """What was read and what was decided on the way."""

    source: Path
    num_files: int
    num_tensors: int
    num_bytes: int
    notes: tuple[str, ...]

    def format(self) -> str:
        """The report as lines for the user."""
        first = (
            f"weights: {self.num_tensors} tensors, {decimal(self.num_bytes)} in "
            f"{self.num_files} files of {self.source}"
        )
        return "\n".join([first, *(f"  {note}" for note in self.notes)])


class HfModel:
    """The tensors of `model_dir` under the names that `arch` wants.

    Args:
        arch: may be untied where the directory's config.json ties (the head then is a copy of
            the embedding), or tied where it ties too.
        mask_token_init: what row `arch.mask_token_id` of embedding and head becomes. `keep`:
            as stored. `mean`: the mean of the rows before it, the trained tokens. `mean_noise`:
            that mean plus N(0, initializer_range) drawn from `seed`. `auto`: `mean` for
            model_type qwen3 and qwen3_moe, which never trained the row, `keep` for sdar.
        keep_cached: see `safetensors_files.SafetensorsReader`.

    Attributes: see `model_source.ModelSource`.

    Raises:
        ValueError: unreadable, damaged or escaping files; missing, unexpected or mis-shaped
            tensors, all of them in one message; a head that contradicts tied embeddings; no
            usable mask_token_id.
    """

    def __init__(
        self,
        model_dir: str | Path,
        arch: Architecture,
        mask_token_init: str = "auto",
        seed: int = 0,
        keep_cached: bool = True,
    ) -> None:
        self.directory = Path(model_dir)
        self.arch = arch
        self.seed = seed
        self.notes: list[str] = []
        source = load_architecture(self.directory)
        self.kind = f"Hugging Face {source.model_type}"
        self._home = _locate(self.directory, keep_cached)
        stored = {name: reader.tensors[name] for name, reader in self._home.items()}
        tied = source.tie_word_embeddings or arch.tie_word_embeddings
        self._head = HEAD if HEAD in stored else EMBEDDING if tied else HEAD
        shapes = model_tensor_shapes(arch)
        found = {name: info.shape for name, info in stored.items() if not (tied and name == HEAD)}
        wanted = {name: shape for name, shape in shapes.items() if not (tied and name == HEAD)}
        problems = differences(wanted, found)
        if tied and HEAD in stored and stored[HEAD].shape != shapes[EMBEDDING]:
            problems.append(f"{HEAD}: has shape {list(stored[HEAD].shape)}, unlike {EMBEDDING}")
        if problems:
            raise ValueError(
                f"{self.directory}: the weights do not fit config.json:\n  " + "\n  ".join(problems)
            )
        if tied and HEAD in stored:
            self._check_head_equals_embedding(stored)
        self.tensors: Mapping[str, TensorInfo] = {
            name: stored[self._stored_name(name)] for name in shapes
        }
        if HEAD in shapes and self._head == EMBEDDING:
            self.notes.append(f"{HEAD}: untied, a copy of {EMBEDDING}")
        self._mask_init = self._resolve_mask_init(mask_token_init, source.model_type)
        self._mask_rows: dict[str, Tensor] = {}

    @cached_property
    def assets(self) -> HfAssets:
        """What travels with the weights."""
        return collect_assets([self.directory])

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that hold weights."""
        return tuple(sorted({reader.path for reader in self._home.values()}))

    @property
    def tokenizer_directory(self) -> Path:
        """The model's own."""
        return self.directory

    def report(self) -> ImportReport:
        """What was found and decided."""
        num_bytes = sum(reader.tensors[name].num_bytes for name, reader in self._home.items())
        return ImportReport(
            self.directory, len(self.files), len(self.tensors), num_bytes, tuple(self.notes)
        )

    def read(self, name: str, ranges: Ranges, dtype: torch.dtype | None = None) -> Tensor:
        """A slice in `dtype` (None: as stored). Rows past arch.vocab_size are zero padding."""
        stored = self._stored_name(name)
        file = self._home[stored]
        dtype = dtype or file.tensors[stored].dtype
        if name not in VOCABULARY:
            return file.read(stored, ranges).to(dtype)
        return with_padding(
            ranges, self.arch.vocab_size, dtype, partial(self._vocabulary_rows, name, dtype)
        )

    def _vocabulary_rows(self, name: str, dtype: torch.dtype, ranges: Ranges) -> Tensor:
        """Rows within the vocabulary, as stored but for that of the mask token."""
        stored = self._stored_name(name)
        rows, columns = ranges
        values = self._home[stored].read(stored, ranges).to(dtype)
        mask_id = self.arch.mask_token_id
        if self._mask_init != "keep" and mask_id is not None and rows.start <= mask_id < rows.stop:
            values[mask_id - rows.start] = self._mask_row(name)[columns]
        return values

    def _stored_name(self, name: str) -> str:
        return self._head if name == HEAD else name

    def _check_head_equals_embedding(self, stored: Mapping[str, TensorInfo]) -> None:
        for ranges in row_blocks(stored[EMBEDDING]):
            head = self._home[HEAD].read(HEAD, ranges)
            if not torch.equal(head, self._home[EMBEDDING].read(EMBEDDING, ranges)):
                raise ValueError(
                    f"{self.directory}: config.json ties the embeddings, yet {HEAD} differs from "
                    f"{EMBEDDING}; remove the wrong one, or set tie_word_embeddings to false there"
                )

    def _resolve_mask_init(self, wanted: str, model_type: str) -> str:
        assert wanted in MASK_TOKEN_INITS, wanted
        init = wanted
        if wanted == "auto":
            init = "mean" if model_type.startswith("qwen3") else "keep"
        mask_id = self.arch.mask_token_id
        if init == "keep":
            self.notes.append(f"<|MASK|> row {mask_id}: kept as stored")
            return init
        if mask_id is None or not 0 < mask_id < self.arch.vocab_size:
            raise ValueError(
                f"mask_token_init: {wanted} needs a mask_token_id from 1 to "
                f"{self.arch.vocab_size - 1}, not {mask_id}; set it in "
                f"{self.directory / 'config.json'} (151669 for Qwen3 and SDAR)"
            )
        noise = f" plus N(0, {self.arch.initializer_range})" if init == "mean_noise" else ""
        self.notes.append(f"<|MASK|> row {mask_id}: mean of rows 0 to {mask_id - 1}{noise}")
        return init

    def _mask_row(self, name: str) -> Tensor:
        """The whole float64 row, from all columns so that no slice can change a rounding."""
        if name == HEAD and self.arch.tie_word_embeddings:
            name = EMBEDDING
        if name not in self._mask_rows:
            assert self.arch.mask_token_id is not None, "checked with mask_token_init"
            stored = self._stored_name(name)
            hidden = self.arch.hidden_size
            total = np.zeros(hidden)
            for start in range(0, self.arch.mask_token_id, _MEAN_ROWS):
                stop = min(start + _MEAN_ROWS, self.arch.mask_token_id)
                block = self._home[stored].read(stored, (slice(start, stop), slice(0, hidden)))
                # numpy adds row after row; torch's order depends on its threads.
                total += np.add.reduce(block.double().numpy(), axis=0)
            row = torch.from_numpy(total / self.arch.mask_token_id)
            if self._mask_init == "mean_noise":
                digest = hashlib.sha256(f"{self.seed}/{name}/mask_token".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
                noise = torch.randn(hidden, generator=generator, dtype=torch.float64)
                row += noise * self.arch.initializer_range
            self._mask_rows[name] = row
        return self._mask_rows[name]


def _locate(directory: Path, keep_cached: bool) -> dict[str, SafetensorsReader]:
    """The file that holds each tensor: by the index, or the only file there is."""
    index = directory / INDEX_NAME
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            raise ValueError(f"{index}: weight_map must be a JSON object of file names")
        names = sorted(set(weight_map.values()))
        readers = {
            name: SafetensorsReader(contained_file(directory, name), keep_cached) for name in names
        }
        lost = sorted(n for n, file in weight_map.items() if n not in readers[file].tensors)
        stray = sorted(
            f"{name} ({file})"
            for file, reader in readers.items()
            for name in reader.tensors
            if weight_map.get(name) != file
        )
        if lost or stray:
            raise ValueError(
                f"{index}: disagrees with the files it lists; not in their file: "
                f"{', '.join(lost) or 'none'}; not in the index: {', '.join(stray) or 'none'}"
            )
        return {name: readers[file] for name, file in weight_map.items()}
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    if len(files) != 1:
        found = (
            f"{len(files)} .safetensors files but no {INDEX_NAME}"
            if files
            else ("no .safetensors file")
        )
        raise ValueError(
            f"{directory}: {found}; download the whole model, or save it with save_pretrained "
            "(other weight formats can run code and are not read)"
        )
    reader = SafetensorsReader(contained_file(directory, files[0]), keep_cached)
    return dict.fromkeys(reader.tensors, reader)
