"""One checkout for all pages: `make demo`, with which each of them begins, runs once."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from docs.reader import ROOT, Result, run


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("reader") / "megatron_sdar"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "demo", "output", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, target, ignore=ignored)
    return target


@pytest.fixture(scope="session")
def made_demo(checkout: Path) -> Result:
    """What `make demo` printed; its files lie in the checkout."""
    return run(f"make demo PYTHON={sys.executable}", checkout)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> bool:
    """Whether this interpreter finds this checkout's packages by itself."""
    code = "import megatron_sdar, sdar_kernels as k; print(megatron_sdar.__file__, k.__file__)"
    found = run(f'python -c "{code}"', tmp_path_factory.mktemp("elsewhere")).stdout.split()
    return len(found) == 2 and all(Path(path).is_relative_to(ROOT) for path in found)
