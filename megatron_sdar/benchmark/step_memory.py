"""Peak memory of one form of the step, in a process of its own (Linux)."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

import numpy as np
import torch

from megatron_sdar.benchmark.step_data import Document
from megatron_sdar.benchmark.step_forms import PEER, Form, make_form
from megatron_sdar.benchmark.step_kernels import build_kernels
from megatron_sdar.benchmark.step_options import StepOptions
from megatron_sdar.benchmark.step_rows import RowShape
from megatron_sdar.diffusion.noise import NoiseDraw
from megatron_sdar.parallel.host_memory import keep_freed_memory, return_freed_memory
from megatron_sdar.parallel.mesh import LaunchInfo, start_process_group, stop_process_group
from megatron_sdar.training.resident_memory import resident_mb

# The first row's gradients are there while the second is computed.
_ROWS = 2
_PROCESSES = 3


@dataclass(frozen=True)
class StepMemory:
    """MiB beyond the process as it was before the model was built.

    Attributes:
        total_mb: peak, with weights, optimizer state and gradients.
        activations_mb: peak beyond weights and optimizer state (gradients included).
        process_mb: the process itself before: interpreter, torch, libraries.
    """

    total_mb: float
    activations_mb: float
    process_mb: float


def measure_memory(
    name: str, options: StepOptions, length: int, documents: Sequence[Document]
) -> StepMemory:
    """Peak of an optimizer step over the first rows of a form.

    Of our forms the median of a few processes: where the heap has holes is a matter of chance, and
    a step of theirs is short.
    """
    found = []
    for _ in range(1 if name == PEER else _PROCESSES):
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as process:
            found.append(process.submit(_measure_here, name, options, length, documents).result())
    return sorted(found, key=lambda memory: memory.total_mb)[len(found) // 2]


def _measure_here(
    name: str, options: StepOptions, length: int, documents: Sequence[Document]
) -> StepMemory:
    torch.set_num_threads(options.threads)
    if name != PEER:
        keep_freed_memory()  # as pretrain_sdar.py
    start_process_group(LaunchInfo(0, 0, 1), "cpu", "gloo", 600)
    # A toy model first: code that libraries load on first use belongs to no form, nor do compiled
    # kernels. The form gets none of their memory.
    if name != PEER:
        build_kernels(options)
    toy = options.quick()
    _first_step(make_form(name, toy, None), toy)
    gc.collect()
    return_freed_memory()
    process_mb = resident_mb("VmRSS")
    form = make_form(name, options, None)
    # A tiny step: the peer makes its optimizer state in it.
    _first_step(form, options)
    built_mb = resident_mb("VmRSS")
    form.bind(documents, options.shape(length))
    form.step(_ROWS)
    peak_mb = resident_mb("VmHWM")
    del form
    stop_process_group()
    return StepMemory(peak_mb - process_mb, peak_mb - built_mb, process_mb)


def _first_step(form: Form, options: StepOptions) -> None:
    form.bind(*smallest_rows(options))
    form.step()


def smallest_rows(options: StepOptions) -> tuple[list[Document], RowShape]:
    """A document of two blocks, and rows with room for its clean and two noisy copies."""
    length = 2 * options.block_length
    ids = np.arange(1, length + 1, dtype=np.int32)
    document = Document(ids, ids, NoiseDraw(0.5, np.ones(length, dtype=np.bool_)))
    return [document], replace(options.shape(length), kept_row_length=3 * length)
