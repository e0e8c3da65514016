"""Evaluation of a run's model: the loss on every set, and generated answers.

Leaves weights, gradients, optimizer and every random state as they are: training with
evaluations gives the weights of training without, bit for bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megatron_sdar.architecture import Architecture
from megatron_sdar.config import SdarConfig
from megatron_sdar.data.tokenization.tokenizer import load_tokenizer
from megatron_sdar.generation.decoder import generate_over_data_parallel
from megatron_sdar.generation.sampler_config import SamplerConfig
from megatron_sdar.generation.text import stop_token_ids
from megatron_sdar.model.sdar import SdarStage
from megatron_sdar.parallel.launch import run_on_main
from megatron_sdar.parallel.mesh import ParallelMesh
from megatron_sdar.training.answers import Answer, Question, exact_match, questions, read_answers
from megatron_sdar.training.evaluation_data import EvaluationSet
from megatron_sdar.training.evaluation_loss import (
    Advance,
    EvaluationStoppedError,
    LossEvaluation,
    LossSums,
    loss_metrics,
    never_stops,
)
from megatron_sdar.training.evaluation_rows import EvaluationRows
from megatron_sdar.training.output_files import written
from megatron_sdar.training.token_files import tokenizer_path

SAMPLES_NAME = "eval_samples.jsonl"
_ANSWERS_AT_ONCE = 32  # per replica; keys and values of so many are held
_SHOWN = 2


class Evaluator:
    """Evaluates the stages that a run trains.

    Args:
        config, arch, mesh: of the run.
        stages: this rank's stages, filled.
        sets: from `prepare_evaluation_sets`.
        row_length: tokens per row; training's, which fits the memory.
        say: called on rank 0 with lines for the user.

    Attributes:
        stops: asked during an evaluation whether all ranks are to leave it.

    Raises:
        ValueError: a set without label tokens; no document whose answer could be generated.

    Collectives: opens the pipeline's channels.
    """

    def __init__(
        self,
        config: SdarConfig,
        arch: Architecture,
        mesh: ParallelMesh,
        stages: Sequence[SdarStage],
        sets: Sequence[EvaluationSet],
        row_length: int,
        say: Callable[[str], None],
    ) -> None:
        assert arch.block_size is not None, "resolved"
        evaluation = config.evaluation
        self._config = config
        self._mesh = mesh
        self._stages = stages
        self._say = say
        self._levels = evaluation.eval_noise_levels
        self._block_lengths = evaluation.eval_block_lengths or (arch.block_size,)
        split = mesh.tp_size if stages[0].sequence_parallel else 1
        self._rows = {
            (each.name, length): EvaluationRows(each, length, self._levels, row_length, split)
            for each in sets
            for length in self._block_lengths
        }
        rows_per_micro_batch = (
            evaluation.per_device_eval_batch_size or config.training.per_device_train_batch_size
        )
        self.stops: Callable[[], bool] = never_stops
        self._loss = LossEvaluation(stages, mesh, rows_per_micro_batch, lambda: self.stops())
        self._questions: list[Question] = []
        if evaluation.eval_generate_samples:
            self._prepare_questions(arch, sets)

    @property
    def num_rows(self) -> int:
        """Rows that one evaluation runs over."""
        return sum(len(rows) for rows in self._rows.values())

    @property
    def metric_names(self) -> set[str]:
        """What an evaluation measures."""
        nothing = np.zeros(self._levels)
        sums = {key: LossSums(nothing, nothing, nothing, 1) for key in self._rows}
        each_set = self._config.evaluation.eval_on_each_dataset
        metrics = loss_metrics(sums, self._block_lengths, each_set)
        if self._questions:
            metrics |= exact_match([Answer(each, "", "", "") for each in self._questions], each_set)
        return {*metrics, "eval_runtime"}

    def run(self, step: int, advance: Advance) -> dict[str, float]:
        """Metrics of the weights as they are, the same on every rank.

        Args:
            step: optimizer steps done, for eval_samples.jsonl.
            advance: called with rows done since.

        Raises:
            EvaluationStoppedError: on every rank, when `stops` said so; nothing was kept.

        Collectives: those of LossEvaluation.run per set and block length, of
        generate_over_data_parallel, and broadcast_object_list (world).
        """
        started = time.monotonic()
        sums: dict[tuple[str, int], LossSums] = {
            key: self._loss.run(rows, self._levels, advance) for key, rows in self._rows.items()
        }
        each_set = self._config.evaluation.eval_on_each_dataset
        metrics = loss_metrics(sums, self._block_lengths, each_set)
        if self._questions:
            answers = self._answer()
            metrics |= exact_match(answers, each_set)
            run_on_main(lambda: self._keep(step, answers), self._mesh)
        metrics["eval_runtime"] = round(time.monotonic() - started, 3)
        # What follows from a metric must follow on every rank, so all have rank 0's last bit.
        return run_on_main(lambda: metrics, self._mesh)

    def _prepare_questions(self, arch: Architecture, sets: Sequence[EvaluationSet]) -> None:
        evaluation = self._config.evaluation
        assert arch.block_size is not None, "resolved"
        assert arch.mask_token_id is not None, "resolved"
        self._tokenizer = load_tokenizer(tokenizer_path(self._config))
        self._sampler = SamplerConfig(
            block_length=arch.block_size,
            mask_token_id=arch.mask_token_id,
            stop_token_ids=stop_token_ids(arch, self._tokenizer),
            max_new_tokens=evaluation.eval_generate_max_new_tokens,
            denoising_steps=evaluation.eval_denoising_steps,
            remasking=evaluation.eval_remasking,
        )
        longest = arch.max_position_embeddings - evaluation.eval_generate_max_new_tokens
        for each in sets:
            found = list(questions(each, evaluation.eval_generate_samples, longest))
            if len(found) < evaluation.eval_generate_samples:
                self._say(
                    f"eval_generate_samples: {evaluation.eval_generate_samples}, but set "
                    f"{each.name} has {len(found)} documents with an answer and a prompt of at "
                    f"most {longest} tokens"
                )
            self._questions += found
        if not self._questions:
            raise ValueError(
                "eval_generate_samples: no evaluation document has an answer to generate; set it "
                "to 0, or evaluate on data with answers"
            )

    def _answer(self) -> list[Answer]:
        size = _ANSWERS_AT_ONCE * self._mesh.dp_size
        answers: list[Answer] = []
        for first in range(0, len(self._questions), size):
            if self.stops():
                raise EvaluationStoppedError
            part = self._questions[first : first + size]
            results = generate_over_data_parallel(
                self._stages,
                self._mesh,
                [question.prompt for question in part],
                self._sampler,
                request_ids=[question.document for question in part],
            )
            answers += read_answers(part, results, self._tokenizer)
        return answers

    def _keep(self, step: int, answers: Sequence[Answer]) -> None:
        """Append the answers to eval_samples.jsonl and show the first ones (rank 0)."""
        path = Path(self._config.training.output_dir) / SAMPLES_NAME
        with written(path), path.open("a", encoding="utf-8") as file:
            for answer in answers:
                record = {
                    "step": step,
                    "set": answer.question.set_name,
                    "document": answer.question.document,
                    "prompt": answer.prompt,
                    "answer": answer.text,
                    "reference": answer.reference,
                    "match": answer.matches,
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        for answer in answers[:_SHOWN]:
            verdict = "right" if answer.matches else "wrong"
            self._say(f"generated ({verdict}): {_shorten(answer.text)!r}")
            self._say(f"  instead of         {_shorten(answer.reference)!r}")


def _shorten(text: str, most: int = 70) -> str:
    """The end of a text, where its answer is."""
    return text if len(text) <= most else f"...{text[3 - most :]}"
