"""Truncation of a document that is too long: which tokens of each turn stay.

Owns LLaMA-Factory's rule for dividing room between prompt and answer. Both sides are cut from
the right, a turn at a time, so that what stays of a turn begins where the turn began and the
kept ranges never overlap; together they hold at most the limit.
"""

from collections.abc import Sequence


def infer_seqlen(source_len: int, target_len: int, cutoff_len: int) -> tuple[int, int]:
    """(prompt tokens, answer tokens) that stay of a turn, together at most CUTOFF_LEN.

    The side that takes less than half of the room stays whole; two long sides are cut in
    proportion.
    """
    if target_len * 2 < cutoff_len:
        max_target_len = cutoff_len
    elif source_len * 2 < cutoff_len:
        max_target_len = cutoff_len - source_len
    else:
        # In floating point as published: exact arithmetic would differ by a token at times.
        max_target_len = int(cutoff_len * (target_len / (source_len + target_len)))
    new_target_len = min(max_target_len, target_len)
    return min(max(cutoff_len - new_target_len, 0), source_len), new_target_len


def cut_turns(turns: Sequence[int], limit: int, mask_history: bool) -> list[tuple[int, int]]:
    """Ranges [start, stop) of the tokens that stay of a document, ascending, LIMIT at most.

    TURNS are the lengths [s1, t1, s2, t2, ...] of the prompts and answers, end to end. Turns get
    room in order, or from the last one back with MASK_HISTORY, since only the last is trained.
    Touching ranges are joined and empty ones left out.
    """
    starts = [0]
    for length in turns:
        starts.append(starts[-1] + int(length))
    kept: list[tuple[int, int]] = []
    total = 0
    order = range(0, len(turns), 2)
    for index in reversed(order) if mask_history else order:
        if total >= limit:
            break
        source, middle, end = starts[index : index + 3]
        source_len, target_len = infer_seqlen(middle - source, end - middle, limit - total)
        kept += [(source, source + source_len), (middle, middle + target_len)]
        total += source_len + target_len
    ranges: list[tuple[int, int]] = []
    for start, stop in sorted(kept):
        if start == stop:
            continue
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], stop)
        else:
            ranges.append((start, stop))
    return ranges
