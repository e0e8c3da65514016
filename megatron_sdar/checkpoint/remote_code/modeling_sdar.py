"""SDAR, a Qwen3 decoder with block-causal attention: SDARModel and SDARForCausalLM.

Part of the model directory: needs only torch and transformers 5. Licence: Apache-2.0.
A token sees every token of its own block of `config.block_size`, in both directions, and every
block before it. The logits at a position are of the token at that position, not of the next one.
Shapes: B rows, L tokens, K keys (cached ones and these L), N heads, H head_dim, D hidden_size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_sdar import SDARConfig

# Imported here too because early transformers 5 copy only the files that a module itself imports.
from .decoding_sdar import BlockDecoding  # noqa: F401
from .generation_sdar import SDARGenerationMixin

# Later transformers 5 call the cache of an output, and the argument for it, `cache`.
_PAST = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"


class SDARRMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last dim, statistics in fp32 or wider."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class SDARAttention(nn.Module):
    """Grouped-query attention with RMSNorm on every query and key head."""

    def __init__(self, config: SDARConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_groups = config.num_attention_heads // config.num_key_value_heads
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = SDARRMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = SDARRMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, x_BLD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """[B, L, D] to [B, L, D]; the keys and values of these tokens join the cache."""
        heads = (*x_BLD.shape[:-1], -1, self.head_dim)
        q_BNLH = _rotate(self.q_norm(self.q_proj(x_BLD).view(heads)).transpose(1, 2), cos, sin)
        k_BNKH = _rotate(self.k_norm(self.k_proj(x_BLD).view(heads)).transpose(1, 2), cos, sin)
        v_BNKH = self.v_proj(x_BLD).view(heads).transpose(1, 2)
        if cache is not None:
            k_BNKH, v_BNKH = cache.update(k_BNKH, v_BNKH, self.layer_idx)
        grouped = self.num_groups > 1
        if grouped and mask is not None:
            # With a mask, the memory-saving kernels for GPUs take no groups.
            k_BNKH = k_BNKH.repeat_interleave(self.num_groups, dim=1)
            v_BNKH = v_BNKH.repeat_interleave(self.num_groups, dim=1)
            grouped = False
        out = F.scaled_dot_product_attention(
            q_BNLH, k_BNKH, v_BNKH, attn_mask=mask, enable_gqa=grouped
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class SDARMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SDARDecoderLayer(nn.Module):
    """Pre-norm attention and MLP with residuals."""

    def __init__(self, config: SDARConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = SDARAttention(config, layer_idx)
        self.mlp = self.make_mlp(config, layer_idx)
        self.input_layernorm = SDARRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = SDARRMSNorm(config.hidden_size, config.rms_norm_eps)

    def make_mlp(self, config: SDARConfig, layer_idx: int) -> nn.Module:
        """What follows attention in this layer."""
        return SDARMLP(config.hidden_size, config.intermediate_size)

    def forward(
        self, x_BLD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD), cos, sin, mask, cache)
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))


class SDARPreTrainedModel(PreTrainedModel):
    """What transformers has to know; it fills new weights by its own rules."""

    config_class: Any = SDARConfig
    base_model_prefix = "model"
    _no_split_modules = ["SDARDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True


class SDARModel(SDARPreTrainedModel):
    """Embedding, layers and final norm.

    Rotary tables are made in every forward, in fp32. A buffer of them would be lost when
    transformers makes the model on the meta device, and rounded when the model changes dtype.
    """

    layer_class: Any = SDARDecoderLayer

    def __init__(self, config: SDARConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [self.layer_class(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = SDARRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        store_kv: bool = True,
        block_length: int | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, L, D] of the tokens after `past_key_values`.

        Args:
            input_ids: [B, L]; or inputs_embeds [B, L, D].
            attention_mask: [B, K], 0 for padding, left or right, or None for no padding: attention
                is block-causal. Or [B or 1, 1, L, K], boolean (True: seen) or added to the
                scores: attention is what it says.
            position_ids: [B or 1, L]; by default tokens count from the first that is no padding.
                Block-causal attention goes by them, so rows of several documents need a
                4-dimensional mask.
            past_key_values: keys and values of earlier blocks, a DynamicCache.
            use_cache: return a cache, a new one without past_key_values; by default
                config.use_cache, and not in training.
            store_kv: False leaves the cache as it was: for a block that is still being denoised.
            block_length: other than config.block_size.
            cache: another name of past_key_values.

        Raises:
            ValueError: for arguments that do not fit together or are not available.
        """
        _refuse(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids and inputs_embeds: give one of them, and only one")
        x_BLD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past = past_key_values if past_key_values is not None else cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if past is None and use_cache:
            past = DynamicCache()
        num_past = 0 if past is None else past.get_seq_length()
        positions, mask = _positions_and_mask(
            x_BLD, attention_mask, position_ids, num_past, block_length or self.config.block_size
        )
        cos, sin = _rotary_tables(positions, self.config.head_dim, self.config.rope_theta)
        cos, sin = cos.to(x_BLD.dtype), sin.to(x_BLD.dtype)
        for layer in self.layers:
            x_BLD = layer(x_BLD, cos, sin, mask, past)
        if past is not None and not store_kv:
            past.crop(-x_BLD.shape[1])
        kept: dict[str, Any] = {_PAST: past} if use_cache else {}
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BLD), **kept)


class SDARForCausalLM(SDARPreTrainedModel, SDARGenerationMixin):
    """SDARModel and the head; `generate` decodes by block diffusion."""

    body_class: Any = SDARModel

    def __init__(self, config: SDARConfig) -> None:
        super().__init__(config)
        self.model = self.body_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        store_kv: bool = True,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, L, vocab_size] and, given labels, the loss.

        Args:
            labels: [B, L]. The loss is the mean cross-entropy of the logits at a position with
                the label at the same position, without a shift, over labels other than -100.
            logits_to_keep: logits of the last so many tokens only (0: of all), or of the tokens
                at these indices; not together with labels.
            num_items_in_batch: what the loss is divided by instead of its number of labels.
            Others: see SDARModel.forward.

        Raises:
            ValueError: as SDARModel.forward.
        """
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if labels is not None and not keeps_all:
            raise ValueError("logits_to_keep: leave it out where labels are given")
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            store_kv=store_kv,
            **kwargs,
        )
        hidden = output.last_hidden_state
        if isinstance(logits_to_keep, int):
            hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        else:
            hidden = hidden[:, logits_to_keep]
        logits = self.lm_head(hidden)
        loss = None if labels is None else _loss(logits, labels, num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{_PAST: output.get(_PAST)})


def _refuse(arguments: dict[str, Any]) -> None:
    """Callers pass every model more than it takes; what would change the result is an error."""
    for name, value in arguments.items():
        wanted = name == "return_dict"
        if name != "cache_position" and value is not None and value is not wanted:
            raise ValueError(f"{name} is {value!r}, which SDAR does not offer; leave it out")


def _loss(logits: Tensor, labels: Tensor, num_items: int | Tensor | None) -> Tensor:
    labels = labels.to(logits.device)
    total = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    if num_items is None:
        return total / (labels != -100).sum().clamp(min=1)
    return total / torch.as_tensor(num_items, device=total.device)


def _rotate(x_BNLH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_BNLH.chunk(2, dim=-1)
    return x_BNLH * cos + torch.cat((-second, first), dim=-1) * sin


def _rotary_tables(positions: Tensor, head_dim: int, rope_theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [B or 1, 1, L, H] in fp32, for positions [B or 1, L]."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions[:, None, :, None].float() * (1.0 / rope_theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _positions_and_mask(
    x_BLD: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    num_past: int,
    block_length: int,
) -> tuple[Tensor, Tensor | None]:
    """Positions [B or 1, L], and what each query sees: None for everything."""
    batch, length = x_BLD.shape[:2]
    num_keys = num_past + length
    if attention_mask is not None and attention_mask.dim() == 4:
        if position_ids is None:
            position_ids = torch.arange(num_past, num_keys, device=x_BLD.device)[None]
        if attention_mask.dtype == torch.bool:
            return position_ids, attention_mask
        if not attention_mask.is_floating_point():
            raise ValueError(
                f"attention_mask has 4 dimensions and dtype {attention_mask.dtype}; make it "
                "torch.bool, or floating point to be added to the scores"
            )
        return position_ids, attention_mask.to(x_BLD.dtype)
    if attention_mask is None:
        key_positions = torch.arange(num_keys, device=x_BLD.device)[None]
    elif tuple(attention_mask.shape) == (batch, num_keys):
        key_positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    else:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; make it ({batch}, {num_keys})"
            f" for {num_past} cached tokens and {length} new ones, or give it 4 dimensions"
        )
    if position_ids is not None:
        past = key_positions[:, :num_past].expand(batch, -1)
        key_positions = torch.cat((past, position_ids.expand(batch, -1)), dim=1)
    positions = key_positions[:, num_past:]
    one_block = num_past // block_length == (num_keys - 1) // block_length
    if attention_mask is None and position_ids is None and one_block:
        return positions, None
    seen = key_positions[:, None, :] // block_length <= positions[:, :, None] // block_length
    if attention_mask is not None:
        # A token always sees itself: a row of padding alone must not turn into NaN.
        index = torch.arange(num_keys, device=x_BLD.device)
        itself = index == index[num_past:, None]
        seen = seen & attention_mask.bool()[:, None, :] | itself
    return positions, seen[:, None]
