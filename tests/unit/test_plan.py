"""Parts of a build: every chosen record once, whatever the part size; sampling by seed."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.token_builds import PAIRS, build

from megatron_sdar.data.building.plan import Part, choose_part_bytes, plan_parts
from megatron_sdar.data.readers.spans import read_span
from megatron_sdar.data.sources.datasets import DatasetSpec, Layout
from megatron_sdar.data.storage.tokens import TokenizedDataset


def write_spec(folder: Path, name: str, sizes: list[int], num_samples=None) -> DatasetSpec:
    """A dataset of one file per entry of SIZES, its records numbered through."""
    files, number = [], 0
    for index, size in enumerate(sizes):
        file = folder / f"{name}{index}.jsonl"
        with file.open("w") as stream:
            for _ in range(size):
                stream.write(json.dumps({"prompt": f"{name}", "response": str(number)}) + "\n")
                number += 1
        files.append(file)
    return DatasetSpec(name, tuple(files), PAIRS, (), num_samples)


def taken(parts: list[Part], dataset: int) -> list[int]:
    """Numbers of the records that PARTS take of a dataset, repetitions included."""
    found = []
    for part in parts:
        if part.dataset != dataset:
            continue
        for span, take in zip(part.spans, part.takes, strict=True):
            for place, record in enumerate(read_span(span)):
                times = 1 if take is None else (int(take[place]) if place < len(take) else 0)
                found += [int(record.value["response"])] * times
    return found


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    part_bytes=st.integers(1, 2000),
    max_samples=st.none() | st.integers(1, 60),
    num_samples=st.none() | st.integers(1, 100),
)
@settings(max_examples=60, deadline=None)
def test_parts_hold_the_chosen_records_in_order(
    tmp_path_factory, sizes, part_bytes, max_samples, num_samples
):
    folder = tmp_path_factory.mktemp("plan")
    spec = write_spec(folder, "d", sizes, num_samples if sum(sizes) else None)
    parts = plan_parts([spec, spec], part_bytes, max_samples, seed=7)
    first, second = taken(parts, 0), taken(parts, 1)
    assert first == second == sorted(first)
    if spec.num_samples is None:
        assert first == list(range(sum(sizes)))[:max_samples]
        return
    whole = taken(plan_parts([spec], 10**9, None, seed=7), 0)
    assert len(whole) == num_samples
    assert first == whole[:max_samples]
    if num_samples <= sum(sizes):
        assert len(set(whole)) == num_samples
    else:
        assert set(whole) == set(range(sum(sizes)))


def test_samples_follow_the_seed_and_the_name(tmp_path):
    def draw(name: str, seed: int) -> tuple[int, ...]:
        spec = write_spec(tmp_path, name, [40], 8)
        return tuple(taken(plan_parts([spec], 99, None, seed), 0))

    drawn = {(name, seed): draw(name, seed) for name in ("a", "b") for seed in (1, 2)}
    assert len(set(drawn.values())) == 4
    assert draw("a", 1) == drawn["a", 1]


def test_small_files_share_a_part_and_large_ones_are_divided(tmp_path):
    spec = write_spec(tmp_path, "d", [5, 5, 5, 200])
    size = spec.files[0].stat().st_size
    parts = plan_parts([spec], 3 * size, None, seed=0)
    assert len(parts[0].spans) == 3
    assert len(parts) > 10
    assert sum(part.num_bytes for part in parts) == sum(f.stat().st_size for f in spec.files)


@pytest.mark.parametrize(("total", "expected"), [(10, 2**20), (2**31, 2**21), (2**42, 2**28)])
def test_part_size_grows_with_the_source_within_bounds(tmp_path, total, expected):
    file = tmp_path / "d.jsonl"
    with file.open("wb") as stream:
        stream.truncate(total)
    assert choose_part_bytes([DatasetSpec("d", (file,), Layout())]) == expected


def test_oversampled_records_are_documents_of_their_own(tokenizer, tmp_path):
    spec = write_spec(tmp_path, "d", [3], num_samples=8)
    summary = build([spec], tmp_path / "p", tokenizer, seed=3)
    assert summary.num_documents == 8
    dataset = TokenizedDataset(tmp_path / "p")
    distinct = {dataset.get(i)[0].tobytes() for i in range(8)}
    assert len(distinct) == 3
    assert dataset.metadata.recipe.seed == 3
