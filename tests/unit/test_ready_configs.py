"""The shipped configurations fit the models and processes that they name, and say what it costs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sdar.architecture import load_architecture
from megatron_sdar.benchmark.model_shapes import MODEL_CONFIGS
from megatron_sdar.config import load_config, validate
from megatron_sdar.training.memory_estimate import GIB, RESERVE, estimate_memory
from megatron_sdar.training.setup import check_schedule

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("sdar_*.yaml"))
CARD = 80 * 10**9


def test_the_list() -> None:
    names = ["sdar_1p7b_8gpu", "sdar_4b_8gpu", "sdar_8b_8gpu", "sdar_8b_multinode"]
    assert [path.stem for path in CONFIGS] == names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_ready_config_fits_and_its_figures_are_right(path: Path, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    size = path.stem.split("_")[1].replace("p", ".")
    (tmp_path / "config.json").write_text(json.dumps(MODEL_CONFIGS[size]))
    arch = replace(load_architecture(tmp_path), tie_word_embeddings=False)
    config = load_config([str(path)])
    assert config.warnings == ()
    assert size.upper() in config.model.model_name_or_path

    found = re.search(
        r"^# processes: (\d+) \(tensor (\d+) x pipeline (\d+) x data (\d+)\)$", text, re.M
    )
    assert found is not None
    world, *sizes = map(int, found.groups())
    validate(config, arch, world)
    check_schedule(config)
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    assert sizes == [tp, pp, world // (tp * pp)]

    largest = max(estimate_memory(config, arch, world), key=lambda rank: rank.total)
    stated = re.search(r"^# memory: ([\d.]+) GiB a process\n((?:#.*\n)+)", text, re.M)
    assert stated is not None
    assert float(stated[1]) == pytest.approx(largest.total / GIB, abs=0.051)
    # The comment's parts, wherever its lines break.
    comment = " ".join(stated[2].replace("#", " ").split())
    parts = {name: f"{value / GIB:.1f}" for name, value in vars(largest).items()}
    assert " + ".join(f"{name} {value}" for name, value in parts.items()) in comment
    assert largest.total < (1 - RESERVE) * CARD
