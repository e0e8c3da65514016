"""Rows under every noise schedule and padding policy: the same in each layout, resumable, exact."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from unit.token_lists import (
    OPTIONS,
    PAD_ID,
    TokenList,
    make_loader,
    pack,
    random_documents,
    same,
)

from megatron_sdar.data.loading import grouped_stream
from megatron_sdar.data.loading.blend import BlendSchedule
from megatron_sdar.data.loading.documents import DocumentStore
from megatron_sdar.data.loading.loader import RowLoader
from megatron_sdar.data.loading.row_options import RowOptions
from megatron_sdar.diffusion.rows import Row

EXACT = replace(OPTIONS, semantics="exact")
CHANGES: dict[str, dict[str, object]] = {
    "per block": {"noise_level_per": "block"},
    "stratified": {"noise_sampling": "stratified"},
    "all": {
        "noise_level_per": "block", "noise_sampling": "stratified", "loss_weight": "flat",
        "noise_eps": 0.2, "noise_high": 0.9, "block_padding_labels": "first",
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_stream, "GROUP_ROWS", 6)


def targets(rows: list[Row]) -> Counter[tuple[int, int, float]]:
    """(token, its place in the document, weight) of every masked token."""
    return Counter(
        (int(target), int(row.position_ids[place]), float(weight))
        for row in rows
        for place, target, weight in zip(
            row.loss_positions, row.target_ids, row.loss_weights, strict=True
        )
    )


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_exact_epoch_masks_what_the_published_rows_mask(change: dict[str, object]) -> None:
    published = make_loader(options=replace(OPTIONS, **change))
    exact = make_loader(options=replace(EXACT, **change))
    whole = [published.stream.row_at(place) for place in range(published.num_rows)]
    assert exact.grouped is not None
    less = [exact.grouped.row_at(i) for i in range(round(exact.count_rows(1)))]
    assert targets(less) == targets(whole)
    assert targets(less) != targets(
        [make_loader().stream.row_at(place) for place in range(published.num_rows)]
    )
    assert sum(row.num_label_tokens for row in less) == sum(row.num_label_tokens for row in whole)


@pytest.mark.parametrize("semantics", ["exact", "paper"])
def test_ranks_workers_and_a_resume_give_the_rows_of_one_process(semantics: str) -> None:
    options = replace(OPTIONS, semantics=semantics, **CHANGES["all"])
    straight = make_loader(options=options)
    steps = [straight.next_step() for _ in range(11)]
    assert straight.epoch > 1.2
    shares = [
        make_loader(options=options, num_micro_batches=2, dp_rank=rank, dp_size=2)
        for rank in range(2)
    ]
    for expected in steps[:4]:
        one, two = (loader.next_step() for loader in shares)
        dealt = [one[0], two[0], one[1], two[1]]
        assert all(same(a, b) for a, b in zip(expected, dealt, strict=True))
    state = json.loads(json.dumps(shares[1].state_dict()))
    resumed = make_loader(options=options, num_workers=2)
    resumed.load_state_dict(state)
    for expected in steps[4:]:
        found = resumed.next_step()
        assert all(same(a, b) for a, b in zip(expected, found, strict=True))
    resumed.close()


def test_documents_of_a_step_have_stratified_levels() -> None:
    """Published rows: a step holds documents that follow each other in the epoch."""

    def widest_gap(options: RowOptions) -> float:
        """Widest gap between t of a step's documents, in units of an even spread's, mean."""
        loader, gaps = make_loader(options=options), []
        for step in range(loader.num_rows // 4):
            rows = [loader.stream.row_at(4 * step + i) for i in range(4)]
            p = np.unique(np.concatenate([1 / row.loss_weights for row in rows]))
            gaps.append(np.diff([*p, p[0] + 1]).max() * p.size)
        return float(np.mean(gaps))

    # Documents without a masked token do not show: a gap may be missing one point.
    assert widest_gap(replace(OPTIONS, noise_sampling="stratified")) < 2.2
    assert widest_gap(OPTIONS) > 2.4


def test_datasets_of_a_blend_run_through_strata_of_their_own() -> None:
    store = DocumentStore([random_documents(40, name="a"), random_documents(30, name="b")])
    stores = [store.select(np.arange(*span)) for span in ((0, 40), (40, 70))]
    options = replace(OPTIONS, noise_sampling="stratified", semantics="exact")
    loaders = [
        RowLoader(
            stores, [pack(each) for each in stores], replace(options, semantics=semantics),
            rows_per_micro_batch=1, num_micro_batches=1, dp_rank=0, dp_size=1,
            schedule=BlendSchedule([(0, [0.5, 0.5])]), repack=False,
        )
        for semantics in ("exact", "paper")
    ]  # fmt: skip
    for _ in range(20):
        (exact,), (paper,) = (loader.next_step() for loader in loaders)
        assert targets([exact]) == targets([paper])
    stream = loaders[1].stream
    counts = [stream.documents_before(part, 5) for part in (0, 1)]
    sizes = [
        [len(index.row(stream.row_of(part, i)[1])) for i in range(5)]
        for part, index in enumerate(part.index for part in stream.parts)
    ]
    assert counts == [sum(each) for each in sizes]
    assert stream.documents_before(0, len(stream.parts[0].index)) == 0, "a new epoch"


@pytest.mark.parametrize(("policy", "trained"), [("learn", 3), ("first", 1), ("ignore", 0)])
def test_pads_that_are_not_trained_are_never_masked_nor_counted(policy: str, trained: int) -> None:
    dataset = TokenList([[3, 6]] * 30)  # 9 tokens: 3 pads in the last block
    for options in (OPTIONS, EXACT):
        loader = make_loader(dataset, replace(options, block_padding_labels=policy))
        rows = [row for _ in range(2) for row in loader.next_step()]
        places = Counter(
            int(row.position_ids[place]) for row in rows for place in row.loss_positions
        )
        assert {place for place in places if place >= 9} == set(range(9, 9 + trained))
        masked = [target for row in rows for target in row.target_ids.tolist()]
        assert (PAD_ID in masked) == (trained > 0)
        assert sum(row.num_label_tokens for row in rows) % (6 + trained) == 0


def test_a_checkpoint_of_before_these_options_is_resumed_and_another_schedule_refused() -> None:
    loader = make_loader(options=EXACT)
    loader.next_step()
    state = json.loads(json.dumps(loader.state_dict()))
    for key in ("noise_high", "noise_level_per", "noise_sampling", "loss_weight",
                "block_padding_labels", "block_lengths"):  # fmt: skip
        del state["stream"][key]
    resumed = make_loader(options=EXACT)
    resumed.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(loader.next_step(), resumed.next_step(), strict=True))
    other = make_loader(options=replace(EXACT, noise_level_per="block"))
    with pytest.raises(ValueError, match=r"noise_level_per was 'document', now 'block'"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"loss_weight was 'inverse_p', now 'flat'"):
        make_loader(options=replace(EXACT, loss_weight="flat")).load_state_dict(state)
