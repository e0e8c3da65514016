"""Malformed inputs by the tool that reads them: the tables, each case with a command line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from unit.malformed_checkpoints import CHECKPOINTS
from unit.malformed_configs import CONFIGS
from unit.malformed_data import DATA
from unit.malformed_models import MODELS
from unit.tool_runs import run_tool
from unit.tool_workplace import Workplace

_MODEL_TOOLS = ("convert_checkpoint", "merge_adapter", "generate", "evaluate", "pretrain")
_NUMBERS = (b"5", b"[]", b'"text"', b"null", b"{}", b"[" * 200_000, b"\xff", b"{", b"")


@dataclass(frozen=True)
class Refusal:
    """A tool, a file spoiled for it, and words of the message."""

    tool: str
    name: str
    file: str
    content: bytes
    words: str
    arguments: Sequence[str]

    def run(self, place: Workplace, folder: Path) -> str | None:
        """What is wrong with how the tool refuses it; None: nothing."""
        copy = place.copy(folder)
        path = copy.spoil(self.file, self.content)
        if "checkpoint-" in self.file and path.name != "COMMITTED":
            copy.resign(next(parent for parent in path.parents if "checkpoint-" in parent.name))
        outcome = run_tool(self.tool, self.arguments, copy.root)
        problem = outcome.problem(self.words)
        return problem and f"{self.tool}, {self.name}: {problem}"


def every_refusal(place: Workplace) -> Iterator[Refusal]:
    """All cases of all tables with every tool that reads such a file."""
    usual = place.arguments
    for name, file, content, words in CONFIGS:
        yield Refusal("pretrain", name, file, content, words, [file])
        yield Refusal("explain_config", name, file, content, words, [file])
        yield Refusal("doctor", name, file, content, "", [file, "--json"])
        record = usual("replay_step")[1]
        yield Refusal("replay_step", name, file, content, words, [file, record])
    for name, file, content, words in MODELS:
        for tool in _MODEL_TOOLS:
            arguments = with_option(with_option(usual(tool), "--from", "model"), "--model", "model")
            yield Refusal(tool, name, f"model/{file}", content, words, arguments)
        if file == "config.json":
            yield Refusal("doctor", name, "model/config.json", content, "", usual("doctor"))
    yield from _data(place)
    for name, file, content, _ in CHECKPOINTS:
        where = f"run/checkpoint-2/{file if file == 'COMMITTED' else 'model/index.json'}"
        for tool in ("convert_checkpoint", "generate", "evaluate"):
            named = with_option(usual(tool), "--from", "run/checkpoint-2")
            arguments = with_option(named, "--model", "run/checkpoint-2")
            yield Refusal(tool, name, where, content, "", arguments)
        resume = ["run.yaml", "max_steps=3", "resume_from_checkpoint=run/checkpoint-2"]
        yield Refusal("pretrain", name, where, content, "", resume)
    yield from _others(place)


def _data(place: Workplace) -> Iterator[Refusal]:
    usual = place.arguments
    for name, file, content, words in DATA:
        if file == "dataset_info.json":
            yield Refusal("preprocess_data", name, file, content, words, usual("preprocess_data"))
            dataset = ["--dataset" if part == "--data-path" else part for part in usual("evaluate")]
            dataset[dataset.index("--dataset") + 1] = "d"
            yield Refusal("evaluate", name, file, content, words, [*dataset, "--dataset-dir", "."])
            keys = ["data_path=null", "dataset=d", "dataset_dir=."]
            yield Refusal("pretrain", name, file, content, words, ["again.yaml", *keys])
        elif file == "p.json":
            for tool in ("inspect_data", "evaluate", "pretrain"):
                yield Refusal(tool, name, "tokens.json", content, "tokens.json", usual(tool))
        else:
            for tool in ("preprocess_data", "inspect_data", "generate", "evaluate"):
                arguments = with_option(usual(tool), "--model", "model")
                if tool == "evaluate":
                    arguments += ["--generate-samples", "1"]
                yield Refusal(tool, name, f"model/{file}", content, words, arguments)


def _others(place: Workplace) -> Iterator[Refusal]:
    """What has no table: adapters, states of runs, records of steps, prompts, documents."""
    usual = place.arguments
    wrong: dict[str, object] = {
        "peft_type": "IA3", "r": 0, "lora_alpha": "x", "target_modules": 5, "modules_to_save": 5,
        "bias": "all", "lora_dropout": "x",
    }  # fmt: skip
    adapter = json.loads((place.root / "lora/adapter_config.json").read_text())
    changed = [json.dumps({**adapter, key: value}).encode() for key, value in wrong.items()]
    for content in (*_NUMBERS, *changed):
        name = f"adapter_config.json {content[:20]!r}"
        path = "lora/adapter_config.json"
        yield Refusal("merge_adapter", name, path, content, path, usual("merge_adapter"))
    record = json.loads((place.root / "run/skipped_steps/step-2.json").read_text())
    for key in record:
        for value in ("x", -1, None, [["a"]], {"a": 1}):
            if (key, value) in (("loss", "x"), ("loss", -1), ("grad_norm", "x"), ("grad_norm", -1),
                                ("label_tokens", -1)):  # fmt: skip
                continue
            content = json.dumps({**record, key: value}).encode()
            path = "run/skipped_steps/step-2.json"
            yield Refusal("replay_step", f"{key} {value}", path, content, "", usual("replay_step"))
    for content in _NUMBERS:
        path = "run/skipped_steps/step-2.json"
        yield Refusal("replay_step", str(content[:9]), path, content, path, usual("replay_step"))
        path = "run/checkpoint-2/trainer_state.json"
        resume = ["run.yaml", "max_steps=3"]
        if content != b"{}":  # a checkpoint made of a model has nothing to say
            yield Refusal("pretrain", f"state {content[:9]!r}", path, content, "", resume)
        if content:
            path, generate = "prompts.jsonl", usual("generate")
            yield Refusal("generate", f"prompt {content[:9]!r}", path, content, path, generate)
        arguments, words = usual("preprocess_data"), "d.jsonl|error: d: "
        name = f"record {content[:9]!r}"
        yield Refusal("preprocess_data", name, "d.jsonl", content, words, arguments)
    own = json.loads((place.root / "run/checkpoint-2/trainer_state.json").read_text())
    state = own["stateful_callbacks"]["megatron_sdar"]
    for key in ("loader", "interval", "best", "skipped"):
        for value in (5, [], "x", {}):
            changed_state = {"stateful_callbacks": {"megatron_sdar": {**state, key: value}}}
            content = json.dumps({**own, **changed_state}).encode()
            path = "run/checkpoint-2/trainer_state.json"
            yield Refusal("pretrain", f"{key} {value}", path, content, path, resume)


def with_option(arguments: Sequence[str], option: str, value: str) -> list[str]:
    """The command line with another value of an option, if it has the option."""
    changed = list(arguments)
    if option in changed:
        changed[changed.index(option) + 1] = value
    return changed
