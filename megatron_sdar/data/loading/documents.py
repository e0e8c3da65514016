"""Documents of several tokenised datasets as one numbered list, and choices from that list.

A document id numbers through the datasets; id + k * total is the k-th repetition of the same
document, with tokens that are the same and noise that is not. Opening a store costs nothing
per document: only `lengths` and the choices below are O(N).
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from megatron_sdar.data.loading.truncation import cut_turns
from megatron_sdar.data.storage.tokens import TokenizedDataset
from megatron_sdar.diffusion.noise import CHOICE_STREAM, SPLIT_STREAM, philox_words, to_uniforms

Selection = range | NDArray[np.int64]

INTERLEAVE_STRATEGIES = ("interleave_under", "interleave_over")
_DRAWS_AT_ONCE = 1 << 16
_MOST_INTERLEAVED = 2**31


class DocumentStore:
    """Documents of a run.

    Args:
        datasets: numbered through in this order; all made with one tokenizer.
        selection: ids of the documents that are used, in packing order, None for all. A
            packed index numbers them by position (see `ids_at`); ids, and so noise, stay those
            of the whole list.

    Raises:
        ValueError: datasets of different tokenizers.
    """

    def __init__(
        self, datasets: Sequence[TokenizedDataset], selection: Selection | None = None
    ) -> None:
        assert datasets, "a store has at least one dataset"
        self.datasets = list(datasets)
        self.starts = [0, *accumulate(len(dataset) for dataset in datasets)]
        self.total = self.starts[-1]
        self.selection: Selection = range(self.total) if selection is None else selection
        if isinstance(self.selection, range):
            within = range(self.selection.start, min(self.selection.stop, self.total))
            assert self.selection == within, "a range selects each of its documents once"
        first = datasets[0]
        for other in datasets[1:]:
            for field in ("mask_token_id", "pad_token_id", "vocab_size"):
                ours, theirs = getattr(first.metadata, field), getattr(other.metadata, field)
                if ours != theirs:
                    raise ValueError(
                        f"{other.prefix}: {field} is {theirs}, but {first.prefix} has {ours}; "
                        "datasets of one run must be made with one tokenizer"
                    )
            ours, theirs = (d.metadata.recipe.tokenizer_fingerprint for d in (first, other))
            if ours != theirs:
                raise ValueError(
                    f"{other.prefix}: it was made with another tokenizer than {first.prefix} "
                    f"({theirs[:12]}, {ours[:12]}); datasets of one run must be made with one "
                    "tokenizer"
                )

    def __len__(self) -> int:
        return len(self.selection)

    def select(self, selection: Selection) -> DocumentStore:
        """The same documents under the same ids, of which only `selection` is used."""
        return DocumentStore(self.datasets, selection)

    def ids_of(self, dataset: int) -> range:
        """Ids of all documents of the dataset with this number."""
        return range(self.starts[dataset], self.starts[dataset + 1])

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens per selected document, int32 [len(self)]; a copy, made in O(N)."""
        chosen = self.selection
        span = chosen if isinstance(chosen, range) else range(self.total)
        lengths = np.concatenate(
            [
                dataset.lengths[max(span.start - start, 0) : max(span.stop - start, 0)]
                for dataset, start in zip(self.datasets, self.starts[:-1], strict=True)
            ]
        )
        return lengths if isinstance(chosen, range) else lengths[chosen % self.total]

    def ids_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Document ids of positions in the selection."""
        if isinstance(self.selection, range):
            return positions + self.selection.start
        return self.selection[positions]

    def get(self, document_id: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """ids and labels of a document, int32 [n] each."""
        dataset, place = self._find(document_id)
        return dataset.get(place)

    def name(self, document_id: int) -> tuple[str, int]:
        """Prefix of its dataset's token files, and which document of them it is."""
        dataset, place = self._find(document_id)
        return dataset.prefix, place

    def turns(self, document_id: int) -> NDArray[np.int32]:
        """Tokens of its prompts and answers in turn, int32 [2 * pairs]."""
        dataset, place = self._find(document_id)
        return dataset.turns(place)

    def cut_ranges(self, document_id: int, limit: int) -> list[tuple[int, int]]:
        """The [start, stop) ranges of tokens that truncation to `limit` keeps of a document.

        With mask_history only the last turn is trained, so it gets its room first.
        """
        dataset, place = self._find(document_id)
        mask_history = bool(dataset.metadata.recipe.template["mask_history"])
        return cut_turns(dataset.turns(place).tolist(), limit, mask_history)

    def cut_lengths(self, positions: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
        """What truncation to `limit` leaves of the documents at positions, in tokens, int64."""
        ids = self.ids_at(positions).tolist()
        ranges = (self.cut_ranges(number, limit) for number in ids)
        kept = (sum(stop - start for start, stop in each) for each in ranges)
        return np.fromiter(kept, dtype=np.int64, count=len(ids))

    @property
    def truncate_mode(self) -> str:
        """How long documents are shortened unless it is said: text is split, answers are cut."""
        plain = all(dataset.metadata.recipe.is_plain_text for dataset in self.datasets)
        return "split" if plain else "cut"

    def _find(self, document_id: int) -> tuple[TokenizedDataset, int]:
        place = document_id % self.total
        number = bisect_right(self.starts, place) - 1
        return self.datasets[number], place - self.starts[number]

    def selection_digest(self) -> str:
        """A short name of the selection, the same for equal selections only."""
        if isinstance(self.selection, range):
            return f"{self.selection.start}:{self.selection.stop}"
        return hashlib.sha256(self.selection.tobytes()).hexdigest()[:16]


def hold_out(
    store: DocumentStore, val_size: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training ids, validation ids) of all documents of STORE, int64 and ascending.

    Like `split_documents`, but the copies of a record that num_samples took several times stay
    on one side; a number of documents then counts records.

    Raises:
        ValueError: val_size does not fit, or one file is used twice.
    """
    digests = Counter(
        file["sha256"]
        for dataset in store.datasets
        for source in dataset.metadata.recipe.sources
        for file in source["files"]
    )
    twice = [digest for digest, count in digests.items() if count > 1]
    if twice:
        names = sorted(
            {
                f"{dataset.prefix} ({file['name']})"
                for dataset in store.datasets
                for source in dataset.metadata.recipe.sources
                for file in source["files"]
                if file["sha256"] == twice[0]
            }
        )
        raise ValueError(
            f"val_size: one file is used twice, in {' and '.join(names)}: what is held out of one "
            "would be trained in the other; use each file once"
        )
    is_copy = np.concatenate([_is_copy(dataset) for dataset in store.datasets])
    record = np.cumsum(~is_copy) - 1
    _, held_out = split_documents(int(record[-1]) + 1, val_size, seed)
    is_held_out = np.isin(record, held_out)
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def _is_copy(dataset: TokenizedDataset) -> NDArray[np.bool_]:
    """Whether each document repeats the one before it; only num_samples makes such copies."""
    copies = np.zeros(len(dataset), dtype=np.bool_)
    if any(source["num_samples"] is not None for source in dataset.metadata.recipe.sources):
        for number in range(1, len(dataset)):
            ours, before = dataset.get(number)[0], dataset.get(number - 1)[0]
            copies[number] = np.array_equal(ours, before)
    return copies


def split_documents(
    num_documents: int, val_size: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training ids, validation ids), int64 and ascending: a random split by document.

    Args:
        val_size: above 1 the number of validation documents, else their fraction (rounded up).

    Raises:
        ValueError: val_size is neither, or leaves one side without a document.
    """
    if not math.isfinite(val_size) or val_size <= 0 or (val_size > 1 and val_size % 1):
        raise ValueError(
            f"val_size is {val_size}; give a fraction between 0 and 1, or a whole number of "
            "documents above 1"
        )
    count = int(val_size) if val_size > 1 else math.ceil(num_documents * val_size)
    if not 0 < count < num_documents:
        raise ValueError(
            f"val_size {val_size} takes {count} of {num_documents} documents for validation and "
            f"leaves {max(num_documents - count, 0)} for training; both need at least one"
        )
    words = philox_words(seed, 0, (SPLIT_STREAM, 0, 0), num_documents)
    chosen = np.zeros(num_documents, dtype=bool)
    chosen[np.argsort(words, kind="stable")[:count]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def interleave_documents(
    counts: Sequence[int], strategy: str, probs: Sequence[float] | None, seed: int
) -> NDArray[np.int64]:
    """Document ids, int64, of datasets with `counts` documents mixed one document at a time.

    Where and after which document the list stops is as in LLaMA-Factory's mix_strategy (Hugging
    Face's interleave_datasets): "interleave_under" as soon as one dataset is used up,
    "interleave_over" when all are, starting smaller ones again. Without `probs` the datasets
    take turns (and every dataset ends on the same turn); with them each document is drawn. The
    draw is our own: by counter, from `seed` only.

    Raises:
        ValueError: an unknown strategy, a dataset without documents, probabilities that are not
            one positive number per dataset with sum 1.
    """
    if strategy not in INTERLEAVE_STRATEGIES:
        raise ValueError(
            f"mix_strategy is {strategy!r}; choose one of {', '.join(INTERLEAVE_STRATEGIES)}"
        )
    if min(counts) < 1:
        raise ValueError(
            f"mix_strategy {strategy}: dataset {list(counts).index(min(counts))} has no "
            "documents; remove it from dataset"
        )
    over = strategy == "interleave_over"
    sizes = np.asarray(counts, dtype=np.int64)
    if probs is None:
        turns = int(sizes.max() if over else sizes.min())
        sources = np.tile(np.arange(len(sizes)), turns)
    else:
        if len(probs) != len(sizes) or not all(p > 0 for p in probs) or abs(sum(probs) - 1) > 1e-6:
            raise ValueError(
                f"interleave_probs is {list(probs)}; give one number above 0 for each of the "
                f"{len(sizes)} datasets, with sum 1"
            )
        needed = int((sizes / np.asarray(probs)).max())
        if over and needed > _MOST_INTERLEAVED:
            raise ValueError(
                f"interleave_probs is {list(probs)}: interleave_over would need about {needed:,} "
                f"documents until every dataset is used up, more than {_MOST_INTERLEAVED:,}; "
                "raise the smallest probability or use interleave_under"
            )
        sources = _draw_sources(sizes, np.asarray(probs, dtype=np.float64), over, seed)
    starts = np.cumsum(sizes) - sizes
    total = int(sizes.sum())
    ids = np.empty(len(sources), dtype=np.int64)
    for source, size in enumerate(sizes.tolist()):
        places = np.flatnonzero(sources == source)
        repetition, document = np.divmod(np.arange(len(places)), size)
        ids[places] = starts[source] + document + repetition * total
    return ids


def _draw_sources(
    sizes: NDArray[np.int64], probs: NDArray[np.float64], over: bool, seed: int
) -> NDArray[np.int64]:
    """Which dataset each document comes from, up to the one that uses up the last (first) one."""
    edges = np.cumsum(probs / probs.sum())[:-1]
    chunks: list[NDArray[np.int64]] = []
    counts = np.zeros_like(sizes)
    done = np.all if over else np.any
    while not done(counts >= sizes):
        words = philox_words(seed, 0, (CHOICE_STREAM, len(chunks), 0), _DRAWS_AT_ONCE)
        chunks.append(np.searchsorted(edges, to_uniforms(words), side="right"))
        counts += np.bincount(chunks[-1], minlength=len(sizes))
    sources = np.concatenate(chunks)
    ends = [
        int(np.flatnonzero(sources == source)[size - 1])
        for source, size in enumerate(sizes.tolist())
        if counts[source] >= size
    ]
    return sources[: (max(ends) if over else min(ends)) + 1]
