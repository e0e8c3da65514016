"""The peer: the published way to train SDAR, in plain transformers and PyTorch.

transformers' Qwen3 on rows [noisy | clean] of 2 L tokens under a dense boolean mask that is built
from token attributes for every row, logits of the noisy half, F.cross_entropy, torch's AdamW.
Nothing here uses the trainer's rows, masks or loss. Chosen in the peer's favour: a fused
optimizer, and one denominator for all rows of the step, as ours has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_sdar.architecture import Architecture
from megatron_sdar.benchmark.step_data import Document
from megatron_sdar.benchmark.step_rows import RowShape
from megatron_sdar.config import OptimConfig


@dataclass(frozen=True)
class PeerRow:
    """One packed row of 2 L tokens, noisy half first, and its loss.

    Attributes:
        input_ids, position_ids: int64 [2 L].
        owner, block: int64 [2 L], the document of a token and its block there; padding belongs
            to document -1.
        masked: bool [L]; targets: int64 [M]; weights: float32 [M], 1/p.
        num_labels: label tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    owner: Tensor
    block: Tensor
    masked: Tensor
    targets: Tensor
    weights: Tensor
    num_labels: int


def peer_rows(documents: Sequence[Document], shape: RowShape, view: int = 0) -> list[PeerRow]:
    """The rows of the step, packed as the published form of ours is.

    Rows hold one noisy copy of a document: each of its views has rows of its own.
    """
    packing = shape.pack_whole(documents)
    return [_peer_row([documents[number] for number in row], shape, view) for row in packing.rows]


def _peer_row(documents: Sequence[Document], shape: RowShape, view: int) -> PeerRow:
    length = shape.length
    clean, positions = torch.zeros(length, dtype=torch.int64), torch.arange(length)
    owner = torch.full((length,), -1)
    masked, weights = torch.zeros(length, dtype=torch.bool), torch.zeros(length)
    start = 0
    for number, document in enumerate(documents):
        span = slice(start, start + document.ids.size)
        noise = document.views(view + 1)[view]
        clean[span] = torch.from_numpy(document.ids).long()
        positions[span] = torch.arange(document.ids.size)
        owner[span] = number
        masked[span] = torch.from_numpy(noise.masked)
        weights[span] = 1.0 / float(noise.mask_prob)
        start = span.stop
    noisy = clean.masked_fill(masked, shape.mask_token_id)
    return PeerRow(
        input_ids=torch.cat((noisy, clean)),
        position_ids=positions.repeat(2),
        owner=owner.repeat(2),
        block=(positions // shape.block_length).repeat(2),
        masked=masked,
        targets=clean[masked],
        weights=weights[masked],
        num_labels=sum(document.num_labels for document in documents),
    )


def dense_row_mask(row: PeerRow) -> Tensor:
    """bool [2 L, 2 L] from comparisons of all pairs, as the published code builds it."""
    is_clean = torch.arange(row.owner.numel()) >= row.owner.numel() // 2
    block_q, block_k = row.block[:, None], row.block[None, :]
    clean_q, clean_k = is_clean[:, None], is_clean[None, :]
    own_block = (block_q == block_k) & (clean_q == clean_k)
    clean_before = (block_q > block_k) & clean_k & ~clean_q
    clean_causal = (block_q >= block_k) & clean_k & clean_q
    same_document = row.owner[:, None] == row.owner[None, :]
    return (own_block | clean_before | clean_causal) & same_document


class PeerStep:
    """Optimizer steps of transformers' Qwen3.

    Args:
        arch: the model.
        weights: initial ones by Hugging Face name; None leaves transformers' own.
        config: AdamW and clipping.
    """

    def __init__(
        self, arch: Architecture, weights: Mapping[str, Tensor] | None, config: OptimConfig
    ) -> None:
        # Imported here: it takes seconds, which other benchmarks need not spend.
        from transformers import Qwen3Config, Qwen3ForCausalLM

        self.config = config
        self.model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=arch.vocab_size,
                hidden_size=arch.hidden_size,
                intermediate_size=arch.intermediate_size,
                num_hidden_layers=arch.num_hidden_layers,
                num_attention_heads=arch.num_attention_heads,
                num_key_value_heads=arch.num_key_value_heads,
                head_dim=arch.head_dim,
                rms_norm_eps=arch.rms_norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": arch.rope_theta},
                max_position_embeddings=arch.max_position_embeddings,
                initializer_range=arch.initializer_range,
                tie_word_embeddings=arch.tie_word_embeddings,
                attention_bias=False,
                attention_dropout=0.0,
                use_cache=False,
            )
        )
        self.model.set_attn_implementation("sdpa")
        if weights is not None:
            self.model.load_state_dict(weights)
        self.model.train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def run(self, rows: Sequence[PeerRow]) -> float:
        """One optimizer step with gradient accumulation over the rows; returns its loss."""
        num_labels = sum(row.num_labels for row in rows)
        total = 0.0
        for row in rows:
            loss = self._loss_sum(row) / num_labels
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def _loss_sum(self, row: PeerRow) -> Tensor:
        logits = self.model(
            input_ids=row.input_ids[None],
            position_ids=row.position_ids[None],
            attention_mask=dense_row_mask(row)[None, None],
            logits_to_keep=torch.arange(row.masked.numel()),
        ).logits[0]
        losses = F.cross_entropy(logits[row.masked], row.targets, reduction="none")
        return (losses * row.weights).sum()
