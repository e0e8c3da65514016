"""The generation tool: prompts as in training, streamed text, and the command itself."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from distributed.layouts import Layout
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_sdar.data.sources.conversations import Conversation, Turn
from megatron_sdar.data.templates.template import TemplateOptions, encode_conversation
from megatron_sdar.data.tokenization.tokenizer import SdarTokenizer, load_tokenizer
from megatron_sdar.generation.sampler import generate
from megatron_sdar.generation.text import (
    TextRequest,
    TextStream,
    generate_text,
    prompt_ids,
    sampler_config,
)
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.model.partition import build_stages
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.model.weights import initialize, materialize
from megatron_sdar.parallel.mesh import build_mesh

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
    request = TextRequest(Path(), "Why?", system=system, enable_thinking=enable_thinking)
    ids = prompt_ids(tokenizer, request)
    conversation = Conversation(
        (Turn("user", "Why?", "assistant", "Because."),), system=system or ""
    )
    trained_on, labels = encode_conversation(
        tokenizer, conversation, TemplateOptions(enable_thinking=enable_thinking)
    )
    assert ids == trained_on[labels == -100].tolist() == trained_on[: len(ids)].tolist()


def test_the_prompt_in_words(tokenizer: SdarTokenizer) -> None:
    def text(request: TextRequest) -> str:
        return tokenizer.decode(prompt_ids(tokenizer, request))

    question = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    base = TextRequest(Path(), "Why?")
    assert text(base) == question
    assert text(replace(base, enable_thinking=False)) == question + "<think>\n\n</think>\n\n"
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert text(replace(base, system="Be brief.")) == system + question
    assert text(replace(base, raw=True)) == "Why?"


def test_pieces_are_tokenised_apart_with_the_real_tokenizer(shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "tokenizer" / "qwen3")
    request = TextRequest(Path(), "What is 2+2?", enable_thinking=False)
    conversation = Conversation((Turn("user", "What is 2+2?", "assistant", "4"),))
    ids, labels = encode_conversation(
        tokenizer, conversation, TemplateOptions(enable_thinking=False)
    )
    assert prompt_ids(tokenizer, request) == ids[labels == -100].tolist()


def test_a_system_prompt_without_the_template_is_refused(tokenizer: SdarTokenizer) -> None:
    with pytest.raises(ValueError, match="leave out --system or --raw"):
        prompt_ids(tokenizer, TextRequest(Path(), "x", system="y", raw=True))


@pytest.mark.parametrize(
    "request_",
    [
        TextRequest(Path(), "a\udce9"),
        TextRequest(Path(), "a\udce9", raw=True),
        TextRequest(Path(), "x", system="\udce9"),
    ],
)
def test_text_that_is_not_unicode_is_refused(
    tokenizer: SdarTokenizer, request_: TextRequest
) -> None:
    with pytest.raises(ValueError, match=r"--(prompt|system).*surrogate"):
        prompt_ids(tokenizer, request_)


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
    config = sampler_config(ARCH, tokenizer, TextRequest(Path("m"), "x"))
    assert (config.block_length, config.mask_token_id, config.num_steps) == (4, 259, 4)
    assert config.stop_token_ids == (7, 256, 258)
    listed = replace(ARCH, eos_token_id=(5, 6), mask_token_id=None)
    config = sampler_config(listed, tokenizer, TextRequest(Path("m"), "x", block_length=8))
    assert config.block_length == 8
    assert config.stop_token_ids == (5, 6, 256, 258)
    none = replace(ARCH, eos_token_id=None)
    assert sampler_config(none, tokenizer, TextRequest(Path("m"), "x")).stop_token_ids == (256, 258)


def test_an_unknown_block_length_is_refused(tokenizer: SdarTokenizer) -> None:
    arch = replace(ARCH, block_size=None)
    with pytest.raises(ValueError, match=r"m/config\.json has no block_size; give --block-length"):
        sampler_config(arch, tokenizer, TextRequest(Path("m"), "x"))


def test_a_block_length_of_zero_is_not_the_default(tokenizer: SdarTokenizer) -> None:
    with pytest.raises(ValueError, match="block_length is 0"):
        sampler_config(ARCH, tokenizer, TextRequest(Path("m"), "x", block_length=0))


def test_another_mask_token_is_refused(tokenizer: SdarTokenizer) -> None:
    arch = replace(ARCH, mask_token_id=12)
    with pytest.raises(ValueError, match=r"mask_token_id 12 but the tokenizer's .* is 259"):
        sampler_config(arch, tokenizer, TextRequest(Path("m"), "x"))


def test_more_than_one_process_is_refused(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 were started; start it with python, not torchrun"):
        generate_text(TextRequest(model_dir, "x"), print)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_gpu_is_refused(model_dir: Path) -> None:
    with pytest.raises(ValueError, match="torch finds no GPU here; use device: cpu"):
        generate_text(TextRequest(model_dir, "x", device="cuda"), print)


def _tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "MASTER_ADDR")}
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "generate.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**environment, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def test_the_command_prints_what_the_model_decodes(model_dir: Path, single_process: None) -> None:
    done = _tool("--model", model_dir, "--prompt", "Why?", "--max-new-tokens", 22)
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(model_dir)
    request = TextRequest(model_dir, "Why?", max_new_tokens=22)
    arch = replace(ARCH, num_hidden_layers=2, eos_token_id=(258, 256))
    options = ModelOptions(260, torch.float32, False, "none", "reference")
    (stage,) = build_stages(arch, build_mesh(CPU, 1, 1), options)
    assert isinstance(stage, SdarStage)
    materialize([stage], CPU)
    initialize([stage], seed=1)
    result = generate(
        stage, prompt_ids(tokenizer, request), sampler_config(arch, tokenizer, request)
    )
    assert done.stdout == tokenizer.decode(result.ids, skip_special=True) + "\n"
    figures = f"{len(result.ids)} tokens, {result.num_forwards} forwards, "
    assert done.stderr.startswith(figures), done.stderr
    assert f"{result.tokens_per_forward:.2f} tokens per forward" in done.stderr
    assert done.stderr.count("\n") == 1, "nothing else on standard error"


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
    assert err.startswith("error: /nowhere/config.json: cannot read it")
    assert err.count("\n") == 1


def test_every_option_reaches_the_request(tool: ModuleType) -> None:
    plain = tool.parse_request(["--model", "m", "--prompt", "p"])
    assert plain == TextRequest(Path("m"), "p")
    options = (
        "--system s --raw --no-enable-thinking --max-new-tokens 9 --block-length 8 "
        "--denoising-steps 2 --remasking dynamic --confidence-threshold 0.5 --temperature 0.7 "
        "--seed 3 --device cpu --dtype bfloat16"
    )
    assert tool.parse_request(["--model", "m", "--prompt", "p", *options.split()]) == TextRequest(
        model_dir=Path("m"),
        prompt="p",
        system="s",
        raw=True,
        enable_thinking=False,
        max_new_tokens=9,
        block_length=8,
        denoising_steps=2,
        remasking="dynamic",
        confidence_threshold=0.5,
        temperature=0.7,
        seed=3,
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
