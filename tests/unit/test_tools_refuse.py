"""Malformed inputs through the tools' own entry points: one readable error, no traceback, no hang.

Every table with every tool that reads such a file runs in `make torture`, which prints the count;
here are some of each, and a few as real processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
from unit.tool_refusals import Refusal, every_refusal
from unit.tool_runs import MODULES, Outcome
from unit.tool_workplace import Workplace

ROOT = Path(__file__).resolve().parents[2]
SOME = 4  # of each tool's


def by_tool(place: Workplace) -> dict[str, list[Refusal]]:
    found: dict[str, list[Refusal]] = defaultdict(list)
    for refusal in every_refusal(place):
        found[refusal.tool].append(refusal)
    return found


@pytest.mark.parametrize("tool", MODULES)
def test_some_of_each_tool(workplace: Workplace, tmp_path: Path, tool: str) -> None:
    refusals = by_tool(workplace)[tool]
    chosen = refusals[:: len(refusals) // SOME + 1]
    assert len(chosen) >= SOME - 1
    if tool == "doctor":
        chosen = chosen[:1]  # it looks at the whole machine each time
    problems = [each.run(workplace, tmp_path / str(n)) for n, each in enumerate(chosen)]
    assert not any(problems), "\n".join(filter(None, problems))


@pytest.mark.torture
@pytest.mark.parametrize("tool", MODULES)
def test_all_of_each_tool(
    workplace: Workplace, tmp_path: Path, tool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    began, problems = time.monotonic(), []
    refusals = by_tool(workplace)[tool]
    if tool == "doctor":  # two seconds each, since it looks at the whole machine
        refusals = refusals[::5]
    for number, refusal in enumerate(refusals):
        problems.append(refusal.run(workplace, tmp_path / str(number)))
    inputs = {(refusal.file, refusal.content) for refusal in refusals}
    with capsys.disabled():
        print(
            f"\n{tool}: {len(refusals)} runs on {len(inputs)} malformed inputs: "
            f"{problems.count(None)} readable errors, {len(problems) - problems.count(None)} "
            f"others, {time.monotonic() - began:.0f} s"
        )
    assert not any(problems), "\n".join(filter(None, problems))


def test_how_many_there_are(workplace: Workplace) -> None:
    refusals = list(every_refusal(workplace))
    assert len({(each.file, each.content) for each in refusals}) >= 390
    assert len(refusals) >= 1400


# What the runs above are held to.


@pytest.mark.parametrize(
    ("code", "stderr", "why"),
    [
        (0, "", "exit code 0"),
        (70, "error: x", "exit code 70"),
        (-9, "error: x", "exit code -9"),
        (-14, "", "hangs"),
        (1, "Traceback (most recent call last):\nValueError: x", "traceback"),
        (1, "error: MemoryError", "out of memory"),
        (1, "error: y.json: wrong", "says nothing of"),
        (1, f"error: x.json: {'a' * 5000}", "characters"),
    ],
)
def test_a_run_that_is_no_readable_refusal(code: int, stderr: str, why: str) -> None:
    assert why in str(Outcome(code, "", stderr, 0.0).problem(r"x\.json"))
    assert Outcome(1, "", "error: x.json: wrong; remedy\n", 0.0).problem(r"x\.json") is None


# As real processes.

PROCESSES = {
    "pretrain": ("run.yaml", b"seed: [1\n"),
    "preprocess_data": ("dataset_info.json", b"[" * 200_000),
    "explain_config": ("again.yaml", b"lerning_rate: 1\n"),
}


@pytest.mark.parametrize("tool", PROCESSES)
def test_as_a_process(workplace: Workplace, tmp_path: Path, tool: str) -> None:
    place = workplace.copy(tmp_path / "place")
    file, content = PROCESSES[tool]
    place.spoil(file, content)
    script = ROOT / ("pretrain_sdar.py" if tool == "pretrain" else f"tools/{tool}.py")
    arguments = [file] if tool == "pretrain" else place.arguments(tool)
    done = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=place.root,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    outcome = Outcome(done.returncode, done.stdout, done.stderr, 0.0)
    assert outcome.problem(file) is None, outcome.text
