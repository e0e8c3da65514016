"""Which tensors an SDAR model consists of, and saying how a set of them differs.

Published names and shapes are Hugging Face's (one tensor per expert), stored ones those of native
checkpoints (the experts of a layer in two tensors, see `experts`). Both are derived from the
architecture alone, so that every reader and writer can insist on exactly these. Differences are
reported completely, yet one line per kind of tensor: layers and experts are folded into ranges.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from megatron_sdar.architecture import Architecture
from megatron_sdar.checkpoint.experts import DOWN, GATE_UP
from megatron_sdar.model.sdar import EMBEDDING, HEAD

VOCABULARY = (EMBEDDING, HEAD)

Shapes = dict[str, tuple[int, ...]]


def model_tensor_shapes(arch: Architecture, vocab_rows: int | None = None) -> Shapes:
    """Published shape of every tensor by name, in the order of a forward pass.

    Args:
        arch: the head is left out when it ties its embeddings.
        vocab_rows: rows of embedding and head; None means arch.vocab_size (no padding).
    """
    return _shapes(arch, vocab_rows, fused=False)


def stored_tensor_shapes(arch: Architecture, vocab_rows: int | None = None) -> Shapes:
    """As `model_tensor_shapes`, by the names of native checkpoints."""
    return _shapes(arch, vocab_rows, fused=True)


def _shapes(arch: Architecture, vocab_rows: int | None, fused: bool) -> Shapes:
    hidden, head_dim = arch.hidden_size, arch.head_dim
    query, key = arch.num_attention_heads * head_dim, arch.num_key_value_heads * head_dim
    layer: Shapes = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "self_attn.q_norm.weight": (head_dim,),
        "self_attn.k_norm.weight": (head_dim,),
        "post_attention_layernorm.weight": (hidden,),
        **_mlp_shapes(arch, fused),
    }
    rows = vocab_rows or arch.vocab_size
    shapes: Shapes = {EMBEDDING: (rows, hidden)}
    for index in range(arch.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not arch.tie_word_embeddings:
        shapes[HEAD] = (rows, hidden)
    return shapes


def _mlp_shapes(arch: Architecture, fused: bool) -> Shapes:
    hidden, experts = arch.hidden_size, arch.experts
    if experts is None:
        return _swiglu_shapes("mlp", hidden, arch.intermediate_size)
    number, inter = experts.num_experts, experts.moe_intermediate_size
    shapes: Shapes = {"mlp.gate.weight": (number, hidden)}
    if fused:
        shapes[f"mlp.{GATE_UP}"] = (number, 2 * inter, hidden)
        shapes[f"mlp.{DOWN}"] = (number, hidden, inter)
        return shapes
    for expert in range(number):
        shapes |= _swiglu_shapes(f"mlp.experts.{expert}", hidden, inter)
    return shapes


def _swiglu_shapes(prefix: str, hidden: int, inter: int) -> Shapes:
    return {
        f"{prefix}.gate_proj.weight": (inter, hidden),
        f"{prefix}.up_proj.weight": (inter, hidden),
        f"{prefix}.down_proj.weight": (hidden, inter),
    }


def differences(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Every missing, unexpected and mis-shaped tensor; empty when the two agree."""
    missing = [(name, "missing") for name in expected if name not in found]
    extra = [(name, "unexpected") for name in found if name not in expected]
    shaped = [
        (name, f"has shape {list(found[name])}, expected {list(shape)}")
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return [*_fold(missing), *_fold(extra), *_fold(shaped)]


def _fold(problems: Iterable[tuple[str, str]]) -> list[str]:
    """One line per name pattern and problem, with the numbers of experts and layers as ranges."""
    lines = [f"{name}: {problem}" for name, problem in problems]
    for numbered in (r"(?<=\.experts\.)\d+(?=\.)", r"(?<=\blayers\.)\d+(?=\.)"):
        groups: dict[tuple[str, str], list[int]] = {}
        for line in lines:
            match = re.search(numbered, line)
            if match is None:
                groups[line, ""] = []
            else:
                key = line[: match.start()], line[match.end() :]
                groups.setdefault(key, []).append(int(match.group()))
        lines = [
            f"{before}{_as_ranges(numbers) if numbers else ''}{behind}"
            for (before, behind), numbers in groups.items()
        ]
    return lines


def _as_ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> {0-2,5}; a single number stands as it is."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"
