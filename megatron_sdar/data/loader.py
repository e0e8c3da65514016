"""Rows in training order, dealt out to data-parallel ranks; a pure function of a position.

The stream of rows is the concatenation of one permutation per epoch, each keyed by (seed,
epoch), so asking for more epochs changes nothing earlier. A step takes the next
`rows_per_step` rows whatever the layout; the only state is how many rows were taken. Noise is
drawn here, by counter, from (seed, epoch, document).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sdar.data.packing import PackedIndex, pad_to_block
from megatron_sdar.data.tokens import TokenizedDataset
from megatron_sdar.diffusion.noise import NoiseKey, draw_noise, epoch_order
from megatron_sdar.diffusion.rows import (
    IGNORED_LABEL,
    Row,
    build_row,
    concatenate_rows,
    full_copies,
)


class DocumentStore:
    """Several tokenised datasets as one list of documents, numbered through."""

    def __init__(self, datasets: Sequence[TokenizedDataset]) -> None:
        self.datasets = list(datasets)
        self.starts = np.cumsum([0] + [len(dataset) for dataset in datasets])
        first = datasets[0]
        for other in datasets[1:]:
            for field in ("mask_token_id", "pad_token_id", "vocab_size"):
                ours, theirs = getattr(first.metadata, field), getattr(other.metadata, field)
                if ours != theirs:
                    raise ValueError(
                        f"{other.prefix}: {field} is {theirs}, but {first.prefix} has {ours}; "
                        "datasets of one run must be made with one tokenizer"
                    )

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens per document, int32 [N]."""
        return np.concatenate([dataset.lengths for dataset in self.datasets])

    def get(self, document_id: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """ids and labels of a document."""
        index = int(np.searchsorted(self.starts, document_id, side="right")) - 1
        return self.datasets[index].get(document_id - int(self.starts[index]))


@dataclass(frozen=True)
class RowOptions:
    """How documents become rows.

    Attributes:
        cutoff_len: document tokens of a row; the row has twice as many positions.
        mask_token_id, pad_token_id: special tokens.
        noise_eps: smallest masking probability.
        seed: of noise and order.
        shuffle: False keeps rows in pack order in every epoch.
    """

    cutoff_len: int
    block_length: int
    mask_token_id: int
    pad_token_id: int
    noise_eps: float
    seed: int
    shuffle: bool = True


class RowLoader:
    """Micro-batches of one data-parallel rank.

    Args:
        store: the documents.
        index: which documents share a row.
        options: how rows are made.
        rows_per_micro_batch: per_device_train_batch_size.
        num_micro_batches: gradient_accumulation_steps.
        dp_rank, dp_size: whose rows; micro-batch m of rank r takes the (m * dp_size + r)-th
            group of rows of the step.
        prefetch: build the next step's rows in a thread while the current one computes.
    """

    def __init__(
        self,
        store: DocumentStore,
        index: PackedIndex,
        options: RowOptions,
        *,
        rows_per_micro_batch: int,
        num_micro_batches: int,
        dp_rank: int,
        dp_size: int,
        prefetch: bool = False,
    ) -> None:
        self.store = store
        self.index = index
        self.options = options
        self.rows_per_micro_batch = rows_per_micro_batch
        self.num_micro_batches = num_micro_batches
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.position = 0
        self._order = lru_cache(maxsize=2)(self._make_order)
        self._pool = ThreadPoolExecutor(max_workers=1) if prefetch else None
        self._ahead: tuple[int, Future[list[Row]]] | None = None

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return len(self.index)

    @property
    def rows_per_step(self) -> int:
        """Rows all data-parallel ranks take in one step."""
        return self.rows_per_micro_batch * self.num_micro_batches * self.dp_size

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.position / self.num_rows

    def stream_identity(self) -> dict[str, object]:
        """What a position of the stream means: everything its rows depend on."""
        digest = hashlib.sha256()
        digest.update(self.index.row_offsets.tobytes())
        digest.update(self.index.doc_ids.tobytes())
        datasets = [dataset.metadata.fingerprint[:16] for dataset in self.store.datasets]
        return {
            **asdict(self.options),
            "num_rows": self.num_rows,
            "packing": digest.hexdigest()[:16],
            "datasets": datasets,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep: JSON, a few hundred bytes."""
        return {"rows_taken": self.position, "stream": self.stream_identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's position.

        Raises:
            ValueError: the checkpoint's stream of rows is not this one, so its position would
                repeat some documents and skip others.
        """
        ours, theirs = self.stream_identity(), state["stream"]
        changed = [
            f"{key} was {theirs.get(key)!r}, now {value!r}"
            for key, value in ours.items()
            if theirs.get(key) != value
        ]
        if changed:
            raise ValueError(
                f"cannot resume: the data differs from the checkpoint's ({'; '.join(changed)}); "
                "resume with the same data and keys, or start a new run (another output_dir, "
                "model_name_or_path: the exported model)"
            )
        self.position = int(state["rows_taken"])
        self._ahead = None

    def next_step(self) -> list[Row]:
        """This rank's micro-batches of the next step; advances the position."""
        position = self.position
        if self._ahead is not None and self._ahead[0] == position:
            batches = self._ahead[1].result()
        else:
            batches = self.step_at(position)
        self.position = position + self.rows_per_step
        if self._pool is not None:
            self._ahead = (self.position, self._pool.submit(self.step_at, self.position))
        return batches

    def step_at(self, position: int) -> list[Row]:
        """This rank's micro-batches of the step that begins after `position` rows."""
        size = self.rows_per_micro_batch
        batches = []
        for micro_batch in range(self.num_micro_batches):
            first = position + (micro_batch * self.dp_size + self.dp_rank) * size
            batches.append(concatenate_rows([self.row_at(first + i) for i in range(size)]))
        return batches

    def row_at(self, position: int) -> Row:
        """The row at a position of the endless stream."""
        epoch, place = divmod(position, self.num_rows)
        row = int(self._order(epoch)[place]) if self.options.shuffle else place
        return self.make_row(self.index.row(row), epoch)

    def make_row(self, document_ids: NDArray[np.int64], epoch: int) -> Row:
        """Pad, noise and lay out documents as one row."""
        options = self.options
        documents = []
        for document_id in document_ids.tolist():
            ids, labels = self.store.get(document_id)
            ids, labels = pad_to_block(
                ids[: options.cutoff_len],
                labels[: options.cutoff_len],
                options.block_length,
                options.pad_token_id,
            )
            noise = draw_noise(
                NoiseKey(options.seed, epoch),
                document_id,
                labels != IGNORED_LABEL,
                options.noise_eps,
            )
            documents.append(full_copies(ids, labels, options.block_length, noise))
        return build_row(
            documents,
            2 * options.cutoff_len,
            options.block_length,
            options.mask_token_id,
            options.pad_token_id,
        )

    def _make_order(self, epoch: int) -> NDArray[np.int64]:
        return epoch_order(self.num_rows, self.options.seed, epoch)

    def close(self) -> None:
        """Stop the prefetching thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
