"""Jinja chat templates of model directories, rendered as transformers does, but contained.

A template is text from a stranger: it runs in Jinja's immutable sandbox, so it reaches no Python
object behind its inputs, and under a budget of time and characters, so it ends. What would make
equal inputs render differently (today's date, random choices) is not there. The rendered text
equals that of transformers' `apply_chat_template`.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.filters import do_indent
from jinja2.meta import find_undeclared_variables
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from megatron_sdar.data.templates.jinja_tree import GenerationTag, meter_tree

MAX_CHARACTERS = 100_000_000
MAX_SECONDS = 30.0

# They can ask for any amount of text with one number, or choose at random.
_LEFT_OUT_FILTERS = ("batch", "center", "pprint", "random", "slice", "urlize", "wordwrap")
_LEFT_OUT_GLOBALS = ("lipsum",)
_PADDING_METHODS = ("center", "expandtabs", "ljust", "rjust", "zfill")
_MAX_EXPONENT_BITS = 4096
# What looking at one value costs in time, counted in characters.
_VALUE_COST = 64
# What an item of a list takes in memory, counted in characters.
_ITEM_COST = 16
# Widths of four digits, or widths taken from a value.
_WIDE_FORMAT = re.compile(r"\d{4}|%[^a-zA-Z%]*\*|\{[^{}]*\{")


class ChatTemplateError(ValueError):
    """What a template cannot render, in one line without a place."""


class JinjaTemplate:
    """A compiled chat template. Not for use by two threads at once.

    variables: the names that it reads and does not set itself.
    """

    def __init__(self, text: str) -> None:
        """Compile TEXT. Raises ChatTemplateError with the line for a syntax error."""
        self._environment = _Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            # Folding constants would run parts of the template while it is compiled.
            optimized=False,
            extensions=[GenerationTag, loopcontrols],
        )
        try:
            self._template = self._environment.from_string(text)
            self.variables = find_undeclared_variables(self._environment.parse(text))
        except TemplateSyntaxError as error:
            raise ChatTemplateError(f"line {error.lineno}: {error.message}") from error
        except (RecursionError, SyntaxError, MemoryError) as error:
            # SyntaxError is Python's for the code that Jinja makes: it nests 20 loops at most.
            raise ChatTemplateError("it is nested too deep") from error

    def render(self, **variables: object) -> str:
        """The text for VARIABLES (plain JSON values). Raises ChatTemplateError."""
        self._environment.start_budget()
        parts = []
        try:
            for part in self._template.generate(**variables):
                self._environment.spend(len(part))
                parts.append(part)
        except TemplateError as error:
            raise ChatTemplateError(_explain(error)) from error
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            MemoryError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise ChatTemplateError(f"{type(error).__name__}: {error}") from error
        return "".join(parts)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with a budget: every loop, call and growing operation draws on it."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=self._finalize, **options)
        for name in _LEFT_OUT_FILTERS:
            del self.filters[name]
        for name in _LEFT_OUT_GLOBALS:
            del self.globals[name]
        self.filters |= {
            "tojson": self._tojson,
            "string": self._string,
            "format": self._format,
            "indent": self._indent,
            "join": self._join_filter,
            "replace": self._replace,
            "concatenate": self._concatenate,
            "same": _same,
        }
        self.filters = {name: self._charged(it) for name, it in self.filters.items()}
        self.globals |= {
            "raise_exception": _raise_exception,
            "namespace": _TemplateNamespace,
            "dict": _make_dict,
        }
        self.start_budget()

    def start_budget(self) -> None:
        """Begin a rendering: all characters, all seconds."""
        self._characters = MAX_CHARACTERS
        self._deadline = time.monotonic() + MAX_SECONDS

    def spend(self, characters: int) -> None:
        """Take CHARACTERS off the budget before they are made."""
        self._characters -= characters
        if self._characters < 0:
            raise SecurityError(f"it makes more than {MAX_CHARACTERS} characters")

    def tick(self) -> bool:
        """Called by every round of a loop and every call of a macro; True."""
        if time.monotonic() > self._deadline:
            raise SecurityError(f"it takes longer than {MAX_SECONDS:.0f} seconds")
        return True

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        meter_tree(tree)
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            self.spend(_repeated_size(left, right))
        elif operator == "**":
            self.spend(_power_size(left, right))
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, right)
        elif operator == "+":
            self.spend(_sized(left) + _sized(right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            __self._check_text_method(__obj.__name__, owner, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        __self.spend(_sized(result))
        return result

    def _charged(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self.spend(_sized(result))
            return result

        return charged

    def _check_text_method(
        self, name: str, text: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        values = [*args, *kwargs.values()]
        if name in _PADDING_METHODS:
            numbers = [value for value in values if isinstance(value, int)]
            self.spend(max([0, *numbers]) * (1 + (text.count("\t") if name == "expandtabs" else 0)))
        elif name == "join":
            self._spend_values(values, len(text))
        elif name == "replace":
            self._spend_replacement(text, values)
        elif name == "translate":
            raise SecurityError("the method translate of text is not supported; use replace")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            self._check_format(value.__self__, [args, kwargs])
            return wrapped(*args, **kwargs)

        return checked

    def _format(self, value: Any, *args: Any, **kwargs: Any) -> str:
        if args and kwargs:
            raise SecurityError("the filter format takes positional or named values, not both")
        self._check_format(str(value), [args, kwargs])
        return str(value) % (kwargs or args)

    def _check_format(self, text: str, values: object) -> None:
        if _WIDE_FORMAT.search(text):
            raise SecurityError(f"a format may not ask for such widths: {text[:100]!r}")
        self._spend_values(values)

    def _spend_values(self, value: object, each: int = 0) -> None:
        """Pay for the text of VALUE, which may hold one object many times over."""
        waiting = [value]
        while waiting:
            item = waiting.pop()
            self.spend(_VALUE_COST + each + (len(item) if isinstance(item, str) else 0))
            if isinstance(item, Mapping):
                waiting += item.keys()
                waiting += item.values()
            elif isinstance(item, list | tuple | set | frozenset):
                waiting += item

    def _spend_replacement(self, text: str, values: list[Any]) -> None:
        if len(values) >= 2 and isinstance(values[0], str) and isinstance(values[1], str):
            self.spend(len(text) + text.count(values[0]) * len(values[1]))

    def _finalize(self, value: Any) -> Any:
        # What is written, also into a variable, is paid for before str() makes it.
        if isinstance(value, str):
            self.spend(len(value))
        else:
            self._spend_values(value)
        return value

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        if isinstance(indent, int) and not 0 <= indent <= 16:
            raise SecurityError(f"the indent of tojson must be in 0..16, got {indent}")
        self._spend_values(value, len(str(separators or "")) + 16 * (indent or 0))
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def _string(self, value: Any) -> str:
        self._spend_values(value)
        return str(value)

    def _indent(
        self, value: Any, width: int | str = 4, first: bool = False, blank: bool = False
    ) -> str:
        step = width if isinstance(width, str) else " " * min(width, MAX_CHARACTERS)
        self._spend_values(value)
        self.spend(len(step) * (1 + str(value).count("\n")))
        return do_indent(str(value), step, first, blank)

    def _join_filter(self, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
        items = list(value)
        if attribute is not None:
            items = [self.getitem(item, attribute) for item in items]
        self._spend_values(items, len(str(d)))
        return str(d).join(map(str, items))

    def _replace(self, value: Any, old: str, new: str, count: int | None = None) -> str:
        self._spend_values(value)
        text = str(value)
        self._spend_replacement(text, [str(old), str(new)])
        return text.replace(str(old), str(new), -1 if count is None else count)

    def _concatenate(self, values: list[Any]) -> str:
        self._spend_values(values)
        return "".join(map(str, values))


class _TemplateNamespace(Namespace):
    """A namespace whose attributes cannot be Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *values = args
        attributes = dict(*values, **kwargs)
        for name in attributes:
            _check_public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: the name begins with _")


def _same(value: Any) -> Any:
    """VALUE; as a filter, it pays for what was made without one."""
    return value


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _sized(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    return _ITEM_COST * len(value) if isinstance(value, list | tuple | dict) else 0


def _repeated_size(left: object, right: object) -> int:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(times, int):
            return _sized(value) * max(times, 0)
    return _bits(left) + _bits(right)


def _power_size(left: object, right: object) -> int:
    if isinstance(right, int) and _bits(left) * right > _MAX_EXPONENT_BITS:
        raise SecurityError(f"{right} is too large an exponent")
    return 0


def _bits(value: object) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _explain(error: TemplateError) -> str:
    message = error.message or type(error).__name__
    if "strftime_now" in message:
        return (
            f"{message}: the template asks for today's date, and data must not depend on the day "
            "it is built; put a fixed date into the template"
        )
    return message
