"""Keys of the noise: rules between them, the block-length schedule's form, and presets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest

from megatron_sdar.architecture import Architecture
from megatron_sdar.config import SdarConfig, dump_resolved, load_config, to_flat_dict, validate
from megatron_sdar.config_fields import SECTION_TYPES, DiffusionConfig
from megatron_sdar.config_presets import PRESETS, describe_preset
from megatron_sdar.config_weights import parse_block_lengths
from megatron_sdar.training.row_settings import row_options
from megatron_sdar.training.setup import check_block_lengths

Load = Callable[[str], SdarConfig]
MODEL = Architecture(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=False,
    max_position_embeddings=4096,
    block_size=16,
    mask_token_id=999,
)


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """load("key: value lines") on top of what a run needs."""

    def load(text: str) -> SdarConfig:
        path = tmp_path / "run.yaml"
        path.write_text(f"model_name_or_path: model\noutput_dir: out\ndataset: a\n{text}\n")
        return load_config([str(path)])

    return load


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("noise_low: 0.3\nnoise_high: 0.8", None),
        ("noise_low: 0.8\nnoise_high: 0.8", "noise_low=0.8 must be below noise_high=0.8"),
        ("noise_high: 0.001", "noise_eps=0.001 must be below noise_high=0.001"),
        ("noise_low: 0.3\nnoise_high: 0.6\nnoisy_views: 2\ncomplementary_views: true", None),
        ("noise_low: 0.5\nnoisy_views: 2\ncomplementary_views: true",
         "both lie between noise_low=0.5 and noise_high=1.0 only if 0.5 does"),
        ("noise_high: 0.5\nnoisy_views: 2\ncomplementary_views: true",
         "both lie between noise_eps=0.001 and noise_high=0.5 only if 0.5 does"),
        ("block_length_schedule: 4; 8 @10; 16 @30\nmax_steps: 31", None),
        ("block_length_schedule: 4; 16 @30\nmax_steps: 30",
         "16 would begin at step 30, but max_steps=30"),
        ("block_length_schedule: 4; 16 @30\nblock_length: 16",
         "block_length=16 and block_length_schedule exclude each other"),
        ("block_length_schedule: 4; 16 @30\nrow_length: 8208", None),
        ("block_length_schedule: 4; 16 @30\nrow_length: 8200",
         "row_length=8200 is not a multiple of 16, the last of block_length_schedule"),
        ("block_length_schedule: 4; 16\nmax_steps: 9", "the block length begins at steps [0, 0]"),
        ("block_length_schedule: 4; 6 @3", "the block lengths [4, 6] must grow, each a multiple"),
        ("block_length_schedule: 8; 4 @3", "the block lengths [8, 4] must grow, each a multiple"),
        ("block_length_schedule: 4; 8 @x",
         "'8 @x' must end in the step its block length begins at, such as 8 @1000"),
        ("block_length_schedule: 4; four @3", "'four' is not a block length; write 4; 8 @1000"),
        ("block_length_schedule: '0'", "'0' is not a block length"),
        ("block_length_schedule: ''", "'' is not a block length"),
    ],
)  # fmt: skip
def test_each_rule_alone(load: Load, text: str, message: str | None) -> None:
    config = load(text)
    if message is None:
        validate(config, MODEL, 1)
        return
    with pytest.raises(ValueError, match="the configuration does not fit:") as error:
        validate(config, MODEL, 1)
    (found,) = str(error.value).splitlines()[1:]
    assert message in found


def test_a_schedule_is_steps_and_lengths() -> None:
    assert parse_block_lengths("4; 8 @1000;16@3000") == [(0, 4), (1000, 8), (3000, 16)]
    assert parse_block_lengths("8") == [(0, 8)]


def test_a_run_that_ends_before_its_last_length_is_refused(load: Load) -> None:
    config = load("block_length_schedule: 4; 16 @30")
    check_block_lengths(config, 31)
    check_block_lengths(load(""), 1)
    with pytest.raises(
        ValueError, match="16 would begin at step 30, but num_train_epochs=3 are 30"
    ):
        check_block_lengths(config, 30)


def test_keys_reach_the_rows(load: Load) -> None:
    text = (
        "noise_level_per: block\nnoise_sampling: stratified\nnoise_low: 0.2\nnoise_high: 0.9\n"
        "loss_weight: flat\nblock_padding_labels: first\nblock_length_schedule: 4; 16 @3\n"
    )
    options = row_options(load(text), MODEL, 7, rows_per_step=6)
    assert options.block_lengths == ((0, 4), (18, 16))
    assert options.block_length == 16
    assert options.block_padding_labels == "first"
    noise = options.noise
    assert (noise.low, noise.high) == (0.2, 0.9)
    assert (noise.level_per, noise.sampling, noise.loss_weight) == ("block", "stratified", "flat")
    plain = row_options(load("noise_eps: 0.01"), MODEL, 7, rows_per_step=6)
    assert plain.noise.low == 0.01
    assert plain.block_lengths == ()


# Presets


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_preset_fills_in_what_is_not_given(load: Load, preset: str) -> None:
    flat = to_flat_dict(load(f"preset: {preset}"))
    for choice in PRESETS[preset]:
        assert flat[choice.key] == choice.value, choice.key
        assert len(choice.source) > 10, choice.key
    chosen = {choice.key for choice in PRESETS[preset]}
    plain = to_flat_dict(load(""))
    assert {key for key in flat if flat[key] != plain[key]} - {"preset"} <= chosen
    validate(load(f"preset: {preset}"), MODEL, 1)


def test_presets_speak_of_the_same_objective() -> None:
    """Whoever changes from one to the other changes every key of it."""
    paper, recommended = ({choice.key for choice in PRESETS[name]} for name in PRESETS)
    assert recommended | {"noise_eps"} == paper
    known = {key.name for section in SECTION_TYPES.values() for key in fields(section)}
    assert paper <= known


def test_the_paper_preset_is_the_published_form_whatever_the_defaults_become(load: Load) -> None:
    paper = load("preset: paper")
    assert paper.diffusion == DiffusionConfig(
        preset="paper", semantics="paper", loss_normalization="llamafactory"
    )
    assert paper.data.packing_algorithm == "llamafactory"


def test_a_given_key_wins_and_is_told(load: Load) -> None:
    config = load("loss_normalization: global\npreset: paper\nnoise_low: 0.2")
    assert config.diffusion.loss_normalization == "global"
    assert config.diffusion.semantics == "paper"
    told = describe_preset(to_flat_dict(config))
    assert told is not None
    assert told.startswith("preset paper: semantics paper, ")
    assert told.endswith(
        "; given: noise_low 0.2 instead of null, loss_normalization global instead of llamafactory"
    )
    assert describe_preset(to_flat_dict(load(""))) is None
    assert "given" not in str(describe_preset(to_flat_dict(load("preset: paper"))))


def test_a_second_name_that_is_given_wins_too(load: Load) -> None:
    config = load("preset: paper\npacking: false")
    assert config.data.neat_packing is False


def test_the_resolved_file_holds_what_the_preset_chose(load: Load, tmp_path: Path) -> None:
    config = load("preset: paper\nseed: 3")
    dump_resolved(config, tmp_path / "resolved.yaml")
    again = load_config([str(tmp_path / "resolved.yaml")])
    assert replace(again, warnings=()) == replace(config, warnings=())
    assert "\nsemantics: paper\n" in (tmp_path / "resolved.yaml").read_text()
