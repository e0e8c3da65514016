"""Keys whose default is another here than in LLaMA-Factory with SDAR, as its users know it.

A file that leaves such a key out means something else here. Keys with the same name and meaning
whose default is the same do not stand here, nor do those that cannot be left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TheirDefault:
    """What LLaMA-Factory does when the key is not given.

    Attributes:
        values: the key's values here that mean the same.
        theirs: their default, for the reader.
        change: what is different here.
    """

    values: tuple[object, ...]
    theirs: str
    change: str


THEIR_DEFAULTS: Mapping[str, TheirDefault] = {
    "finetuning_type": TheirDefault(("lora",), "lora", "every weight is trained"),
    "template": TheirDefault(
        ("chat_template",), "null", "Qwen3's template, not what the tokenizer's directory says"
    ),
    "neat_packing": TheirDefault(
        (False,), "false", "documents share rows; they do not attend to each other"
    ),
    "packing_algorithm": TheirDefault(
        ("llamafactory",), "llamafactory", "fewer rows; other documents share a step"
    ),
    "semantics": TheirDefault(
        ("paper",), "paper", "the same gradient with less work, in other rows"
    ),
    "loss_normalization": TheirDefault(
        ("llamafactory",), "llamafactory", "every token of a step weighs the same, in any layout"
    ),
    "logging_steps": TheirDefault((500,), "500", "more lines in the log"),
    "report_to": TheirDefault((), "null (all installed)", "no tracker is used unless it is named"),
    "per_device_eval_batch_size": TheirDefault(
        (8,), "8", "as in training; no number depends on it"
    ),
}
