"""The tokenizer of a model directory, as plain text to ids.

Owns finding and checking the tokenizer files: every added token that the files declare has the
id they declare, the chat markers exist, and <|MASK|> exists (it is appended to a Qwen3
tokenizer that lacks it). Nothing is ever added around a text and nothing is truncated or
padded, whatever the tokenizer file asks for. No code of the model directory is executed.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

MASK_TOKEN = "<|MASK|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"


class SdarTokenizer:
    """A `tokenizers.Tokenizer` with the special ids that SDAR training needs.

    Fields: mask_token_id, eos_token_id (<|im_end|>), pad_token_id (<|endoftext|>) and
    vocab_size, the number of ids including every added token.
    """

    def __init__(self, backend: Tokenizer, origin: str) -> None:
        """Take BACKEND over (it is modified); ORIGIN names it in error messages.

        Raises ValueError when a chat marker is missing.
        """
        missing = [t for t in (IM_START, IM_END, END_OF_TEXT) if backend.token_to_id(t) is None]
        if missing:
            raise ValueError(
                f"{origin}: the tokenizer has no {', '.join(missing)}; the qwen3 template needs "
                "them: use the tokenizer of a Qwen3 or SDAR model"
            )
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        if MASK_TOKEN not in added:
            backend.add_special_tokens([MASK_TOKEN])
        # A tokenizer.json may carry the truncation or padding of whoever saved it last.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._fingerprint: str | None = None
        self.mask_token_id = self._special_id(MASK_TOKEN)
        self.eos_token_id = self._special_id(IM_END)
        self.pad_token_id = self._special_id(END_OF_TEXT)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    def _special_id(self, token: str) -> int:
        token_id = self._backend.token_to_id(token)
        assert token_id is not None
        return token_id

    def encode(self, text: str) -> list[int]:
        """Ids of TEXT; special-token strings inside it become their special ids."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of every text, using all cores."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of IDS; SKIP_SPECIAL leaves special tokens out."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token_to_id(self, token: str) -> int | None:
        """Id of one token string, None when there is none."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def fingerprint(self) -> str:
        """sha256 of the serialised tokenizer: equal fingerprints give equal ids."""
        if self._fingerprint is None:
            self._fingerprint = hashlib.sha256(self._backend.to_str().encode()).hexdigest()
        return self._fingerprint


def load_tokenizer(path: str | Path) -> SdarTokenizer:
    """The tokenizer at PATH: a tokenizer.json file, or a directory that holds one.

    A directory with other tokenizer files (vocab.json, merges.txt, ...) is read through
    transformers. Raises ValueError when there is no usable tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        file = path / "tokenizer.json"
        backend = _from_file(file) if file.is_file() else _from_transformers(path)
        directory = path
    elif path.is_file():
        backend = _from_file(path)
        directory = path.parent
    else:
        raise ValueError(
            f"tokenizer {path}: no such file or directory; give a model directory or a "
            "tokenizer.json file"
        )
    for file, tokens in _declared_tokens(directory):
        _add_declared(backend, file, tokens)
    return SdarTokenizer(backend, str(path))


def _from_file(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception for unreadable files
        raise ValueError(f"{file}: not a tokenizer.json of the tokenizers library: {error}") from (
            error
        )


def _from_transformers(directory: Path) -> Tokenizer:
    if not any(
        (directory / name).is_file()
        for name in ("vocab.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt")
    ):
        raise ValueError(
            f"tokenizer {directory}: the directory holds no tokenizer files; copy tokenizer.json "
            "there or name the directory that has it"
        )
    from transformers import AutoTokenizer

    try:
        wrapper = AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, TypeError, KeyError, ImportError, AttributeError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"tokenizer {directory}: transformers cannot load it ({first_line}); "
            "put a tokenizer.json there"
        ) from error
    backend = getattr(wrapper, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(
            f"tokenizer {directory}: {type(wrapper).__name__} has no fast tokenizer behind it; "
            "convert it to a tokenizer.json"
        )
    return backend


def _declared_tokens(directory: Path) -> list[tuple[Path, dict[int, AddedToken]]]:
    """Added tokens by id, as tokenizer_config.json and added_tokens.json declare them."""
    declared = []
    file = directory / "tokenizer_config.json"
    if file.is_file():
        entries = _read_object(file).get("added_tokens_decoder", {})
        if not isinstance(entries, dict):
            raise ValueError(f"{file}: added_tokens_decoder must be an object of id: token")
        tokens = {}
        for token_id, entry in entries.items():
            if not (
                token_id.isdecimal()
                and isinstance(entry, dict)
                and isinstance(entry.get("content"), str)
            ):
                raise ValueError(
                    f"{file}: added_tokens_decoder[{token_id!r}] must be an object with a "
                    f"'content' string under a whole-number id, got {entry!r}"
                )
            flags = {
                flag: bool(entry[flag])
                for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")
                if flag in entry
            }
            tokens[int(token_id)] = AddedToken(entry["content"], **flags)
        declared.append((file, tokens))
    file = directory / "added_tokens.json"
    if file.is_file():
        tokens = {}
        for content, token_id in _read_object(file).items():
            if not isinstance(token_id, int) or isinstance(token_id, bool):
                raise ValueError(f"{file}: {content!r} must have a whole-number id: {token_id!r}")
            special = content.startswith("<|") and content.endswith("|>")
            tokens[token_id] = AddedToken(content, normalized=False, special=special)
        declared.append((file, tokens))
    return declared


def _add_declared(backend: Tokenizer, file: Path, tokens: dict[int, AddedToken]) -> None:
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token_id, token in sorted(tokens.items()):
        if token.content not in known:
            backend.add_tokens([token])
        actual = backend.token_to_id(token.content)
        if actual != token_id:
            raise ValueError(
                f"{file}: {token.content} is declared with id {token_id} but the tokenizer gives "
                f"it {actual}; the tokenizer files do not belong together"
            )


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must hold one JSON object, got {type(content).__name__}")
    return content
