"""The token files of a run: made from the datasets it names, or found and checked.

All of it happens on rank 0; the others open what it leaves. Invariant: what is trained on or
evaluated was made with the run's own tokenizer and options.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from megatron_sdar.config import DataConfig, SdarConfig
from megatron_sdar.data.building.build_options import BuildOptions, available_cores
from megatron_sdar.data.building.builder import ensure_dataset
from megatron_sdar.data.building.unpacked_cache import unpack_cache
from megatron_sdar.data.sources.datasets import DatasetSpec, resolve_datasets
from megatron_sdar.data.sources.llamafactory_cache import cache_files, is_llamafactory_cache
from megatron_sdar.data.storage.metadata import read_metadata
from megatron_sdar.data.storage.tokens import TokenizedDataset
from megatron_sdar.data.templates.chat_template import load_chat_template, load_template_tokens
from megatron_sdar.data.templates.template import TemplateOptions
from megatron_sdar.data.tokenization.tokenizer import load_tokenizer

_TOLD_OPTIONS = ("template", "enable_thinking", "mask_history", "train_on_prompt")


def tokenizer_path(config: SdarConfig) -> str:
    """Where the tokenizer lies."""
    return config.model.tokenizer_name_or_path or config.model.model_name_or_path


def template_options(config: SdarConfig) -> TemplateOptions:
    """How the data configuration wants documents written."""
    data = config.data
    own: dict[str, str] = {}
    if data.template == "chat_template":
        path = tokenizer_path(config)
        own = {"chat_template": load_chat_template(path), **load_template_tokens(path)}
    return TemplateOptions(
        template=data.template,
        enable_thinking=data.enable_thinking,
        mask_history=data.mask_history,
        train_on_prompt=data.train_on_prompt,
        default_system=data.default_system,
        llamafactory_version=data.llamafactory_version,
        **own,
    )


def check_token_files(
    prefixes: Sequence[str],
    config: SdarConfig,
    say: Callable[[str], None],
    key: str = "data_path",
) -> None:
    """Refuse token files made with another tokenizer or other options, and tell their options.

    Args:
        key: which key names them; max_samples is about data_path only.

    Raises:
        ValueError: for that, and for damage anywhere in an index.
    """
    for prefix in prefixes:
        _check_recipe(prefix, config, key)
    first = read_metadata(prefixes[0]).recipe
    path = tokenizer_path(config)
    try:
        fingerprint = load_tokenizer(path).fingerprint()
    except ValueError as error:
        say(f"the tokenizer of {prefixes[0]} is not checked: {error}")
        fingerprint = first.tokenizer_fingerprint
    if fingerprint != first.tokenizer_fingerprint:
        raise ValueError(
            f"{key}: {prefixes[0]} was made with another tokenizer than {path}; give the "
            "tokenizer it was made with (tokenizer_name_or_path), or run "
            "tools/preprocess_data.py with this one"
        )
    options = ", ".join(
        f"{key} {value}" for key, value in first.template.items() if key in _TOLD_OPTIONS
    )
    say(f"{', '.join(prefixes)}: {options}")
    # Damage far inside an index is found here, not after days of training.
    _verify(prefixes)


def _check_recipe(prefix: str, config: SdarConfig, key: str) -> None:
    """Refuse options that the token files at `prefix` were not made with.

    Keys left at their default follow the files; a key that was set must agree with them.
    """
    data = config.data
    recipe = read_metadata(prefix).recipe
    defaults = DataConfig()
    found = dict(recipe.template)
    if key == "data_path":
        found["max_samples"] = recipe.max_samples
    # The template's text and tokens come from the tokenizer, not from keys.
    options = [option.name for option in fields(data) if option.name in found]
    problems = [
        f"{option} is {getattr(data, option)!r}, the files were made with {found[option]!r}"
        for option in options
        if getattr(data, option) not in (found[option], getattr(defaults, option))
    ]
    if config.training.stage == "pt" and not recipe.is_plain_text:
        problems.append("stage is 'pt', the files hold conversations")
    if problems:
        raise ValueError(
            f"{key}: {prefix} is tokenised already and these keys come too late: "
            f"{'; '.join(problems)}; remove them, or run tools/preprocess_data.py with them"
        )


def _unpack(cache: str, config: SdarConfig, say: Callable[[str], None]) -> str:
    """The documents of a LLaMA-Factory cache as token files of this run; their prefix."""
    if not is_llamafactory_cache(cache):
        raise ValueError(
            f"tokenized_path: {cache} is a folder, but neither one that LLaMA-Factory wrote nor "
            f"the prefix of token files; give {cache}/tokens to tokenise dataset there"
        )
    prefix = f"{config.training.output_dir}/tokenized/llamafactory"
    tokenizer = load_tokenizer(tokenizer_path(config))
    say(
        f"tokenized_path: {cache} holds rows that LLaMA-Factory packed: exactly its documents are "
        "trained, packed anew; dataset, template and the other keys that make tokens come too late"
    )
    if cache_files(cache, "validation"):
        say(f"tokenized_path: the validation split of {cache} is not read")
    say(unpack_cache(cache, prefix, tokenizer).format())
    return prefix


def _verify(prefixes: Sequence[str]) -> None:
    for prefix in prefixes:
        TokenizedDataset(prefix).verify()


def make_token_files(config: SdarConfig, say: Callable[[str], None]) -> list[str]:
    """Make the token files of `dataset` where they are not there yet; their prefixes.

    Raises:
        ValueError: unreadable data; files that are there and hold something else.
    """
    data = config.data
    cache = data.tokenized_path or f"{config.training.output_dir}/tokenized/data"
    if Path(cache).is_dir():
        return [_unpack(cache, config, say)]
    if not data.dataset:
        raise ValueError(
            f"tokenized_path: {cache} is no folder that LLaMA-Factory wrote; give dataset to make "
            "it, or data_path for token files of tools/preprocess_data.py"
        )
    specs = resolve_datasets(data.dataset, data.dataset_dir, config.training.stage)
    builds: list[tuple[str, list[DatasetSpec]]] = [(cache, specs)]
    if data.mix_strategy != "concat":
        builds = [(f"{cache}.{i}-{spec.name}", [spec]) for i, spec in enumerate(specs)]
    return _build(builds, config, say)


def make_evaluation_files(config: SdarConfig, say: Callable[[str], None]) -> list[str]:
    """`make_token_files` of eval_dataset: files of its own for each set; their prefixes."""
    data = config.data
    cache = data.tokenized_path or f"{config.training.output_dir}/tokenized/data"
    names = config.evaluation.eval_dataset
    specs = resolve_datasets(names, data.dataset_dir, config.training.stage)
    builds = [(f"{cache}.eval-{i}-{spec.name}", [spec]) for i, spec in enumerate(specs)]
    return _build(builds, config, say)


def _build(
    builds: Sequence[tuple[str, list[DatasetSpec]]], config: SdarConfig, say: Callable[[str], None]
) -> list[str]:
    """Make the token files of each (prefix, datasets); their prefixes."""
    data = config.data
    tokenizer = load_tokenizer(tokenizer_path(config))
    cores = available_cores()
    num_workers = min(data.preprocessing_num_workers or cores, cores)
    if (data.preprocessing_num_workers or 0) > cores:
        say(
            f"preprocessing_num_workers: {data.preprocessing_num_workers} is more than the "
            f"{cores} cores here; {num_workers} are used"
        )
    for prefix, chosen in builds:
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        summary = ensure_dataset(
            chosen,
            prefix,
            tokenizer,
            template_options(config),
            BuildOptions(
                num_workers=num_workers,
                max_samples=data.max_samples,
                seed=config.training.seed,
                on_error=data.on_data_error,
                overwrite=data.overwrite_cache,
            ),
            # Without tokenized_path the files are this run's own, so they may follow its inputs.
            rebuild_stale=data.tokenized_path is None,
        )
        say(summary.format())
    prefixes = [prefix for prefix, _ in builds]
    _verify(prefixes)
    return prefixes
