"""Block-diffusion decoding: equal to a brute-force oracle, and honest about its limits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from distributed import oracle
from distributed.layouts import Layout
from torch import Tensor

from megatron_sdar.architecture import Architecture
from megatron_sdar.config import OptimConfig
from megatron_sdar.diffusion.noise import NoiseKey, draw_noise
from megatron_sdar.diffusion.rows import build_row, concatenate_rows, full_copies
from megatron_sdar.generation.reference_sampler import generate
from megatron_sdar.generation.sampler_config import GenerationResult, SamplerConfig
from megatron_sdar.model.options import ModelOptions
from megatron_sdar.model.partition import build_stages
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.model.weights import initialize, materialize
from megatron_sdar.optim.adamw import ShardedAdamW
from megatron_sdar.parallel.mesh import ParallelMesh, build_mesh
from megatron_sdar.training.step import TrainingStep, named_parameters

ARCH = replace(Layout("sampler").arch, num_hidden_layers=2, initializer_range=0.3)
MASK_ID = 130
CPU = torch.device("cpu")
NO_STOP: tuple[int, ...] = ()


def _stage(
    arch: Architecture, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[SdarStage, ParallelMesh]:
    options = ModelOptions(136, dtype, False, "none", "tiled")
    mesh = build_mesh(CPU, 1, 1)
    (stage,) = build_stages(arch, mesh, options)
    materialize([stage], CPU)
    initialize([stage], seed)
    assert isinstance(stage, SdarStage)
    return stage, mesh


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for tensors this small a second thread only costs
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stage(single_process: None) -> SdarStage:
    return _stage(ARCH, seed=5)[0]


def _config(block_length: int = 4, **changes: object) -> SamplerConfig:
    settings = {"mask_token_id": MASK_ID, "stop_token_ids": NO_STOP, "max_new_tokens": 18}
    return SamplerConfig(**{"block_length": block_length, **settings, **changes})


def _prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, MASK_ID, size=length).tolist()


def brute_force(
    weights: dict[str, Tensor], arch: Architecture, prompt: list[int], config: SamplerConfig
) -> tuple[list[int], int]:
    """Greedy decoding from the description: a dense mask, token by token, in plain Python."""
    block_length, steps = config.block_length, config.num_steps
    tokens: list[int | None] = list(prompt)
    while len(tokens) < len(prompt) + config.max_new_tokens or len(tokens) % block_length:
        tokens.append(None)
    forwards = 0
    for start in range(len(prompt) // block_length * block_length, len(tokens), block_length):
        end = start + block_length
        step = 0
        while None in tokens[start:end]:
            ids = torch.tensor([MASK_ID if token is None else token for token in tokens[:end]])
            blocks = torch.arange(end) // block_length
            seen = blocks[None, :] <= blocks[:, None]
            hidden = oracle.hidden_states(weights, arch, ids, torch.arange(end), seen)
            logits = hidden @ weights["lm_head.weight"][: arch.vocab_size].T
            forwards += 1
            best = {}
            for place in range(start, end):
                if tokens[place] is None:
                    others = torch.arange(arch.vocab_size) != MASK_ID
                    probabilities = logits[place][others].softmax(0)
                    token = int(probabilities.argmax())  # MASK_ID is the last id
                    best[place] = (float(probabilities[token]), token)
            share = block_length // steps + (1 if step < block_length % steps else 0)
            ranked = sorted(best, key=lambda place: -best[place][0])
            reveal = set(ranked[:share])
            if config.remasking == "dynamic":
                reveal |= {p for p in best if best[p][0] > config.confidence_threshold}
            for place in reveal:
                tokens[place] = best[place][1]
            step += 1
    answer = [token for token in tokens[len(prompt) :] if token is not None]
    return answer[: config.max_new_tokens], forwards


def _weights(stage: SdarStage) -> dict[str, Tensor]:
    return {name: p._local_tensor.detach() for name, p in stage.named_parameters()}


METHODS: dict[str, dict[str, object]] = {
    "one_token_per_step": {},
    "all_at_once": {"denoising_steps": 1},
    "three_steps": {"denoising_steps": 3},
    "dynamic": {"remasking": "dynamic", "confidence_threshold": 0.2},
    "dynamic_three_steps": {
        "remasking": "dynamic",
        "confidence_threshold": 0.2,
        "denoising_steps": 3,
    },
    "dynamic_that_never_dares": {"remasking": "dynamic", "confidence_threshold": 1.0},
    "dynamic_that_dares_all": {"remasking": "dynamic", "confidence_threshold": 0.0},
}
# An empty prompt in longer blocks is left out: its mask tokens all see the same, so their
# confidences are equal and rounding decides. Blocks of one token know no steps.
CASES = [
    (prompt, block, method) for prompt in (1, 3, 8, 13) for block in (4, 8) for method in METHODS
]
CASES += [(prompt, 1, method) for prompt in (0, 5) for method in ("one_token_per_step", "dynamic")]


@pytest.mark.parametrize(("prompt_length", "block_length", "method"), CASES)
def test_decoding_is_the_brute_force_oracle(
    stage: SdarStage, prompt_length: int, block_length: int, method: str
) -> None:
    config = _config(block_length, max_new_tokens=11, **METHODS[method])
    prompt = _prompt(prompt_length)
    result = generate(stage, prompt, config)
    expected, forwards = brute_force(_weights(stage), ARCH, prompt, config)
    assert list(result.ids) == expected
    assert result.num_forwards == forwards
    assert len(result.ids) == 11
    assert not result.stopped
    assert MASK_ID not in result.ids


def test_the_methods_differ(stage: SdarStage) -> None:
    # Otherwise the comparison above would prove little.
    answers, forwards = {}, {}
    for method, changes in METHODS.items():
        result = generate(stage, _prompt(3), _config(8, **changes))
        answers[method], forwards[method] = result.ids, result.num_forwards
    # Blocks of 5 (after 3 prompt tokens), 8 and 8 unknown tokens.
    assert forwards["one_token_per_step"] == 5 + 8 + 8
    assert forwards["all_at_once"] == forwards["dynamic_that_dares_all"] == 3
    assert forwards["three_steps"] == 2 + 3 + 3
    assert 3 < forwards["dynamic"] < forwards["dynamic_that_never_dares"] == 21
    assert answers["dynamic_that_never_dares"] == answers["one_token_per_step"]
    assert len(set(answers.values())) >= 4
    assert len(set(answers["one_token_per_step"])) > 4


def test_the_mask_token_never_appears_even_when_the_model_wants_it(single_process: None) -> None:
    stage, _ = _stage(ARCH, seed=6)
    with torch.no_grad():
        embedding = stage.model.embed_tokens.weight._local_tensor
        stage.lm_head.weight._local_tensor[MASK_ID] = embedding[MASK_ID] * 100
    unwilling = generate(stage, _prompt(5), _config(4))
    assert MASK_ID not in unwilling.ids
    drawn = generate(stage, _prompt(5), _config(4, temperature=5.0))
    assert MASK_ID not in drawn.ids
    # The same logits without the exclusion would choose it: as an ordinary token it comes.
    other = generate(stage, _prompt(5), _config(4, mask_token_id=129))
    assert MASK_ID in other.ids


def test_vocabulary_padding_is_never_produced(single_process: None) -> None:
    stage, _ = _stage(ARCH, seed=6)
    with torch.no_grad():
        stage.lm_head.weight._local_tensor[ARCH.vocab_size :] = 1e3
    result = generate(stage, _prompt(5), _config(4, temperature=10.0))
    assert max(result.ids) < ARCH.vocab_size


def test_the_answer_ends_with_the_first_stop_token_inside_its_block(stage: SdarStage) -> None:
    free = generate(stage, _prompt(3), _config(8))
    for place in (0, 4, 5, 9, 16):
        stop = free.ids[place]
        first = free.ids.index(stop)
        result = generate(stage, _prompt(3), _config(8, stop_token_ids=(MASK_ID - 1, stop)))
        assert result.ids == free.ids[: first + 1]
        assert result.stopped
        # The first block holds 5 new tokens, the later ones 8; a block is always finished.
        assert result.num_forwards == (5 if first < 5 else 13 if first < 13 else 21)


def test_a_stop_token_past_the_limit_does_not_count(stage: SdarStage) -> None:
    free = generate(stage, _prompt(3), _config(8, max_new_tokens=10))
    beyond = generate(stage, _prompt(3), _config(8, max_new_tokens=13)).ids[10:]
    unseen = next(token for token in beyond if token not in free.ids)
    result = generate(stage, _prompt(3), _config(8, max_new_tokens=10, stop_token_ids=(unseen,)))
    assert result == free
    assert not result.stopped


def test_a_stop_token_in_the_prompt_does_not_stop(stage: SdarStage) -> None:
    prompt = _prompt(9)
    free = generate(stage, prompt, _config(4))
    unused = next(token for token in range(MASK_ID) if token not in free.ids)
    prompt[1] = unused
    assert len(generate(stage, prompt, _config(4, stop_token_ids=(unused,))).ids) > 1


@pytest.mark.parametrize("max_new_tokens", [1, 2, 7, 18])
def test_a_shorter_answer_is_the_beginning_of_a_longer_one(
    stage: SdarStage, max_new_tokens: int
) -> None:
    whole = generate(stage, _prompt(6), _config(4)).ids
    cut = generate(stage, _prompt(6), _config(4, max_new_tokens=max_new_tokens))
    assert cut.ids == whole[:max_new_tokens]


def test_blocks_are_handed_over_as_they_are_finished(stage: SdarStage) -> None:
    blocks: list[tuple[int, ...]] = []
    result = generate(stage, _prompt(3), _config(8), blocks.append)
    assert [len(block) for block in blocks] == [5, 8, 5]
    assert sum(blocks, ()) == result.ids


def test_drawing_depends_on_the_seed_and_on_the_temperature(stage: SdarStage) -> None:
    def draw(temperature: float, seed: int) -> GenerationResult:
        return generate(stage, _prompt(6), _config(4, temperature=temperature, seed=seed))

    greedy = generate(stage, _prompt(6), _config(4))
    assert draw(1.0, 1) == draw(1.0, 1)
    assert draw(1.0, 1) != draw(1.0, 2)
    assert draw(1e-320, 1) == draw(1e-6, 1) == greedy, "an almost zero temperature is greedy"


def test_drawn_tokens_follow_the_tempered_distribution(stage: SdarStage) -> None:
    prompt, temperature = _prompt(3), 0.7
    ids = torch.tensor([*prompt, MASK_ID])
    seen = torch.ones(4, 4, dtype=torch.bool)
    hidden = oracle.hidden_states(_weights(stage), ARCH, ids, torch.arange(4), seen)
    logits = (hidden @ _weights(stage)["lm_head.weight"][: ARCH.vocab_size].T)[3]
    logits[MASK_ID] = -torch.inf
    expected = (logits / temperature).softmax(0)
    config = _config(4, max_new_tokens=1, temperature=temperature)
    draws = [generate(stage, prompt, replace(config, seed=seed)).ids[0] for seed in range(250)]
    for token in expected.topk(3).indices.tolist():
        p = expected[token].item()
        sigma = (p * (1 - p) / len(draws)) ** 0.5
        assert abs(draws.count(token) / len(draws) - p) < 4 * sigma


def test_an_overfitted_model_continues_what_it_learned(single_process: None) -> None:
    text = b"block diffusion fills in whole blocks, then goes on. ok!"
    ids = np.frombuffer(text, dtype=np.uint8).astype(np.int32)
    assert ids.size % 4 == 0
    arch = replace(ARCH, initializer_range=0.1)
    stage, mesh = _stage(arch, seed=0, dtype=torch.float32)
    parameters = named_parameters([stage])
    optimizer = ShardedAdamW(parameters, OptimConfig(learning_rate=3e-3, weight_decay=0.0))
    step = TrainingStep(arch, mesh, [stage], optimizer)
    everything = np.ones(ids.size, dtype=bool)
    for number in range(100):
        rows = [
            build_row(
                [full_copies(ids, ids, 4, draw_noise(NoiseKey(0, number), d, everything, 1e-3))],
                2 * ids.size,
                4,
                MASK_ID,
                0,
            )
            for d in range(2)
        ]
        step.run([concatenate_rows(rows)], 3e-3)
    for start, changes in ((8, {}), (17, {}), (14, {"remasking": "dynamic"})):
        config = _config(4, max_new_tokens=200, stop_token_ids=(ord("!"),), **changes)
        result = generate(stage, ids[:start].tolist(), config)
        assert bytes(result.ids) == text[start:]
        assert result.stopped
        if changes:
            assert result.tokens_per_forward > 2, "a sure model needs few forwards"


def test_a_prompt_with_the_mask_token_is_refused(stage: SdarStage) -> None:
    with pytest.raises(ValueError, match=r"prompt token 1 is the mask token \(id 130\)"):
        generate(stage, [3, MASK_ID], _config(4))


@pytest.mark.parametrize("token", [-1, 131])
def test_a_prompt_token_outside_the_vocabulary_is_refused(stage: SdarStage, token: int) -> None:
    with pytest.raises(ValueError, match=rf"prompt token 2 is id {token} but .* only 131"):
        generate(stage, [3, 4, token], _config(4))


def test_a_mask_token_outside_the_vocabulary_is_refused(stage: SdarStage) -> None:
    with pytest.raises(ValueError, match="mask_token_id is 151669 but the model has only 131"):
        generate(stage, [3], _config(4, mask_token_id=151669))


def test_more_tokens_than_positions_are_refused(stage: SdarStage) -> None:
    with pytest.raises(ValueError, match=r"max_new_tokens is 510 after a prompt of 3 .* only 512"):
        generate(stage, [3, 4, 5], _config(4, max_new_tokens=510))


def test_damaged_weights_are_reported(single_process: None) -> None:
    stage, _ = _stage(ARCH, seed=6)
    with torch.no_grad():
        stage.model.norm.weight._local_tensor[0] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        generate(stage, [3], _config(4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_length": 0}, "block_length is 0; it must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"denoising_steps": 0}, "denoising_steps is 0; it must be from 1 to block_length"),
        ({"denoising_steps": 5}, "denoising_steps is 5; it must be from 1 to block_length"),
        ({"remasking": "random"}, "remasking is 'random'; use static or dynamic"),
        ({"confidence_threshold": 1.5}, "confidence_threshold is 1.5; it is a probability"),
        ({"confidence_threshold": float("nan")}, "confidence_threshold is nan"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0 or above"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"seed": -1}, "seed is -1; it must be from 0"),
    ],
)
def test_a_setting_out_of_range_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _config(**changes)


@pytest.mark.parametrize(
    ("block_length", "steps", "shares"),
    [(8, 3, [3, 3, 2]), (4, None, [1, 1, 1, 1]), (4, 1, [4]), (7, 4, [2, 2, 2, 1])],
)
def test_a_block_is_shared_out_over_the_steps(
    block_length: int, steps: int | None, shares: list[int]
) -> None:
    assert _config(block_length, denoising_steps=steps).step_shares == shares
