"""docs/: every command runs and does its work, messages are real, links lead somewhere.

Commands run in the order of the pages, after `make demo` as everywhere (see README's test); a
command that stands on several pages runs once.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from docs.reader import ACTIVATE, ROOT, Result, commands_of, run

from megatron_sdar.checkpoint.run_directory import read_marker
from megatron_sdar.config import load_config
from megatron_sdar.config_description import reference_markdown

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
COMMANDS = list(dict.fromkeys(line for page in PAGES for line in commands_of(page)))
RUN = [command for command in COMMANDS if command not in ("make demo", ACTIVATE)]
EXAMPLE = "docs/sdar_demo_full.yaml"


def test_the_pages() -> None:
    names = ["README", "configuration", "guide", "parallelism", "troubleshooting"]
    assert [page.stem for page in PAGES] == names
    assert COMMANDS[:2] == ["make demo", ACTIVATE], "what the others need"


def test_every_command_has_its_own_effect() -> None:
    assert list(EFFECTS) == RUN


@pytest.mark.parametrize("command", RUN, ids=lambda command: command[:70])
def test_command_runs_and_has_its_effect(
    command: str, checkout: Path, installed: bool, made_demo: Result
) -> None:
    if not installed:
        pytest.skip(f"{sys.executable} has not got this checkout installed, as .venv would")
    assert made_demo.returncode == 0, made_demo.stderr[-3000:]
    result = run(command, checkout)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    EFFECTS[command](checkout, result)


def machine_is_ready(checkout: Path, result: Result) -> None:
    del checkout
    assert result.stdout.rstrip().endswith("ready to train")
    for name in ("python", "torch", "triton", "process group", "output_dir"):
        assert re.search(rf"^(ok|slow) +{name} ", result.stdout, re.MULTILINE), name


def keys_were_explained(checkout: Path, result: Result) -> None:
    del checkout
    assert re.search(r"^freeze_vision_tower +true +ignored ", result.stdout, re.MULTILINE)
    assert re.search(r"^cutoff_len +512 +supported ", result.stdout, re.MULTILINE)
    assert "data_parallel_sharding_strategy: optim_grads" in result.stdout


def configuration_was_resolved(checkout: Path, result: Result) -> None:
    values = yaml.safe_load(result.stdout)
    assert values["data_parallel_sharding_strategy"] == "optim_grads"
    path = checkout / "demo/resolved.yaml"
    path.write_text(result.stdout)
    assert load_config([str(path)]) == load_config([str(checkout / EXAMPLE)])


def run_is_ready(checkout: Path, result: Result) -> None:
    assert not (checkout / "demo/guide").exists(), "the doctor only looks"
    for text in ("weights complete (sdar)", "arithmetic: 1 files", "1 processes = tensor 1 x"):
        assert text in " ".join(result.stdout.split()), text


def six_steps_were_trained(checkout: Path, result: Result) -> None:
    output = checkout / "demo/guide"
    for step in (3, 6):
        assert read_marker(output / f"checkpoint-{step}").layout == {"tp": 1, "pp": 1, "dp": 2}
    assert (output / "config.json").exists()
    assert "freeze_vision_tower is ignored" in result.stderr


def log_was_shown(checkout: Path, result: Result) -> None:
    del checkout
    (line,) = result.stdout.splitlines()
    assert json.loads(line), "a record"


def files_were_listed(checkout: Path, result: Result) -> None:
    del checkout
    assert {"COMMITTED", "demo/guide/training_loss.png"} <= set(result.stdout.split())


def runs_were_compared(checkout: Path, result: Result) -> None:
    del checkout
    for name in ("output", "guide"):
        assert re.search(rf"\b{name}\b", result.stdout)


def text_was_generated(checkout: Path, result: Result) -> None:
    del checkout
    assert result.stdout.strip()
    assert re.search(r"^[1-9]\d* tokens, [1-9]\d* forwards", result.stderr, re.MULTILINE)


def checkpoint_was_exported(checkout: Path, result: Result) -> None:
    del result
    assert (checkout / "demo/guide-step-3/model.safetensors.index.json").exists()


def another_machine_was_asked_for(checkout: Path, result: Result) -> None:
    del checkout
    text = " ".join(result.stdout.split())
    assert "8 processes = tensor 2 x pipeline 1 x data 4" in text
    assert "a device has 80.0 GiB" in text


# In the order of the pages.
EFFECTS: dict[str, Callable[[Path, Result], None]] = {
    "python -m megatron_sdar.doctor": machine_is_ready,
    f"python tools/explain_config.py {EXAMPLE}": keys_were_explained,
    f"python tools/explain_config.py {EXAMPLE} --resolved": configuration_was_resolved,
    f"python -m megatron_sdar.doctor {EXAMPLE}": run_is_ready,
    f"torchrun --standalone --nproc_per_node 2 pretrain_sdar.py {EXAMPLE} max_steps=6 "
    "save_steps=3": six_steps_were_trained,
    "tail -n 1 demo/guide/trainer_log.jsonl": log_was_shown,
    "ls demo/guide/checkpoint-6 demo/guide/training_loss.png": files_were_listed,
    "python tools/compare_runs.py demo/output demo/guide": runs_were_compared,
    "python tools/generate.py --model demo/guide --prompt 'What is 27 + 45?' --max-new-tokens 16": (
        text_was_generated
    ),
    "python tools/convert_checkpoint.py --from demo/guide/checkpoint-3 --to demo/guide-step-3 "
    "--format hf --verify": checkpoint_was_exported,
    f"python -m megatron_sdar.doctor {EXAMPLE} tensor_model_parallel_size=2 --processes 8 "
    "--device-memory 80": another_machine_was_asked_for,
}


# What pages say.


def test_the_reference_is_up_to_date() -> None:
    written = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert written == reference_markdown(), "run `make docs`"


def test_links_lead_somewhere() -> None:
    broken = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not (DOCS / target).exists()
    ]
    assert broken == []


def test_memory_figures_are_those_of_the_ready_configs() -> None:
    text = (DOCS / "parallelism.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(configs/\S+)`.*\| (\d+) \|.*\| ([\d.]+) GiB \|$", text, re.MULTILINE)
    assert len(rows) == len(list((ROOT / "configs").glob("sdar_*.yaml")))
    for path, processes, memory in rows:
        config = (ROOT / path).read_text(encoding="utf-8")
        assert f"# processes: {processes} (" in config
        assert f"# memory: {memory} GiB a process" in config


def messages() -> list[str]:
    """Texts of the source, parts that are filled in replaced by a NUL."""
    found = []
    for folder in ("megatron_sdar", "kernels", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = (getattr(part, "value", None) for part in node.values)
                    found.append("".join(p if isinstance(p, str) else "\0" for p in parts))
    return found


def is_real(message: str, texts: list[str]) -> bool:
    """Whether one text of the source could be this message; `...` is what is filled in."""
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    return any(re.search(pattern, text) for text in texts)


def test_messages_are_real() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### `(.*)`$", text, re.MULTILINE)
    assert len(headings) > 20
    texts = messages()
    assert [heading for heading in headings if not is_real(heading, texts)] == []
    assert not is_real("cutoff_len=... is no multiple of block_length=...", texts)
