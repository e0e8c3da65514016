"""The byte-level BPE inside a tokenizer, for an engine other than `tokenizers`.

Owns the decision whether a merge engine that knows only the bytes and the id of every token
(joining, again and again, the leftmost pair that makes the token of the lowest id) gives the
ids of `tokenizers`, which joins listed pairs in list order. It does when every kept token has
one merge, ids rise with the list, and merging a token's own bytes ends in that token: then two
neighbours that together spell a token are always the pair that the list joins.
"""

import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from megatron_sdar.data.tokenization.merge_order import reachable_merges

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CHAT_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTIONS = "s|t|r|e|v|m|l|d"
# The splits that leave no character out and use only what both regex engines read alike, with
# the classes in them whose members depend on an engine's Unicode tables.
SPLIT_CLASSES: dict[str, tuple[str, ...]] = {
    _GPT2_SPLIT: (r"\p{L}", r"\p{N}", r"\s"),
    _CHAT_SPLIT % "": (r"\p{L}", r"\p{N}", r"\s", f"(?i:{_CONTRACTIONS})"),
    _CHAT_SPLIT % "{1,3}": (r"\p{L}", r"\p{N}", r"\s", f"(?i:{_CONTRACTIONS})"),
}


@dataclass(frozen=True)
class ByteLevelBpe:
    """A byte-level BPE tokenizer: how text is split, and the tokens of which ids.

    Fields: `pattern`, a key of SPLIT_CLASSES; `token_bytes`, the bytes of all tokens end to
    end, with `token_lengths` and `token_ids` int32 [tokens]; `added`, the id of every added
    token; `normalizes`, whether text is brought to NFC.
    """

    pattern: str
    token_bytes: bytes
    token_lengths: NDArray[np.int32]
    token_ids: NDArray[np.int32]
    added: dict[str, int]
    normalizes: bool

    def ranks(self) -> dict[bytes, int]:
        """The id of every token by its bytes."""
        ends = np.cumsum(self.token_lengths).tolist()
        starts = [0, *ends[:-1]]
        blob = self.token_bytes
        return {
            blob[start:end]: token_id
            for start, end, token_id in zip(starts, ends, self.token_ids.tolist(), strict=True)
        }


def read_byte_level_bpe(backend: Tokenizer) -> ByteLevelBpe | str:
    """The byte-level BPE that BACKEND is, or one phrase why it is none or has extras."""
    spec = json.loads(backend.to_str())
    pattern = _split_pattern(spec["pre_tokenizer"])
    if pattern is None:
        return "it does not split text in a way known here"
    normalizer = (spec["normalizer"] or {"type": None})["type"]
    if normalizer not in (None, "NFC"):
        return f"it normalises text by {normalizer}"
    problem = (
        _model_problem(spec["model"])
        or _added_token_problem(backend, spec["added_tokens"], normalizer is not None)
        or ("it truncates texts" if spec["truncation"] else None)
        or ("it pads texts" if spec["padding"] else None)
    )
    if problem is not None:
        return problem
    added = {entry["content"]: entry["id"] for entry in spec["added_tokens"]}
    tokens = _merged_tokens(spec["model"], added)
    if isinstance(tokens, str):
        return tokens
    return ByteLevelBpe(
        pattern=pattern,
        token_bytes=b"".join(tokens.values()),
        token_lengths=np.fromiter(map(len, tokens.values()), np.int32, len(tokens)),
        token_ids=np.fromiter(tokens, np.int32, len(tokens)),
        added=added,
        normalizes=normalizer is not None,
    )


def _split_pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The regular expression that the pre-tokenizer splits by, if it is in SPLIT_CLASSES."""
    if pre_tokenizer is None:
        return None
    steps = (
        pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    )
    *first, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last["use_regex"]:
        return _GPT2_SPLIT if not first else None
    if len(first) != 1 or first[0]["type"] != "Split":
        return None
    split = first[0]
    pattern: str | None = split["pattern"].get("Regex")
    isolated = split["behavior"] == "Isolated" and not split["invert"]
    return pattern if isolated and pattern in SPLIT_CLASSES else None


def _model_problem(model: dict[str, Any]) -> str | None:
    if model["type"] != "BPE":
        return f"its model is {model['type']}, not BPE"
    extras = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    for name in (*extras, "fuse_unk", "byte_fallback"):
        if model[name]:
            return f"its BPE model has {name} {model[name]!r}"
    return None


def _added_token_problem(
    backend: Tokenizer, entries: list[dict[str, Any]], normalizes: bool
) -> str | None:
    if backend.encode_special_tokens:
        return "it encodes special tokens as text"
    for entry in entries:
        for flag in ("single_word", "lstrip", "rstrip"):
            if entry[flag]:
                return f"its added token {entry['content']!r} has {flag}"
        if not entry["content"].isascii():
            return f"its added token {entry['content']!r} is not ASCII"
    contents = sorted(entry["content"] for entry in entries)
    for shorter, longer in pairwise(contents):
        if longer.startswith(shorter):
            return f"its added token {shorter!r} begins another, {longer!r}"
    # Tokens marked `normalized` are looked for after all others: the same as one search in
    # the order of the text only where no two tokens can overlap.
    if len({entry["normalized"] for entry in entries}) > 1 and normalizes:
        firsts = {content[0] for content in contents}
        for content in contents:
            if not firsts.isdisjoint(content[1:]):
                return f"its added token {content!r} may overlap another, and flags differ"
    return None


def _merged_tokens(model: dict[str, Any], added: dict[str, int]) -> dict[int, bytes] | str:
    """Bytes of every token that merging can give, by id; or a phrase why ids could differ."""
    vocab: dict[str, int] = model["vocab"]
    made: dict[str, bytes] = {char: bytes([byte]) for char, byte in byte_characters().items()}
    missing = sum(char not in vocab for char in made)
    if missing:
        return f"its vocabulary lacks {missing} of the 256 bytes"
    joined_ids: list[int] = []
    last = -1
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    for left, right in pairs:
        token = left + right
        token_id = vocab[token]
        if left not in made or right not in made or token_id <= last:
            flaw = "an id out of order" if token_id <= last else "a part that comes later"
            return f"its merge {len(joined_ids)} ({left} {right}) has {flaw}"
        last = token_id
        made[token] = made[left] + made[right]
        joined_ids.append(token_id)
    merges = np.array(
        [[vocab[left] for left, _ in pairs], [vocab[right] for _, right in pairs], joined_ids],
        np.int32,
    ).T
    reachable = reachable_merges(merges, max(vocab.values()) + 1)
    dead = set(merges[~reachable, 2].tolist())
    if model["ignore_merges"]:
        # A whole word is then looked up first, so a token that merging never gives still counts.
        extra = [t for t, i in vocab.items() if (t not in made or i in dead) and t not in added]
        if extra:
            return f"its vocabulary holds {extra[0]!r}, which only a whole-word look-up gives"
    return {vocab[token]: data for token, data in made.items() if vocab[token] not in dead}


def byte_characters() -> dict[str, int]:
    """The byte that each of the 256 characters of a byte-level vocabulary stands for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    stand_ins = {chr(256 + position): byte for position, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | stand_ins
