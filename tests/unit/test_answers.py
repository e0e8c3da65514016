"""What a generated text comes to, and which questions are asked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from unit.token_lists import MASK_ID, OPTIONS, TokenList, pack

from megatron_sdar.data.loading.documents import DocumentStore
from megatron_sdar.data.loading.row_stream import RowPart, RowStream
from megatron_sdar.training.answers import (
    Answer,
    Question,
    exact_match,
    extract_answer,
    questions,
)
from megatron_sdar.training.evaluation_data import EvaluationSet


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("He has 3 apples.\n#### 42", "42"),
        ("#### 1,234.50\nmore 7", "1234.5"),
        ("#### 5 then #### -0.0", "0"),
        ("#### $18", "18"),
        ("#### 70%", "70"),
        ("#### blue.", "blue"),
        ("#### 42 apples and 3 pears", "42"),
        ("#### $1,200 per month", "1200"),
        ("#### **$18**.", "18"),
        ("#### -$5", "-5"),
        ("#### 1/2", "1/2"),
        ("#### 10 + 5 pears", "10 + 5 pears"),
        ("#### Step 3: add\nso \\boxed{18}", "18"),
        ("#### 7\nor \\boxed{18}", "7"),
        (r"\boxed{\$1,800}", "1800"),
        (r"\boxed{18\%}", "18"),
        ("10-3", "3"),
        ("f(2)-1", "1"),
        ("10 - -3", "-3"),
        ("####", None),
        (r"so \boxed{\frac{1}{2}} and 3", r"\frac{1}{2}"),
        (r"first \boxed{1}, then \boxed{2,000}.", "2000"),
        (r"cut off \boxed{17", "17"),
        ("27 + 45 = 72.", "72"),
        ("it is -7", "-7"),
        ("costs 1,000,000 in all", "1000000"),
        ("a share of .5", "0.5"),
        ("no number", None),
        ("", None),
    ],
)
def test_extraction(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def answer(text: str, reference: str, name: str = "a") -> Answer:
    return Answer(Question(name, 0, (1,), (2,)), "prompt", text, reference)


def test_a_text_without_an_answer_never_matches() -> None:
    assert answer("the sum is 72", "#### 72.0").matches
    assert not answer("73", "72").matches
    assert not answer("", "").matches


def test_shares() -> None:
    answers = [answer("1", "1"), answer("1", "2"), answer("3", "3"), answer("4", "4", "b")]
    assert exact_match(answers, each_set=False) == {
        "eval_exact_match": 0.75,
        "eval_num_generated": 4.0,
    }
    apart = exact_match(answers, each_set=True)
    assert apart["eval_a_exact_match"] == pytest.approx(2 / 3)
    assert apart["eval_b_exact_match"] == 1.0


class Documents(TokenList):
    """With prompts that are trained, or ids of one's own."""

    def __init__(self, turns: Sequence[Sequence[int]]) -> None:
        super().__init__(turns)
        self.ids: dict[int, list[int]] = {}
        self.trains_prompts = False

    def get(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        ids, labels = super().get(index)
        ids = np.array(self.ids.get(index, ids), dtype=np.int32)
        return ids, ids if self.trains_prompts else np.where(labels < 0, labels, ids)


def evaluation_set(data: TokenList, pieces: int = 1) -> EvaluationSet:
    store = DocumentStore([data])
    items = tuple((number, piece) for number in range(len(data)) for piece in range(pieces))
    return EvaluationSet("a", RowStream([RowPart(store, pack(store))], OPTIONS), items)


def asked(data: TokenList, most: int = 9, longest: int = 99) -> list[tuple[int, int, int]]:
    found = list(questions(evaluation_set(data), most, longest))
    assert all(question.set_name == "a" for question in found)
    for question in found:
        ids, _ = data.get(question.document)
        assert list(question.prompt + question.reference) == ids.tolist()
    return [(each.document, len(each.prompt), len(each.reference)) for each in found]


def test_the_last_answer_of_a_document_is_asked_for() -> None:
    data = Documents([[3, 5], [10, 7, 2, 4], [0, 6]])
    everything = [(0, 3, 5), (1, 19, 4), (2, 0, 6)]
    assert asked(data) == everything
    data.trains_prompts = True
    assert asked(data) == everything, "a prompt that is trained is a prompt"
    assert asked(data, most=2) == everything[:2]
    assert asked(data, longest=18) == [everything[0], everything[2]]
    assert asked(data, longest=19) == everything
    twice = questions(evaluation_set(data, pieces=2), 9, 99)
    assert [each.document for each in twice] == [0, 1, 2], "of two pieces of one document"


def test_a_reference_is_never_cut() -> None:
    """Documents are cut to CUTOFF tokens for the loss only."""
    data = Documents([[100, 90]])
    each = evaluation_set(data)
    assert each.tokens((0, 0), 1)[0].size < 190
    assert asked(data, longest=100) == [(0, 100, 90)]


def test_what_cannot_be_asked_is_passed_over() -> None:
    data = Documents([[3, 5], [2, 4, 6, 0], [1, 1]])
    data.ids = {0: [1, MASK_ID, 2, 3, 4, 5, 6, 7]}
    assert asked(data) == [(2, 1, 1)], "a mask token in the prompt; no answer at the end"
    data.ids = {0: [1, 2, 3, 4, MASK_ID, 5, 6, 7]}
    assert asked(data) == [(0, 3, 5), (2, 1, 1)]
