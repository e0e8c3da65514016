"""A user's folder with one good thing of each kind that tools read, made once, then spoiled.

Everything is of the demo: documents, token files, a model with weights, a run with checkpoints, a
LoRA run, the record of a skipped step, prompts.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from unit.tiny_hf import resign, write_model
from unit.tool_runs import run_tool

from megatron_sdar.architecture import load_architecture
from megatron_sdar.checkpoint.checksums import FileRecord, file_record
from megatron_sdar.checkpoint.run_lock import RUN_LOCK_NAME
from megatron_sdar.checkpoint.tensor_names import model_tensor_shapes
from megatron_sdar.data.demo import make_demo_data


@dataclass(frozen=True)
class Workplace:
    """Where things lie; every path that a file or a command line holds is relative to `root`."""

    root: Path

    def copy(self, to: Path) -> Workplace:
        """The same in another folder. Files are shared with this one until `spoil` parts them."""
        shutil.copytree(self.root, to, copy_function=os.link)
        copy = Workplace(to)
        for path in self.root.glob(f"*/{RUN_LOCK_NAME}"):  # written in place
            copy.spoil(str(path.relative_to(self.root)), path.read_bytes())
        return copy

    def spoil(self, name: str, content: bytes) -> Path:
        """Replace a file of the copy only."""
        path = self.root / name
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        return path

    def resign(self, checkpoint: Path) -> None:
        """Make a spoiled checkpoint of the copy look complete."""
        marker = checkpoint / "COMMITTED"
        content = marker.read_bytes()
        marker.unlink()  # not written through to the checkpoint that it is a link to
        marker.write_bytes(content)
        resign(checkpoint)

    def contents(self) -> dict[str, FileRecord]:
        """What every file holds."""
        files = [path for path in sorted(self.root.rglob("*")) if path.is_file()]
        return {str(path.relative_to(self.root)): file_record(path) for path in files}

    def config(self, name: str, **changes: object) -> Path:
        """A configuration of two steps; None removes a key."""
        values: dict[str, object] = {
            "model_name_or_path": "model",
            "data_path": "tokens",
            "cutoff_len": 128,
            "block_length": 4,
            "per_device_train_batch_size": 1,
            "max_steps": 2,
            "save_steps": 1,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "recompute_granularity": "none",
            "output_dir": name,
            "device": "cpu",
            **changes,
        }
        path = self.root / f"{name}.yaml"
        kept = {key: value for key, value in values.items() if value is not None}
        path.write_text(yaml.safe_dump(kept))
        return path

    def arguments(self, tool: str) -> list[str]:
        """A command line that works, relative to the folder."""
        return {
            "pretrain": ["again.yaml"],
            "doctor": ["again.yaml", "--json"],
            "explain_config": ["again.yaml"],
            "replay_step": ["run.yaml", "run/skipped_steps/step-2.json"],
            "preprocess_data": ["--dataset", "d", "--dataset-dir", ".", "--tokenizer", "model",
                                "--output-prefix", "out/tokens", "--num-workers", "1"],
            "inspect_data": ["tokens", "--tokenizer", "model", "--rows", "1", "--cutoff-len",
                             "128"],
            "convert_checkpoint": ["--from", "run", "--to", "out/model", "--format", "hf"],
            "merge_adapter": ["--model", "model", "--adapter", "lora", "--to", "out/merged"],
            "generate": ["--model", "run", "--input", "prompts.jsonl", "--output",
                         "answers.jsonl", "--max-new-tokens", "4", "--device", "cpu"],
            "evaluate": ["--model", "run", "--data-path", "tokens", "--output-dir", "evaluated",
                         "--cutoff-len", "128", "--max-documents", "4", "--noise-levels", "1",
                         "--device", "cpu"],
        }[tool]  # fmt: skip


def make_workplace(root: Path) -> Workplace:
    """Make everything; about ten seconds."""
    place = Workplace(root)
    make_demo_data(root, 40)
    arch = load_architecture(root / "model")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.05 + (len(shape) == 1)
        for name, shape in model_tensor_shapes(arch).items()
    }
    kept = {path.name: path.read_bytes() for path in (root / "model").iterdir()}
    write_model(root / "model", tensors)
    (root / "model" / "vocab.json").unlink()
    (root / "model" / "merges.txt").unlink()
    for name, content in kept.items():
        (root / "model" / name).write_bytes(content)
    info = {"file_name": "d.jsonl", "columns": {"prompt": "prompt", "response": "response"}}
    (root / "dataset_info.json").write_text(json.dumps({"d": info}))
    (root / "train.jsonl").rename(root / "d.jsonl")
    (root / "prompts.jsonl").write_text('{"prompt": "What is 1 + 1?"}\n')
    build = ["--input", "d.jsonl", "--tokenizer", "model", "--output-prefix", "tokens"]
    _run("preprocess_data", build, root)
    _run("pretrain", [place.config("run").name], root)
    lora = {"finetuning_type": "lora", "lora_rank": 2}
    _run("pretrain", [place.config("lora", **lora).name], root)
    place.config("again", overwrite_output_dir=True)
    state = json.loads((root / "run/checkpoint-1/trainer_state.json").read_text())
    record = {
        "step": 2, "skipped_before": [], "loss": "nan", "grad_norm": "nan", "label_tokens": 5,
        "rows_per_micro_batch": 1, "data_parallel_size": 1, "micro_batches": [{"documents": []}],
        "loader": state["stateful_callbacks"]["megatron_sdar"]["loader"],
    }  # fmt: skip
    (root / "run" / "skipped_steps").mkdir()
    (root / "run" / "skipped_steps" / "step-2.json").write_text(json.dumps(record))
    return place


def _run(tool: str, arguments: list, cwd: Path) -> None:
    outcome = run_tool(tool, arguments, cwd)
    assert outcome.code == 0, f"exit code {outcome.code}: {outcome.text}"
