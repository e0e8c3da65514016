"""SDAR with mixture-of-experts layers, routed as Qwen3-MoE; the rest is modeling_sdar.

Part of the model directory: needs only torch and transformers 5. Licence: Apache-2.0.
Invariant: every expert's weights are tensors of their own, as checkpoints hold them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .configuration_sdar import SDARMoeConfig

# Imported here too because early transformers 5 copy only the files that a module itself imports.
from .decoding_sdar import BlockDecoding  # noqa: F401
from .generation_sdar import SDARGenerationMixin  # noqa: F401
from .modeling_sdar import SDARMLP, SDARDecoderLayer, SDARForCausalLM, SDARModel


class SDARMoeSparseMLP(nn.Module):
    """The most probable experts of every token, weighted by their probability."""

    def __init__(self, config: SDARMoeConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            [
                SDARMLP(config.hidden_size, config.moe_intermediate_size)
                for _ in range(config.num_experts)
            ]
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_TD = x_BLD.flatten(0, -2)
        logits = self.gate(x_TD)
        # Probabilities among all experts, in fp32 or wider.
        wide = logits if logits.dtype == torch.float64 else logits.float()
        weights, chosen = wide.softmax(dim=-1).topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = weights.to(x_TD.dtype)
        out = torch.zeros_like(x_TD)
        for index in chosen.unique().tolist():
            tokens, rank = torch.where(chosen == index)
            part = self.experts[index](x_TD[tokens]) * weights[tokens, rank, None]
            out.index_add_(0, tokens, part.to(out.dtype))
        return out.view_as(x_BLD)


class SDARMoeDecoderLayer(SDARDecoderLayer):
    """A layer whose MLP is sparse where the configuration says so."""

    def make_mlp(self, config: Any, layer_idx: int) -> nn.Module:
        # Not checked by class: AutoConfig loads a copy of configuration_sdar of its own.
        if config.is_sparse(layer_idx):
            return SDARMoeSparseMLP(config)
        return super().make_mlp(config, layer_idx)


class SDARMoeModel(SDARModel):
    """Embedding, layers and final norm."""

    config_class = SDARMoeConfig
    layer_class = SDARMoeDecoderLayer
    _no_split_modules = ["SDARMoeDecoderLayer"]  # noqa: RUF012


class SDARMoeForCausalLM(SDARForCausalLM):
    """SDARMoeModel and the head; see SDARForCausalLM."""

    config_class = SDARMoeConfig
    body_class = SDARMoeModel
    _no_split_modules = ["SDARMoeDecoderLayer"]  # noqa: RUF012
