"""Datasets: dataset_info.json entries or plain files, and what their records look like.

Owns the way from a name to a DatasetSpec, and the recognition of files that nothing describes.
Every record of a spec's files (see `spans`) becomes a document (see `conversations`) or a
RecordError.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sdar.data.readers.line_files import TEXT_COLUMN
from megatron_sdar.data.readers.records import RecordError, SkipReport
from megatron_sdar.data.readers.spans import data_suffix, read_file
from megatron_sdar.data.readers.streams import COMPRESSED_SUFFIXES
from megatron_sdar.data.sources.conversations import read_document
from megatron_sdar.data.sources.dataset_info import (
    DatasetSpec,
    check_stage,
    list_files,
    read_dataset_info,
)
from megatron_sdar.data.sources.layouts import (
    OPENAI_TAGS,
    Columns,
    Conversation,
    Layout,
    PlainText,
    Tags,
    Turn,
)

__all__ = [
    "Columns",
    "Conversation",
    "DatasetSpec",
    "Layout",
    "PlainText",
    "RecordError",
    "SkipReport",
    "Tags",
    "Turn",
    "dataset_from_file",
    "read_dataset_info",
    "read_document",
    "resolve_datasets",
]

# Records without a dataset_info.json entry: (prompt, query, response) columns, tried in order.
_PAIR_STYLES = (
    ("instruction", "input", "output"),
    ("question", None, "answer"),
    ("prompt", None, "response"),
)


def resolve_datasets(
    names: Sequence[str], dataset_dir: str | Path, stage: str = "sft"
) -> list[DatasetSpec]:
    """One spec per name: a file, a folder (with a "/"), or a key of dataset_info.json."""
    specs = []
    for name in names:
        if data_suffix(Path(name)) is not None or ("/" in name and Path(name).is_dir()):
            specs.append(dataset_from_file(name, stage))
        else:
            specs.extend(read_dataset_info(dataset_dir, [name], stage))
    return specs


def dataset_from_file(path: str | Path, stage: str = "sft") -> DatasetSpec:
    """The dataset in one file or a folder of files, its layout taken from the first good record.

    Layouts: `messages` or `conversations` (role/content or from/value), instruction/input/
    output, question/answer, prompt/response; `system`, `tools` and `history` beside them. For
    STAGE pt: `text`, or else the prompt of one of these (its first message).
    """
    check_stage(stage)
    file = Path(path)
    files = list_files(str(file), file, stage)
    record = _first_record(files)
    layout = _detect_text(record) if stage == "pt" else _detect_layout(record)
    if layout is not None:
        return DatasetSpec(_name(file), files, layout)
    found = f"the first record has {', '.join(map(repr, record)) or 'no fields'}"
    hint = "text, " if stage == "pt" else ""
    remedy = "; plain text is for continued pretraining: set stage: pt"
    raise ValueError(
        f"{file}: cannot tell how its records are laid out: {found}; use {hint}messages or "
        "conversations, instruction/input/output, question/answer or prompt/response, or "
        f"describe the file in a dataset_info.json{remedy if TEXT_COLUMN in record else ''}"
    )


def _name(file: Path) -> str:
    if file.is_dir():
        return file.resolve().name
    stem = file.with_suffix("") if file.suffix in COMPRESSED_SUFFIXES else file
    return stem.stem


def _first_record(files: Sequence[Path]) -> dict[str, Any]:
    for file in files:
        for record in read_file(file):
            if not isinstance(record.value, RecordError):
                return record.value
    return {}


def _detect_layout(record: dict[str, Any]) -> Layout | None:
    for key in ("messages", "conversations"):
        if key not in record:
            continue
        columns = Columns(messages=key, system="system", tools="tools")
        messages = record[key]
        first = messages[0] if isinstance(messages, list) and messages else None
        if isinstance(first, dict) and "role" in first:
            return Layout("openai", columns, OPENAI_TAGS)
        return Layout("sharegpt", columns)
    for prompt, query, response in _PAIR_STYLES:
        if prompt in record and response in record:
            columns = Columns(
                prompt, query, response, history="history", system="system", tools="tools"
            )
            return Layout("alpaca", columns)
    return None


def _detect_text(record: dict[str, Any]) -> Layout | None:
    if TEXT_COLUMN in record:
        return Layout("text", Columns(prompt=TEXT_COLUMN, query=None))
    layout = _detect_layout(record)
    if layout is not None:
        if layout.formatting == "alpaca":
            columns = Columns(layout.columns.prompt, layout.columns.query, messages=None)
        else:
            columns = Columns(prompt=None, query=None, messages=layout.columns.messages)
        return Layout("text", columns, layout.tags)
    return None
