r"""Generated answers against the true ones: GSM8K's "#### 42", \boxed{42}, or the last number."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal

from megatron_sdar.data.tokenization.tokenizer import SdarTokenizer
from megatron_sdar.diffusion.rows import IGNORED_LABEL
from megatron_sdar.generation.sampler_config import GenerationResult
from megatron_sdar.training.evaluation_data import EvaluationSet

# A minus sign behind a digit or a letter is a dash: 10-3.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
# What a number is followed by: 42 apples.
_UNIT = re.compile(r"(?<=[\d%*])\s+[A-Za-z].*$")
_BOXED = r"\boxed{"
_IN_NUMBERS = str.maketrans("", "", "\\$,")


@dataclass(frozen=True)
class Question:
    """A document whose last answer is asked for again.

    Attributes:
        set_name: its evaluation set.
        document: its id there, which keys the draws of its answer.
        prompt: ids up to the last answer.
        reference: the true answer's ids.
    """

    set_name: str
    document: int
    prompt: tuple[int, ...]
    reference: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """What was generated for a question, as text."""

    question: Question
    prompt: str
    text: str
    reference: str

    @property
    def matches(self) -> bool:
        """Whether both texts come to the same answer."""
        expected = extract_answer(self.reference)
        return expected is not None and extract_answer(self.text) == expected


def extract_answer(text: str) -> str | None:
    r"""What a text comes to: the number after the last ####, else what the last \boxed{} holds,
    else the line after ####, else the last number; None without any. Numbers are written one way:
    1,200.50 and 1200.5 are equal.
    """
    if "####" in text:
        line = next(iter(text.rsplit("####", 1)[1].strip().splitlines()), "")
        number = _number(_UNIT.sub("", line))
        # Without a number it may be a heading of markdown.
        if number is not None or _BOXED not in text:
            return number or _canonical(line)
    if _BOXED in text:
        return _canonical(_braced(text.rsplit(_BOXED, 1)[1]))
    numbers = _NUMBER.findall(text)
    return _canonical(numbers[-1]) if numbers else None


def _braced(text: str) -> str:
    """The part of TEXT before the brace that closes what was opened in front of it."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:place]
    return text


def _canonical(answer: str) -> str | None:
    return _number(answer) or _bare(answer) or None


def _number(answer: str) -> str | None:
    r"""The number that the whole answer is, dollars and per cent included; LaTeX's \$, \%, too."""
    number = _bare(answer).translate(_IN_NUMBERS).removesuffix("%").rstrip()
    if not _NUMBER.fullmatch(number):
        return None
    value = Decimal(number)
    return "0" if value == 0 else f"{value.normalize():f}"


def _bare(answer: str) -> str:
    """Without what emphasises it or ends the sentence."""
    return answer.strip().strip("*$").rstrip(".").strip("*$ ")


def questions(documents: EvaluationSet, most: int, longest_prompt: int) -> Iterator[Question]:
    """The first `most` documents that can be asked.

    They end with an answer that is trained, their prompt is what precedes it, trained or not: at
    most `longest_prompt` tokens, none of them the mask token. Truncation has no part in it, since
    a cut answer would be another one.
    """
    found = 0
    store, mask = documents.store, documents.stream.options.mask_token_id
    for document in dict.fromkeys(document for document, _ in documents.items):
        if found == most:
            return
        ids, labels = store.get(document)
        start = ids.size - int(store.turns(document)[-1])
        reference = ids[start:][labels[start:] != IGNORED_LABEL]
        if not reference.size or start > longest_prompt or mask in ids[:start]:
            continue
        found += 1
        yield Question(
            documents.name, document, tuple(ids[:start].tolist()), tuple(reference.tolist())
        )


def read_answers(
    asked: Sequence[Question], results: Sequence[GenerationResult], tokenizer: SdarTokenizer
) -> list[Answer]:
    """Results as text, special tokens left out of answers."""
    return [
        Answer(
            question,
            tokenizer.decode(question.prompt),
            tokenizer.decode(result.ids, skip_special=True).strip(),
            tokenizer.decode(question.reference, skip_special=True).strip(),
        )
        for question, result in zip(asked, results, strict=True)
    ]


def exact_match(answers: Sequence[Answer], each_set: bool) -> dict[str, float]:
    """The share of right answers, and how many were asked; apart for each set if wanted."""
    metrics = {"eval_exact_match": _share(answers), "eval_num_generated": float(len(answers))}
    if each_set:
        for name in dict.fromkeys(answer.question.set_name for answer in answers):
            own = [answer for answer in answers if answer.question.set_name == name]
            metrics[f"eval_{name}_exact_match"] = _share(own)
    return metrics


def _share(answers: Sequence[Answer]) -> float:
    return sum(answer.matches for answer in answers) / len(answers)
