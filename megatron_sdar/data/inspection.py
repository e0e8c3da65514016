"""Packed rows as a person reads them: what tools/inspect_data.py prints.

Owns the picture of a row: which tokens are prompt, answer, masked or padding, and where blocks
end. What is shown comes out of the same packing, row stream and noise as training, for the
same seed and epoch. Text of the data is escaped where a terminal could take it for a command.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from megatron_sdar.data.building.summary import summarize_dataset
from megatron_sdar.data.length_histogram import bars, count_lengths, write_image
from megatron_sdar.data.loading.documents import DocumentStore
from megatron_sdar.data.loading.packing import PackedIndex, pack_documents, pad_to_block
from megatron_sdar.data.loading.row_options import RowOptions
from megatron_sdar.data.loading.row_stream import RowPart, RowStream
from megatron_sdar.data.storage.tokens import TokenizedDataset
from megatron_sdar.data.tokenization.tokenizer import SdarTokenizer, load_tokenizer
from megatron_sdar.diffusion.noise import NoiseKey, draw_noise
from megatron_sdar.diffusion.rows import IGNORED_LABEL, Row
from megatron_sdar.diffusion.savings import kept_copies, num_row_blocks

PROMPT, ANSWER, PADDING = "prompt", "answer", "padding"
_STYLES = {PROMPT: "blue", ANSWER: "green", PADDING: "magenta"}
_BRACKETS = {
    PROMPT: ("", ""),
    ANSWER: (
        "\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}",
        "\N{RIGHT-POINTING DOUBLE ANGLE QUOTATION MARK}",
    ),
    PADDING: ("{", "}"),
}
_MASKED = "bold white on red"
_BORDER = "\N{BOX DRAWINGS LIGHT VERTICAL}"
_NEWLINE = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"


@dataclass(frozen=True)
class InspectRequest:
    """What tools/inspect_data.py was asked for.

    rows: how many of the epoch's rows at most, in training order; document: show this one instead.
    truncate_mode: None for the default of training. plot: an image of the lengths.
    """

    prefixes: Sequence[str]
    tokenizer: str
    cutoff_len: int = 2048
    block_length: int = 4
    rows: int = 2
    seed: int = 42
    epoch: int = 0
    noise_eps: float = 1e-3
    truncate_mode: str | None = None
    document: int | None = None
    plot: Path | None = None


@dataclass(frozen=True)
class ShownDocument:
    """One document of a row, n tokens with its padding.

    ids: int32 [n], clean. kinds: PROMPT, ANSWER or PADDING of each. masked: bool [n], what the
    noisy copy of the row hides. mask_prob: the p they were drawn with. num_turns: its pairs.
    num_kept: positions that it takes with semantics exact, instead of 2 n.
    """

    document_id: int
    piece: int
    ids: NDArray[np.int32]
    kinds: list[str]
    masked: NDArray[np.bool_]
    mask_prob: float
    num_turns: int
    num_kept: int


def inspect_dataset(request: InspectRequest, console: Console) -> None:
    """Print the asked rows and the summary of the datasets.

    Raises ValueError for every mistake of the user: damaged or missing files, another tokenizer
    than the one of the build, sizes that do not fit, a document that is in no row.
    """
    _check(request)
    store = DocumentStore([TokenizedDataset(prefix) for prefix in request.prefixes])
    tokenizer = _load_tokenizer(request, store)
    stream = make_stream(request, store)
    index = stream.parts[0].index
    if request.document is None:
        first = request.epoch * len(index)
        places = [stream.place(first + i)[2] for i in range(min(request.rows, len(index)))]
    else:
        places = _rows_of(request.document, store, index)
    _print_legend(console, request.block_length)
    for place in places:
        row, documents = read_row(stream, place, request.epoch)
        shown = [d for d in documents if request.document in (None, d.document_id)]
        used = sum(len(document.ids) for document in documents)
        num_kept = sum(document.num_kept for document in documents)
        console.print()
        console.rule(
            Text(
                f"row {place} of {len(index)}, epoch {request.epoch}: {len(documents)} documents, "
                f"{used} of {request.cutoff_len} positions, {len(row.loss_positions)} masked; "
                f"exact {num_kept} of {2 * used}"
            ),
            align="left",
        )
        for document in shown:
            console.print(document_header(document, request.noise_eps))
            console.print(document_text(document, tokenizer, request.block_length))
        if request.document is None and used < request.cutoff_len:
            console.print(Text(f"<row padding: {request.cutoff_len - used} positions>", "dim"))
    _print_summary(request, store, index, console)


def make_stream(request: InspectRequest, store: DocumentStore) -> RowStream:
    """The rows that training with this request's options takes from STORE."""
    index = pack_documents(
        store.lengths,
        request.cutoff_len,
        request.block_length,
        truncate_mode=request.truncate_mode or store.truncate_mode,
        cut_lengths=store.cut_lengths,
    )
    metadata = store.datasets[0].metadata
    options = RowOptions(
        cutoff_len=request.cutoff_len,
        block_length=request.block_length,
        mask_token_id=metadata.mask_token_id,
        pad_token_id=metadata.pad_token_id,
        noise_eps=request.noise_eps,
        seed=request.seed,
    )
    return RowStream([RowPart(store, index)], options)


def read_row(stream: RowStream, place: int, epoch: int) -> tuple[Row, list[ShownDocument]]:
    """Row PLACE of the pack in EPOCH as it is trained, and the documents read back out of it."""
    part, options = stream.parts[0], stream.options
    document_ids = part.store.ids_at(part.index.row(place))
    pieces = part.index.row_pieces(place)
    row = stream.make_row(document_ids, epoch, pieces)
    hidden = np.zeros(row.num_tokens, np.bool_)
    hidden[row.loss_positions] = True
    documents = []
    key = NoiseKey(options.seed, epoch)
    for number, (document, piece) in enumerate(
        zip(document_ids.tolist(), pieces.tolist(), strict=True)
    ):
        kept, kept_labels = stream.kept(part, document, piece)
        block = options.block_length
        ids, labels = pad_to_block(kept, kept_labels, block, options.pad_token_id)
        clean = int(row.segment_starts[number])
        noisy = int(row.segment_starts[len(document_ids) + number])
        kinds = [PROMPT if label == IGNORED_LABEL else ANSWER for label in kept_labels.tolist()]
        kinds += [PADDING] * (len(labels) - len(kept))
        noise = draw_noise(key, document, labels != IGNORED_LABEL, options.noise_eps, piece)
        documents.append(
            ShownDocument(
                document_id=document,
                piece=piece,
                ids=row.input_ids[clean : clean + len(labels)].astype(np.int32),
                kinds=kinds,
                masked=hidden[noisy : noisy + len(labels)],
                mask_prob=float(noise.mask_prob),
                num_turns=len(part.store.turns(document)) // 2,
                num_kept=num_row_blocks(kept_copies(ids, labels, block, [noise])) * block,
            )
        )
    return row, documents


def document_header(document: ShownDocument, noise_eps: float) -> Text:
    """One line: id, tokens, turns, the noise drawn and what it masked."""
    padding = document.kinds.count(PADDING)
    trained = len(document.kinds) - document.kinds.count(PROMPT)
    t = (document.mask_prob - noise_eps) / (1 - noise_eps)
    piece = f" piece {document.piece}" if document.piece else ""
    turns = f"{document.num_turns} turn{'s' * (document.num_turns != 1)}"
    return Text(
        f"document {document.document_id}{piece}: {len(document.ids) - padding} tokens"
        f" + {padding} padding, {turns}, t {t:.3f} p {document.mask_prob:.3f}, "
        f"{int(document.masked.sum())} of {trained} trained tokens masked; exact: "
        f"{document.num_kept} of 2 x {len(document.ids)} positions",
        "bold",
    )


def document_text(document: ShownDocument, tokenizer: SdarTokenizer, block_length: int) -> Text:
    """The clean tokens, coloured and bracketed by kind, with a mark where a block ends."""
    text = Text()
    before: str | None = None
    for place, (token, kind, masked) in enumerate(
        zip(document.ids.tolist(), document.kinds, document.masked.tolist(), strict=True)
    ):
        if kind != before:
            if before is not None:
                text.append(_BRACKETS[before][1], _STYLES[before])
            if place and place % block_length == 0:
                text.append(_BORDER, "dim")
            text.append(_BRACKETS[kind][0], _STYLES[kind])
            before = kind
        elif place % block_length == 0:
            text.append(_BORDER, "dim")
        shown = printable(tokenizer.token_bytes(token))
        text.append(f"[{shown}]" if masked else shown, _MASKED if masked else _STYLES[kind])
        if _NEWLINE in shown:
            text.append("\n")
    if before is not None:
        text.append(_BRACKETS[before][1], _STYLES[before])
    return text


def printable(data: bytes) -> str:
    """Token bytes for a terminal: parts of characters, control and invisible ones as escapes."""
    text = data.decode("utf-8", "backslashreplace").replace("\n", _NEWLINE)
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _check(request: InspectRequest) -> None:
    for name, least in (("rows", 0), ("epoch", 0), ("block_length", 1), ("cutoff_len", 1)):
        if getattr(request, name) < least:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be at least {least}, got {getattr(request, name)}")
    if not 0 < request.noise_eps < 1:
        raise ValueError(f"--noise-eps must be between 0 and 1, got {request.noise_eps}")


def _load_tokenizer(request: InspectRequest, store: DocumentStore) -> SdarTokenizer:
    tokenizer = load_tokenizer(request.tokenizer)
    for dataset in store.datasets:
        if dataset.metadata.recipe.tokenizer_fingerprint != tokenizer.fingerprint():
            raise ValueError(
                f"--tokenizer {request.tokenizer}: {dataset.prefix} was made with another "
                "tokenizer; name the model directory that preprocess_data.py was given"
            )
    return tokenizer


def _rows_of(document: int, store: DocumentStore, index: PackedIndex) -> list[int]:
    """The rows that hold DOCUMENT: one, or when it was split, those of its pieces in order."""
    if not 0 <= document < len(store):
        raise ValueError(f"--document {document}: there are documents 0 to {len(store) - 1}")
    items = np.flatnonzero(index.doc_ids == document)
    if not items.size:
        raise ValueError(
            f"--document {document}: it is in no row, its {store.lengths[document]} tokens do not "
            f"fit (truncate_mode {index.truncate_mode}); raise --cutoff-len"
        )
    if index.pieces is not None:
        items = items[np.argsort(index.pieces[items])]
    rows = np.searchsorted(index.row_offsets, items, side="right") - 1
    return list(dict.fromkeys(rows.tolist()))


def _print_legend(console: Console, block_length: int) -> None:
    legend = Text("legend: ")
    for kind, example in ((PROMPT, "prompt"), (ANSWER, "answer"), (PADDING, "trained padding")):
        left, right = _BRACKETS[kind]
        legend.append(f"{left}{example}{right}", _STYLES[kind]).append("  ")
    legend.append("[masked token]", _MASKED).append("  ")
    legend.append(_BORDER, "dim").append(f" block border (every {block_length} tokens)  ")
    legend.append(f"{_NEWLINE} line break")
    console.print(legend)
    console.print(
        "semantics exact, the default, trains the same masked tokens, but leaves out the positions "
        "that no loss depends on, and packs what is left into rows again",
        style="dim",
    )


def _print_summary(
    request: InspectRequest, store: DocumentStore, index: PackedIndex, console: Console
) -> None:
    console.print()
    for dataset in store.datasets:
        console.print(Text(summarize_dataset(dataset.prefix).format()))
    console.print(
        Text(
            f"{f'rows of {request.cutoff_len}':<16}{len(index):,} rows, {100 * index.fill:.2f}% "
            f"full at block_length {request.block_length}; {index.num_cut:,} documents cut, "
            f"{index.num_split:,} split, {index.num_dropped:,} dropped "
            f"({index.num_lost_tokens:,} tokens lost)"
        )
    )
    edges, numbers = count_lengths(dataset.lengths for dataset in store.datasets)
    console.print(Text("documents by length in tokens"))
    for line in bars(edges, numbers, console.width):
        console.print(line)
    if request.plot is not None:
        title = f"{sum(numbers):,} documents of {', '.join(request.prefixes)}"
        write_image(request.plot, edges, numbers, request.cutoff_len, title)
        console.print(Text(f"{'histogram':<16}{request.plot}"))
