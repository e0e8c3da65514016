"""The model that an adapter belongs to: where it lay, and how to recognise it again.

base_model.json in a checkpoint of a LoRA run. The fingerprint covers the architecture and the
first rows of every tensor as stored, so that a model that was moved or cut into other files is the
same one, and a finetuned sibling with the same config.json is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from megatron_sdar.architecture import Architecture
from megatron_sdar.checkpoint.checksums import Checksum
from megatron_sdar.checkpoint.hf_assets import read_json_object, write_json
from megatron_sdar.checkpoint.hf_source import HfModel
from megatron_sdar.checkpoint.safetensors_files import TensorInfo

BASE_MODEL_NAME = "base_model.json"
_BYTES_PER_TENSOR = 2**16


@dataclass(frozen=True)
class BaseModel:
    """A model beside which something is trained.

    Attributes:
        path: as the configuration names it.
        fingerprint: of its content.
    """

    path: str
    fingerprint: str


def base_model(directory: str | Path, arch: Architecture) -> BaseModel:
    """Describe a Hugging Face model. Reads up to 64 KiB of every tensor.

    Args:
        arch: of the model, untied.

    Raises:
        ValueError: it cannot be read.
    """
    source = HfModel(directory, arch, mask_token_init="keep")
    checksum = Checksum()
    # What a run adds to config.json is no part of the model.
    published = replace(arch, block_size=None, mask_token_id=None, model_type="")
    checksum.update(json.dumps(asdict(published), sort_keys=True).encode())
    for name, info in source.tensors.items():
        first = source.read(name, _first_rows(info))
        checksum.update(f"{name} {list(info.shape)} {info.dtype}".encode())
        checksum.update(first.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return BaseModel(str(directory), checksum.record().xxh3_128)


def _first_rows(info: TensorInfo) -> tuple[slice, ...]:
    row_bytes = info.num_bytes // info.shape[0]
    rows = min(info.shape[0], max(1, _BYTES_PER_TENSOR // row_bytes))
    return (slice(0, rows), *(slice(0, size) for size in info.shape[1:]))


def write_base_model(directory: Path, base: BaseModel) -> None:
    """Write base_model.json. OSError is the caller's to explain."""
    content: Mapping[str, str] = asdict(base)
    write_json(directory / BASE_MODEL_NAME, content)


def read_base_model(directory: Path) -> BaseModel:
    """Read base_model.json; ValueError names the file."""
    path = directory / BASE_MODEL_NAME
    content = read_json_object(path)
    try:
        return BaseModel(**content)
    except TypeError as error:
        raise ValueError(f"{path}: not the description of a model: {error}") from error
