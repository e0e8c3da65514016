"""A small arithmetic data set, its tokenizer and a tiny SDAR model folder, made from a seed.

Owns the demo that needs no download. Texts are templated and short, so that a model of one
million parameters visibly learns them in a minute; the same seed gives the same bytes.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors as post_processors
from tokenizers.trainers import BpeTrainer

from megatron_sdar.data.tokenization.tokenizer import END_OF_TEXT, IM_END, IM_START, MASK_TOKEN

VOCAB_SIZE = 512
_QWEN3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
_PLAIN_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
_NAMES = (
    "Anna Ben Carla David Emma Felix Grace Hugo Iris Jack Karen Liam Maria Noah Olivia Peter "
    "Quinn Rachel Samuel Teresa Victor Wendy Xavier Yvonne"
)
_ITEMS = (
    "apples books coins eggs marbles pencils shells stamps balloons candles flowers lemons "
    "notebooks oranges postcards ribbons stickers tickets"
)
_PLACES = "market garden library school kitchen station workshop harbour"
_CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def make_demo_data(output_dir: str | Path, num_documents: int = 2000, seed: int = 0) -> list[Path]:
    """Write train.jsonl, test.jsonl, dataset_info.json and model/ into OUTPUT_DIR.

    One document in ten goes to test.jsonl; no test question is in train.jsonl. Returns the
    files written. Raises ValueError when NUM_DOCUMENTS is not in 10 to 100000.
    """
    if not 10 <= num_documents <= 100_000:
        raise ValueError(f"num_documents must be in 10 to 100000, got {num_documents}")
    directory = Path(output_dir)
    model = directory / "model"
    model.mkdir(parents=True, exist_ok=True)
    records = make_records(num_documents, seed)
    num_test = num_documents // 10
    train, test = records[num_test:], records[:num_test]
    tokenizer = train_tokenizer(
        f"{role}\n{record[key]}"
        for record in train
        for role, key in (("user", "prompt"), ("assistant", "response"))
    )
    contents = {
        directory / "train.jsonl": "".join(json.dumps(record) + "\n" for record in train),
        directory / "test.jsonl": "".join(json.dumps(record) + "\n" for record in test),
        directory / "dataset_info.json": _json(
            {
                f"arithmetic{suffix}": entry
                for suffix, entry in (
                    ("", _dataset_entry("train.jsonl")),
                    ("_test", _dataset_entry("test.jsonl")),
                )
            }
        ),
        model / "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        model / "tokenizer_config.json": _json(_tokenizer_config(tokenizer)),
        model / "chat_template.jinja": _CHAT_TEMPLATE,
        model / "config.json": _json(_model_config(tokenizer)),
        model / "generation_config.json": _json(_generation_config(tokenizer)),
    }
    for file, content in contents.items():
        file.write_text(content, encoding="utf-8", newline="\n")
    return list(contents)


def make_records(num_documents: int, seed: int) -> list[dict[str, str]]:
    """NUM_DOCUMENTS different questions with a worked answer that ends in "#### N"."""
    rng = random.Random(seed)
    makers = (_addition, _purchase, _story)
    records: dict[str, dict[str, str]] = {}
    while len(records) < num_documents:
        prompt, steps, result = rng.choice(makers)(rng)
        response = f"<think>\n{steps}\n</think>\n\n#### {result}"
        records.setdefault(prompt, {"prompt": prompt, "response": response})
    return list(records.values())


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """A byte-level BPE tokenizer of VOCAB_SIZE ids over TEXTS, with Qwen3's split and markers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = post_processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    num_added = len(_SPECIAL_TOKENS) + len(_PLAIN_TOKENS) + 1
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE - num_added,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in _PLAIN_TOKENS])
    tokenizer.add_special_tokens([MASK_TOKEN])
    return tokenizer


def _addition(rng: random.Random) -> tuple[str, str, int]:
    a, b = rng.randint(10, 999), rng.randint(10, 999)
    steps, carry, place = [], 0, 1
    for name in ("ones", "tens", "hundreds"):
        left, right = a // place % 10, b // place % 10
        total = left + right + carry
        with_carry = f" + {carry}" if carry else ""
        steps.append(f"{name}: {left} + {right}{with_carry} = {total}")
        carry, place = total // 10, place * 10
    return f"What is {a} + {b}?", "\n".join(steps), a + b


def _purchase(rng: random.Random) -> tuple[str, str, int]:
    name, item = rng.choice(_NAMES.split()), rng.choice(_ITEMS.split())
    count, price, paid = rng.randint(2, 9), rng.randint(2, 9), rng.randint(81, 99)
    cost = count * price
    prompt = f"{name} buys {count} {item} for ${price} each and pays ${paid}. How much is left?"
    return prompt, f"{count} * {price} = {cost}\n{paid} - {cost} = {paid - cost}", paid - cost


def _story(rng: random.Random) -> tuple[str, str, int]:
    name, item, place = (
        rng.choice(_NAMES.split()),
        rng.choice(_ITEMS.split()),
        rng.choice(_PLACES.split()),
    )
    start, more, given = rng.randint(20, 60), rng.randint(10, 39), rng.randint(2, 19)
    total = start + more
    prompt = (
        f"{name} has {start} {item}, finds {more} more in the {place} and gives {given} away. "
        f"How many {item} are left?"
    )
    steps = f"{start} + {more} = {total}\n{total} - {given} = {total - given}"
    return prompt, steps, total - given


def _dataset_entry(file_name: str) -> dict[str, Any]:
    return {"file_name": file_name, "columns": {"prompt": "prompt", "response": "response"}}


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            str(token_id): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items())
        },
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "mask_token": MASK_TOKEN,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }


def _model_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "attention_bias": False,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        # Wider than usual: a model this small learns little in 60 steps from 0.02.
        "initializer_range": 0.06,
        "block_size": 4,
        "mask_token_id": tokenizer.token_to_id(MASK_TOKEN),
        "bos_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "eos_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "torch_dtype": "float32",
    }


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    ends = [tokenizer.token_to_id(token) for token in (IM_END, END_OF_TEXT)]
    return {"bos_token_id": ends[1], "eos_token_id": ends, "pad_token_id": ends[1]}


def _json(content: object) -> str:
    return json.dumps(content, indent=2) + "\n"
