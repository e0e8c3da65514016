"""The house rules that a reader relies on, checked on the syntax tree of every source file.

Imports point one way, torch.distributed stays inside parallel/, the environment is read in two
places, every file says what it owns. `violations` is itself proved on synthetic trees that break
one rule each.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CONFIG, ENTRY = 0, 6
CONFIG_FILES = (
    "architecture", "compat", "compat_defaults", "compat_ignored", "compat_mapped",
    "compat_refused", "config",
    "config_batch",
    "config_description", "config_explanation", "config_fields", "config_rules", "config_sections",
    "config_presets", "config_rules_diffusion", "config_rules_evaluation",
    "config_rules_finetuning", "config_weights",
    "config_yaml", "regular_files",
)  # fmt: skip
LAYERS = {
    **dict.fromkeys(CONFIG_FILES, CONFIG),
    "diffusion": 1, "data": 1,
    "parallel": 2,
    "model": 3,
    "optim": 4, "checkpoint": 4,
    "training": 5, "generation": 5, "benchmark": 5, "doctor": 5,
}  # fmt: skip
OURS = {"megatron_sdar", "sdar_kernels", "tools", "pretrain_sdar"}
KERNEL_LIBRARIES = {"sdar_kernels", "torch", "triton", "numpy", "einops"}
CONFIG_LIBRARIES = {"megatron_sdar", "yaml"}
# Weights are DTensors and layers are handed a mesh, so both types may be named anywhere; what
# communicates may not.
DISTRIBUTED_TYPES = {
    "torch.distributed.device_mesh.DeviceMesh",
    "torch.distributed.tensor.DTensor",
}
ENVIRONMENT_READERS = {"pretrain_sdar.py", "megatron_sdar/parallel/mesh.py"}
NAMELESS_FILES = {"utils.py", "common.py", "helpers.py", "misc.py"}


def violations(root: Path) -> list[str]:
    """Every broken house rule under `root`, as `path: what`."""
    found = []
    edges: dict[tuple[str, str], str] = {}
    for path in source_files(root):
        name = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imports = list(imported_modules(tree, name))
        part, level = place(name)
        if level is None:
            found.append(f"{name}: {part} has no layer; give it one in this test")
        found += [f"{name}: {what}" for what in file_problems(path, tree, name)]
        for module in imports:
            target, target_level = place(module.replace(".", "/"))
            own = module.split(".")[0] in OURS
            if part == "sdar_kernels" and foreign(module, KERNEL_LIBRARIES):
                found.append(f"{name}: a kernel imports {module}")
            elif level == CONFIG and part in CONFIG_FILES and foreign(module, CONFIG_LIBRARIES):
                found.append(f"{name}: the configuration imports {module}")
            elif not own or level is None or target_level is None:
                continue
            elif target_level > level:
                found.append(f"{name}: {part} imports {target}, a layer above it")
            elif target_level == level and target != part and part in LAYERS:
                edges.setdefault((part, target), name)
        if part != "parallel":
            found += [
                f"{name}: uses {module}; only parallel/ may"
                for module in [*imports, *attribute_chains(tree)]
                if within(module, "torch.distributed")
                and module not in DISTRIBUTED_TYPES
                and not (part == "checkpoint" and within(module, "torch.distributed.checkpoint"))
            ]
    for (part, target), name in edges.items():
        if (target, part) in edges and part < target and part not in CONFIG_FILES:
            found.append(f"{name}: {part} and {target} import each other")
    return found


def source_files(root: Path) -> Iterator[Path]:
    for folder in ("megatron_sdar", "kernels/sdar_kernels", "tools"):
        yield from sorted((root / folder).rglob("*.py"))
    yield from root.glob("*.py")


def place(path: str) -> tuple[str, int | None]:
    """The part that a file or module belongs to, and its layer (None: not placed)."""
    parts = path.removesuffix(".py").removeprefix("kernels/").split("/")
    if parts[0] == "sdar_kernels":
        return "sdar_kernels", CONFIG
    if parts[0] != "megatron_sdar":
        return parts[0], ENTRY
    if len(parts) == 1 or parts[1] == "__init__":
        return "megatron_sdar", CONFIG
    return parts[1], LAYERS.get(parts[1])


def imported_modules(tree: ast.AST, name: str) -> Iterator[str]:
    """Absolute dotted names; `from a import b` yields a.b, since b may be a module."""
    package = name.removeprefix("kernels/").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def attribute_chains(tree: ast.AST) -> Iterator[str]:
    """`torch.distributed` reached from a plain `import torch`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def foreign(module: str, libraries: set[str]) -> bool:
    top = module.split(".")[0]
    return top not in libraries and top not in sys.stdlib_module_names


def file_problems(path: Path, tree: ast.Module, name: str) -> Iterator[str]:
    if not ast.get_docstring(tree):
        yield "has no module docstring"
    if path.name in NAMELESS_FILES:
        yield "is not named after what it owns"
    if name in ENVIRONMENT_READERS:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = {node.attr} if node.value.id == "os" else set()
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            names = {alias.name for alias in node.names}
        else:
            continue
        if names & {"environ", "getenv", "environb", "getenvb"}:
            yield f"line {node.lineno}: reads the environment"


# The rules hold here.


def test_the_house_is_in_order() -> None:
    assert violations(ROOT) == []


def test_every_part_was_looked_at() -> None:
    names = [path.relative_to(ROOT).as_posix() for path in source_files(ROOT)]
    assert {place(name)[0] for name in names} >= {*LAYERS, "sdar_kernels"}
    assert len(names) >= 40


# The rules bite.


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A small tree that breaks no rule."""
    for name, text in {
        "megatron_sdar/__init__.py": "",
        "megatron_sdar/config.py": "import json\nimport yaml\nfrom megatron_sdar import compat\n",
        "megatron_sdar/compat.py": "from pathlib import Path\n",
        "megatron_sdar/data/rows.py": "from megatron_sdar.diffusion import noise\n",
        "megatron_sdar/diffusion/noise.py": "from megatron_sdar.config import DataConfig\n",
        "megatron_sdar/parallel/mesh.py": "import os, torch.distributed as d\nos.environ['RANK']\n",
        "megatron_sdar/model/sdar.py": "from ..parallel import mesh\nimport sdar_kernels.swiglu\n",
        "megatron_sdar/model/weights.py": "from torch.distributed.tensor import DTensor\n",
        "megatron_sdar/checkpoint/native.py": "from torch.distributed.checkpoint import save\n",
        "megatron_sdar/training/step.py": "from . import loop\nfrom megatron_sdar.optim import a\n",
        "kernels/sdar_kernels/swiglu.py": "import torch, math\nfrom . import reference\n",
        "tools/convert.py": "from megatron_sdar.checkpoint.native import load\n",
        "pretrain_sdar.py": "import os\nos.getenv('RANK')\nimport megatron_sdar.training.step\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""Owns {name}."""\n{text}')
    assert violations(tmp_path) == []
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("megatron_sdar/config.py", "from megatron_sdar.optim import a", "imports optim, a layer"),
        ("megatron_sdar/config.py", "import torch", "the configuration imports torch"),
        ("megatron_sdar/data/rows.py", "import megatron_sdar.parallel.mesh", "data imports par"),
        ("megatron_sdar/data/rows.py", "from megatron_sdar import model", "data imports model"),
        ("megatron_sdar/data/rows.py", "from .. import model", "data imports model"),
        ("megatron_sdar/data/rows.py", "from ..model.sdar import M", "data imports model"),
        ("megatron_sdar/data/rows.py", "def f():\n    import megatron_sdar.model", "imports model"),
        ("megatron_sdar/parallel/mesh.py", "from ..model import sdar", "parallel imports model"),
        ("megatron_sdar/model/sdar.py", "from ..optim import a", "model imports optim"),
        ("megatron_sdar/optim/a.py", "from megatron_sdar.training import x", "imports training"),
        ("megatron_sdar/training/step.py", "import tools.convert", "imports tools"),
        ("megatron_sdar/diffusion/noise.py", "from ..data import rows", "import each other"),
        ("megatron_sdar/newcomer/a.py", "x = 1", "newcomer has no layer"),
        ("kernels/sdar_kernels/swiglu.py", "import megatron_sdar.config", "a kernel imports megat"),
        ("kernels/sdar_kernels/swiglu.py", "import transformers", "a kernel imports transformers"),
        ("megatron_sdar/model/sdar.py", "import torch.distributed", "only parallel/ may"),
        ("megatron_sdar/model/sdar.py", "from torch import distributed as d", "only parallel/ may"),
        ("megatron_sdar/model/sdar.py", "from torch.distributed import all_reduce", "only paral"),
        ("megatron_sdar/model/sdar.py", "import torch\ntorch.distributed.barrier()", "only parall"),
        ("megatron_sdar/model/sdar.py", "from torch.distributed.tensor import distribute_tensor",
         "uses torch.distributed.tensor.distribute_tensor"),
        ("megatron_sdar/checkpoint/native.py", "from torch.distributed import barrier", "only par"),
        ("tools/convert.py", "import torch.distributed.checkpoint", "only parallel/ may"),
        ("pretrain_sdar.py", "import torch.distributed", "only parallel/ may"),
        ("megatron_sdar/model/sdar.py", "import os\nx = os.environ.get('A')", "line 3: reads the"),
        ("megatron_sdar/model/sdar.py", "import os\nx = os.getenv('A')", "reads the environment"),
        ("tools/convert.py", "from os import environ", "reads the environment"),
        ("megatron_sdar/model/utils.py", "x = 1", "is not named after what it owns"),
        ("kernels/sdar_kernels/common.py", "x = 1", "is not named after what it owns"),
    ],
)  # fmt: skip
def test_each_violation_is_found(house: Path, name: str, text: str, what: str) -> None:
    path = house / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'"""Owns it."""\n{text}\n')
    found = violations(house)
    assert len(found) == 1, found
    assert what in found[0]


def test_a_missing_docstring_is_found(house: Path) -> None:
    (house / "megatron_sdar/__init__.py").write_text("x = 1\n")
    assert violations(house) == ["megatron_sdar/__init__.py: has no module docstring"]


def test_the_kernels_folder_does_not_pose_as_the_pypi_package() -> None:
    """transformers probes for a package called `kernels`; from our root it must not find ours."""
    installed = any(d.metadata["Name"] == "kernels" for d in metadata.distributions())
    probe = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    answer = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == str(installed)
    assert not (ROOT / "kernels" / "__init__.py").exists()
