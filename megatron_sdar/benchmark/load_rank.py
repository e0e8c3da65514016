"""One rank that loads its part of a Hugging Face directory, for the memory it takes.

    torchrun --nproc-per-node N -m megatron_sdar.benchmark.load_rank DIRECTORY

Tensor parallel over all ranks, parameters in the dtype of the files. Rank 0 prints one JSON line:
every rank's peak resident memory and that of its own parameters, in MiB.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from megatron_sdar.architecture import load_architecture, padded_vocab_size
from megatron_sdar.checkpoint.hf_import import load_hf_weights
from megatron_sdar.checkpoint.hf_source import HfModel
from megatron_sdar.checkpoint.tensor_names import EMBEDDING
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.model.partition import build_stages
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.model.weights import materialize
from megatron_sdar.parallel.launch import gather_from_world
from megatron_sdar.parallel.mesh import (
    build_mesh,
    read_launch_info,
    start_process_group,
    stop_process_group,
)
from megatron_sdar.parallel.sharding import local_tensor
from megatron_sdar.training.resident_memory import resident_mb

_TIMEOUT_SECONDS = 600


def main(directory: Path) -> None:
    """Load and report."""
    torch.set_num_threads(1)
    launch = read_launch_info()
    start_process_group(launch, "cpu", "gloo", _TIMEOUT_SECONDS)
    mesh = build_mesh(torch.device("cpu"), launch.world_size, 1)
    arch = replace(load_architecture(directory), tie_word_embeddings=False)
    dtype = HfModel(directory, arch, "keep").tensors[EMBEDDING].dtype
    rows = padded_vocab_size(arch.vocab_size, 128)
    options = ModelOptions(rows, dtype, False, "none", "tiled")
    stages = [s for s in build_stages(arch, mesh, options) if isinstance(s, SdarStage)]
    materialize(stages, mesh.device)
    load_hf_weights(stages, arch, directory, "keep")
    own = sum(local_tensor(p).nbytes for stage in stages for p in stage.parameters())
    answers = gather_from_world((resident_mb("VmHWM"), own / 2**20))
    if launch.rank == 0:
        peaks, parameters = zip(*answers, strict=True)
        print(json.dumps({"peak_mb": peaks, "own_mb": parameters}), flush=True)
    stop_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
