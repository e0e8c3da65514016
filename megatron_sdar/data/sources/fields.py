"""One field of a record: there or not, text or not.

Owns the messages about a single value. Text that a tokenizer cannot take never gets past here.
"""

from typing import Any

from megatron_sdar.data.readers.records import RecordError


def required(record: dict[str, Any], column: str, location: str) -> object:
    """The value of COLUMN. Raises RecordError when RECORD has no such field."""
    if column not in record:
        raise RecordError(
            location, "missing column", f"the record has no {column!r}; it has {names_in(record)}"
        )
    return record[column]


def optional_column(record: dict[str, Any], column: str | None, location: str) -> str:
    """The text of COLUMN, "" where it is absent or null."""
    if column is None:
        return ""
    return optional_text(record.get(column), column, location)


def optional_text(value: object, name: str, location: str) -> str:
    """VALUE, which must be a string or null ("")."""
    return "" if value is None else require_text(value, name, location)


def require_text(value: object, name: str, location: str) -> str:
    """VALUE, which must be a string of valid Unicode. NAME is its place in the record."""
    if not isinstance(value, str):
        remedy = "; store it as JSON text (json.dumps)" if isinstance(value, list | dict) else ""
        raise RecordError(
            location,
            "non-string content",
            f"{name!r} must be a string, got {type(value).__name__}{remedy}",
        )
    return require_unicode(value, name, location)


def require_unicode(text: str, name: str, location: str) -> str:
    """TEXT, unless it holds half of a surrogate pair, which no tokenizer accepts: RecordError."""
    if is_unicode(text):
        return text
    place = next(i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff")
    raise RecordError(
        location,
        "invalid unicode",
        f"{name!r} holds half of a surrogate pair (\\u{ord(text[place]):04x}) at character {place}",
    )


def is_unicode(text: str) -> bool:
    """Whether TEXT can be written as UTF-8: half of a surrogate pair cannot."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def require_answer(value: object, name: str, location: str) -> str:
    """VALUE, which must be a string and not empty: nothing could be trained on."""
    text = require_text(value, name, location)
    if not text:
        raise RecordError(location, "empty answer", f"{name!r} is an empty string")
    return text


def names_in(record: dict[str, Any]) -> str:
    """The fields of RECORD, for a message."""
    return ", ".join(map(repr, record)) or "no fields"
