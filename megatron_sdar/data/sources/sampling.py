"""Which records of a dataset are taken, and how often, when num_samples is given.

Owns the draw of LLaMA-Factory's num_samples. It depends on the seed, the dataset's name and the
two counts only, and not on the numpy version: raw words of a counter-based generator.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from megatron_sdar.diffusion.noise import philox_words

_SUBSET_STREAM = (0, 0, 0)
_REPEAT_STREAM = (1, 0, 0)


def sample_counts(num_records: int, num_samples: int, seed: int, name: str) -> NDArray[np.int32]:
    """How often each record is taken, int32 [num_records] with sum NUM_SAMPLES.

    Up to NUM_RECORDS samples are a random subset. Beyond that every record is taken once, and
    the rest is drawn with replacement. NAME keeps the draws of datasets apart. Raises ValueError
    when there is no record to take.
    """
    if not num_records:
        raise ValueError(
            f"dataset {name}: num_samples is {num_samples}, but its files hold no records; correct "
            "file_name"
        )
    # The key of a dataset, in place of the epoch in a document's key.
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    if num_samples >= num_records:
        words = philox_words(seed, key, _REPEAT_STREAM, num_samples - num_records)
        # The remainder of a 64-bit word is uniform to within num_records / 2**64.
        drawn = (words % np.uint64(num_records)).astype(np.int64)
        return (1 + np.bincount(drawn, minlength=num_records)).astype(np.int32)
    words = philox_words(seed, key, _SUBSET_STREAM, num_records)
    # The records with the smallest words, without sorting all of them; of equal words the first.
    limit = np.partition(words, num_samples - 1)[num_samples - 1]
    counts = (words < limit).astype(np.int32)
    equal = np.flatnonzero(words == limit)
    counts[equal[: num_samples - int(counts.sum())]] = 1
    return counts
