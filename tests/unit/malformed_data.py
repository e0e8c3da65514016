"""dataset_info.json and tokenizer files that must be refused: (name, file, content, words)."""

import json

from unit.malformed_configs import Case

_INFO, _PREFIX = "dataset_info.json", "p.json"


def _entry(**keys: object) -> bytes:
    return json.dumps({"d": {"file_name": "d.jsonl", **keys}}).encode()


_ENTRIES: dict[str, tuple[object, ...]] = {
    "file_name": (5, ["a"], "missing.jsonl", "\0"),
    "formatting": ("other", ["alpaca"], {"a": 1}, 5),
    "num_samples": (0, -1, 1.5, "5", True),
    "columns": (5, [], "text", {"prompt": 5}, {"promt": "a"}, {"images": "a"}),
    "tags": (5, [], {"role_tag": 5}, {"role": "a"}),
    "split": ("test", ["train"]),
    "script_url": ("run.py",),
    "hf_hub_url": ("a/b",),
    "ranking": (True,),
    "loader": ("x",),
}
_BROKEN: list[tuple[str, bytes]] = [
    ("cut", b'{"d": '),
    ("deep", b"[" * 200_000),
    ("not UTF-8", b"\xff"),
    ("long number", b'{"d": ' + b"1" * 5000 + b"}"),
    ("list", b"[]"),
    ("number", b"5"),
]

DATA: list[Case] = [
    *((f"{file} {name}", file, text, file) for file in (_INFO, _PREFIX) for name, text in _BROKEN),
    *((f"tokenizer.json {name}", "tokenizer.json", text, "tokenizer") for name, text in _BROKEN),
    *(
        (f"{file} {name}", file, text, file)
        for file in ("tokenizer_config.json", "added_tokens.json")
        for name, text in _BROKEN
    ),
    ("no such dataset", _INFO, b"{}", "no dataset 'd'"),
    ("entry is a list", _INFO, b'{"d": []}', "must be an object"),
    *(
        (f"{key} is {value!r}", _INFO, _entry(**{key: value}), f"{_INFO}: d.*{key}")
        for key, values in _ENTRIES.items()
        for value in values
    ),
    ("id of 5000 digits", "tokenizer_config.json",
     b'{"added_tokens_decoder": {"' + b"1" * 5000 + b'": {"content": "a"}}}', "whole-number id"),
    ("added token is a number", "tokenizer_config.json",
     b'{"added_tokens_decoder": {"1": 5}}', "whole-number id"),
    ("added tokens in a list", "tokenizer_config.json",
     b'{"added_tokens_decoder": []}', "must be an object"),
    ("added id is text", "added_tokens.json", b'{"a": "1"}', "whole-number id"),
    ("added id contradicts", "added_tokens.json", b'{"<|im_end|>": 1}', "do not belong together"),
]  # fmt: skip
