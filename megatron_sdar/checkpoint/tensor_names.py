"""Which tensors an SDAR model consists of, and saying how a set of them differs.

Names and shapes are Hugging Face's, derived from the architecture alone, so that every reader
and writer can insist on exactly these. Differences are reported completely, yet one line per
kind of tensor: the layers it concerns are folded into ranges.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from megatron_sdar.architecture import Architecture
from megatron_sdar.model.sdar import EMBEDDING, HEAD

VOCABULARY = (EMBEDDING, HEAD)

Shapes = dict[str, tuple[int, ...]]


def model_tensor_shapes(arch: Architecture, vocab_rows: int | None = None) -> Shapes:
    """Shape of every tensor by name, in the order of a forward pass.

    Args:
        arch: the head is left out when it ties its embeddings.
        vocab_rows: rows of embedding and head; None means arch.vocab_size (no padding).
    """
    hidden, inter, head_dim = arch.hidden_size, arch.intermediate_size, arch.head_dim
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
        "mlp.gate_proj.weight": (inter, hidden),
        "mlp.up_proj.weight": (inter, hidden),
        "mlp.down_proj.weight": (hidden, inter),
    }
    rows = vocab_rows or arch.vocab_size
    shapes: Shapes = {EMBEDDING: (rows, hidden)}
    for index in range(arch.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not arch.tie_word_embeddings:
        shapes[HEAD] = (rows, hidden)
    return shapes


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
    """One line per name pattern and problem, with the layer numbers as ranges."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name, problem in problems:
        match = re.search(r"(?<=layers\.)\d+(?=\.)", name)
        if match is None:
            groups[name, problem] = []
        else:
            pattern = f"{name[: match.start()]}*{name[match.end() :]}"
            groups.setdefault((pattern, problem), []).append(int(match.group()))
    return [
        f"{name.replace('*', _as_ranges(layers), 1) if layers else name}: {problem}"
        for (name, problem), layers in groups.items()
    ]


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
