"""A request for text, completed from the model, and ids turned back into text block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_sdar.architecture import Architecture
from megatron_sdar.data.tokenization.tokenizer import END_OF_TEXT, SdarTokenizer
from megatron_sdar.generation.sampler_config import SamplerConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class TextRequest:
    """What tools/generate.py was asked for; None means what the model directory says.

    Attributes:
        model_dir: a Hugging Face directory, a native checkpoint or a run's output_dir.
        prompts: questions, or with `raw` texts to go on from; there are some, or an input file.
        input_file, output_file: JSONL, see `prompts.read_prompts` and `job.run_job`.
        system: system prompt of prompts without one of their own.
        raw: prompts are continued as they are, without the chat template.
        enable_thinking: False puts an empty think block before the answer.
        batch_size: prompts that a data-parallel replica decodes at the same time.
        device: auto, cpu or cuda. dtype: auto or one of DTYPES.
        Others: see `sampler_config.SamplerConfig`.
    """

    model_dir: Path
    prompts: tuple[str, ...] = ()
    input_file: Path | None = None
    output_file: Path | None = None
    system: str | None = None
    raw: bool = False
    enable_thinking: bool = True
    max_new_tokens: int = 512
    block_length: int | None = None
    denoising_steps: int | None = None
    remasking: str = "static"
    confidence_threshold: float = 0.9
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 16
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    device: str = "auto"
    dtype: str = "auto"


def sampler_config(
    arch: Architecture, tokenizer: SdarTokenizer, request: TextRequest
) -> SamplerConfig:
    """The request completed from config.json and the tokenizer.

    Raises:
        ValueError: when the block length is unknown or the mask token is ambiguous.
    """
    block_length = arch.block_size if request.block_length is None else request.block_length
    if block_length is None:
        raise ValueError(
            f"{request.model_dir}/config.json has no block_size; give --block-length, the one "
            "the model was trained with"
        )
    if arch.mask_token_id not in (None, tokenizer.mask_token_id):
        raise ValueError(
            f"{request.model_dir}: config.json says mask_token_id {arch.mask_token_id} but the "
            f"tokenizer's <|MASK|> is {tokenizer.mask_token_id}; the files do not belong together"
        )
    return SamplerConfig(
        block_length=block_length,
        mask_token_id=tokenizer.mask_token_id,
        stop_token_ids=stop_token_ids(arch, tokenizer),
        max_new_tokens=request.max_new_tokens,
        denoising_steps=request.denoising_steps,
        remasking=request.remasking,
        confidence_threshold=request.confidence_threshold,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        seed=request.seed,
    )


def stop_token_ids(arch: Architecture, tokenizer: SdarTokenizer) -> tuple[int, ...]:
    """The tokens that end an answer, by config.json and the tokenizer."""
    stops = {tokenizer.eos_token_id, tokenizer.token_to_id(END_OF_TEXT)}
    own = arch.eos_token_id
    stops.update(own if isinstance(own, tuple) else (own,))
    return tuple(sorted(token for token in stops if token is not None))


class TextStream:
    """Ids in, text out, without ever cutting a character that two blocks share."""

    def __init__(self, tokenizer: SdarTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._num_written = 0

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete; special tokens have none."""
        self._ids += ids
        text = self._tokenizer.decode(self._ids, skip_special=True)
        # A character whose bytes are not all there yet decodes to replacement characters.
        return self._advance(text, len(text.rstrip(REPLACEMENT)))

    def finish(self) -> str:
        """What is left, replacement characters for bytes that never became one included."""
        text = self._tokenizer.decode(self._ids, skip_special=True)
        return self._advance(text, len(text))

    def _advance(self, text: str, end: int) -> str:
        start, self._num_written = self._num_written, max(self._num_written, end)
        return text[start : self._num_written]
