"""A byte-level BPE tokenizer on tiktoken's engine, with the ids of `tokenizers`.

Owns the engine built from a tokenizer's own vocabulary, the decision which texts it may take,
and the comparison of both. A text goes through it only where its ids are proved to be the
same; every other text is handed back for `tokenizers`. Texts travel in one call, joined by a
separator that is an added token here, since a call costs as much as a short text.
"""

import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tiktoken import Encoding
from tokenizers import Tokenizer

from megatron_sdar.data.tokenization.byte_level_bpe import (
    SPLIT_CLASSES,
    ByteLevelBpe,
    read_byte_level_bpe,
)
from megatron_sdar.data.tokenization.character_kinds import PLAIN, UNKNOWN, character_kinds

# Two control characters that no text should hold (one that does goes to `tokenizers`). They
# differ, so no occurrence can lie across the edge of a text.
_SEPARATOR = "\x1e\x1f"
_BATCH_CHARACTERS = 1 << 20
_CHECK_TEXTS = (
    "",
    "The quick brown fox jumps over the lazy dog. 1234567890",
    "I'm, you're, he's, we've, they'll, she'd, don't; I'M, YOU'RE, HE'S, WE'VE, THEY'LL, DON'T",
    "'s 't 're 've 'm 'll 'd ''s '\u017f x'\u017ft \u2019s \u2019t",
    "trailing spaces   ",
    "   leading, and  two   three    four",
    "tabs\t\tand \t mixed\v\f\x85\u00a0\u2028\u3000ends",
    "line\nline\r\nline\rline\n\n\nline \n \n  x\r\n\r\n",
    "x = [1, 2.5e-3, 0x1F]; y += 10_000 // 3  # comment\n\treturn x**2 != y",
    "def f(a, b):\n    if a:\n        return {'k': b}\n\n\n",
    "<<48/2=24>>24 clips, $12, 50%, 3/4, #### 72",
    "\u00e9t\u00e9 na\u00efve \u00dcber stra\u00dfe \u0130stanbul \u0152uvre",
    "e\u0301te\u0301 a\u0323\u0301 a\u0301\u0323 \u212b \u2126 \u1e9b\u0323",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u03ba\u03cc\u03c3\u03bc\u03b5! \u03ac\u03c2",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u6570\u5b66\u9898\uff1a\u4e09\u52a0\u4e94\u7b49\u4e8e\u516b\u3002",
    "\u3053\u3093\u306b\u3061\u306f\u30ab\u30bf\u30ab\u30ca \uff76\uff9e \u304b\u3099",
    "\ud55c\uad6d\uc5b4 \u1112\u1161\u11ab \u110b\u1161",
    "\u0627\u0644\u0633\u0651\u0644\u0627\u0645\u064f \u05e9\u05b8\u05dc\u05d5\u05b9\u05dd",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u09ac\u09be\u0982\u09b2\u09be",
    "\u09cb \u0ba4\u0bae\u0bbf\u0bb4\u0bcd",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e19\u0e49\u0e33 \u0f40\u0f71\u0f72",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd",
    "\U0001f1e9\U0001f1ea \u2764\ufe0f",
    "\u00bd \u00b2 \u2163 \u0663\u0664 \u2460 \U0001d7d8 \u4e00",
    "\u2212\u00d7\u00f7\u2211\u222b\u221a\u03c0 \u2260 \u2264",
    "\u20ac \u00a3 \u201cq\u201d \u2014 \u2026",
    "\x00\x01\x1b[0m\x7f \ufeff \ufffd \u200b \u00ad \ue000 \uffff \U0010ffff",
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\path\\to",
    "CamelCase snake_case kebab-case ALLCAPS mIxEd x1y2z3 4th",
    "\x1e\x1f",
)
_REPEATED = (
    "a",
    "A",
    "1",
    "-",
    "^",
    " ",
    "\n",
    "\t",
    "\r\n",
    "' ",
    "ab ",
    " \n",
    "\u4e2d",
    "\u00e9",
)


class FastEncoder:
    """tiktoken's engine with the vocabulary of a byte-level BPE tokenizer; picklable."""

    def __init__(self, bpe: ByteLevelBpe, kinds: NDArray[np.uint8]) -> None:
        """Take BPE and the KINDS of characters (`character_kinds` of its split)."""
        self._bpe = bpe
        self._kinds = kinds
        self._separator_id = 1 + max(int(bpe.token_ids.max()), *bpe.added.values(), -1)
        added = bpe.added | {_SEPARATOR: self._separator_id}
        self._added = frozenset(added)
        self._engine = Encoding(
            "fast", pat_str=bpe.pattern, mergeable_ranks=bpe.ranks(), special_tokens=added
        )

    def __reduce__(self) -> tuple[type["FastEncoder"], tuple[ByteLevelBpe, NDArray[np.uint8]]]:
        return FastEncoder, (self._bpe, self._kinds)

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int32] | None]:
        """Ids of every text, int32 [n] and read-only; None for a text that `tokenizers` must take.

        Added tokens inside a text become their ids.
        """
        results: list[NDArray[np.int32] | None] = []
        start = characters = 0
        for index, text in enumerate(texts):
            characters += len(text)
            if characters >= _BATCH_CHARACTERS:
                results += self._encode_batch(texts[start : index + 1])
                start, characters = index + 1, 0
        if start < len(texts):
            results += self._encode_batch(texts[start:])
        return results

    def _encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32] | None]:
        joined = _SEPARATOR.join(texts)
        refused: set[int] = set()
        if not joined.isascii():
            refused = self._refused(texts, joined)
            if refused:
                kept = ("" if index in refused else text for index, text in enumerate(texts))
                joined = _SEPARATOR.join(kept)
        try:
            ids = self._engine.encode_to_numpy(
                joined, allowed_special=self._added, disallowed_special=()
            ).view(np.int32)
        except ValueError:  # the regex engine ran out of stack in a very long run of white space
            return self._encode_halves(texts)
        ends = np.flatnonzero(ids == self._separator_id)
        if len(ends) != len(texts) - 1:  # a text holds the separator itself
            return self._encode_halves(texts)
        starts = [0, *(ends + 1).tolist()]
        stops = [*ends.tolist(), len(ids)]
        results: list[NDArray[np.int32] | None] = [
            ids[start:stop] for start, stop in zip(starts, stops, strict=True)
        ]
        for index in refused:
            results[index] = None
        return results

    def _encode_halves(self, texts: Sequence[str]) -> list[NDArray[np.int32] | None]:
        if len(texts) == 1:
            return [None]
        middle = len(texts) // 2
        return self._encode_batch(texts[:middle]) + self._encode_batch(texts[middle:])

    def _refused(self, texts: Sequence[str], joined: str) -> set[int]:
        """Positions of the texts that hold unknown characters or that NFC would change."""
        codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
        kinds = self._kinds[codes]
        notable = np.flatnonzero(kinds != PLAIN)
        if not notable.size:
            return set()
        stops = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)) + len(_SEPARATOR))
        owners = np.searchsorted(stops, notable, side="right")
        refused = set(owners[kinds[notable] == UNKNOWN].tolist())
        if self._bpe.normalizes:
            refused.update(
                index
                for index in set(owners.tolist()) - refused
                if not unicodedata.is_normalized("NFC", texts[index])
            )
        return refused


def build_fast_encoder(backend: Tokenizer) -> FastEncoder | str:
    """The fast encoder with BACKEND's ids, or one phrase why BACKEND can have none."""
    bpe = read_byte_level_bpe(backend)
    if isinstance(bpe, str):
        return bpe
    if any(set(_SEPARATOR) & set(content) for content in bpe.added):
        return "an added token holds a control character that the fast encoder needs"
    kinds = character_kinds(SPLIT_CLASSES[bpe.pattern])
    if (kinds[:128] != PLAIN).any():
        return "the two regex engines disagree on ASCII characters"
    return FastEncoder(bpe, kinds)


def check_texts(added: Sequence[str]) -> list[str]:
    """Texts that exercise every rule of the splits, byte sequences and the tokens ADDED."""
    texts = [*_CHECK_TEXTS, *(char * count for char in _REPEATED for count in (1, 2, 3, 7, 64))]
    for token in added:
        texts += [token, f"a{token}b", f" {token} {token}\n", f"1{token[:-1]}", f"{token}\u0338"]
    texts.append("".join(added))
    return texts


def cross_check(fast: FastEncoder, backend: Tokenizer, texts: Sequence[str]) -> str | None:
    """The first text of TEXTS whose ids differ between FAST and BACKEND, as one phrase."""
    for text, ids in zip(texts, fast.encode(texts), strict=True):
        if ids is None:
            continue
        expected = backend.encode(text, add_special_tokens=False).ids
        if ids.tolist() != expected:
            return f"{text[:60]!r} gives {ids[:20].tolist()}, expected {expected[:20]}"
    return None
