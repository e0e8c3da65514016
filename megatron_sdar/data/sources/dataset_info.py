"""Entries of dataset_info.json.

Owns which files a dataset has and how an entry describes their records. Every key of an entry
is either honoured or refused by name with the remedy; nothing in it is ignored in silence.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_sdar.data.readers.line_files import TEXT_COLUMN
from megatron_sdar.data.readers.spans import TABLE_SUFFIXES, TEXT_SUFFIXES, data_suffix
from megatron_sdar.data.sources.layouts import Columns, Layout, Tags
from megatron_sdar.regular_files import read_json, shown

STAGES = ("sft", "pt")

_LOCAL_FILE = (
    "datasets are not downloaded here: save its files (.parquet, .jsonl, ...) beside "
    "dataset_info.json and name the file or folder as 'file_name' in place of this key"
)
_REFUSED_KEYS = {
    "hf_hub_url": _LOCAL_FILE,
    "ms_hub_url": _LOCAL_FILE,
    "om_hub_url": _LOCAL_FILE,
    "script_url": "dataset scripts are code and are not run; export .jsonl and use 'file_name'",
    "cloud_file_name": "copy the file here and give it as 'file_name'",
    "subset": "it selects part of a hub dataset; give the files of that part as 'file_name'",
    "folder": "it selects part of a hub dataset; give the folder as 'file_name'",
}
_REFUSED_COLUMNS = {
    "images": "this trainer reads text only",
    "videos": "this trainer reads text only",
    "audios": "this trainer reads text only",
    "chosen": "preference data cannot be used for fine-tuning; use prompt and response",
    "rejected": "preference data cannot be used for fine-tuning; use prompt and response",
    "kto_tag": "preference data cannot be used for fine-tuning; use prompt and response",
}
_ENTRY_KEYS = ("file_name", "formatting", "ranking", "split", "num_samples", "columns", "tags")
_FORMATTINGS = ("alpaca", "sharegpt", "openai")


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset: its name, its files in reading order, and the layout of their records.

    `explicit_columns` are optional columns that dataset_info.json names: each must turn up in
    at least one record, so that a misspelt name is not read as "absent everywhere"; who reads
    all records checks it. `num_samples`: how many records are taken at random (see
    `sampling.sample_counts`); None: each once.
    """

    name: str
    files: tuple[Path, ...]
    layout: Layout
    explicit_columns: tuple[str, ...] = ()
    num_samples: int | None = None


def read_dataset_info(
    dataset_dir: str | Path, names: Sequence[str], stage: str = "sft"
) -> list[DatasetSpec]:
    """Specs of the entries NAMES of DATASET_DIR/dataset_info.json, in the order of NAMES.

    Files are relative to DATASET_DIR. STAGE pt reads every record as plain text. Raises
    ValueError that names the entry and the key.
    """
    check_stage(stage)
    file = Path(dataset_dir) / "dataset_info.json"
    if not file.is_file():
        raise ValueError(f"{file}: no such file; set dataset_dir to the folder that holds it")
    info = read_json(file)
    if not isinstance(info, dict):
        raise ValueError(f"{file}: must hold one object of name: entry")
    specs = []
    for name in names:
        if name not in info:
            near = difflib.get_close_matches(name, info, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {_listed(info)}"
            raise ValueError(f"{file}: no dataset {name!r}; {hint}")
        specs.append(_read_entry(f"{file}: {name}", name, info[name], Path(dataset_dir), stage))
    return specs


def _listed(names: Iterable[str]) -> str:
    """Names for a message, which a stranger's file may have a million of."""
    return shown(", ".join(names)).strip("'\"") or "none"


def check_stage(stage: str) -> None:
    """Raise ValueError unless STAGE is one that datasets are read for."""
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {', '.join(STAGES)}: {stage!r}")


def list_files(where: str, path: Path, stage: str) -> tuple[Path, ...]:
    """The data files at PATH, a file or a folder, by name; hidden ones are passed over."""
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if not p.name.startswith("."))
        if not found:
            raise ValueError(f"{where}: the folder {path} is empty")
    elif path.is_file():
        found = [path]
    else:
        raise ValueError(f"{where}: {path}: no such file or folder")
    for file in found:
        if file.is_dir():
            raise ValueError(
                f"{where}: {file}: a folder in a folder is not read; give its files an entry of "
                "their own, or move them up"
            )
        suffix = data_suffix(file)
        if suffix is None:
            raise ValueError(
                f"{where}: {file}: it is none of the files that are read: "
                f"{', '.join(TEXT_SUFFIXES)} (also with .gz or .zst), {', '.join(TABLE_SUFFIXES)}; "
                "convert or remove it"
            )
        if suffix == ".txt" and stage != "pt":
            raise ValueError(
                f"{where}: {file}: a .txt file holds plain text without questions and answers, "
                "which is for continued pretraining: set stage: pt"
            )
    return tuple(found)


def _read_entry(where: str, name: str, entry: object, dataset_dir: Path, stage: str) -> DatasetSpec:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: an entry must be an object, got {type(entry).__name__}")
    _check_keys(where, entry)
    num_samples = entry.get("num_samples")
    if num_samples is not None and (type(num_samples) is not int or num_samples < 1):
        raise ValueError(
            f"{where}: 'num_samples' must be a whole number from 1 on, got {shown(num_samples)}; "
            "leave it out to take every record once"
        )
    formatting = entry.get("formatting") or "alpaca"
    if formatting not in _FORMATTINGS:
        raise ValueError(
            f"{where}: 'formatting' {shown(formatting)} is not supported; use "
            f"{', '.join(map(repr, _FORMATTINGS))}"
        )
    if not isinstance(entry.get("file_name"), str):
        raise ValueError(f"{where}: 'file_name' must name a data file, or a folder of them")
    files = list_files(f"{where}: file_name", dataset_dir / entry["file_name"], stage)
    tags = Tags()
    if entry.get("tags") is not None:
        named = _read_names(f"{where}: tags", entry["tags"], Tags, {})
        _require_names(
            f"{where}: tags", named, ("role_tag", "content_tag", "user_tag", "assistant_tag")
        )
        tags = Tags(**named)
    plain = all(data_suffix(file) == ".txt" for file in files)
    columns, explicit = _read_columns(where, entry.get("columns"), formatting, stage, plain)
    layout = Layout("text" if stage == "pt" else formatting, columns, tags)
    return DatasetSpec(name, files, layout, explicit, num_samples)


def _check_keys(where: str, entry: dict[str, Any]) -> None:
    for key, value in entry.items():
        if key in _REFUSED_KEYS and value is not None:
            raise ValueError(f"{where}: {key!r} is not supported: {_REFUSED_KEYS[key]}")
        if key not in _ENTRY_KEYS and key not in _REFUSED_KEYS:
            near = difflib.get_close_matches(key, _ENTRY_KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_ENTRY_KEYS)}"
            raise ValueError(f"{where}: unknown key {shown(key)}; {hint}")
    if entry.get("ranking"):
        raise ValueError(
            f"{where}: 'ranking' is true: preference data cannot be used for fine-tuning; give "
            "prompt and response columns"
        )
    if entry.get("split") not in (None, "train"):
        raise ValueError(
            f"{where}: 'split' {shown(entry['split'])} is not supported: local files have no "
            "splits; name the file of that split as 'file_name'"
        )


def _read_columns(
    where: str, given: object, formatting: str, stage: str, plain: bool
) -> tuple[Columns, tuple[str, ...]]:
    """The columns of an entry, and those of them that some record must have.

    PLAIN: all files are .txt, whose one column has a name of its own.
    """
    required: tuple[str, ...] = ("prompt", "response")
    optional: tuple[str, ...] = ("query", "history", "system", "tools")
    if formatting != "alpaca":
        required, optional = ("messages",), ("system", "tools")
    if stage == "pt":
        # The document is the prompt, or the first message; nothing else of a record is used.
        required, optional = required[:1], optional[:1] if formatting == "alpaca" else ()
    named: dict[str, Any] = dict.fromkeys(f.name for f in fields(Columns))
    if given is not None:
        listed = _read_names(f"{where}: columns", given, Columns, _REFUSED_COLUMNS)
        _require_names(f"{where}: columns", listed, required)
        named |= {key: listed[key] for key in (*required, *optional)}
        explicit = tuple(column for key in optional if (column := named[key]) is not None)
        return Columns(**named), explicit
    default = Columns(prompt=TEXT_COLUMN, query=None) if plain else Columns()
    named |= {key: getattr(default, key) for key in (*required, *optional)}
    return Columns(**named), ()


def _read_names(
    where: str, given: object, kind: type[Columns] | type[Tags], refused: dict[str, str]
) -> dict[str, Any]:
    # Unlisted names become None: an entry that lists any column lists all that it uses.
    names: dict[str, Any] = {f.name: None for f in fields(kind)}
    if not isinstance(given, dict):
        raise ValueError(f"{where}: must be an object, got {type(given).__name__}")
    for key, value in given.items():
        if value is None:
            continue
        if key in refused:
            raise ValueError(f"{where}: {key!r} is not supported: {refused[key]}")
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
            raise ValueError(f"{where}: unknown name {shown(key)}; {hint}")
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
