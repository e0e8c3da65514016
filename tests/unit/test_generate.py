"""The generation tool: prompts as in training, streamed text, and the command itself."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from distributed.command import run_python
from distributed.layouts import Layout
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from unit.tiny_hf import make_config

from megatron_sdar.checkpoint.native import save_checkpoint
from megatron_sdar.data.sources.conversations import Conversation, Turn
from megatron_sdar.data.templates.template import TemplateOptions, encode_conversation
from megatron_sdar.data.tokenization.tokenizer import SdarTokenizer, load_tokenizer
from megatron_sdar.generation.job import run_job
from megatron_sdar.generation.loading import load_stages, open_model
from megatron_sdar.generation.prompts import Prompt, PromptOptions, prompt_ids, read_prompts
from megatron_sdar.generation.reference_sampler import generate
from megatron_sdar.generation.text import TextRequest, TextStream, sampler_config
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.model.partition import build_stages
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.model.weights import initialize, materialize
from megatron_sdar.parallel.mesh import LaunchInfo, build_mesh

ROOT = Path(__file__).resolve().parents[2]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"]
CPU = torch.device("cpu")


def _byte_tokenizer() -> Tokenizer:
    """256 bytes and the special tokens: ids 0 to 259."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return backend


@pytest.fixture
def tokenizer() -> SdarTokenizer:
    return SdarTokenizer(_byte_tokenizer(), "test")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, single_process: None) -> Path:
    """An export of a small random model with its tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    arch = replace(
        Layout("generate").arch,
        vocab_size=260,
        mask_token_id=259,
        eos_token_id=(258, 256),
        num_hidden_layers=2,
    )
    options = ModelOptions(260, torch.float32, False, "none", "tiled")
    (stage,) = build_stages(arch, build_mesh(CPU, 1, 1), options)
    materialize([stage], CPU)
    initialize([stage], seed=1)
    tensors = {n: p._local_tensor.detach() for n, p in stage.named_parameters()}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(arch.to_hf_config()))
    _byte_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


@pytest.mark.parametrize("enable_thinking", [True, False])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_prompt_is_what_training_left_untrained(
    tokenizer: SdarTokenizer, enable_thinking: bool, system: str | None
) -> None:
    prompt = Prompt("Why?", system=system or "")
    ids = prompt_ids(tokenizer, prompt, PromptOptions(enable_thinking=enable_thinking))
    conversation = Conversation(
        (Turn("user", "Why?", "assistant", "Because."),), system=system or ""
    )
    trained_on, labels = encode_conversation(
        tokenizer, conversation, TemplateOptions(enable_thinking=enable_thinking)
    )
    assert ids == trained_on[labels == -100].tolist() == trained_on[: len(ids)].tolist()


def test_the_prompt_in_words(tokenizer: SdarTokenizer) -> None:
    def text(prompt: Prompt, **options: bool) -> str:
        return tokenizer.decode(prompt_ids(tokenizer, prompt, PromptOptions(**options)))

    question = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert text(Prompt("Why?")) == question
    empty_thought = "<think>\n\n</think>\n\n"
    assert text(Prompt("Why?"), enable_thinking=False) == question + empty_thought
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert text(Prompt("Why?", system="Be brief.")) == system + question
    assert text(Prompt("Why?"), raw=True) == "Why?"


def test_pieces_are_tokenised_apart_with_the_real_tokenizer(shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "tokenizer" / "qwen3")
    conversation = Conversation((Turn("user", "What is 2+2?", "assistant", "4"),))
    ids, labels = encode_conversation(
        tokenizer, conversation, TemplateOptions(enable_thinking=False)
    )
    options = PromptOptions(enable_thinking=False)
    asked = prompt_ids(tokenizer, Prompt("What is 2+2?"), options)
    assert asked == ids[labels == -100].tolist()


def test_what_only_the_template_can_say_is_refused_with_raw(tokenizer: SdarTokenizer) -> None:
    with pytest.raises(ValueError, match="leave out --system or --raw"):
        prompt_ids(tokenizer, Prompt("x", system="y"), PromptOptions(raw=True))
    messages = Prompt("", conversation=Conversation((Turn("user", "a", "assistant", ""),)))
    with pytest.raises(ValueError, match="messages need the chat template; leave out --raw"):
        prompt_ids(tokenizer, messages, PromptOptions(raw=True))


@pytest.mark.parametrize(
    ("prompt", "raw"),
    [
        (Prompt("a\udce9"), False),
        (Prompt("a\udce9"), True),
        (Prompt("x", system="\udce9"), False),
    ],
)
def test_text_that_is_not_unicode_is_refused(
    tokenizer: SdarTokenizer, prompt: Prompt, raw: bool
) -> None:
    with pytest.raises(ValueError, match=r"--prompt.*surrogate"):
        prompt_ids(tokenizer, prompt, PromptOptions(raw))


def _file(tmp_path: Path, *records: object) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n\n" for record in records))
    return path


def test_prompts_of_a_file(tokenizer: SdarTokenizer, tmp_path: Path) -> None:
    said = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Why?"},
    ]
    answered = [*said, {"role": "assistant", "content": "Because."}]
    path = _file(
        tmp_path,
        {"prompt": "a", "id": 7},
        {"question": "b", "answer": "4", "system": "own"},
        {"instruction": "c", "input": "d"},
        {"messages": said},
        {"messages": answered},
    )
    prompts = read_prompts(path, "given")
    assert [p.text for p in prompts] == ["a", "b", "c\nd", "", ""]
    assert [p.system for p in prompts[:3]] == ["given", "own", "given"]
    assert prompts[0].record == {"prompt": "a", "id": 7}
    assert prompts[4].place == f"{path}:9"
    texts = [tokenizer.decode(prompt_ids(tokenizer, p, PromptOptions())) for p in prompts[3:]]
    expected = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nHello<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert texts == [expected, expected]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"prompts.jsonl:1: not JSON"),
        ("[1]", r"prompts.jsonl:1: a list, not an object with a prompt"),
        ('{"text": "x"}', r"prompts.jsonl:1: has neither messages nor prompt, .*; it has text"),
        ("{}", r"it has no field"),
        ('{"prompt": 3}', r"prompts.jsonl:1: prompt is a int, not text"),
        ('{"prompt": "a", "system": 3}', r"system is a int, not text"),
        ('{"instruction": "a", "input": 3}', r"input is a int, not text"),
        ('{"messages": [{"role": "user"}]}', r"prompts.jsonl:1: "),
        ('{"messages": "x"}', r"prompts.jsonl:1: "),
        ("", r"prompts.jsonl: holds no prompt"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=message):
        read_prompts(path, "")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.jsonl: cannot read it"):
        read_prompts(tmp_path / "none.jsonl", "")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_streaming_never_cuts_a_character(tokenizer: SdarTokenizer, size: int) -> None:
    text = "na\u00efve \u4e2d\u6587 \U0001f642!"
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    parts = [stream.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) == text
    assert stream.finish() == ""


def test_bytes_that_never_become_a_character_are_shown_at_the_end(
    tokenizer: SdarTokenizer,
) -> None:
    ids = tokenizer.encode("ab\u00e9")[:-1]
    stream = TextStream(tokenizer)
    assert stream.push(ids) == "ab"
    assert stream.finish() == "\ufffd"


def test_special_tokens_are_not_shown(tokenizer: SdarTokenizer) -> None:
    stream = TextStream(tokenizer)
    assert stream.push(tokenizer.encode("4<|im_end|>")) == "4"
    assert stream.finish() == ""


ARCH = replace(
    Layout("generate").arch, vocab_size=260, mask_token_id=259, eos_token_id=7, block_size=4
)


def test_the_sampler_is_completed_from_the_model(tokenizer: SdarTokenizer) -> None:
    config = sampler_config(ARCH, tokenizer, TextRequest(Path("m"), ("x",)))
    assert (config.block_length, config.mask_token_id, config.num_steps) == (4, 259, 4)
    assert config.stop_token_ids == (7, 256, 258)
    listed = replace(ARCH, eos_token_id=(5, 6), mask_token_id=None)
    config = sampler_config(listed, tokenizer, TextRequest(Path("m"), ("x",), block_length=8))
    assert config.block_length == 8
    assert config.stop_token_ids == (5, 6, 256, 258)
    none = replace(ARCH, eos_token_id=None)
    assert sampler_config(none, tokenizer, TextRequest(Path("m"), ("x",))).stop_token_ids == (
        256,
        258,
    )


def test_an_unknown_block_length_is_refused(tokenizer: SdarTokenizer) -> None:
    arch = replace(ARCH, block_size=None)
    with pytest.raises(ValueError, match=r"m/config\.json has no block_size; give --block-length"):
        sampler_config(arch, tokenizer, TextRequest(Path("m"), ("x",)))


def test_a_block_length_of_zero_is_not_the_default(tokenizer: SdarTokenizer) -> None:
    with pytest.raises(ValueError, match="block_length is 0"):
        sampler_config(ARCH, tokenizer, TextRequest(Path("m"), ("x",), block_length=0))


def test_another_mask_token_is_refused(tokenizer: SdarTokenizer) -> None:
    arch = replace(ARCH, mask_token_id=12)
    with pytest.raises(ValueError, match=r"mask_token_id 12 but the tokenizer's .* is 259"):
        sampler_config(arch, tokenizer, TextRequest(Path("m"), ("x",)))


ALONE = LaunchInfo(rank=0, local_rank=0, world_size=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_gpu_is_refused(model_dir: Path) -> None:
    with pytest.raises(ValueError, match="torch finds no GPU here; use device: cpu"):
        run_job(TextRequest(model_dir, ("x",), max_new_tokens=8, device="cuda"), ALONE, print)


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({"prompts": ()}, 1, "no prompt; give --prompt TEXT or --input"),
        ({"batch_size": 0}, 1, "--batch-size is 0; it must be at least 1"),
        ({"output_file": ROOT / "README.md"}, 1, "README.md exists; remove it or name another"),
        ({"tensor_parallel_size": 2}, 1, "1 processes cannot be divided .* start a multiple of 2"),
        ({"pipeline_parallel_size": 0}, 1, "1 processes cannot be divided"),
        ({"tensor_parallel_size": 3}, 3, "--tensor-parallel-size 3 does not divide .* 4 heads"),
        ({"pipeline_parallel_size": 3}, 3, "--pipeline-parallel-size 3: .* only 2 layers"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(
    model_dir: Path, changes: dict[str, Any], world_size: int, message: str
) -> None:
    request = replace(TextRequest(model_dir, ("x",), max_new_tokens=8), **changes)
    with pytest.raises(ValueError, match=message):
        run_job(request, LaunchInfo(0, 0, world_size), print)


def _tool(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    launcher = torchrun if processes > 1 else []
    return run_python([*launcher, str(ROOT / "tools" / "generate.py"), *map(str, arguments)])


def test_the_command_prints_what_the_model_decodes(model_dir: Path, single_process: None) -> None:
    done = _tool("--model", model_dir, "--prompt", "Why?", "--max-new-tokens", 22)
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(model_dir)
    request = TextRequest(model_dir, ("Why?",), max_new_tokens=22)
    arch = replace(ARCH, num_hidden_layers=2, eos_token_id=(258, 256))
    options = ModelOptions(260, torch.float32, False, "none", "reference")
    (stage,) = build_stages(arch, build_mesh(CPU, 1, 1), options)
    assert isinstance(stage, SdarStage)
    materialize([stage], CPU)
    initialize([stage], seed=1)
    result = generate(
        stage,
        prompt_ids(tokenizer, Prompt("Why?"), PromptOptions()),
        sampler_config(arch, tokenizer, request),
    )
    assert done.stdout == tokenizer.decode(result.ids, skip_special=True) + "\n"
    figures = f"{len(result.ids)} tokens, {result.num_forwards} forwards, "
    assert done.stderr.startswith(figures), done.stderr
    assert f"{result.tokens_per_forward:.2f} tokens per forward" in done.stderr
    assert done.stderr.count("\n") == 1, "nothing else on standard error"


@pytest.fixture(scope="module")
def run_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose newest checkpoint holds the model of `model_dir`."""
    source = open_model(model_dir)
    mesh = build_mesh(CPU, 1, 1)
    stages = load_stages(source, mesh, torch.float32)
    run = tmp_path_factory.mktemp("run")
    save_checkpoint(run, 3, stages, None, {}, make_config(run), source.arch, mesh, [model_dir])
    return run


def test_a_file_of_prompts_is_answered_alike_by_two_replicas_of_a_checkpoint(
    model_dir: Path, run_dir: Path, tmp_path: Path
) -> None:
    questions = ["Why?", "a", "What is 2+2?", "How so?", "b"]
    path = _file(tmp_path, *({"question": text, "id": i} for i, text in enumerate(questions)))
    common = ("--input", path, "--max-new-tokens", 13, "--temperature", 0.7, "--batch-size", 2)
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    alone = _tool("--model", model_dir, *common, "--output", one)
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout == ""
    assert re.match(r"\d+ tokens, \d+ forwards, [\d.]+ tokens per forward, ", alone.stderr)
    assert re.search(r"; \d of 5 answers ended by a stop token\n$", alone.stderr)
    several = _tool("--model", run_dir, *common, "--output", two, processes=2)
    assert several.returncode == 0, several.stderr
    assert f"note: model: {run_dir}/checkpoint-3" in several.stderr
    assert several.stderr.count("tokens per forward") == 1
    assert two.read_text() == one.read_text()
    records = [json.loads(line) for line in one.read_text().splitlines()]
    assert [record["question"] for record in records] == questions
    assert [record["id"] for record in records] == [0, 1, 2, 3, 4]
    assert len({record["generated"] for record in records}) == 5
    assert all(0 < record["num_tokens"] <= 13 for record in records)


def test_several_prompts_and_a_pipeline_whose_ranks_leave_together(model_dir: Path) -> None:
    pipeline = ("--pipeline-parallel-size", 2, "--max-new-tokens", 6)
    done = _tool("--model", model_dir, "--prompt", "x", "--prompt", "yy", *pipeline, processes=2)
    assert done.returncode == 0, done.stderr
    assert re.match(r"### x\n.*\n\n### yy\n.*\n\n$", done.stdout, re.DOTALL)
    failed = _tool("--model", model_dir, "--prompt", "x", "--max-new-tokens", 999, processes=2)
    assert failed.returncode == 1
    assert failed.stderr.count("error: max_new_tokens is 999 after a prompt of") == 1


def test_a_mistake_found_by_the_model_is_one_line_and_status_1(model_dir: Path) -> None:
    done = _tool("--model", model_dir, "--prompt", "x", "--max-new-tokens", 100_000)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: max_new_tokens is 100000 after a prompt of")
    assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "tools" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_model_that_is_not_there_is_one_line_and_status_1(
    tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["--model", "/nowhere", "--prompt", "x"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: /nowhere: no such directory; --model takes")
    assert err.count("\n") == 1


def test_every_option_reaches_the_request(tool: ModuleType) -> None:
    plain = tool.parse_request(["--model", "m", "--prompt", "p"])
    assert plain == TextRequest(Path("m"), ("p",))
    options = (
        "--system s --raw --no-enable-thinking --max-new-tokens 9 --block-length 8 "
        "--denoising-steps 2 --remasking dynamic --confidence-threshold 0.5 --temperature 0.7 "
        "--top-k 5 --top-p 0.9 --seed 3 --batch-size 2 --tensor-parallel-size 2 "
        "--pipeline-parallel-size 3 --device cpu --dtype bfloat16 --input i --output o --prompt q"
    )
    assert tool.parse_request(["--model", "m", "--prompt", "p", *options.split()]) == TextRequest(
        model_dir=Path("m"),
        prompts=("p", "q"),
        input_file=Path("i"),
        output_file=Path("o"),
        system="s",
        raw=True,
        enable_thinking=False,
        max_new_tokens=9,
        block_length=8,
        denoising_steps=2,
        remasking="dynamic",
        confidence_threshold=0.5,
        temperature=0.7,
        top_k=5,
        top_p=0.9,
        seed=3,
        batch_size=2,
        tensor_parallel_size=2,
        pipeline_parallel_size=3,
        device="cpu",
        dtype="bfloat16",
    )


def test_help_teaches(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        tool.main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for word in ("--denoising-steps", "--remasking", "examples:", "mask tokens"):
        assert word in text
