"""Datasets: dataset_info.json entries or plain files, read as a stream of conversations.

Owns which files a dataset has and how their records are laid out. Every key of an entry is
either honoured or refused by name; every record becomes a conversation, raises with its
file:line, or is counted in a SkipReport.
"""

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_sdar.data.conversations import (
    Columns,
    Conversation,
    Layout,
    Tags,
    Turn,
    read_conversation,
)
from megatron_sdar.data.records import (
    RECORD_SUFFIXES,
    RecordError,
    SkipReport,
    read_records,
)

__all__ = [
    "Columns",
    "Conversation",
    "DatasetSpec",
    "Layout",
    "RecordError",
    "SkipReport",
    "Tags",
    "Turn",
    "dataset_from_file",
    "iter_conversations",
    "read_dataset_info",
    "resolve_datasets",
]

ON_ERROR_MODES = ("raise", "skip")

_REFUSED_KEYS = {
    "hf_hub_url": "download the dataset as .jsonl and give it as 'file_name'",
    "ms_hub_url": "download the dataset as .jsonl and give it as 'file_name'",
    "om_hub_url": "download the dataset as .jsonl and give it as 'file_name'",
    "script_url": "dataset scripts are code and are not run; export .jsonl and use 'file_name'",
    "cloud_file_name": "copy the file here and give it as 'file_name'",
    "subset": "it selects part of a hub dataset; store that part as .jsonl",
    "folder": "it selects part of a hub dataset; give the folder as 'file_name'",
    "num_samples": "use max_samples, which takes the first records",
}
_REFUSED_COLUMNS = {
    "images": "this trainer reads text only",
    "videos": "this trainer reads text only",
    "audios": "this trainer reads text only",
    "chosen": "preference data cannot be used for fine-tuning; use prompt and response",
    "rejected": "preference data cannot be used for fine-tuning; use prompt and response",
    "kto_tag": "preference data cannot be used for fine-tuning; use prompt and response",
}
_ENTRY_KEYS = ("file_name", "formatting", "ranking", "split", "columns", "tags")
# Records without a dataset_info.json entry: (prompt, query, response) columns, tried in order.
_PAIR_STYLES = (
    ("instruction", "input", "output"),
    ("question", None, "answer"),
    ("prompt", None, "response"),
)


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset: its name, its files in reading order, and the layout of their records.

    `explicit_columns` are optional columns that dataset_info.json names: each must turn up in
    at least one record, so that a misspelt name is not read as "absent everywhere".
    """

    name: str
    files: tuple[Path, ...]
    layout: Layout
    explicit_columns: tuple[str, ...] = ()


def resolve_datasets(names: Sequence[str], dataset_dir: str | Path) -> list[DatasetSpec]:
    """One spec per name: a path that ends in .jsonl or .json, or a key of dataset_info.json."""
    specs = []
    for name in names:
        if Path(name).suffix in RECORD_SUFFIXES:
            specs.append(dataset_from_file(name))
        else:
            specs.extend(read_dataset_info(dataset_dir, [name]))
    return specs


def read_dataset_info(dataset_dir: str | Path, names: Sequence[str]) -> list[DatasetSpec]:
    """Specs of the entries NAMES of DATASET_DIR/dataset_info.json, in the order of NAMES.

    Files are relative to DATASET_DIR. Raises ValueError that names the entry and the key.
    """
    file = Path(dataset_dir) / "dataset_info.json"
    if not file.is_file():
        raise ValueError(f"{file}: no such file; set dataset_dir to the folder that holds it")
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(info, dict):
        raise ValueError(f"{file}: must hold one object of name: entry")
    specs = []
    for name in names:
        if name not in info:
            near = difflib.get_close_matches(name, info, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(info) or 'none'}"
            raise ValueError(f"{file}: no dataset {name!r}; {hint}")
        specs.append(_read_entry(f"{file}: {name}", name, info[name], Path(dataset_dir)))
    return specs


def dataset_from_file(path: str | Path) -> DatasetSpec:
    """The dataset in one .jsonl or .json file, its layout taken from the first good record.

    Layouts: `messages` or `conversations` (role/content or from/value), instruction/input/
    output, question/answer, prompt/response; `system`, `tools` and `history` beside them.
    """
    file = Path(path)
    files = _list_files(str(file), file)
    seen: list[str] = []
    for record in read_records(file):
        if isinstance(record.value, RecordError):
            continue
        layout = _detect_layout(record.value)
        if layout is not None:
            return DatasetSpec(file.stem, files, layout)
        seen = list(record.value)
        break
    found = f"the first record has {', '.join(map(repr, seen)) or 'no fields'}"
    raise ValueError(
        f"{file}: cannot tell how its records are laid out: {found}; use messages or "
        "conversations, instruction/input/output, question/answer or prompt/response, or "
        "describe the file in a dataset_info.json"
    )


def iter_conversations(
    spec: DatasetSpec,
    on_error: str = "raise",
    *,
    skipped: SkipReport | None = None,
    max_samples: int | None = None,
    on_read: Callable[[int], None] | None = None,
) -> Iterator[Conversation]:
    """Conversations of the first MAX_SAMPLES records of SPEC (default all), in file order.

    A bad record raises RecordError, or with on_error "skip" is counted in SKIPPED (required
    then). ON_READ is called with the length of every record, for progress.
    """
    if on_error not in ON_ERROR_MODES:
        raise ValueError(f"on_error must be one of {', '.join(ON_ERROR_MODES)}: {on_error!r}")
    if on_error == "skip" and skipped is None:
        raise ValueError("on_error 'skip' needs a SkipReport, so that skipped records are told")
    num_read, num_good = 0, 0
    unseen = set(spec.explicit_columns)
    for file in spec.files:
        for record in read_records(file):
            if max_samples is not None and num_read == max_samples:
                return
            num_read += 1
            if on_read is not None:
                on_read(record.length)
            try:
                if isinstance(record.value, RecordError):
                    raise record.value
                if unseen:
                    unseen.difference_update(record.value)
                conversation = read_conversation(record.value, spec.layout, record.location)
            except RecordError as error:
                if skipped is None or on_error == "raise":
                    raise
                skipped.add(error)
                continue
            num_good += 1
            yield conversation
    if num_good and unseen:
        raise ValueError(
            f"dataset {spec.name}: column {', '.join(map(repr, sorted(unseen)))} is in no record "
            f"of {', '.join(map(str, spec.files))}; correct 'columns' in dataset_info.json"
        )


def _read_entry(where: str, name: str, entry: object, dataset_dir: Path) -> DatasetSpec:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: an entry must be an object, got {type(entry).__name__}")
    for key, value in entry.items():
        if key in _REFUSED_KEYS and value is not None:
            raise ValueError(f"{where}: {key!r} is not supported: {_REFUSED_KEYS[key]}")
        if key not in _ENTRY_KEYS and key not in _REFUSED_KEYS:
            near = difflib.get_close_matches(key, _ENTRY_KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_ENTRY_KEYS)}"
            raise ValueError(f"{where}: unknown key {key!r}; {hint}")
    if entry.get("ranking"):
        raise ValueError(
            f"{where}: 'ranking' is true: preference data cannot be used for fine-tuning; give "
            "prompt and response columns"
        )
    if entry.get("split") not in (None, "train"):
        raise ValueError(
            f"{where}: 'split' {entry['split']!r} is not supported: local files have no splits; "
            "name the file of that split as 'file_name'"
        )
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt"):
        raise ValueError(
            f"{where}: 'formatting' {formatting!r} is not supported; use 'alpaca', or 'sharegpt' "
            "(for openai messages: with tags role_tag=role, content_tag=content, user_tag=user, "
            "assistant_tag=assistant, system_tag=system)"
        )
    if not isinstance(entry.get("file_name"), str):
        raise ValueError(f"{where}: 'file_name' must name a .jsonl or .json file, or a folder")
    columns, tags = Columns(), Tags()
    explicit: tuple[str, ...] = ()
    if entry.get("columns") is not None:
        named = _read_names(f"{where}: columns", entry["columns"], Columns, _REFUSED_COLUMNS)
        columns = Columns(**named)
        required = {"alpaca": ("prompt", "response"), "sharegpt": ("messages",)}[formatting]
        _require_names(f"{where}: columns", named, required)
        used = {"alpaca": ("query", "history"), "sharegpt": ()}[formatting] + ("system", "tools")
        explicit = tuple(column for key in used if (column := named[key]) is not None)
    if entry.get("tags") is not None:
        named = _read_names(f"{where}: tags", entry["tags"], Tags, {})
        _require_names(
            f"{where}: tags", named, ("role_tag", "content_tag", "user_tag", "assistant_tag")
        )
        tags = Tags(**named)
    files = _list_files(f"{where}: file_name", dataset_dir / entry["file_name"])
    return DatasetSpec(name, files, Layout(formatting, columns, tags), explicit)


def _read_names(
    where: str, given: object, kind: type[Columns] | type[Tags], refused: dict[str, str]
) -> dict[str, str | None]:
    # Unlisted names become None: an entry that lists any column lists all that it uses.
    names: dict[str, str | None] = {f.name: None for f in fields(kind)}
    if not isinstance(given, dict):
        raise ValueError(f"{where}: must be an object, got {type(given).__name__}")
    for key, value in given.items():
        if value is None:
            continue
        if key in refused:
            raise ValueError(f"{where}: {key!r} is not supported: {refused[key]}")
        if key not in names:
            raise ValueError(f"{where}: unknown name {key!r}; known: {', '.join(names)}")
        if not isinstance(value, str):
            raise ValueError(f"{where}: {key!r} must be a string, got {type(value).__name__}")
        names[key] = value
    return names


def _require_names(where: str, named: dict[str, Any], required: Sequence[str]) -> None:
    missing = [key for key in required if named[key] is None]
    if missing:
        raise ValueError(
            f"{where}: {', '.join(missing)} must be given: once one name is listed, an unlisted "
            "one means 'absent'"
        )


def _list_files(where: str, path: Path) -> tuple[Path, ...]:
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
        if not files:
            raise ValueError(f"{where}: the folder {path} is empty")
    elif path.is_file():
        files = [path]
    else:
        raise ValueError(f"{where}: {path}: no such file or folder")
    for file in files:
        if file.suffix not in RECORD_SUFFIXES:
            raise ValueError(
                f"{where}: {file}: only .jsonl and .json files are read; convert it to .jsonl"
            )
    return tuple(files)


def _detect_layout(record: dict[str, Any]) -> Layout | None:
    for key in ("messages", "conversations"):
        if key not in record:
            continue
        columns = Columns(messages=key, system="system", tools="tools")
        messages = record[key]
        first = messages[0] if isinstance(messages, list) and messages else None
        if isinstance(first, dict) and "role" in first:
            tags = Tags(
                role_tag="role", content_tag="content", user_tag="user", assistant_tag="assistant"
            )
            return Layout("sharegpt", columns, tags)
        return Layout("sharegpt", columns)
    for prompt, query, response in _PAIR_STYLES:
        if prompt in record and response in record:
            columns = Columns(
                prompt, query, response, history="history", system="system", tools="tools"
            )
            return Layout("alpaca", columns)
    return None
