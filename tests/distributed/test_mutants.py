"""The equality suite goes red for every deliberate defect, so green means something."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed.layouts import mismatches, read_result, reference
from distributed.mutants import MUTANTS, run_mutant
from distributed.world import run_world


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mutants")
    for world in sorted({layout.world for _, layout in MUTANTS.values()}):
        jobs = [
            (run_mutant, (name, directory))
            for name, (_, layout) in MUTANTS.items()
            if layout.world == world
        ]
        run_world(world, jobs, directory)
    return directory


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, results: Path) -> None:
    layout = MUTANTS[name][1]
    result = read_result(layout, results)
    found = mismatches(result, reference(layout.arch, layout.silent_half, layout.views))
    assert found, f"the suite did not notice {name}"
    assert not any(line.startswith("initial") for line in found), "only the step was changed"
