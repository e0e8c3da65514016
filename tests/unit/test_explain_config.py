"""tools/explain_config.py: every key has its verdict, secrets stay hidden, torch is not needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_sdar.compat_defaults import THEIR_DEFAULTS
from megatron_sdar.config import load_config, to_flat_dict
from megatron_sdar.config_explanation import explain

ROOT = Path(__file__).resolve().parents[2]
TEXT = """\
model_name_or_path: model
output_dir: out
deepspeed: examples/ds_z3_config.json
gradient_checkpointing: false
packing: true
freeze_vision_tower: true
optim: adamw_torch
trust_remote_code: true
ddp_timeout: 180000000
pure_bf16: true
hf_hub_token: very-secret
swanlab_api_key: very-secret
warmup_ratio: 0.03
lr_scheduler_type: constant
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    return path


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    # -I: what the tool imports is what is installed with the interpreter and the checkout.
    code = "import sys; sys.path[:0] = [sys.argv.pop(1)]; sys.modules['torch'] = None; "
    code += "import runpy; runpy.run_path(sys.argv.pop(1) + '/tools/explain_config.py', "
    code += "run_name='__main__')"
    command = [sys.executable, "-c", code, str(ROOT), str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_each_verdict(path: Path) -> None:
    found = explain([str(path), "cutoff_len=1024", "fp16=true", "sed=1"])
    assert found.config is None
    kinds = {key.key: key.kind for key in found.keys}
    assert kinds["cutoff_len"] == "supported"
    assert kinds["fp16"] == "refused"
    assert kinds["sed"] == "unknown"
    assert [line.split(": ")[1] for line in found.problems] == [
        "fp16",
        "unknown key 'sed'; did you mean 'seed'?",
    ]


def test_defaults_that_are_not_llamafactorys(path: Path) -> None:
    found = {default.key: default for default in explain([str(path)]).defaults}
    assert found.keys() == THEIR_DEFAULTS.keys() - {"neat_packing"}, "packing says it"
    assert (found["semantics"].value, found["semantics"].theirs) == ("exact", "paper")
    assert (found["report_to"].value, found["logging_steps"].value) == ("[]", "10")
    given = ["preset=paper", "report_to=none", "logging_steps=500", "template=qwen3"]
    left = {default.key for default in explain([str(path), *given]).defaults}
    assert left == {"finetuning_type", "per_device_eval_batch_size"}
    nothing = [given[0], *given[2:], "packing=null", "report_to=null"]
    left = {default.key for default in explain([str(path), *nothing]).defaults}
    assert left == {"finetuning_type", "per_device_eval_batch_size", "neat_packing", "report_to"}
    assert explain([str(path), "sed=1"]).defaults == ()
    shown = run_tool(str(path)).stdout
    assert "finetuning_type" in shown.split("default is another:")[1].split("# Resolved")[0]
    assert json.loads(run_tool(str(path), "--json").stdout)["defaults"][0]["theirs"] == "lora"


def test_what_keys_become(path: Path) -> None:
    found = explain([str(path)])
    texts = {key.key: (key.kind, key.text) for key in found.keys}
    assert texts == {
        "model_name_or_path": ("supported", ""),
        "output_dir": ("supported", ""),
        "deepspeed": ("mapped", "data_parallel_sharding_strategy: optim_grads_params"),
        "gradient_checkpointing": ("mapped", "recompute_granularity: none"),
        "packing": ("mapped", "neat_packing: true"),
        "freeze_vision_tower": ("ignored", "SDAR is text only, it has no vision tower"),
        "optim": ("ignored", "it asks for what happens anyway"),
        "trust_remote_code": (
            "ignored", "no code of a model directory is executed; it is never needed"
        ),
        "ddp_timeout": ("mapped", "ddp_timeout: 2147483"),
        "pure_bf16": (
            "mapped",
            "bf16: true; the optimizer keeps float32 weights, which is more exact and takes more "
            "memory",
        ),
        "hf_hub_token": ("ignored", "nothing is downloaded or uploaded"),
        "swanlab_api_key": ("ignored", texts["swanlab_api_key"][1]),
        "warmup_ratio": ("supported", ""),
        "lr_scheduler_type": ("supported", ""),
    }  # fmt: skip
    assert found.config == load_config([str(path)])
    assert any("constant has no warm-up" in note for note in found.notes)
    assert not any("freeze_vision_tower" in note for note in found.notes), "the table says it"


def test_secrets_are_not_shown(path: Path) -> None:
    result = run_tool(str(path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("(hidden)") == 2
    assert "very-secret" not in result.stdout + run_tool(str(path), "--json").stdout


def test_the_resolved_configuration_is_one_that_runs(path: Path, tmp_path: Path) -> None:
    native = tmp_path / "native.yaml"
    native.write_text(run_tool(str(path), "--resolved", "cutoff_len=1024").stdout)
    config = load_config([str(native)])
    assert config == load_config([str(path), "cutoff_len=1024"])
    assert not any(word in line for line in config.warnings for word in ("ignored", "taken as"))
    table = run_tool(str(path), "cutoff_len=1024", "--width", "200").stdout
    assert yaml.safe_load(table[table.index("# Resolved") :]) == to_flat_dict(config)


def test_json_and_exit_status(path: Path) -> None:
    good = json.loads(run_tool(str(path), "--json").stdout)
    assert good["config"]["recompute_granularity"] == "none"
    assert good["keys"][2]["where"] == f"{path}:3"
    bad = run_tool(str(path), "--json", "fp16=true", "new=1")
    assert bad.returncode == 1
    assert json.loads(bad.stdout)["config"] is None
    assert [line.split(":")[0] for line in bad.stderr.splitlines()] == ["error", "error"]
    assert run_tool(str(path), "--allow-unknown", "new=1").returncode == 0


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    result = run_tool(str(tmp_path / "none.yaml"))
    assert result.returncode == 1
    assert "error: " in result.stderr
    assert "cannot read" in result.stderr
    assert result.stdout == ""
