"""Which tokenizers the fast encoder may stand for, and why not the others."""

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from megatron_sdar.data.demo import train_tokenizer
from megatron_sdar.data.tokenization.byte_level_bpe import (
    ByteLevelBpe,
    byte_characters,
    read_byte_level_bpe,
)
from megatron_sdar.data.tokenization.character_kinds import (
    COMPOSING,
    PLAIN,
    UNKNOWN,
    character_kinds,
    differing_characters,
)
from megatron_sdar.data.tokenization.fast_tokenizer import FastEncoder, build_fast_encoder
from megatron_sdar.data.tokenization.merge_order import reachable_merges


def demo_spec() -> dict[str, Any]:
    return json.loads(train_tokenizer(iter(["hello hello shop shops"])).to_str())


def build(spec: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(spec))


def added(spec: dict[str, Any], content: str, **flags: bool) -> dict[str, Any]:
    entry = dict(spec["added_tokens"][0], id=1000, content=content) | flags
    return entry


def _set(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(spec: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            spec = spec[int(name)] if name.isdecimal() else spec[name]
        spec[int(last) if last.isdecimal() else last] = value

    return change


def _add(content: str, **flags: bool) -> Callable[[dict[str, Any]], None]:
    return lambda spec: spec["added_tokens"].append(added(spec, content, **flags))


def _swap_merges(spec: dict[str, Any]) -> None:
    merges = spec["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def _late_part(spec: dict[str, Any]) -> None:
    spec["model"]["vocab"] |= {"zz": 2000, "zzq": 2001}
    spec["model"]["merges"].append(["zz", "q"])


def _whole_word(spec: dict[str, Any]) -> None:
    spec["model"]["vocab"]["zzz"] = 2000
    spec["model"]["ignore_merges"] = True


def _no_byte(spec: dict[str, Any]) -> None:
    vocab = spec["model"]["vocab"]
    vocab["unused"] = vocab.pop("\u0100")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_set("pre_tokenizer", None), "does not split text in a way known"),
        (_set("pre_tokenizer.pretokenizers.0.pattern", {"Regex": r"\w+"}), "does not split"),
        (_set("pre_tokenizer.pretokenizers.0.pattern", {"String": " "}), "does not split"),
        (_set("pre_tokenizer.pretokenizers.0.behavior", "Removed"), "does not split"),
        (_set("pre_tokenizer.pretokenizers.0.invert", True), "does not split"),
        (_set("pre_tokenizer.pretokenizers.1.add_prefix_space", True), "does not split"),
        (_set("pre_tokenizer.pretokenizers.1.use_regex", True), "does not split"),
        (_set("pre_tokenizer", {"type": "Whitespace"}), "does not split"),
        (_set("normalizer", {"type": "NFKC"}), "normalises text by NFKC"),
        (_set("model.dropout", 0.1), "has dropout 0.1"),
        (_set("model.byte_fallback", True), "has byte_fallback True"),
        (_set("model.end_of_word_suffix", "</w>"), "has end_of_word_suffix '</w>'"),
        (_set("model", {"type": "WordLevel", "vocab": {}, "unk_token": "u"}), "is WordLevel"),
        (_add("<x>", lstrip=True), "'<x>' has lstrip"),
        (_add("<x>", rstrip=True), "'<x>' has rstrip"),
        (_add("<x>", single_word=True), "'<x>' has single_word"),
        (_add("<\u00e9>"), "is not ASCII"),
        (_add("<|im_start"), "'<|im_start' begins another, '<|im_start|>'"),
        (_add(">|x", normalized=True), "'</think>' may overlap another"),
        (_add("<\x1e>"), "holds a control character"),
        (_swap_merges, "merge 1 .* has an id out of order"),
        (_late_part, r"\(zz q\) has a part that comes later"),
        (_whole_word, "'zzz', which only a whole-word look-up gives"),
        (_no_byte, "lacks 1 of the 256 bytes"),
        (
            _set(
                "truncation",
                {"max_length": 3, "stride": 0, "strategy": "LongestFirst", "direction": "Right"},
            ),
            "truncates",
        ),
        (
            _set(
                "padding",
                {
                    "strategy": {"Fixed": 9},
                    "direction": "Right",
                    "pad_id": 0,
                    "pad_type_id": 0,
                    "pad_token": "x",
                    "pad_to_multiple_of": None,
                },
            ),
            "pads",
        ),
    ],
)
def test_reasons(change, reason):
    spec = demo_spec()
    change(spec)
    result = build_fast_encoder(build(spec))
    assert isinstance(result, str)
    assert re.search(reason, result), result


def test_special_tokens_as_text_are_a_reason():
    backend = train_tokenizer(iter(["hello"]))
    backend.encode_special_tokens = True
    assert build_fast_encoder(backend) == "it encodes special tokens as text"


def _orphan(spec: dict[str, Any]) -> None:
    spec["model"]["vocab"]["zqz"] = 2000


def _never_merged(spec: dict[str, Any]) -> None:
    # "z q" comes first in "zqj", so "z qj" is never joined; the engine must not join "zq j".
    spec["model"]["vocab"] |= {"zq": 2000, "qj": 2001, "zqj": 2002, "zqjz": 2003}
    spec["model"]["merges"] += [["z", "q"], ["q", "j"], ["z", "qj"], ["zqj", "z"]]


def _ignore_merges(spec: dict[str, Any]) -> None:
    spec["model"]["ignore_merges"] = True
    spec["model"]["vocab"]["<think>"] = spec["added_tokens"][-3]["id"]


def _merges_as_text(spec: dict[str, Any]) -> None:
    spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]


@pytest.mark.parametrize(
    "change",
    [
        _orphan,
        _never_merged,
        _ignore_merges,
        _set("normalizer", None),
        _set("model.continuing_subword_prefix", ""),
        _merges_as_text,
        _add("<x>", normalized=True),
        lambda spec: spec["added_tokens"].clear(),
    ],
)
def test_variants_that_are_taken(change):
    spec = demo_spec()
    change(spec)
    backend = build(spec)
    fast = build_fast_encoder(backend)
    assert isinstance(fast, FastEncoder), fast
    texts = ["hello shops zqz zqj zqjz qj zq <think> <x>", "zqjzqjz<|im_end|>hello"]
    assert [ids.tolist() for ids in fast.encode(texts)] == [
        backend.encode(text, add_special_tokens=False).ids for text in texts
    ]


def test_ranks_hold_every_token_once():
    backend = train_tokenizer(iter(["hello hello shop shops"]))
    bpe = read_byte_level_bpe(backend)
    assert isinstance(bpe, ByteLevelBpe)
    assert bpe.normalizes
    characters = byte_characters()
    expected = {
        bytes(characters[char] for char in token): token_id
        for token, token_id in backend.get_vocab(with_added_tokens=False).items()
    }
    assert bpe.ranks() == expected
    assert bpe.added["<|MASK|>"] == backend.token_to_id("<|MASK|>")


def test_byte_characters_are_those_of_tokenizers():
    characters = byte_characters()
    assert set(characters) == set(pre_tokenizers.ByteLevel.alphabet())
    step = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text = "\x00 \t\x7f!~\u00a1\u00ad\u00ff\u0100\u4f60\U0001f600"
    ((spelled, _),) = step.pre_tokenize_str(text)
    assert bytes(characters[char] for char in spelled) == text.encode()


@st.composite
def merge_lists(draw: st.DrawFn) -> list[tuple[str, str]]:
    """Merges over three letters, each of a new token, of tokens made before."""
    tokens, merges = ["a", "b", "c"], []
    for _ in range(draw(st.integers(1, 14))):
        left, right = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        if left + right not in tokens:
            tokens.append(left + right)
            merges.append((left, right))
    return merges or [("a", "b")]


@settings(max_examples=300, deadline=None)
@given(merges=merge_lists())
def test_reachable_tokens_are_those_that_tokenizers_gives(merges):
    vocab = {token: i for i, token in enumerate(["a", "b", "c", *map("".join, merges)])}
    triples = [[vocab[left], vocab[right], vocab[left + right]] for left, right in merges]
    model = models.BPE(vocab, merges)
    expected = [len(model.tokenize(left + right)) == 1 for left, right in merges]
    assert reachable_merges(np.array(triples, np.int32), len(vocab)).tolist() == expected


@settings(max_examples=200, deadline=None)
@given(merges=merge_lists(), text=st.text("abc", max_size=40))
def test_any_merge_list_gives_the_same_ids(merges, text):
    spec = demo_spec()
    spec["model"]["merges"] = merges
    spec["added_tokens"] = []
    spec["model"]["vocab"] = {
        token: i for i, token in enumerate([*byte_characters(), *map("".join, merges)])
    }
    backend = build(spec)
    fast = build_fast_encoder(backend)
    assert isinstance(fast, FastEncoder), fast
    (ids,) = fast.encode([text])
    assert ids.tolist() == backend.encode(text).ids


def test_classes_that_engines_read_differently_are_found():
    # POSIX classes are Unicode for Oniguruma and ASCII for the Rust engine.
    assert differing_characters(["[[:alpha:]]"], "ab1\u00e9\u4f60").tolist() == [0xE9, 0x4F60]
    assert differing_characters([r"\p{L}", r"\s"], "ab1\u00e9 \u4f60\u0085").size == 0


def test_kinds_of_characters():
    kinds = character_kinds((r"\p{L}",))
    assert not kinds[:0x300].any()
    for char in "\u4e00\uac00\u0416\U0001f600\ue000":
        assert kinds[ord(char)] == PLAIN, char
    for char in "\u0301\u212b\u037e\u1161\u11a8\u09be\u0e38\u0958\u2126":
        assert kinds[ord(char)] == COMPOSING, char
    for code in (0xD800, 0x0378, 0x20000, 0xE0001, 0x10FFFF):
        assert kinds[code] == UNKNOWN, hex(code)
    assert character_kinds(("[[:alpha:]]",))[0xE9] == UNKNOWN


def test_plain_characters_are_left_alone_by_normal_forms():
    kinds = character_kinds((r"\p{L}",))
    normalize = normalizers.NFC().normalize_str
    text = "".join(map(chr, np.flatnonzero(kinds == PLAIN)))
    assert normalize(text) == text
    for before in "aeIO\u03b1\u1100\u0928\u09c7\u0bc6\u304b":
        spread = before + before.join(text)
        assert normalize(spread) == spread
