"""The fast encoder: the ids of `tokenizers`, or the text is handed back."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from megatron_sdar.data.demo import make_records, train_tokenizer
from megatron_sdar.data.tokenization import tokenizer as tokenizer_module
from megatron_sdar.data.tokenization.byte_level_bpe import SPLIT_CLASSES
from megatron_sdar.data.tokenization.fast_tokenizer import (
    FastEncoder,
    build_fast_encoder,
    check_texts,
    cross_check,
)
from megatron_sdar.data.tokenization.tokenizer import SdarTokenizer, load_tokenizer

SHARED = Path(__file__).parents[3] / "shared"
QWEN3 = SHARED / "tokenizer" / "qwen3"
GSM8K = SHARED / "data" / "gsm8k"
GPT2_SPLIT, QWEN_SPLIT, LLAMA3_SPLIT = SPLIT_CLASSES
ADDED = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>")
# Text that favours what splits and normal forms look at.
PARTS = st.one_of(
    st.sampled_from(
        [*ADDED, "<|MASK|>", "'s", "'LL", "\u017f", " ", "  ", "\n", "\r\n", "\t", "<"]
    ),
    st.sampled_from(
        ["\u0301", "\u0338", "\u0323", "\u1161", "\u09be", "\u212b", "e\u0301", "1234"]
    ),
    st.sampled_from(
        ["the ", " shop", "##", "\u4f60\u597d", "\U0001f600\u200d", "\x1e", "\x1e\x1f"]
    ),
    st.text(max_size=6),
)
TEXTS = st.lists(PARTS, max_size=12).map("".join)


def trained(split: str, normalize: bool = True) -> Tokenizer:
    """A byte-level BPE tokenizer of 600 ids that splits by SPLIT."""
    backend = Tokenizer(models.BPE())
    if normalize:
        backend.normalizer = normalizers.NFC()
    if split == GPT2_SPLIT:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    records = [f"{r['prompt']} I'll  \u00e9t\u00e9 {r['response']}" for r in make_records(50, 0)]
    backend.train_from_iterator(records, trainer)
    backend.add_special_tokens(list(ADDED[:3]))
    backend.add_tokens([AddedToken(token, normalized=False) for token in ADDED[3:]])
    return backend


@pytest.fixture(scope="module", params=[GPT2_SPLIT, QWEN_SPLIT, LLAMA3_SPLIT])
def pair(request) -> tuple[Tokenizer, FastEncoder]:
    backend = trained(request.param)
    fast = build_fast_encoder(backend)
    assert isinstance(fast, FastEncoder), fast
    return backend, fast


@pytest.fixture(scope="module")
def qwen3() -> SdarTokenizer:
    if not QWEN3.is_dir():
        pytest.skip("the Qwen3 tokenizer is not beside the repository")
    tokenizer = load_tokenizer(QWEN3)
    assert tokenizer.enable_fast().startswith("tokenizer: tiktoken (checked on ")
    return tokenizer


def plain(backend: Tokenizer, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


def small() -> SdarTokenizer:
    return SdarTokenizer(train_tokenizer(iter(["user assistant hello hello"])), "test")


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXTS, max_size=5))
@example(texts=["<|im_end|>\u0338", "e", "\u0301"])
@example(texts=["a\x1e", "\x1fb", "a\x1e\x1fb", ""])
def test_ids_equal_for_every_split(pair, texts):
    backend, fast = pair
    for text, ids in zip(texts, fast.encode(texts), strict=True):
        assert ids is None or ids.tolist() == plain(backend, text)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXTS, max_size=5))
def test_pieces_equal_with_qwen3(qwen3, texts):
    assert [ids.tolist() for ids in qwen3.encode_pieces(texts)] == qwen3.encode_batch(texts)


def test_every_gsm8k_string_with_qwen3(qwen3):
    if not GSM8K.is_dir():
        pytest.skip("GSM8K is not beside the repository")
    lines = [line for file in sorted(GSM8K.glob("*.jsonl")) for line in file.open()]
    texts = [text for line in lines for text in json.loads(line).values()]
    assert len(texts) > 14_000
    ids = qwen3.encode_pieces(texts)
    assert [part.tolist() for part in ids] == qwen3.encode_batch(texts)
    assert {part.dtype for part in ids} == {np.dtype(np.int32)}
    marked = [f"<|im_start|>user\n{text}<|im_end|>\n" for text in texts[:2000]]
    assert [part.tolist() for part in qwen3.encode_pieces(marked)] == qwen3.encode_batch(marked)


def every_place(code: int) -> str:
    """A text with one character wherever the splits look at its class."""
    char = chr(code)
    middle = f".{char}a 1{char}1 '{char} '{char}e '{char}l 'r{char}a{char}"
    return f"{middle}. {char}\n{char}{char}  {char}x"


@pytest.mark.parametrize(
    "step", [97, pytest.param(1, marks=pytest.mark.slow, id="every code point")]
)
def test_characters_that_are_taken_give_equal_ids(qwen3, step):
    backend = Tokenizer.from_file(str(QWEN3 / "tokenizer.json"))
    fast = build_fast_encoder(backend)
    taken = 0
    for start in range(0, 0x110000, 0x4000):
        texts = [every_place(code) for code in range(start + start % step, start + 0x4000, step)]
        pairs = [(t, i) for t, i in zip(texts, fast.encode(texts), strict=True) if i is not None]
        expected = backend.encode_batch_fast([t for t, _ in pairs], add_special_tokens=False)
        assert [ids.tolist() for _, ids in pairs] == [encoding.ids for encoding in expected]
        taken += len(pairs)
    assert taken > 80_000 // step


@pytest.mark.parametrize("unit", ["a", "^", " ", "\n", " \n", "1", "ab ", "\u4e2d", "\u0301"])
def test_long_runs_end_and_are_equal(qwen3, unit):
    text = (unit * 200_000)[:200_000] + "x"
    assert [i.tolist() for i in qwen3.encode_pieces(["a", text])] == qwen3.encode_batch(["a", text])


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("plain", True),
        ("\u00e9t\u00e9 \u4f60\u597d \U0001f600", True),
        ("\u0915\u093f \u0e19\u0e49", True),  # marks that are NFC as they stand
        ("e\u0301", False),
        ("<think>\u0338", False),  # NFC must not join the mark to the token
        ("\u212b", False),
        ("\u0378", False),  # no character
        ("\U00020000", False),  # a plane that was not compared
        ("a\x1e\x1fb", False),  # holds the separator
        ("\x1e", True),
    ],
)
def test_which_texts_are_taken(pair, text, taken):
    backend, fast = pair
    before, ids, after = fast.encode(["a<think>", text, "b"])
    assert (ids is not None) == taken
    assert before.tolist() == plain(backend, "a<think>")
    assert after.tolist() == plain(backend, "b")
    if taken:
        assert ids.tolist() == plain(backend, text)


def test_text_that_composes_is_taken_where_nothing_normalises():
    backend = trained(QWEN_SPLIT, normalize=False)
    fast = build_fast_encoder(backend)
    (ids,) = fast.encode(["e\u0301\u212b"])
    assert ids.tolist() == plain(backend, "e\u0301\u212b")


def test_separator_and_refused_texts_reach_tokenizers():
    tokenizer = small()
    texts = ["hello", "e\u0301", "\x1e\x1f", "hello", "", "x\x1e\x1f\x1e\x1fy<|im_end|>"]
    expected = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in tokenizer.encode_pieces(texts)] == expected
    assert tokenizer.enable_fast(texts).startswith("tokenizer: tiktoken (checked on ")
    pieces = tokenizer.encode_pieces(texts)
    assert [ids.tolist() for ids in pieces] == expected
    assert all(ids.dtype == np.int32 for ids in pieces)
    assert tokenizer.encode_pieces([]) == []


def test_white_space_that_the_engine_has_no_stack_for_is_handed_back(qwen3):
    fast = build_fast_encoder(Tokenizer.from_file(str(QWEN3 / "tokenizer.json")))
    text = " " * 1_000_000
    results = fast.encode(["a", text, "b", "c"])
    assert [ids is None for ids in results] == [False, True, False, False]
    assert qwen3.encode_pieces([text])[0].tolist() == qwen3.encode(text)


def test_large_batches_are_cut_by_characters(pair, monkeypatch):
    backend, fast = pair
    texts = ["the shop " * 3, "a", "b<think>" * 5, "", "c", "d" * 20, "e"]
    batches = []
    encode_batch = FastEncoder._encode_batch
    monkeypatch.setattr("megatron_sdar.data.tokenization.fast_tokenizer._BATCH_CHARACTERS", 20)
    monkeypatch.setattr(
        FastEncoder,
        "_encode_batch",
        lambda self, texts: batches.append(len(texts)) or encode_batch(self, texts),
    )
    assert [ids.tolist() for ids in fast.encode(texts)] == [plain(backend, t) for t in texts]
    assert batches == [1, 2, 3, 1]


def test_check_counts_its_strings_and_reports_the_first_difference(monkeypatch):
    tokenizer = small()
    samples = ["one", "two"]
    added = [
        token.content for token in train_tokenizer(iter(["a"])).get_added_tokens_decoder().values()
    ]
    count = len(check_texts(added)) + len(samples)
    assert tokenizer.enable_fast(samples) == f"tokenizer: tiktoken (checked on {count} strings)"
    other = build_fast_encoder(train_tokenizer(iter(["shop shop shops"])))
    monkeypatch.setattr(tokenizer_module, "build_fast_encoder", lambda _: other)
    fresh = small()
    line = fresh.enable_fast(["hello"])
    assert line.startswith("tokenizer: tokenizers (first difference: ")
    assert [ids.tolist() for ids in fresh.encode_pieces(["hello"])] == [fresh.encode("hello")]


def test_cross_check_reaches_the_samples():
    backend = train_tokenizer(iter(["hello hello"]))
    fast = build_fast_encoder(train_tokenizer(iter(["shop shop"])))
    assert cross_check(fast, backend, ["42", "e\u0301"]) is None
    difference = cross_check(fast, backend, ["42", "hello"])
    assert difference.startswith("'hello' gives [")
    assert f"expected {plain(backend, 'hello')}" in difference


def test_a_copy_in_another_process_reads_no_tokenizer(monkeypatch):
    tokenizer = small()
    tokenizer.enable_fast()
    text = "hello <|im_end|>\u00e9"
    expected, fingerprint = tokenizer.encode(text), tokenizer.fingerprint()
    copy = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_module, "Tokenizer", None)
        assert copy.encode_pieces([text])[0].tolist() == expected
        assert copy.fingerprint() == fingerprint
    assert copy._loaded is None
    assert copy.encode(text) == expected
    assert copy.vocab_size == tokenizer.vocab_size
    assert pickle.loads(pickle.dumps(copy)).encode(text) == expected  # noqa: S301
