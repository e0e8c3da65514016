"""The published data path: the samples and rows that LLaMA-Factory was observed to make.

The data sets of the truncation vectors are not in the file; they are written out here as far as
the recorded rows show them (of a text that is always cut, only its beginning ever shows).
"""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.golden_sft import golden, require_golden, require_qwen3
from unit.turns import piece_turns

from megatron_sdar.data.loading.llamafactory import (
    greedy_knapsack,
    knapsack_indices,
    pack_like_llamafactory,
    packed_rows,
    supervised_sample,
)
from megatron_sdar.data.sources.conversations import Conversation, Turn
from megatron_sdar.data.templates.template import TemplateOptions, document_pieces
from megatron_sdar.data.tokenization.tokenizer import SdarTokenizer

PAD = 151643
IGNORED = -100
SETTINGS = {"truncate_mode": "cut", "packing": True, "block_length": 4, "pad_token_id": PAD}


@pytest.fixture(scope="module")
def qwen3() -> SdarTokenizer:
    return require_qwen3()


def conversation(*texts: str) -> Conversation:
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return Conversation(tuple(Turn("user", q, "assistant", a) for q, a in pairs))


def make_pairs(tokenizer: SdarTokenizer, document: Conversation) -> list[tuple[list, list]]:
    pieces = document_pieces(document, TemplateOptions())
    piece_ids = tokenizer.encode_pieces([piece.text for piece in pieces])
    turns = piece_turns(pieces, [len(ids) for ids in piece_ids])
    parts = np.split(np.concatenate(piece_ids), np.cumsum(turns)[:-1])
    return [(parts[i].tolist(), parts[i + 1].tolist()) for i in range(0, len(parts), 2)]


def truncation_data(tokenizer: SdarTokenizer, name: str) -> list[Conversation]:
    if name == "two_turns":
        return [conversation("one " * 10, "two " * 10, "three " * 10, "four " * 10)]
    if name == "long_question":
        return [conversation("long " * 200, "short answer")]
    assert name == "long_answer_plus_short"
    question, word = "Q", "word "
    for case in golden("truncation_cases"):
        for row in case.get("rows", []) if case["data"] == name else []:
            text = tokenizer.decode(row["input_ids"])
            found = re.match(
                r"<\|im_start\|>user\n(.*?)<\|im_end\|>.*</think>\n\n(\w+ )", text, re.S
            )
            if found:
                question, word = found.groups()
    return [conversation(question, word * 200), conversation("Q", "short")]


@pytest.mark.parametrize(
    "case", golden("truncation_cases"), ids=lambda it: "-".join(map(str, list(it.values())[:4]))
)
def test_golden_truncation(case, qwen3):
    cutoff_len, packing = case["cutoff_len"], case["neat_packing"]
    samples = [
        supervised_sample(
            make_pairs(qwen3, document),
            cutoff_len=cutoff_len,
            truncate_mode=case["truncate_mode"],
            packing=packing,
            block_length=4,
            pad_token_id=qwen3.pad_token_id,
        )
        for document in truncation_data(qwen3, case["data"])
    ]
    if packing:
        packed = packed_rows(samples, cutoff_len, pad_token_id=qwen3.pad_token_id)
        rows = [(row.input_ids, row.labels) for row in packed]
    else:
        rows = [sample for sample in samples if sample is not None]
    found = [
        {
            "len": len(ids),
            "n_label": int((labels != IGNORED).sum()),
            "input_ids": ids.tolist(),
            "labels": labels.tolist(),
        }
        for ids, labels in rows
    ]
    # Without a single row LLaMA-Factory stops with the recorded error.
    assert found == case.get("rows", [])
    assert bool(found) is ("error" not in case)


@pytest.mark.parametrize("case", golden("packing_cases"), ids=lambda case: str(case["lengths"]))
def test_golden_knapsacks(case):
    assert greedy_knapsack(case["lengths"], case["capacity"]) == case["knapsacks"]


def test_golden_packed_rows(qwen3):
    packed = require_golden()["packed"]
    samples = []
    for record in packed["data"]:
        texts = [message["content"] for message in record["messages"]]
        samples.append(
            supervised_sample(
                make_pairs(qwen3, conversation(*texts)),
                cutoff_len=64,
                truncate_mode="drop",
                packing=True,
                block_length=4,
                pad_token_id=qwen3.pad_token_id,
            )
        )
    assert [len(sample[0]) for sample in samples] == packed["sample_lengths_in_file_order"]
    rows = [
        {name: values.tolist() for name, values in row._asdict().items()}
        for row in packed_rows(samples, 64, pad_token_id=qwen3.pad_token_id)
    ]
    # The file holds rows from the front; the lengths of all samples give the count of the rest.
    assert rows[: len(packed["rows"])] == packed["rows"]
    assert len(rows) == len(greedy_knapsack(packed["sample_lengths_in_file_order"], 63))


# Samples


def sample(*turns: tuple[int, int], **changes) -> tuple[list[int], list[int]] | None:
    """supervised_sample of turns whose tokens count up from 0, as lists."""
    numbers = iter(range(10_000))
    pairs = [
        ([next(numbers) for _ in range(s)], [next(numbers) for _ in range(t)]) for s, t in turns
    ]
    found = supervised_sample(pairs, **{**SETTINGS, "cutoff_len": 65, **changes})
    return None if found is None else (found[0].tolist(), found[1].tolist())


def test_block_padding_is_trained():
    ids, labels = sample((3, 3))
    assert ids == [0, 1, 2, 3, 4, 5, PAD, PAD]
    assert labels == [IGNORED] * 3 + [3, 4, 5, PAD, PAD]


@pytest.mark.parametrize(
    ("cutoff_len", "packing", "length"),
    [(64, True, None), (64, False, 64), (65, True, 64), (65, False, None), (66, False, None)],
)
def test_a_sample_that_was_cut_is_dropped_for_its_padding(cutoff_len, packing, length):
    found = sample((30, 90), cutoff_len=cutoff_len, packing=packing)
    assert (found and len(found[0])) == length


def test_turns_after_the_room_is_used_up_vanish():
    for mode in ("cut", "drop"):
        ids, _ = sample((30, 34), (5, 5), truncate_mode=mode)
        assert ids == list(range(64))
    assert sample((30, 33), (5, 5), truncate_mode="drop") is None


def test_mask_history_gives_room_from_the_end_and_labels_there():
    ids, labels = sample((20, 20), (20, 20), mask_history=True)
    assert ids == [*range(12), *range(20, 32), *range(40, 80)]
    assert labels == [IGNORED] * 44 + list(range(60, 80))
    # In the order of the turns, the first is whole and the last is cut.
    ids, labels = sample((20, 20), (20, 20))
    assert ids == [*range(40), *range(40, 52), *range(60, 72)]
    assert labels == [IGNORED] * 20 + list(range(20, 40)) + [IGNORED] * 12 + list(range(60, 72))


def test_train_on_prompt_labels_everything():
    ids, labels = sample((3, 2), (1, 1), train_on_prompt=True)
    assert ids == labels == [*range(7), PAD]


def test_unknown_truncate_mode_is_refused():
    with pytest.raises(ValueError, match="truncate_mode must be 'cut' or 'drop', got 'split'"):
        sample((1, 1), truncate_mode="split")


# Packing


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(30, 60))
def test_knapsacks_are_the_published_loop(lengths, capacity):
    left = sorted(lengths)
    expected = []
    while left:
        sack: list[int] = []
        while fitting := [n for n in left if n <= capacity - sum(sack)]:
            sack.append(max(fitting))
            left.remove(max(fitting))
        expected.append(sack)
    assert greedy_knapsack(lengths, capacity) == expected
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(length, []).append(index)
    # The published code takes the samples of a length off the end of their list.
    assert knapsack_indices(lengths, capacity) == [
        [by_length[length].pop() for length in sack] for sack in expected
    ]


@pytest.mark.parametrize("lengths", [[5, 11], [0, 5], [-1]])
def test_lengths_that_no_sack_holds_are_refused(lengths):
    with pytest.raises(ValueError, match=r"lengths must be in 1\.\.10 .*, got "):
        greedy_knapsack(lengths, 10)


def rows_of(lengths: list[int], cutoff_len: int, **options) -> list[list[int]]:
    offsets, ids = pack_like_llamafactory(lengths, cutoff_len, **options)
    assert offsets.dtype == ids.dtype == np.int64
    return [part.tolist() for part in np.split(ids, offsets[1:-1])]


def test_one_position_stays_free():
    assert rows_of([4, 4], 8) == [[1], [0]]
    assert rows_of([4, 4], 9) == [[1, 0]]


def test_each_batch_is_packed_apart_and_dropped_samples_take_a_place():
    assert rows_of([4, 8, 4, 4, 4], 13, batch_size=3) == [[1, 2], [0], [4, 3]]
    assert rows_of([4, 0, 4, 4, 4], 13, batch_size=3) == [[2, 0], [4, 3]]


@pytest.mark.parametrize(
    ("num_workers", "rows"),
    [
        (1, [[6, 5, 4], [3, 2, 1], [0]]),
        (2, [[3, 2, 1], [0], [6, 5, 4]]),
        (3, [[2, 1, 0], [4, 3], [6, 5]]),
        (7, [[0], [1], [2], [3], [4], [5], [6]]),
        (96, [[0], [1], [2], [3], [4], [5], [6]]),
    ],
)
def test_workers_take_contiguous_shares(num_workers, rows):
    assert rows_of([4] * 7, 13, num_workers=num_workers) == rows


def test_nothing_to_pack_makes_no_row():
    for lengths in ([], [0, 0]):
        offsets, ids = pack_like_llamafactory(lengths, 64, num_workers=4)
        assert (offsets.tolist(), ids.tolist()) == ([0], [])
    assert packed_rows([None], 64, pad_token_id=PAD) == []


@pytest.mark.parametrize("sizes", [{"num_workers": 0}, {"batch_size": 0}])
def test_bad_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="preprocessing_batch_size must be at least 1, got "):
        pack_like_llamafactory([4], 64, **sizes)


def test_rows_without_neat_packing_have_one_mask():
    samples = [(np.arange(4, dtype=np.int32), np.arange(4, dtype=np.int32))] * 2
    (row,) = packed_rows(samples, 12, pad_token_id=9, neat_packing=False)
    assert row.attention_mask.tolist() == [1] * 12
    assert row.position_ids.tolist() == [0, 1, 2, 3] * 2 + [0] * 4
    assert row.labels.tolist() == [0, 1, 2, 3] * 2 + [IGNORED] * 4
    (row,) = packed_rows(samples, 12, pad_token_id=9)
    assert row.attention_mask.tolist() == [1] * 4 + [2] * 4 + [0] * 4
    assert row.input_ids.tolist() == [0, 1, 2, 3] * 2 + [9] * 4
