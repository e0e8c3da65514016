"""Fixtures shared by all tests: a process group of one, and where the shared data lies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent

# Spawned ranks import the test modules by name.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests in folders of whole runs need the machine for themselves."""
    folders = [ROOT / "tests" / name for name in ("distributed", "docs")]
    for item in items:
        if any(item.path.is_relative_to(folder) for folder in folders):
            item.add_marker(pytest.mark.alone)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Test tensors are small: on a busy machine a second thread only waits.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def single_process() -> Iterator[None]:
    """A default process group of one rank, as `python pretrain_sdar.py` makes it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout; tests that need it skip without it."""
    path = ROOT.parent / "shared"
    if not (path / "data").is_dir():
        pytest.skip(f"{path} is absent: this test needs the real data kept there")
    return path
