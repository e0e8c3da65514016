"""The observed vectors of LLaMA-Factory beside the repository, for the tests that read them."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sdar.data.sources.conversations import Conversation, PlainText, read_document
from megatron_sdar.data.sources.dataset_info import read_dataset_info
from megatron_sdar.data.templates.template import TemplateOptions
from megatron_sdar.data.tokenization.tokenizer import SdarTokenizer, load_tokenizer

SHARED = Path(__file__).parents[3] / "shared"
GOLDEN = SHARED / "data" / "golden" / "sft.json"
QWEN3 = SHARED / "tokenizer" / "qwen3"


def golden(*keys: str) -> list[Any]:
    """All cases under KEYS, none when the file is absent."""
    if not GOLDEN.is_file():
        return []
    content = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return [case for key in keys for case in content[key]]


def require_golden() -> dict[str, Any]:
    if not GOLDEN.is_file():
        pytest.skip("the golden vectors are not beside the repository")
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def require_qwen3() -> SdarTokenizer:
    if not QWEN3.is_dir():
        pytest.skip("the Qwen3 tokenizer is not beside the repository")
    return load_tokenizer(QWEN3)


def read_case(case: dict[str, Any], folder: Path) -> Conversation | PlainText:
    """The document of a case, read through its own dataset_info.json in FOLDER."""
    info = case["dataset_info"]
    (folder / info["file_name"]).write_text(json.dumps([case["data_row"]]))
    (folder / "dataset_info.json").write_text(json.dumps({case["name"]: info}))
    (spec,) = read_dataset_info(folder, [case["name"]])
    return read_document(case["data_row"], spec.layout, f"{spec.files[0]}:1")


def template_options(case: dict[str, Any], **options: Any) -> TemplateOptions:
    """The options that a case was observed with."""
    observed = {k: v for k, v in case["options"].items() if k != "block_length"}
    return TemplateOptions(template=case["template"], **observed, **options)
