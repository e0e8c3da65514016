"""The tokenizer of a model directory, as plain text to ids.

Owns finding and checking the tokenizer files: every added token that the files declare has the
id they declare, the chat markers exist, and <|MASK|> exists (it is appended to a Qwen3
tokenizer that lacks it). Nothing is ever added around a text and nothing is truncated or
padded, whatever the tokenizer file asks for. No code of the model directory is executed.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders

from megatron_sdar.data.tokenization.byte_level_bpe import byte_characters
from megatron_sdar.data.tokenization.fast_tokenizer import (
    FastEncoder,
    build_fast_encoder,
    check_texts,
    cross_check,
)
from megatron_sdar.regular_files import IrregularFileError, check_regular, read_json, shown

MASK_TOKEN = "<|MASK|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
_MAX_ID_DIGITS = 10
_LONGEST = 300  # characters of what a library says
_MAX_BYTES = 2**30  # of tokenizer.json, of which the largest have some 40 MB


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
        self._loaded: Tokenizer | None = backend
        self._json: str | None = None
        self._fast: FastEncoder | None = None
        self.mask_token_id = self._special_id(MASK_TOKEN)
        self.eos_token_id = self._special_id(IM_END)
        self.pad_token_id = self._special_id(END_OF_TEXT)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    @property
    def backend(self) -> Tokenizer:
        """The tokenizers library's own object."""
        # Reading 150 thousand tokens takes most of a second: a worker process that only needs
        # the fast encoder never does.
        if self._loaded is None:
            assert self._json is not None
            self._loaded = Tokenizer.from_str(self._json)
        return self._loaded

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaded": None, "_json": self._serialized()}

    def _serialized(self) -> str:
        if self._json is None:
            self._json = self.backend.to_str()
        return self._json

    def _special_id(self, token: str) -> int:
        token_id = self.backend.token_to_id(token)
        assert token_id is not None
        return token_id

    def encode(self, text: str) -> list[int]:
        """Ids of TEXT; special-token strings inside it become their special ids."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of every text, using all cores."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_pieces(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """`encode` of every text as read-only int32 [n], by the fast encoder once enabled.

        Equal texts share one array. Uses one core with the fast encoder, else all cores.
        """
        unique = list(dict.fromkeys(texts))
        found = self._fast.encode(unique) if self._fast is not None else [None] * len(unique)
        rest = [text for text, ids in zip(unique, found, strict=True) if ids is None]
        slow = iter(self.encode_batch(rest) if rest else ())
        by_text = {
            text: np.array(next(slow), np.int32) if ids is None else ids
            for text, ids in zip(unique, found, strict=True)
        }
        return [by_text[text] for text in texts]

    def enable_fast(self, sample_texts: Sequence[str] = ()) -> str:
        """Let `encode_pieces` use tiktoken's engine if its ids are the same; say what was decided.

        Both engines are compared on a fixed battery of texts and on SAMPLE_TEXTS.
        """
        fast = build_fast_encoder(self.backend)
        if isinstance(fast, str):
            return f"tokenizer: tokenizers ({fast})"
        added = [token.content for token in self.backend.get_added_tokens_decoder().values()]
        texts = [*check_texts(added), *sample_texts]
        difference = cross_check(fast, self.backend, texts)
        if difference is not None:
            return f"tokenizer: tokenizers (first difference: {difference})"
        self._fast = fast
        return f"tokenizer: tiktoken (checked on {len(texts)} strings)"

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of IDS; SKIP_SPECIAL leaves special tokens out."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token; of a byte-level vocabulary perhaps a part of a character."""
        token: str | None = self.backend.id_to_token(token_id)
        added = self.backend.get_added_tokens_decoder()
        if (
            token is None
            or token_id in added
            or not isinstance(self.backend.decoder, decoders.ByteLevel)
        ):
            return self.decode([token_id]).encode()
        characters = byte_characters()
        return bytes(characters[char] for char in token)

    def token_to_id(self, token: str) -> int | None:
        """Id of one token string, None when there is none."""
        token_id: int | None = self.backend.token_to_id(token)
        return token_id

    def fingerprint(self) -> str:
        """sha256 of the serialised tokenizer: equal fingerprints give equal ids."""
        return hashlib.sha256(self._serialized().encode()).hexdigest()


def load_tokenizer(path: str | Path) -> SdarTokenizer:
    """The tokenizer at PATH: a tokenizer.json file, or a directory that holds one.

    A directory with other tokenizer files (vocab.json, merges.txt, ...) is read through
    transformers. Raises ValueError when there is no usable tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        file = path / "tokenizer.json"
        backend = _from_file(file) if os.path.lexists(file) else _from_transformers(path)
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
        check_regular(file, _MAX_BYTES)
        return Tokenizer.from_file(str(file))
    except IrregularFileError:
        raise
    except Exception as error:  # tokenizers raises plain Exception for unreadable files
        raise ValueError(
            f"{file}: not a tokenizer.json of the tokenizers library: {str(error)[:_LONGEST]}"
        ) from error


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
    except Exception as error:  # whatever the library meets in a stranger's files
        first_line = str(error).strip().partition("\n")[0][:_LONGEST]
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
    if os.path.lexists(file):
        entries = _read_object(file).get("added_tokens_decoder", {})
        if not isinstance(entries, dict):
            raise ValueError(f"{file}: added_tokens_decoder must be an object of id: token")
        tokens = {}
        for token_id, entry in entries.items():
            if not (
                token_id.isdecimal()
                and len(token_id) <= _MAX_ID_DIGITS
                and isinstance(entry, dict)
                and isinstance(entry.get("content"), str)
            ):
                raise ValueError(
                    f"{file}: added_tokens_decoder[{shown(token_id)}] must be an object with a "
                    f"'content' string under a whole-number id, got {shown(entry)}"
                )
            flags = {
                flag: bool(entry[flag])
                for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")
                if flag in entry
            }
            tokens[int(token_id)] = AddedToken(entry["content"], **flags)
        declared.append((file, tokens))
    file = directory / "added_tokens.json"
    if os.path.lexists(file):
        tokens = {}
        for content, token_id in _read_object(file).items():
            if not isinstance(token_id, int) or isinstance(token_id, bool):
                raise ValueError(
                    f"{file}: {shown(content)} must have a whole-number id: {shown(token_id)}"
                )
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
        content = read_json(file)
    except OSError as error:  # such as a link to nothing
        raise ValueError(f"{file}: cannot read it: {error.strerror or error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must hold one JSON object, got {type(content).__name__}")
    return content
