"""The job of tools/generate.py: load a model, decode all prompts, write the answers.

A single prompt streams to the terminal, several are written one after the other, and those of a
file go to a file with their records. Runs on any number of processes; the main one writes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from megatron_sdar.checkpoint.model_source import ModelSource
from megatron_sdar.data.tokenization.tokenizer import SdarTokenizer
from megatron_sdar.generation.decoder import OnBlock, generate_over_data_parallel
from megatron_sdar.generation.loading import (
    check_layout,
    load_stages,
    model_tokenizer,
    open_model,
)
from megatron_sdar.generation.prompts import Prompt, PromptOptions, prompt_ids, read_prompts
from megatron_sdar.generation.sampler_config import GenerationResult, SamplerConfig, check_request
from megatron_sdar.generation.text import DTYPES, TextRequest, TextStream, sampler_config
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.parallel.devices import check_launch, device_type
from megatron_sdar.parallel.launch import run_on_main
from megatron_sdar.parallel.mesh import (
    LaunchInfo,
    ParallelMesh,
    build_mesh,
    start_process_group,
    stop_process_group,
)

PROCESS_GROUP_TIMEOUT_SECONDS = 600

Write = Callable[[str], None]


@dataclass(frozen=True)
class JobReport:
    """What was decoded.

    Attributes:
        results: one per prompt, in order.
        loading_seconds: until the weights were there.
        seconds: of decoding.
    """

    results: tuple[GenerationResult, ...]
    loading_seconds: float
    seconds: float

    def summary(self) -> str:
        """One line for people."""
        tokens = sum(len(result.ids) for result in self.results)
        forwards = sum(result.num_forwards for result in self.results)
        stopped = sum(result.stopped for result in self.results)
        if len(self.results) == 1:
            ended = f"ended by {'stop token' if stopped else 'max_new_tokens reached'}"
        else:
            ended = f"{stopped} of {len(self.results)} answers ended by a stop token"
        return (
            f"{tokens} tokens, {forwards} forwards, {tokens / forwards:.2f} tokens per forward, "
            f"{tokens / self.seconds:.1f} tokens/s ({self.seconds:.1f} s, loading "
            f"{self.loading_seconds:.1f} s); {ended}"
        )


@dataclass(frozen=True)
class _Job:
    """The prompts with all that is needed to decode them."""

    request: TextRequest
    tokenizer: SdarTokenizer
    config: SamplerConfig
    prompts: Sequence[Prompt]
    ids: Sequence[Sequence[int]]


def run_job(request: TextRequest, launch: LaunchInfo, write: Write) -> JobReport:
    """Decode every prompt of the request.

    Writes answers with `write` on the main rank: a single one as its blocks are finished, several
    one after the other under their prompts. With an output file each line there is the prompt's
    record (or its text as `prompt`) with `generated`, `num_tokens`, `num_forwards` and `stopped`.

    Raises:
        ValueError: on every rank, for every mistake of the user.

    Starts and stops the process group.
    """
    started = time.monotonic()
    source = open_model(request.model_dir)
    tokenizer = model_tokenizer(source)
    config = sampler_config(source.arch, tokenizer, request)
    prompts = _prompts(request)
    options = PromptOptions(request.raw, request.enable_thinking)
    ids = [prompt_ids(tokenizer, prompt, options) for prompt in prompts]
    for prompt, tokens in zip(prompts, ids, strict=True):
        try:
            check_request(source.arch, tokens, config)
        except ValueError as error:
            where = f"{prompt.place}: " if prompt.record else ""
            raise ValueError(f"{where}{error}") from error
    tp, pp = request.tensor_parallel_size, request.pipeline_parallel_size
    check_layout(source.arch, launch.world_size, tp, pp)
    if request.batch_size < 1:
        raise ValueError(f"--batch-size is {request.batch_size}; it must be at least 1")
    chosen = device_type(request.device)
    check_launch(launch, chosen, None)
    if launch.rank == 0:
        for note in source.notes:
            print(f"note: {note}", file=sys.stderr)
    job = _Job(request, tokenizer, config, prompts, ids)
    device = start_process_group(launch, chosen, None, PROCESS_GROUP_TIMEOUT_SECONDS)
    try:
        report = _run(job, source, build_mesh(device, tp, pp, True), started, write)
    except (ValueError, OSError):
        if launch.world_size == 1:  # several ranks need the group to leave together
            stop_process_group()
        raise
    stop_process_group()
    return report


def _run(
    job: _Job, source: ModelSource, mesh: ParallelMesh, started: float, write: Write
) -> JobReport:
    stages = load_stages(source, mesh, _dtype(job.request.dtype, mesh.device.type))
    loaded = time.monotonic()
    results = _decode(job, stages, mesh, write)
    return JobReport(tuple(results), loaded - started, time.monotonic() - loaded)


def _prompts(request: TextRequest) -> list[Prompt]:
    system = request.system or ""
    prompts = [Prompt(text, system=system) for text in request.prompts]
    if request.input_file is not None:
        prompts += read_prompts(request.input_file, system)
    if not prompts:
        raise ValueError("no prompt; give --prompt TEXT or --input FILE.jsonl")
    output = request.output_file
    if output is not None and output.exists():
        raise ValueError(f"--output {output} exists; remove it or name another file")
    return prompts


def _dtype(name: str, device: str) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device == "cuda" else "float32"
    return DTYPES[name]


def _decode(
    job: _Job, stages: Sequence[SdarStage], mesh: ParallelMesh, write: Write
) -> list[GenerationResult]:
    """All prompts, so many at a time as the request says, in order."""
    streams = len(job.prompts) == 1 and job.request.output_file is None
    stream = TextStream(job.tokenizer)

    def show(_: int, tokens: tuple[int, ...]) -> None:
        if mesh.is_main:
            write(stream.push(tokens))

    on_block: OnBlock | None = show if streams else None
    results: list[GenerationResult] = []
    size = job.request.batch_size * mesh.dp_size
    with _output(job.request.output_file, mesh) as file, _progress(job, mesh) as advance:
        for start in range(0, len(job.ids), size):
            part = range(start, min(start + size, len(job.ids)))
            prompts = [job.ids[index] for index in part]
            found = generate_over_data_parallel(
                stages, mesh, prompts, job.config, on_block, list(part)
            )
            results += found
            if mesh.is_main and not streams:
                for index, result in zip(part, found, strict=True):
                    _write_answer(job, index, result, file, write)
            advance(len(part))
    if mesh.is_main and streams:
        write(stream.finish() + "\n")
    return results


def _write_answer(
    job: _Job, index: int, result: GenerationResult, file: IO[str] | None, write: Write
) -> None:
    prompt = job.prompts[index]
    answer = job.tokenizer.decode(result.ids, skip_special=True)
    if file is None:
        write(f"### {prompt.text or prompt.place}\n{answer}\n\n")
        return
    record = {
        **(prompt.record or {"prompt": prompt.text}),
        "generated": answer,
        "num_tokens": len(result.ids),
        "num_forwards": result.num_forwards,
        "stopped": result.stopped,
    }
    try:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
    except OSError as error:
        with suppress(OSError):  # what is still buffered cannot be written either
            file.close()
        raise ValueError(
            f"--output {job.request.output_file}: cannot write answer {index + 1}: "
            f"{error.strerror or error}; make room, or name a file elsewhere"
        ) from error


@contextmanager
def _output(path: Path | None, mesh: ParallelMesh) -> Iterator[IO[str] | None]:
    """The output file on the main rank; None elsewhere, or when there is none."""
    if path is None:
        yield None
        return

    def create() -> None:
        path.open("x", encoding="utf-8").close()

    run_on_main(create, mesh)
    if not mesh.is_main:
        yield None
        return
    with path.open("a", encoding="utf-8") as file:
        yield file


@contextmanager
def _progress(job: _Job, mesh: ParallelMesh) -> Iterator[Callable[[int], None]]:
    """Counts answers that go to a file, on a terminal."""
    watched = mesh.is_main and job.request.output_file is not None and sys.stderr.isatty()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    bar = Progress(*columns, console=Console(stderr=True), disable=not watched)
    with bar:
        task = bar.add_task("answers", total=len(job.prompts))
        yield lambda count: bar.advance(task, count)
