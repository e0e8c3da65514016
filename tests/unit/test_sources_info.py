"""dataset_info.json: every key honoured or refused by name."""

import json
from pathlib import Path

import pytest
from data_files import write

from megatron_sdar.data.sources.datasets import DatasetSpec, read_dataset_info
from megatron_sdar.data.sources.layouts import Columns, Layout, Tags

GOOD = {"instruction": "q", "output": "a"}
SHAREGPT = {"formatting": "sharegpt"}


def read_entry(folder: Path, entry: dict, stage: str = "sft") -> DatasetSpec:
    """The spec of ENTRY, whose file is data.jsonl unless it says otherwise."""
    write(folder / "data.jsonl", [GOOD])
    info = {"name": {"file_name": "data.jsonl"} | entry}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (spec,) = read_dataset_info(folder, ["name"], stage)
    return spec


def test_defaults(tmp_path):
    columns = Columns(messages=None)
    assert read_entry(tmp_path, {}) == DatasetSpec(
        "name", (tmp_path / "data.jsonl",), Layout("alpaca", columns, Tags())
    )
    columns = Columns(prompt=None, query=None, response=None)
    assert read_entry(tmp_path, SHAREGPT).layout == Layout("sharegpt", columns, Tags())
    assert read_entry(tmp_path, {"formatting": "openai"}).layout == Layout("openai", columns)


def test_harmless_values_are_accepted(tmp_path):
    nulls = dict.fromkeys(("hf_hub_url", "columns", "tags", "num_samples", "formatting"))
    assert read_entry(tmp_path, {"ranking": False, "split": "train"} | nulls) == read_entry(
        tmp_path, {}
    )


def test_columns_and_tags_are_taken_over(tmp_path):
    columns = {"prompt": "p", "response": "r", "query": "q", "history": "h"}
    spec = read_entry(tmp_path, {"columns": columns | {"system": "s", "tools": "t"}})
    assert spec.layout.columns == Columns("p", "q", "r", "h", None, "s", "t")
    assert spec.explicit_columns == ("q", "h", "s", "t")
    # Once one is listed, those that are not are absent; null is not listed.
    spec = read_entry(tmp_path, {"columns": {"prompt": "p", "response": "r", "query": None}})
    assert spec.layout.columns == Columns("p", None, "r", messages=None)
    assert spec.explicit_columns == ()
    tags = {"role_tag": "role", "content_tag": "c", "user_tag": "u", "assistant_tag": "a"}
    entry = SHAREGPT | {"columns": {"messages": "m", "system": "s"}}
    spec = read_entry(tmp_path, entry | {"tags": tags | {"observation_tag": "tool"}})
    assert spec.layout.columns == Columns(None, None, None, None, "m", "s")
    assert spec.layout.tags == Tags("role", "c", "u", "a", "tool", None, None)
    assert spec.explicit_columns == ("s",)


def test_num_samples(tmp_path):
    assert read_entry(tmp_path, {"num_samples": 5}).num_samples == 5
    for bad in (0, -1, 1.5, "3", True):
        with pytest.raises(ValueError, match=f"'num_samples' must be a whole .*got {bad!r}; leave"):
            read_entry(tmp_path, {"num_samples": bad})


def test_stage_pt_uses_the_prompt_or_the_first_message(tmp_path):
    spec = read_entry(tmp_path, {}, "pt")
    assert spec.layout == Layout("text", Columns(response=None, messages=None))
    spec = read_entry(tmp_path, {"columns": {"prompt": "body", "system": "s"}}, "pt")
    assert spec.layout.columns == Columns("body", None, None, messages=None)
    assert spec.explicit_columns == ()
    spec = read_entry(tmp_path, {"columns": {"prompt": "body", "query": "q"}}, "pt")
    assert (spec.layout.columns.query, spec.explicit_columns) == ("q", ("q",))
    tags = {"role_tag": "r", "content_tag": "c", "user_tag": "u", "assistant_tag": "a"}
    entry = SHAREGPT | {"columns": {"messages": "m"}, "tags": tags}
    spec = read_entry(tmp_path, entry, "pt")
    columns = Columns(None, None, None, messages="m")
    assert spec.layout == Layout("text", columns, Tags("r", "c", "u", "a", None, None, None))


def test_text_files_in_an_entry(tmp_path):
    write(tmp_path / "d.txt", [{"text": "x"}])
    spec = read_entry(tmp_path, {"file_name": "d.txt"}, "pt")
    assert spec.layout == Layout("text", Columns("text", None, None, messages=None))
    with pytest.raises(ValueError, match=r"name: file_name: .*d\.txt: .* set stage: pt"):
        read_entry(tmp_path, {"file_name": "d.txt"})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"hf_hub_url": "a/b"}, "'hf_hub_url' is not supported: .* 'file_name' in place of this"),
        ({"ms_hub_url": "a/b"}, "'ms_hub_url' is not supported: .*save its files"),
        ({"om_hub_url": "a/b"}, "'om_hub_url' is not supported"),
        ({"script_url": "x"}, "are not run"),
        ({"cloud_file_name": "x"}, "copy the file here"),
        ({"subset": "x"}, "'subset' is not supported"),
        ({"folder": "x"}, "'folder' is not supported"),
        ({"ranking": True}, "preference data"),
        ({"split": "test"}, "'split' 'test' is not supported: local files have no splits"),
        ({"formatting": "chatml"}, "'chatml' is not supported; use 'alpaca', 'sharegpt', 'openai'"),
        ({"formatting": ["alpaca"]}, "'formatting' .* is not supported"),
        ({"file_name": None}, "'file_name' must name a data file, or a folder"),
        ({"file_name": "x.parquet"}, r"x\.parquet: no such file"),
        ({"colums": {}}, "unknown key 'colums'; did you mean 'columns'"),
        ({"zzz": {}}, "unknown key 'zzz'; known: file_name"),
        ({"columns": []}, "columns: must be an object, got list"),
        ({"columns": {"prompt": "p"}}, "columns: response must be given"),
        ({"columns": {"messages": "m"}}, "columns: prompt, response must be given"),
        ({"columns": {"prompt": 1}}, "'prompt' must be a string, got int"),
        ({"columns": {"answer": "x"}}, "unknown name 'answer'; known: prompt"),
        ({"columns": {"promt": "x"}}, "unknown name 'promt'; did you mean 'prompt'"),
        ({"columns": {"images": "x"}}, "'images' is not supported: this trainer reads text only"),
        ({"columns": {"chosen": "x"}}, "'chosen' is not supported: preference data"),
        (SHAREGPT | {"columns": {"prompt": "x"}}, "columns: messages must be given"),
        (SHAREGPT | {"tags": {"role_tag": "r"}}, "content_tag, user_tag, assistant_tag must be"),
        ({"tags": {"bot": "x"}}, "tags: unknown name 'bot'"),
    ],
)
def test_bad_entry_is_refused_by_name(tmp_path, entry, message):
    with pytest.raises(ValueError, match=f"dataset_info.json: name: ?.*{message}"):
        read_entry(tmp_path, entry)


def test_columns_that_pretraining_requires(tmp_path):
    with pytest.raises(ValueError, match="columns: prompt must be given"):
        read_entry(tmp_path, {"columns": {"response": "r"}}, "pt")
    with pytest.raises(ValueError, match="columns: messages must be given"):
        read_entry(tmp_path, SHAREGPT | {"columns": {"prompt": "r"}}, "pt")


def test_bad_dataset_info_file(tmp_path):
    with pytest.raises(ValueError, match="no such file; set dataset_dir"):
        read_dataset_info(tmp_path, ["a"])
    file = tmp_path / "dataset_info.json"
    for damaged in ("{", "\u00e9", "[" * 100_000):
        file.write_text(damaged, encoding="latin-1")
        with pytest.raises(ValueError, match=r"dataset_info\.json: not valid JSON"):
            read_dataset_info(tmp_path, ["a"])
    file.write_text("[]")
    with pytest.raises(ValueError, match="must hold one object"):
        read_dataset_info(tmp_path, ["a"])
    file.write_text('{"gsm8k": 3}')
    with pytest.raises(ValueError, match="no dataset 'gsm8'; did you mean 'gsm8k'"):
        read_dataset_info(tmp_path, ["gsm8"])
    with pytest.raises(ValueError, match="no dataset 'zz'; it has gsm8k"):
        read_dataset_info(tmp_path, ["zz"])
    with pytest.raises(ValueError, match="gsm8k: an entry must be an object, got int"):
        read_dataset_info(tmp_path, ["gsm8k"])
