"""The vectorised turns of a build against the plain form, on documents of any pieces."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.turns import piece_turns

from megatron_sdar.data.building.part import _turns
from megatron_sdar.data.templates.template import Piece

PIECES = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=6)


@given(documents=st.lists(PIECES, min_size=1, max_size=5))
@settings(max_examples=300, deadline=None)
def test_turns_of_a_chunk_are_those_of_its_documents(documents):
    expected = [
        piece_turns([Piece("", False, answer) for _, answer in pieces], [n for n, _ in pieces])
        for pieces in documents
    ]
    flat = [piece for pieces in documents for piece in pieces]
    starts = np.cumsum([0] + [len(pieces) for pieces in documents[:-1]])
    turns, counts = _turns(
        np.array([size for size, _ in flat]), np.array([answer for _, answer in flat]), starts
    )
    assert counts.tolist() == [len(each) for each in expected]
    assert turns.tolist() == [length for each in expected for length in each]
