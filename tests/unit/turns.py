"""The turns of a document, piece by piece: what the builder's vectorised form must equal."""

from collections.abc import Sequence

from megatron_sdar.data.templates.template import Piece


def piece_turns(pieces: Sequence[Piece], lengths: Sequence[int]) -> list[int]:
    """[s1, t1, s2, t2, ...]: tokens of the prompt and of the answer of each pair.

    LENGTHS are the tokens of each piece. The system prompt counts with the first prompt.
    """
    turns = [0, 0]
    was_answer = False
    for piece, length in zip(pieces, lengths, strict=True):
        if piece.answer:
            turns[-1] += length
        elif was_answer:
            turns += (length, 0)
        else:
            turns[-2] += length
        was_answer = piece.answer
    return turns
