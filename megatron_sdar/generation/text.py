"""From a prompt in words to an answer in words: what tools/generate.py calls.

Owns loading an exported model into one process, turning the prompt into ids with the chat
template that training used, and turning ids back into text block by block. Invariant: the
prompt is exactly what training left untrained before the last answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_sdar.architecture import Architecture, load_architecture, padded_vocab_size
from megatron_sdar.checkpoint.hf_import import load_hf_weights
from megatron_sdar.data.sources.conversations import Conversation, Turn, require_unicode
from megatron_sdar.data.templates.template import TemplateOptions, conversation_pieces
from megatron_sdar.data.tokenization.tokenizer import END_OF_TEXT, SdarTokenizer, load_tokenizer
from megatron_sdar.generation.sampler import GenerationResult, SamplerConfig, generate
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.model.partition import build_stages
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.model.weights import materialize
from megatron_sdar.parallel.mesh import (
    build_mesh,
    device_type,
    read_launch_info,
    start_process_group,
    stop_process_group,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
PROCESS_GROUP_TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class TextRequest:
    """What tools/generate.py was asked for; None means what the model directory says.

    Attributes:
        raw: the prompt is continued as it is, without the chat template.
        enable_thinking: False puts an empty think block before the answer.
        device: auto, cpu or cuda. dtype: auto, float32 or bfloat16.
        Others: see sampler.SamplerConfig.
    """

    model_dir: Path
    prompt: str
    system: str | None = None
    raw: bool = False
    enable_thinking: bool = True
    max_new_tokens: int = 512
    block_length: int | None = None
    denoising_steps: int | None = None
    remasking: str = "static"
    confidence_threshold: float = 0.9
    temperature: float = 0.0
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"


def prompt_ids(tokenizer: SdarTokenizer, request: TextRequest) -> list[int]:
    """Ids of the prompt, each template piece tokenised on its own, as in training.

    Raises:
        ValueError: for a system prompt without the template, and for text that is not Unicode.
    """
    if request.raw:
        if request.system is not None:
            raise ValueError("--system needs the chat template; leave out --system or --raw")
        return tokenizer.encode(require_unicode(request.prompt, "prompt", "--prompt"))
    require_unicode(request.system or "", "system", "--system")
    require_unicode(request.prompt, "prompt", "--prompt")
    conversation = Conversation(
        (Turn("user", request.prompt, "assistant", ""),), system=request.system or ""
    )
    pieces = conversation_pieces(
        conversation, TemplateOptions(enable_thinking=request.enable_thinking)
    )
    texts = [piece.text for piece in pieces if not piece.trained]
    return [token for ids in tokenizer.encode_batch(texts) for token in ids]


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
    stops = {tokenizer.eos_token_id, tokenizer.token_to_id(END_OF_TEXT)}
    own = arch.eos_token_id
    stops.update(own if isinstance(own, tuple) else (own,))
    return SamplerConfig(
        block_length=block_length,
        mask_token_id=tokenizer.mask_token_id,
        stop_token_ids=tuple(sorted(token for token in stops if token is not None)),
        max_new_tokens=request.max_new_tokens,
        denoising_steps=request.denoising_steps,
        remasking=request.remasking,
        confidence_threshold=request.confidence_threshold,
        temperature=request.temperature,
        seed=request.seed,
    )


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


def generate_text(request: TextRequest, write: Callable[[str], None]) -> GenerationResult:
    """Load the model, decode one answer and write its text as blocks are finished.

    Starts and stops a process group of one. Raises ValueError for every mistake of the user.
    """
    launch = read_launch_info()
    if launch.world_size > 1:
        raise ValueError(
            f"generation runs in one process but {launch.world_size} were started; start it "
            "with python, not torchrun"
        )
    arch = load_architecture(request.model_dir)
    tokenizer = load_tokenizer(request.model_dir)
    config = sampler_config(arch, tokenizer, request)
    ids = prompt_ids(tokenizer, request)
    chosen = device_type(request.device)
    dtype = _dtype(request.dtype, chosen)
    stream = TextStream(tokenizer)
    device = start_process_group(launch, chosen, None, PROCESS_GROUP_TIMEOUT_SECONDS)
    try:
        stage = _load_stage(arch, request.model_dir, device, dtype)
        result = generate(stage, ids, config, lambda block: write(stream.push(block)))
        del stage  # holds the process group, see stop_process_group
    finally:
        stop_process_group()
    write(stream.finish())
    return result


def _dtype(name: str, device: str) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device == "cuda" else "float32"
    return DTYPES[name]


def _load_stage(
    arch: Architecture, model_dir: Path, device: torch.device, dtype: torch.dtype
) -> SdarStage:
    """The whole model, filled from the directory's safetensors; SDAR's head is never tied."""
    arch = replace(arch, tie_word_embeddings=False)
    # Tiled attention on every device: FlexAttention would compile again for every length.
    options = ModelOptions(padded_vocab_size(arch.vocab_size, 1), dtype, False, "none", "tiled")
    (stage,) = build_stages(arch, build_mesh(device, 1, 1), options)
    assert isinstance(stage, SdarStage)
    materialize([stage], device)
    load_hf_weights([stage], arch, model_dir, mask_token_init="keep")
    return stage.eval()
