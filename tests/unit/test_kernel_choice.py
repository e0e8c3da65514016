"""Kernels are chosen once and are the same on every rank, or nobody starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from sdar_kernels import attention_backend
from sdar_kernels.triton_configs import AttentionConfig, KernelConfig
from sdar_kernels.triton_search import SearchResult

from megatron_sdar.architecture import Architecture
from megatron_sdar.training import kernels
from megatron_sdar.training.kernels import KernelChoice, choose_kernels

ARCH = Architecture(
    vocab_size=131, hidden_size=48, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6,
    rope_theta=1e4, tie_word_embeddings=False, max_position_embeddings=64,
    initializer_range=0.2, model_type="sdar", block_size=4, mask_token_id=130,
)  # fmt: skip
CHOICE = KernelChoice("tiled", "torch", None, "kernels: ...", "")


@pytest.fixture(autouse=True)
def _no_compiler() -> Iterator[None]:
    """What is chosen does not depend on the machine that the tests run on."""
    with mock.patch.object(attention_backend, "why_no_native", return_value="no compiler"):
        yield


def _config(**model: object) -> SimpleNamespace:
    keys = {"attention_backend": "auto", "fused_kernels": "auto", "attention_autotune": False}
    return SimpleNamespace(
        model=SimpleNamespace(**{**keys, **model}),
        training=SimpleNamespace(fp64=False, bf16=False),
        data=SimpleNamespace(cutoff_len=32),
    )


def _mesh(tp_size: int = 1) -> SimpleNamespace:
    return SimpleNamespace(tp_size=tp_size, device=torch.device("cpu"))


def _answers(*others: tuple[KernelChoice | None, str]) -> mock._patch:
    """This rank is rank 0; the others have answered already."""
    return mock.patch.object(kernels, "gather_from_all", lambda value, mesh: [value, *others])


@pytest.mark.parametrize(("tp_size", "heads"), [(1, "4/2"), (2, "2/1"), (4, "1/1")])
def test_cpu_takes_tiled_attention_and_torch(tp_size: int, heads: str) -> None:
    with _answers():
        choice = choose_kernels(_config(), ARCH, _mesh(tp_size))
    assert (choice.attention, choice.fused_kernels) == ("tiled", "torch")
    assert choice.description.startswith(
        f"kernels: attention tiled for {heads} heads of 16 (native"
    )
    assert "norms, SwiGLU and loss torch" in choice.description


def test_bf16_on_a_cpu_without_units_is_warned_of_whatever_rank_has_it() -> None:
    config = _config()
    config.training.bf16 = True
    for slowdown, words in (
        (60.0, "takes 60 times as long as in float32; set bf16: false"),
        (0.5, ""),
    ):
        with _answers(), mock.patch.object(kernels, "bf16_slowdown", return_value=slowdown):
            warning = choose_kernels(config, ARCH, _mesh()).warning
        assert warning.endswith(words)
        assert bool(warning) == bool(words)
    theirs = replace(CHOICE, warning="warning: this CPU has no bf16 units")
    with _answers((theirs, "")), mock.patch.object(kernels, "bf16_slowdown", return_value=0.5):
        assert choose_kernels(config, ARCH, _mesh()).warning == theirs.warning
    with mock.patch.object(kernels, "bf16_slowdown", side_effect=AssertionError), _answers():
        assert choose_kernels(_config(), ARCH, _mesh()).warning == ""


def test_what_cannot_run_is_an_error_on_every_rank() -> None:
    with _answers(), pytest.raises(ValueError, match=r"^attention_backend: triton cannot be used"):
        choose_kernels(_config(attention_backend="triton"), ARCH, _mesh())
    failed = (None, "attention_backend: flex cannot be used here: no compiler")
    with _answers((CHOICE, ""), failed), pytest.raises(ValueError, match=r"^rank 2: attention_ba"):
        choose_kernels(_config(), ARCH, _mesh())


def test_ranks_that_would_differ_do_not_start() -> None:
    other = (replace(CHOICE, attention="triton"), "")
    message = "rank 0 would compute with tiled attention and torch kernels, rank 2 with triton att"
    with _answers((CHOICE, ""), other), pytest.raises(ValueError, match=message):
        choose_kernels(_config(), ARCH, _mesh())


def test_reasons_may_differ_and_tile_sizes_are_those_of_rank_0() -> None:
    tuned = replace(CHOICE, attention_config=mock.sentinel.config, description="another")
    with _answers((tuned, "")):
        choice = choose_kernels(_config(), ARCH, _mesh())
    assert choice.attention_config is None


def test_autotune_says_what_it_found_or_that_there_is_nothing_to_tune() -> None:
    with _answers():
        choice = choose_kernels(_config(attention_autotune=True), ARCH, _mesh())
    assert choice.description.endswith("attention_autotune has nothing to tune in tiled")
    launch = KernelConfig(16, 16, 16, 4, 1)
    found = SearchResult(AttentionConfig(launch, launch, launch), 1.5, 2.0, 9, 2)
    chosen = SimpleNamespace(name="triton", reason="as configured")
    with (
        _answers(),
        mock.patch.object(kernels, "choose_backend", return_value=chosen),
        mock.patch.object(kernels, "_search", return_value=found),
    ):
        choice = choose_kernels(_config(attention_autotune=True), ARCH, _mesh())
    assert choice.attention_config == found.config
    assert "2.00 -> 1.50 ms per layer" in choice.description
    assert "9 timed, 2 do not run here" in choice.description
