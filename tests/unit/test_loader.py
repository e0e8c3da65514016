"""The row stream: prefix-stable, layout-independent, exactly resumable."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_sdar.data.builder import build_dataset
from megatron_sdar.data.loader import DocumentStore, RowLoader, RowOptions
from megatron_sdar.data.packing import pack_documents
from megatron_sdar.data.sources import dataset_from_file
from megatron_sdar.data.template import TemplateOptions
from megatron_sdar.data.tokenizer import load_tokenizer
from megatron_sdar.data.tokens import TokenizedDataset
from megatron_sdar.diffusion.noise import epoch_order
from megatron_sdar.diffusion.rows import IGNORED_LABEL, Row
from tools import make_demo_data

CUTOFF, BLOCK = 128, 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenizedDataset:
    directory = tmp_path_factory.mktemp("demo")
    make_demo_data.main(["--output-dir", str(directory), "--num-documents", "60"])
    build_dataset(
        [dataset_from_file(directory / "train.jsonl")],
        directory / "tokens",
        load_tokenizer(directory / "model"),
        TemplateOptions(),
        progress=False,
    )
    return TokenizedDataset(directory / "tokens")


def make_loader(dataset: TokenizedDataset, **changes: object) -> RowLoader:
    store = DocumentStore([dataset])
    index = pack_documents(store.lengths, CUTOFF, BLOCK, truncate_mode="drop")
    settings = {"rows_per_micro_batch": 1, "num_micro_batches": 4, "dp_rank": 0, "dp_size": 1}
    settings.update(changes)
    meta = dataset.metadata
    options = RowOptions(CUTOFF, BLOCK, meta.mask_token_id, meta.pad_token_id, 1e-3, seed=3)
    return RowLoader(store, index, options, **settings)


def same(a: Row, b: Row) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in vars(a))


def test_order_is_a_permutation_that_other_epochs_do_not_change() -> None:
    orders = [epoch_order(50, 3, epoch) for epoch in range(4)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(50))
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], epoch_order(50, 4, 0))


def test_every_epoch_holds_every_row_once(dataset: TokenizedDataset) -> None:
    loader = make_loader(dataset)
    rows = loader.num_rows
    for epoch in range(2):
        taken = [int(loader._order(epoch)[place]) for place in range(rows)]
        assert sorted(taken) == list(range(rows))


def test_data_parallel_ranks_split_the_same_global_batch(dataset: TokenizedDataset) -> None:
    whole = make_loader(dataset).next_step()
    split: dict[int, list[Row]] = {
        rank: make_loader(dataset, num_micro_batches=2, dp_rank=rank, dp_size=2).next_step()
        for rank in range(2)
    }
    dealt = [split[rank][micro] for micro in range(2) for rank in range(2)]
    assert all(same(a, b) for a, b in zip(whole, dealt, strict=True))


def test_rows_per_micro_batch_only_regroups(dataset: TokenizedDataset) -> None:
    singles = make_loader(dataset).next_step()
    pairs = make_loader(dataset, rows_per_micro_batch=2, num_micro_batches=2).next_step()
    for group, pair in enumerate(pairs):
        ids = np.concatenate([row.input_ids for row in singles[2 * group : 2 * group + 2]])
        assert np.array_equal(pair.input_ids, ids)
        labels = [row.num_label_tokens for row in singles[2 * group : 2 * group + 2]]
        assert pair.num_label_tokens == sum(labels)


@pytest.mark.parametrize("prefetch", [False, True])
def test_resume_continues_bitwise(dataset: TokenizedDataset, prefetch: bool) -> None:
    straight = make_loader(dataset, prefetch=prefetch)
    steps = [straight.next_step() for _ in range(12)]
    stopped = make_loader(dataset, prefetch=prefetch)
    for _ in range(5):
        stopped.next_step()
    resumed = make_loader(dataset, prefetch=prefetch)
    resumed.load_state_dict(stopped.state_dict())
    for expected in steps[5:]:
        assert all(same(a, b) for a, b in zip(expected, resumed.next_step(), strict=True))
    assert resumed.epoch == straight.epoch > 1, "the test must cross an epoch border"
    for loader in (straight, stopped, resumed):
        loader.close()


def test_noise_changes_between_epochs_but_not_between_packings(
    dataset: TokenizedDataset,
) -> None:
    loader = make_loader(dataset)
    document = np.array([5])
    alone, again = loader.make_row(document, 0), loader.make_row(document, 0)
    assert same(alone, again)
    assert not same(alone, loader.make_row(document, 1))
    together = loader.make_row(np.array([4, 5]), 0)
    masked_alone = set(
        zip(alone.position_ids[alone.loss_positions].tolist(), alone.target_ids, strict=True)
    )
    masked_together = set(
        zip(
            together.position_ids[together.loss_positions].tolist(),
            together.target_ids,
            strict=True,
        )
    )
    assert masked_alone <= masked_together


def test_documents_longer_than_a_row_are_cut_at_the_right(dataset: TokenizedDataset) -> None:
    store = DocumentStore([dataset])
    meta = dataset.metadata
    index = pack_documents(store.lengths, 32, BLOCK, truncate_mode="cut")
    assert index.num_cut > 0
    options = RowOptions(32, BLOCK, meta.mask_token_id, meta.pad_token_id, 1e-3, seed=3)
    loader = RowLoader(
        store, index, options, rows_per_micro_batch=1, num_micro_batches=1, dp_rank=0, dp_size=1
    )
    longest = int(np.argmax(store.lengths))
    ids, labels = store.get(longest)
    row = loader.make_row(np.array([longest]), 0)
    assert np.array_equal(row.input_ids[:32], ids[:32])
    assert row.num_label_tokens == int((labels[:32] != IGNORED_LABEL).sum())


def test_store_numbers_documents_through_and_refuses_mixed_tokenizers(
    dataset: TokenizedDataset,
) -> None:
    store = DocumentStore([dataset, dataset])
    assert store.lengths.size == 2 * len(dataset)
    assert np.array_equal(store.get(len(dataset) + 3)[0], dataset.get(3)[0])
    other = TokenizedDataset(dataset.prefix)
    other.metadata = replace(other.metadata, mask_token_id=other.metadata.mask_token_id + 1)
    with pytest.raises(ValueError, match=r"mask_token_id is .* one tokenizer"):
        DocumentStore([dataset, other])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 4}, "seed was 3, now 4"),
        ({"noise_eps": 0.01}, "noise_eps was 0.001, now 0.01"),
        ({"shuffle": False}, "shuffle was True, now False"),
    ],
)
def test_resume_on_another_stream_is_refused(
    dataset: TokenizedDataset, changes: dict[str, object], named: str
) -> None:
    stopped = make_loader(dataset)
    stopped.next_step()
    state = json.loads(json.dumps(stopped.state_dict()))
    other = make_loader(dataset)
    other.options = replace(other.options, **changes)
    with pytest.raises(ValueError, match=f"cannot resume: .*{named}"):
        other.load_state_dict(state)
    repacked = make_loader(dataset)
    repacked.index = replace(repacked.index, doc_ids=repacked.index.doc_ids[::-1].copy())
    with pytest.raises(ValueError, match=r"cannot resume: .*packing was"):
        repacked.load_state_dict(state)
    wider = make_loader(dataset, num_micro_batches=2, dp_size=2)
    wider.load_state_dict(state)
    assert wider.position == stopped.position, "another data-parallel size goes on"
