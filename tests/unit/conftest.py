"""Demo data and its tokenizer, made once for all tests that build token files."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from unit.tool_workplace import Workplace, make_workplace

from megatron_sdar.data.demo import make_demo_data
from megatron_sdar.data.sources.datasets import DatasetSpec, dataset_from_file
from megatron_sdar.data.tokenization.tokenizer import SdarTokenizer, load_tokenizer


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    make_demo_data(folder, 300)
    return folder


@pytest.fixture(scope="session")
def tokenizer(demo) -> SdarTokenizer:
    return load_tokenizer(demo / "model")


@pytest.fixture
def spec(demo, tmp_path) -> DatasetSpec:
    """The first 20 documents, in a file of the test's own."""
    lines = (demo / "train.jsonl").read_text().splitlines(keepends=True)[:20]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    return dataset_from_file(tmp_path / "train.jsonl")


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Iterator[Workplace]:
    """One good thing of each kind that tools read. Work on a copy of it."""
    place = make_workplace(tmp_path_factory.mktemp("workplace"))
    before = place.contents()
    yield place
    assert place.contents() == before, "a test wrote through the links of its copy"
