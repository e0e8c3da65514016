"""Where a model directory keeps its chat template, and the tokens that it writes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sdar.data.templates.chat_template import load_chat_template, load_template_tokens


def write(folder: Path, **files: object) -> None:
    for name, content in files.items():
        file = folder / name.replace("__", ".")
        file.write_text(content if isinstance(content, str) else json.dumps(content))


def test_the_jinja_file_comes_first(tmp_path):
    write(tmp_path, tokenizer_config__json={"chat_template": "config"}, tokenizer__json="{}")
    assert load_chat_template(tmp_path) == "config"
    write(tmp_path, chat_template__jinja="file\n")
    assert load_chat_template(tmp_path) == "file\n"
    assert load_chat_template(tmp_path / "tokenizer.json") == "file\n"


@pytest.mark.parametrize(
    ("names", "expected"), [(["tool_use", "default"], "default"), (["rag", "tool_use"], "tool_use")]
)
def test_named_templates(tmp_path, names, expected):
    entries = [{"name": name, "template": name} for name in names]
    write(tmp_path, tokenizer_config__json={"chat_template": entries})
    assert load_chat_template(tmp_path) == expected


@pytest.mark.parametrize("config", [None, {}, {"chat_template": [{"name": "rag"}, 3]}])
def test_no_template_is_an_error(tmp_path, config):
    if config is not None:
        write(tmp_path, tokenizer_config__json=config)
    with pytest.raises(ValueError, match=r"there is no chat template: .* set template to qwen3"):
        load_chat_template(tmp_path)


def test_tokens_of_the_config(tmp_path):
    assert load_template_tokens(tmp_path) == {}
    write(
        tmp_path,
        tokenizer_config__json={
            "bos_token": None,
            "eos_token": {"content": "</s>"},
            "pad_token": "p",
        },
    )
    assert load_template_tokens(tmp_path) == {"eos_token": "</s>"}
    write(tmp_path, tokenizer_config__json={"bos_token": "<s>", "eos_token": 3})
    assert load_template_tokens(tmp_path) == {"bos_token": "<s>"}


@pytest.mark.parametrize("load", [load_chat_template, load_template_tokens])
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "not valid JSON"), (b"[]", "must hold one JSON object"), (b"\xff", "not valid JSON")],
)
def test_unreadable_config(tmp_path, load: Callable, content, message):
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"tokenizer_config.json: {message}"):
        load(tmp_path)
