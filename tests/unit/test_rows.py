"""Rows: what stands where, which tokens carry loss, and with what weight."""

from __future__ import annotations

import numpy as np
import pytest
from unit.packings import MASK_ID, PAD_ID, Packing, pack, random_document, random_packing

from megatron_sdar.diffusion.noise import NoiseDraw
from megatron_sdar.diffusion.rows import (
    RowDocument,
    View,
    build_row,
    concatenate_rows,
    full_copies,
)

BLOCK = 4


def _document() -> RowDocument:
    """Eight tokens, three of prompt, two masked with p = 0.5."""
    ids = np.arange(11, 19, dtype=np.int32)
    labels = ids.copy()
    labels[:3] = -100
    masked = np.zeros(8, dtype=bool)
    masked[[3, 6]] = True
    return full_copies(ids, labels, BLOCK, NoiseDraw(0.5, masked))


def test_the_published_form_of_one_document() -> None:
    row = build_row([_document()], 18, BLOCK, MASK_ID, PAD_ID)
    clean, noisy = list(range(11, 19)), [11, 12, 13, MASK_ID, 15, 16, MASK_ID, 18]
    assert row.input_ids.tolist() == [*clean, *noisy, PAD_ID, PAD_ID]
    assert row.position_ids.tolist() == [*range(8), *range(8), 0, 0]
    assert row.segment_starts.tolist() == [0, 8, 16]
    assert row.loss_positions.tolist() == [8 + 3, 8 + 6]
    assert row.target_ids.tolist() == [14, 17]
    assert row.loss_weights.tolist() == [2.0, 2.0]
    assert row.num_label_tokens == 5
    assert row.num_padding == 2
    assert row.num_tokens == 18
    assert row.key_intervals.tolist() == [
        *[[0, 4, 0, 0]] * 4,
        *[[0, 8, 0, 0]] * 4,
        *[[0, 0, 8, 12]] * 4,
        *[[0, 4, 12, 16]] * 4,
        [16, 16, 16, 17],
        [16, 16, 17, 18],
    ]


def test_arrays_have_the_documented_types() -> None:
    row = build_row([_document()], 18, BLOCK, MASK_ID, PAD_ID)
    for name in ("input_ids", "position_ids", "segment_starts", "loss_positions", "target_ids"):
        assert getattr(row, name).dtype == np.int64, name
    assert row.key_intervals.dtype == np.int32
    assert row.loss_weights.dtype == np.float64


@pytest.fixture(params=range(12))
def packing(request: pytest.FixtureRequest) -> Packing:
    return random_packing(500 + request.param, (1, 2, 4, 8)[request.param % 4])


def _sources(packing: Packing) -> list[int]:
    """Position in its document of every token that is not padding."""
    counts: dict[object, int] = {}
    places = []
    for token in packing.tokens:
        if token.copy != "padding":
            counts[token] = counts.get(token, -1) + 1
            places.append(token.block * packing.block_length + counts[token])
    return places


def test_every_token_is_its_documents_or_the_mask(packing: Packing) -> None:
    row = packing.row
    for place, source in enumerate(_sources(packing)):
        token = packing.tokens[place]
        document = packing.documents[token.document]
        hidden = token.copy == "noisy" and document.views[token.view].noise.masked[source]
        assert row.input_ids[place] == (MASK_ID if hidden else document.ids[source])
        assert row.position_ids[place] == source


def test_loss_is_at_every_masked_token_of_a_kept_block_and_nowhere_else(packing: Packing) -> None:
    row, expected = packing.row, {}
    for place, source in enumerate(_sources(packing)):
        token = packing.tokens[place]
        if token.copy == "noisy":
            document = packing.documents[token.document]
            noise = document.views[token.view].noise
            if noise.masked[source]:
                expected[place] = (int(document.ids[source]), 1.0 / noise.mask_prob)
    found = zip(row.target_ids.tolist(), row.loss_weights.tolist(), strict=True)
    assert dict(zip(row.loss_positions.tolist(), found, strict=True)) == expected
    assert len(row.loss_positions) == len(expected)


def test_the_denominator_counts_labels_masked_or_not_and_dropped_blocks_too(
    packing: Packing,
) -> None:
    expected = sum(
        len(document.views) * int((document.labels != -100).sum()) for document in packing.documents
    )
    assert packing.row.num_label_tokens == expected


def test_padding_is_counted_and_carries_nothing(packing: Packing) -> None:
    row = packing.row
    assert row.num_padding == sum(token.copy == "padding" for token in packing.tokens)
    tail = slice(row.num_tokens - row.num_padding, None)
    assert (row.input_ids[tail] == PAD_ID).all()
    assert not (row.loss_positions >= row.num_tokens - row.num_padding).any()


def test_segments_start_where_copies_do(packing: Packing) -> None:
    tokens = packing.tokens
    kinds = [(token.document, token.copy, token.view) for token in tokens]
    starts = [i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
    assert packing.row.segment_starts.tolist() == starts


def test_a_documents_content_does_not_depend_on_its_neighbours() -> None:
    rng = np.random.default_rng(0)
    first, second = (random_document(rng, BLOCK, 4, drop=True) for _ in range(2))
    alone, together = pack([second], BLOCK, 0), pack([first, second], BLOCK, 3)
    mine = [place for place, token in enumerate(together.tokens) if token.document == 1]
    for name in ("input_ids", "position_ids"):
        left, right = getattr(together.row, name)[mine], getattr(alone.row, name)
        assert np.array_equal(left, right), name
    count = alone.row.target_ids.size
    assert count > 0
    for name in ("target_ids", "loss_weights"):
        left, right = getattr(together.row, name)[-count:], getattr(alone.row, name)
        assert np.array_equal(left, right), name


def plain_intervals(packing: Packing) -> list[list[int]]:
    """Key intervals token by token, from where each copy and block begins."""
    first: dict[tuple[int, str, int, int], int] = {}
    for place, token in enumerate(packing.tokens):
        first.setdefault((token.document, token.copy, token.view, token.block), place)
    starts: dict[int, int] = {}
    length, intervals = packing.block_length, []
    clean_end = 0
    for number, document in enumerate(packing.documents):
        starts[number] = clean_end
        clean_end += document.num_clean_blocks * length
    for place, token in enumerate(packing.tokens):
        if token.copy == "padding":
            end = len(packing.tokens) - packing.row.num_padding
            intervals.append([end, end, place, place + 1])
            continue
        start = starts[token.document]
        if token.copy == "clean":
            intervals.append([start, start + (token.block + 1) * length, 0, 0])
        else:
            own = first[token.document, "noisy", token.view, token.block]
            intervals.append([start, start + token.block * length, own, own + length])
    return intervals


def test_key_intervals_are_those_of_each_token_alone(packing: Packing) -> None:
    assert packing.row.key_intervals.tolist() == plain_intervals(packing)


def test_a_row_without_documents_is_padding() -> None:
    row = build_row([], 6, BLOCK, MASK_ID, PAD_ID)
    assert row.input_ids.tolist() == [PAD_ID] * 6
    assert row.segment_starts.tolist() == [0]
    assert row.num_padding == 6
    assert row.key_intervals.tolist() == [[0, 0, i, i + 1] for i in range(6)]


def test_concatenated_rows_keep_their_content_and_move_their_places() -> None:
    packings = [random_packing(seed, BLOCK) for seed in (1, 2, 3)]
    rows = [packing.row for packing in packings]
    joined = concatenate_rows(rows)
    start = 0
    for row in rows:
        span = slice(start, start + row.num_tokens)
        assert np.array_equal(joined.input_ids[span], row.input_ids)
        assert np.array_equal(joined.position_ids[span], row.position_ids)
        assert np.array_equal(joined.key_intervals[span] - start, row.key_intervals)
        start += row.num_tokens
    assert joined.num_tokens == start
    assert joined.key_intervals.dtype == np.int32
    assert joined.num_label_tokens == sum(row.num_label_tokens for row in rows)
    assert joined.num_padding == sum(row.num_padding for row in rows)
    for name in ("target_ids", "loss_weights"):
        parts = [getattr(row, name) for row in rows]
        assert np.array_equal(getattr(joined, name), np.concatenate(parts)), name
    assert (joined.input_ids[joined.loss_positions] == MASK_ID).all()
    assert joined.segment_starts.tolist() == sorted(set(joined.segment_starts.tolist()))


def test_one_row_concatenated_is_itself() -> None:
    row = random_packing(1, BLOCK).row
    joined = concatenate_rows([row])
    for name in ("input_ids", "key_intervals", "loss_positions", "segment_starts"):
        assert np.array_equal(getattr(joined, name), getattr(row, name)), name


def test_documents_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"need 16 tokens but the row holds 15.*build it again"):
        build_row([_document()], 15, BLOCK, MASK_ID, PAD_ID)


def test_a_noisy_block_without_its_clean_past_is_refused() -> None:
    document = _document()
    view = View(document.views[0].noise, np.array([1]))
    torn = RowDocument(document.ids, document.labels, 0, (view,))
    with pytest.raises(AssertionError, match="needs all clean blocks before it"):
        build_row([torn], 32, BLOCK, MASK_ID, PAD_ID)


def test_a_row_without_masked_tokens_has_no_loss_but_counts_its_labels() -> None:
    ids = np.arange(8, dtype=np.int32)
    silent = full_copies(ids, ids, BLOCK, NoiseDraw(0.1, np.zeros(8, dtype=bool)))
    row = build_row([silent], 16, BLOCK, MASK_ID, PAD_ID)
    assert row.loss_positions.size == row.target_ids.size == row.loss_weights.size == 0
    assert row.num_label_tokens == 8
