"""Malformed inputs from strangers: each ends in one readable ValueError, soon and in little memory.

The tables of cases are in malformed_configs, malformed_models and malformed_data.
"""

import shutil
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from unit.malformed_configs import CONFIGS, Case
from unit.malformed_data import DATA
from unit.malformed_models import MODELS
from unit.tiny_hf import write_model

from megatron_sdar.architecture import load_architecture
from megatron_sdar.checkpoint.hf_source import HfModel
from megatron_sdar.config import load_config
from megatron_sdar.data.sources.dataset_info import read_dataset_info
from megatron_sdar.data.storage.metadata import (
    Recipe,
    TokenizedMetadata,
    read_metadata,
    write_metadata,
)
from megatron_sdar.data.tokenization.tokenizer import load_tokenizer

SECONDS = 20
PEAK_BYTES = 64 * 2**20


@contextmanager
def bounded() -> Iterator[None]:
    """TimeoutError after SECONDS, and an upper limit for what Python allocates."""

    def expire(number: int, frame: object) -> None:
        raise TimeoutError("a malformed input hangs")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(SECONDS)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(read: Callable[[], object], words: str, *names: str) -> None:
    """READ raises ValueError itself, not a kind of it that only a library would raise."""
    with bounded(), pytest.raises(ValueError, match=words) as caught:
        read()
    assert caught.type.__module__.partition(".")[0] in ("builtins", "megatron_sdar")
    assert caught.type not in (UnicodeDecodeError, UnicodeEncodeError)
    assert any(name in str(caught.value) for name in names), "names no file"


def ids(cases: list[Case]) -> list[str]:
    names = [name for name, *_ in cases]
    assert len(set(names)) == len(names)
    return names


def test_there_are_200() -> None:
    assert len({(file, content) for _, file, content, _ in [*CONFIGS, *MODELS, *DATA]}) >= 200


@pytest.mark.parametrize("case", CONFIGS, ids=ids(CONFIGS))
def test_configuration(tmp_path: Path, case: Case) -> None:
    _, file, content, words = case
    (tmp_path / file).write_bytes(content)
    refused(lambda: load_config([str(tmp_path / file)]), words, file)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "model"
    write_model(directory)
    HfModel(directory, load_architecture(directory))
    return directory


@pytest.mark.parametrize("case", MODELS, ids=ids(MODELS))
def test_model_directory(tmp_path: Path, model: Path, case: Case) -> None:
    _, file, content, words = case
    arch = load_architecture(model)
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / file).write_bytes(content)
    refused(lambda: HfModel(tmp_path / "model", arch), words, str(tmp_path / "model"))


@pytest.mark.parametrize("case", DATA, ids=ids(DATA))
def test_data_and_tokenizer(tmp_path: Path, demo: Path, case: Case) -> None:
    _, file, content, words = case
    (tmp_path / "d.jsonl").write_text("{}\n")
    if file in ("tokenizer_config.json", "added_tokens.json"):
        shutil.copy(demo / "model" / "tokenizer.json", tmp_path)
    (tmp_path / file).write_bytes(content)
    if file == "dataset_info.json":
        refused(lambda: read_dataset_info(tmp_path, ["d"]), words, file)
    elif file == "p.json":
        refused(lambda: read_metadata(tmp_path / "p"), words, file)
    else:
        refused(lambda: load_tokenizer(tmp_path), words, str(tmp_path))


@pytest.mark.parametrize("source", [5, {}, {"layout": 5}, {"layout": {"formatting": []}}], ids=str)
def test_token_metadata_with_a_true_fingerprint(tmp_path: Path, source: dict) -> None:
    recipe = Recipe("tokenizer", {}, [source], None)
    write_metadata(tmp_path / "p", TokenizedMetadata(1, 1, 1, 0, 3, 2, 1, 9, recipe))
    refused(lambda: read_metadata(tmp_path / "p"), "'sources' must be objects", "p.json")
