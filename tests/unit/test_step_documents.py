"""The documents of the last step by name, and the state that gives its rows again."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from unit.token_lists import OPTIONS, TokenList, make_loader, pack, random_documents, same

from megatron_sdar.data.loading import grouped_stream
from megatron_sdar.data.loading.blend import BlendSchedule
from megatron_sdar.data.loading.documents import DocumentStore
from megatron_sdar.data.loading.loader import RowLoader

# Lengths are whole blocks, so that padding has no part in the counts below.
DATASETS = [
    TokenList((np.random.default_rng(seed).integers(1, 15, size=(count, 2)) * 4).tolist(), name)
    for seed, (name, count) in enumerate({"first": 60, "second": 25}.items())
]
BY_NAME = {dataset.prefix: dataset for dataset in DATASETS}


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_stream, "GROUP_ROWS", 6)


def blended(semantics: str, rank: int = 0, ranks: int = 1, **changes: Any) -> RowLoader:
    base = DocumentStore(DATASETS)
    stores = [base.select(base.ids_of(number)) for number in range(2)]
    return RowLoader(
        stores, [pack(store) for store in stores], replace(OPTIONS, semantics=semantics),
        rows_per_micro_batch=2, num_micro_batches=3, dp_rank=rank, dp_size=ranks,
        schedule=BlendSchedule([(0, [2.0, 1.0]), (20, [1.0, 3.0])]), **changes,
    )  # fmt: skip


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("semantics", ["paper", "exact"])
def test_names_belong_to_the_rows(semantics: str, prefetch: bool) -> None:
    loaders = [blended(semantics, rank, 2, prefetch=prefetch) for rank in range(2)]
    names: set[str] = set()
    for _ in range(5):
        steps = [loader.next_step() for loader in loaders]
        batches = loaders[1].last_step_documents()
        assert batches == loaders[0].last_step_documents(), "every rank knows all"
        assert len(batches) == 6
        for number, documents in enumerate(batches):
            row = steps[number % 2][number // 2]
            labels = [BY_NAME[name.dataset].get(name.document)[1] for name in documents]
            answers = np.concatenate(labels)
            assert np.count_nonzero(answers != -100) == row.num_label_tokens
            assert set(row.target_ids.tolist()) <= set(answers.tolist())
            names |= {name.dataset for name in documents}
    assert names == {"first", "second"}
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("semantics", ["paper", "exact"])
def test_the_state_gives_the_rows_again_in_any_dealing(semantics: str) -> None:
    whole, two = blended(semantics), blended(semantics, 1, 2)
    whole.num_micro_batches = 6
    for _ in range(4):
        rows = two.next_step()
    state = json.loads(json.dumps(two.last_step_state()))
    assert state["rows_taken"] == two.position - 12
    whole.load_state_dict(state)
    assert whole.epoch == pytest.approx(state["packed_rows_taken"] / whole.num_rows)
    for number, row in enumerate(rows):
        assert same(whole.micro_batch_at(state["rows_taken"], 2 * number + 1), row)
    again = whole.next_step()
    assert all(same(again[2 * number + 1], row) for number, row in enumerate(rows))
    assert whole.epoch == two.epoch


def test_of_a_document_that_was_split_the_piece_is_named() -> None:
    store = DocumentStore([TokenList([[0, 300], [0, 40]])])
    loader = RowLoader(
        store, pack(store, "split"), OPTIONS,
        rows_per_micro_batch=1, num_micro_batches=4, dp_rank=0, dp_size=1,
    )  # fmt: skip
    loader.next_step()
    found = {name for batch in loader.last_step_documents() for name in batch}
    assert {(name.document, name.piece) for name in found} == {(0, 0), (0, 1), (0, 2), (1, 0)}


def test_one_dataset_needs_no_blend() -> None:
    loader = make_loader(random_documents(10))
    loader.next_step()
    assert {name.dataset for batch in loader.last_step_documents() for name in batch} == {"data"}
