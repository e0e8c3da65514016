"""`generate` of an SDAR model: what it takes, and what it refuses; decoding_sdar decodes.

Part of the model directory: needs only torch and transformers 5. Licence: Apache-2.0.
Invariant: no argument or setting that would change another model's answer is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from .decoding_sdar import BlockDecoding, decode

# Settings of a GenerationConfig that are read, and those without effect: max_new_tokens comes
# before max_length, and there is no assistant.
_TAKEN = (
    "max_new_tokens", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k",
    "top_p", "max_length", "bos_token_id", "transformers_version", "_from_model_config",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_lookbehind", "target_lookbehind",
)  # fmt: skip
# What other models offer and this one does not, by the value that turns it off.
_OFF_AT_0 = (
    "min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "epsilon_cutoff", "eta_cutoff", "diversity_penalty",
)  # fmt: skip
_OFF_AT_1 = (
    "num_beams", "num_beam_groups", "num_return_sequences", "repetition_penalty",
    "length_penalty", "encoder_repetition_penalty", "typical_p",
)  # fmt: skip
_OFF_AT_FALSE = (
    "output_scores", "output_logits", "output_attentions", "output_hidden_states", "synced_gpus",
    "return_dict_in_generate", "early_stopping", "remove_invalid_values",
)  # fmt: skip
_OFF: Mapping[str, Any] = {
    **dict.fromkeys(_OFF_AT_0, 0),
    **dict.fromkeys(_OFF_AT_1, 1),
    **dict.fromkeys(_OFF_AT_FALSE, False),
    "stopping_criteria": [],
    "logits_processor": [],
    "use_cache": True,
}


class SDARGenerationMixin(GenerationMixin):
    """`generate` of an SDAR model."""

    @torch.no_grad()
    def generate(
        self: Any,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        block_length: int | None = None,
        denoising_steps: int | None = None,
        remasking: str = "static",
        confidence_threshold: float = 0.9,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        mask_token_id: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        streamer: Any = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Prompts and answers, int64 [rows, prompt length + answer length].

        Args:
            inputs, input_ids: one of them, int64 [rows, length], padded on the left.
            generation_config: read for max_new_tokens, eos_token_id, pad_token_id, and with
                do_sample for temperature, top_k and top_p, where these are not given. The
                model's own generation_config is read for the first three only: its sampling
                settings are meant for token-by-token decoding.
            attention_mask: [rows, length], 0 for padding; None for no padding.
            max_new_tokens: each answer's greatest length.
            block_length: tokens decoded together; by default config.block_size.
            denoising_steps: most forwards per block; by default block_length. The tokens of a
                block are shared out over the steps, the larger shares first (8 in 3: 3, 3, 2).
            remasking: "static" reveals each step's share, most confident tokens first; "dynamic"
                reveals every token above the threshold, and at least the step's share.
            confidence_threshold: of "dynamic"; confidence is always the probability at
                temperature 1, so that the threshold keeps its meaning.
            do_sample: True draws, at temperature 1 unless it is given; False takes the most
                probable tokens; by default the temperature decides.
            temperature: 0 takes the most probable token; above 0 draws from
                softmax(logits / temperature). By default 0.
            top_k, top_p: draw only among so many tokens, or so much probability.
            eos_token_id: an answer ends with the first of these.
            pad_token_id: what follows an answer that ended before others; by default the
                first eos_token_id.
            mask_token_id: the token for one still unknown, never produced; by default
                config.mask_token_id.
            seed, generator: of the draws; by default torch's own generator.
            streamer: gets the prompt, then each block; for one row.
            token_type_ids: accepted from tokenizers, and not used.

        Raises:
            ValueError: for a value out of range, a setting that this does not offer, a prompt
                that the model cannot read or continue, and logits that are not finite.
        """
        _refuse_others(kwargs, "")
        if generation_config is not None:
            settings = generation_config.to_diff_dict().items()
            others = {name: value for name, value in settings if name not in _TAKEN}
            _refuse_others(others, "generation_config.")
        if (inputs is None) == (input_ids is None):
            raise ValueError("inputs and input_ids: give one of them, and only one")
        prompts: Any = inputs if input_ids is None else input_ids
        given = {"do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        own = self.generation_config
        eos = _first(eos_token_id, generation_config, own, self.config, name="eos_token_id")
        eos_ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        length = self.config.block_size if block_length is None else block_length
        decoding = BlockDecoding(
            max_new_tokens=_first(max_new_tokens, generation_config, own, name="max_new_tokens"),
            block_length=length,
            denoising_steps=length if denoising_steps is None else denoising_steps,
            remasking=remasking,
            confidence_threshold=confidence_threshold,
            eos_token_ids=frozenset(eos_ids),
            mask_token_id=self.config.mask_token_id if mask_token_id is None else mask_token_id,
            **_sampling(given, generation_config),
        )
        pad = _first(pad_token_id, generation_config, own, self.config, name="pad_token_id")
        rows = _prompt_rows(prompts, attention_mask, pad)
        _check_request(rows, decoding, self.config)
        if streamer is not None and len(rows) != 1:
            raise ValueError(f"streamer: it takes one prompt, not {len(rows)}; leave it out")
        if seed is not None:
            generator = _seeded(seed, generator, prompts.device)
        if streamer is not None:
            streamer.put(prompts.cpu())
        answers = decode(self, rows, decoding, generator, streamer)
        if streamer is not None:
            streamer.end()
        # Without an eos_token_id all answers are equally long, so 0 is never used.
        filler = pad if pad is not None else eos_ids[0] if eos_ids else 0
        longest = max(map(len, answers))
        padded = [answer + [filler] * (longest - len(answer)) for answer in answers]
        return torch.cat((prompts, torch.tensor(padded, device=prompts.device)), dim=1)


def _refuse_others(settings: Mapping[str, Any], where: str) -> None:
    for name, value in settings.items():
        if value is not None and (name not in _OFF or value != _OFF[name]):
            advice = "give max_new_tokens instead" if name == "max_length" else "leave it out"
            raise ValueError(
                f"{where}{name} is {value!r}, which SDAR's generate does not offer; {advice}"
            )


def _first(value: Any, *sources: Any, name: str) -> Any:
    """The value, or that of the first source that has one."""
    for source in sources:
        if value is None:
            value = getattr(source, name, None)
    return value


def _sampling(given: Mapping[str, Any], source: GenerationConfig | None) -> dict[str, Any]:
    """temperature, top_k and top_p from the arguments and an explicit GenerationConfig."""
    temperature = given["temperature"]
    do_sample = _first(given["do_sample"], source, name="do_sample")
    if do_sample is False and temperature:
        raise ValueError(
            f"temperature is {temperature} but do_sample is False; leave out one of them"
        )
    if do_sample:
        temperature = _first(temperature, source, name="temperature")
        temperature = 1.0 if temperature is None else temperature
        if temperature == 0:
            raise ValueError("temperature is 0 but do_sample is True; leave out one of them")
        given = {**given, **{k: _first(given[k], source, name=k) for k in ("top_k", "top_p")}}
    return {
        "temperature": 0.0 if temperature is None else temperature,
        "top_k": 0 if given["top_k"] is None else given["top_k"],
        "top_p": 1.0 if given["top_p"] is None else given["top_p"],
    }


def _seeded(seed: int, generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    if generator is not None:
        raise ValueError(f"seed is {seed} and there is a generator too; give one of them")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}; it must be from 0 to 2^63 - 1")
    return torch.Generator(device).manual_seed(seed)


def _prompt_rows(prompts: Tensor, attention_mask: Tensor | None, pad: int | None) -> list[Tensor]:
    """Each row's tokens without its padding."""
    if prompts.dim() != 2 or prompts.shape[0] < 1 or prompts.dtype != torch.int64:
        raise ValueError(
            f"input_ids have shape {tuple(prompts.shape)} and dtype {prompts.dtype}; make them "
            "int64 [rows, length]"
        )
    if attention_mask is None:
        if pad is not None and 0 < int((prompts[:, :1] == pad).sum()) < len(prompts):
            raise ValueError(
                "attention_mask is None but some rows begin with the padding token; give the "
                "tokenizer's attention_mask"
            )
        return list(prompts)
    if attention_mask.shape != prompts.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; make it that of input_ids, "
            f"{tuple(prompts.shape)}"
        )
    used = attention_mask.bool()
    if bool((used[:, :-1] & ~used[:, 1:]).any()):
        raise ValueError(
            "attention_mask has padding behind a token; pad on the left "
            "(tokenizer.padding_side = 'left')"
        )
    return [row[mask] for row, mask in zip(prompts, used, strict=True)]


def _check_request(rows: Sequence[Tensor], decoding: BlockDecoding, config: Any) -> None:
    mask_id, vocab_size = decoding.mask_token_id, config.vocab_size
    if not 0 <= mask_id < vocab_size:
        raise ValueError(
            f"mask_token_id is {mask_id} but the model has only {vocab_size} token ids; use the "
            "one of its config.json"
        )
    for row in rows:
        outside = row[(row < 0) | (row >= vocab_size)]
        if outside.numel():
            raise ValueError(
                f"input_ids hold id {int(outside[0])} but the model has only {vocab_size} "
                "token ids; use the model's own tokenizer"
            )
        if bool((row == mask_id).any()):
            raise ValueError(
                f"input_ids hold the mask token (id {mask_id}), which stands for a token to be "
                "generated; take it out of the prompt"
            )
    longest = max(map(len, rows))
    if longest + decoding.max_new_tokens > config.max_position_embeddings:
        raise ValueError(
            f"max_new_tokens is {decoding.max_new_tokens} after a prompt of {longest} tokens, but "
            f"the model has only {config.max_position_embeddings} positions "
            "(max_position_embeddings); ask for fewer tokens or shorten the prompt"
        )
