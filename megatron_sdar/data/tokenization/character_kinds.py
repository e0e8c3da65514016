"""Which characters two tokenizer engines read alike.

Owns a table over all code points, found by asking both engines (Oniguruma in `tokenizers`, the
Rust regex crate in `tiktoken`) for the members of each character class. Characters that Python's
Unicode tables do not know are never trusted. For all others normal forms are stable: text that
Python calls NFC is left alone by any other version's NFC.
"""

import sys
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from tiktoken import Encoding
from tokenizers import Regex, pre_tokenizers

PLAIN, COMPOSING, UNKNOWN = 0, 1, 2

# Beyond the first two planes lie rare ideographs, tags and private characters.
_TRUSTED_END = 0x20000
_HANGUL_PARTS = range(0x1100, 0x1200)


@lru_cache(maxsize=4)
def character_kinds(classes: tuple[str, ...]) -> NDArray[np.uint8]:
    """Kind of every code point, uint8 [0x110000], for splits that use the regex CLASSES.

    PLAIN: the same class everywhere and never changed by NFC. COMPOSING: the same class, but
    NFC may change text that holds it. UNKNOWN: text that holds it may come out differently.
    The result is read-only.
    """
    known = [
        char
        for char in map(chr, range(_TRUSTED_END))
        if unicodedata.category(char) not in ("Cn", "Cs")
    ]
    kinds = np.full(sys.maxunicode + 1, UNKNOWN, np.uint8)
    kinds[_codes("".join(known))] = PLAIN
    kinds[_composing(known)] = COMPOSING
    kinds[differing_characters(classes, "".join(known))] = UNKNOWN
    kinds.flags.writeable = False
    return kinds


def differing_characters(classes: Sequence[str], text: str) -> NDArray[np.int64]:
    """Code points of the characters of TEXT that are in one of CLASSES for one engine only."""
    differs = np.zeros(sys.maxunicode + 1, np.bool_)
    for name in classes:
        runs = f"(?:{name})+"
        members = np.zeros((2, sys.maxunicode + 1), np.bool_)
        members[0, _codes(_found_by_oniguruma(runs, text))] = True
        members[1, _codes(_found_by_rust(runs, text))] = True
        differs |= members[0] != members[1]
    return np.flatnonzero(differs)


def _found_by_oniguruma(pattern: str, text: str) -> str:
    split = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    return "".join(piece for piece, _ in split.pre_tokenize_str(text))


def _found_by_rust(pattern: str, text: str) -> str:
    # With single bytes as its vocabulary, tiktoken gives back the bytes that the pattern matches.
    ranks = {bytes([byte]): byte for byte in range(256)}
    engine = Encoding("bytes", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    found = engine.encode_to_numpy(text, disallowed_special=())
    return found.astype(np.uint8).tobytes().decode()


def _composing(known: Sequence[str]) -> list[int]:
    """Characters that NFC replaces, reorders or joins to the one before them."""
    found = set(_HANGUL_PARTS)
    for char in known:
        if unicodedata.combining(char):
            found.add(ord(char))
        mapping = unicodedata.decomposition(char)
        if mapping and not mapping.startswith("<"):
            if not unicodedata.is_normalized("NFC", char):
                found.add(ord(char))
            found.update(int(part, 16) for part in mapping.split()[1:])
    return sorted(found)


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)
