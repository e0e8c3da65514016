"""A plain single-process SDAR: the numbers every parallel layout must reproduce.

Shares no code with the product's model, rows, mask or optimizer path: documents are computed
one by one, never packed, as [noisy | clean] with a dense mask written from the published rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sdar.architecture import Architecture


@dataclass(frozen=True)
class NoisyDocument:
    """A document with its noise already drawn; all [n], n a multiple of the block length.

    divisors: what the loss of each token is divided by, float64.
    """

    ids: Tensor
    labels: Tensor
    masked: Tensor
    divisors: Tensor


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight


def _rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    # Angles in fp32, as the published weights were trained.
    inverse = 1.0 / theta ** (torch.arange(0, 2 * half, 2).float() / (2 * half))
    angles = (positions.float()[:, None] * inverse[None, :]).to(torch.float32)
    cos, sin = angles.cos().to(x.dtype)[:, None], angles.sin().to(x.dtype)[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def published_mask(length: int, block: int) -> Tensor:
    """bool [2n, 2n] over [noisy | clean], from the rule in words.

    A noisy query sees its own noisy block and the clean blocks strictly before it; a clean
    query sees clean blocks up to and including its own.
    """
    mask = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for query in range(2 * length):
        for key in range(2 * length):
            query_block, key_block = query % length // block, key % length // block
            query_noisy, key_noisy = query < length, key < length
            if query_noisy and key_noisy:
                mask[query, key] = query_block == key_block
            elif query_noisy:
                mask[query, key] = key_block < query_block
            elif not key_noisy:
                mask[query, key] = key_block <= query_block
    return mask


def hidden_states(
    weights: dict[str, Tensor], arch: Architecture, ids: Tensor, positions: Tensor, mask: Tensor
) -> Tensor:
    """Final hidden states [T, D] under a dense mask [T, T]."""
    x = weights["model.embed_tokens.weight"][ids]
    heads, kv, dim = arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim
    for i in range(arch.num_hidden_layers):
        w = {k.split(f"layers.{i}.", 1)[1]: v for k, v in weights.items() if f"layers.{i}." in k}
        y = _norm(x, w["input_layernorm.weight"], arch.rms_norm_eps)
        q = (y @ w["self_attn.q_proj.weight"].T).view(-1, heads, dim)
        k = (y @ w["self_attn.k_proj.weight"].T).view(-1, kv, dim)
        v = (y @ w["self_attn.v_proj.weight"].T).view(-1, kv, dim)
        q = _norm(q, w["self_attn.q_norm.weight"], arch.rms_norm_eps)
        k = _norm(k, w["self_attn.k_norm.weight"], arch.rms_norm_eps)
        q, k = (_rotate(z, positions, arch.rope_theta) for z in (q, k))
        outs = []
        for head in range(heads):
            kv_head = head // (heads // kv)
            scores = q[:, head] @ k[:, kv_head].T / dim**0.5
            outs.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v[:, kv_head])
        x = x + torch.stack(outs, 1).flatten(1) @ w["self_attn.o_proj.weight"].T
        y = _norm(x, w["post_attention_layernorm.weight"], arch.rms_norm_eps)
        gate, up = y @ w["mlp.gate_proj.weight"].T, y @ w["mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w["mlp.down_proj.weight"].T
    return _norm(x, weights["model.norm.weight"], arch.rms_norm_eps)


def loss(
    weights: dict[str, Tensor],
    arch: Architecture,
    documents: list[NoisyDocument],
    block: int,
    mask_id: int,
) -> Tensor:
    """sum over documents and masked tokens of CE / divisor, over the number of label tokens."""
    total = torch.zeros((), dtype=torch.float64)
    labels = 0
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    for doc in documents:
        n = doc.ids.numel()
        noisy = torch.where(doc.masked, mask_id, doc.ids)
        hidden = hidden_states(
            weights,
            arch,
            torch.cat((noisy, doc.ids)),
            torch.arange(n).repeat(2),
            published_mask(n, block),
        )
        log_probs = (hidden[:n] @ head[: arch.vocab_size].T).log_softmax(-1)
        picked = log_probs[torch.arange(n), doc.ids]
        total = total - (picked / doc.divisors)[doc.masked].sum()
        labels += int((doc.labels != -100).sum())
    return total / max(labels, 1)


def train(
    weights: dict[str, Tensor],
    arch: Architecture,
    steps: list[list[NoisyDocument]],
    block: int,
    mask_id: int,
    *,
    lr: float,
    weight_decay: float,
    max_grad_norm: float,
) -> dict[str, object]:
    """AdamW steps; returns losses, grad norms, first-step gradients and final weights."""
    leaves = {name: w.clone().double().requires_grad_() for name, w in weights.items()}
    plain = [w for n, w in leaves.items() if "layernorm" in n]
    decayed = [w for n, w in leaves.items() if "layernorm" not in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0}],
        lr=lr,
    )
    losses, norms, first = [], [], {}
    for documents in steps:
        optimizer.zero_grad()
        value = loss(leaves, arch, documents, block, mask_id)
        value.backward()
        first = first or {name: w.grad.clone() for name, w in leaves.items()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(leaves.values(), max_grad_norm)))
        optimizer.step()
        losses.append(float(value.detach()))
    final = {name: w.detach() for name, w in leaves.items()}
    return {"losses": losses, "norms": norms, "gradients": first, "weights": final}
