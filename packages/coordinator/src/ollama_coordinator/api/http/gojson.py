"""JSON bodies as Go's decoder reads them, its complaints included.

Keys match in any letter case, the last of several equal ones wins, bytes after the first value are
ignored, invalid UTF-8 and lone surrogates become U+FFFD. Texts are those of Go's `encoding/json`.
"""

import json
import re
import string
from typing import Any, NoReturn

from ollama_coordinator_common.printable import quoted

from .errors import UnreadableBody

KINDS = {
    str: "string",
    bool: "bool",
    int: "number",
    float: "number",
    list: "array",
    dict: "object",
}
_WHERE = {
    "Expecting property name": "looking for beginning of object key string",
    "Illegal trailing comma before end of object": "looking for beginning of object key string",
    "Expecting ':'": "after object key",
    "Invalid \\": "in string escape code",
}
SINGLE = "'"
"""The quotation mark of a character."""

LITERALS = ("true", "false", "null")
_TEXT_OR_FLAT = re.compile(r'"(?:[^"\\]|\\.)*+"|[^\[\]{}"]++', re.DOTALL)
"""Everything but the brackets that are not in a text."""

_NO_UTF8 = re.compile("[\\udc80-\\udcff]")
"""A byte that is no UTF-8, as `surrogateescape` writes it."""

_CUT_NUMBER = re.compile(r"-?\d+(?:\.|(?:\.\d+)?[eE][-+]?)")
"""Python takes what comes before the cut."""

LONGEST_INTEGER = 400
"""Digits; a longer number is read as a float, since Python refuses to convert one of thousands."""


class TooDeep(UnreadableBody):
    """JSON in more brackets than Python reads, which are fewer than in Go."""


class _Constant(ValueError):
    """`NaN` or `Infinity`, which Python takes and Go does not."""


def _no_constant(name: str) -> NoReturn:
    if name.startswith("-"):
        raise _Constant("invalid character 'I' in numeric literal")
    raise _Constant(f"invalid character '{name[0]}' looking for beginning of value")


def _whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) <= LONGEST_INTEGER else float(digits)


def _in_order(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys stand where they came last, for the last of those alike wins."""
    members = dict(pairs)
    if len(members) == len(pairs):
        return members
    last_first = dict(reversed(pairs))
    return {key: members[key] for key in reversed(last_first)}


_decoder = json.JSONDecoder(
    parse_constant=_no_constant, parse_int=_whole_number, object_pairs_hook=_in_order
)


def first_value(body: bytes, empty: str) -> Any:
    """The first JSON value of a body.

    Raises:
        HttpError: 400 with Go's text, or with `empty` where there is nothing.
    """
    # Go counts in bytes, and each byte that is no UTF-8 is a character.
    bytewise = body.decode(errors="surrogateescape").lstrip(" \t\r\n")
    if not bytewise:
        raise UnreadableBody(400, empty)
    text = _NO_UTF8.sub("\ufffd", bytewise)
    try:
        value, _ = _decoder.raw_decode(text)
        if KINDS.get(type(value)) == "number" and _CUT_NUMBER.fullmatch(text):
            raise UnreadableBody(400, "unexpected EOF")
        return _whole(value) if "\\ud" in text or "\\uD" in text else value
    except json.JSONDecodeError as exc:
        raise UnreadableBody(400, _complaint(bytewise, exc)) from exc
    except _Constant as exc:
        raise UnreadableBody(400, str(exc)) from exc
    except RecursionError as exc:
        raise TooDeep(400, "json: exceeded max depth") from exc


def _whole(value: Any) -> Any:
    """The same value without halves of surrogate pairs, which no encoding can write."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {_whole(key): _whole(item) for key, item in value.items()}
    return value


def _complaint(text: str, error: json.JSONDecodeError) -> str:
    """Go's sentence on a body that is no JSON."""
    at, where = _place(text, error)
    if at >= len(text) or error.msg.startswith("Unterminated"):
        return "unexpected EOF"
    character = chr(text[at].encode(errors="surrogateescape")[0])
    return f"invalid character {quoted(character, SINGLE)} {where}"


def _place(text: str, error: json.JSONDecodeError) -> tuple[int, str]:
    """Which character Go complains of, and where it says that it is."""
    at, message = error.pos, error.msg
    if "control character" in message:
        return at, "in string literal"
    if message.startswith("Invalid \\u"):
        at = text.rfind("\\u", 0, at + 2) + 2
        return _after(text, at, string.hexdigits), "in \\u hexadecimal character escape"
    if message.startswith(("Illegal trailing comma", "Invalid \\escape")):
        at += 1  # Python points at the comma or the backslash, Go at the next character
    at = _after(text, at, " \t\r\n")
    if message.startswith("Expecting value"):
        return _in_value(text, at)
    if message.startswith("Expecting ','"):
        return _after_value(text, at)
    default = "looking for beginning of value"
    return at, next((said for start, said in _WHERE.items() if message.startswith(start)), default)


def _in_value(text: str, at: int) -> tuple[int, str]:
    if text.startswith("-", at):
        return at + 1, "in numeric literal"
    for literal in LITERALS:
        if text.startswith(literal[0], at):
            same = next(n for n in range(5) if not text.startswith(literal[: n + 1], at))
            return at + same, f"in literal {literal} (expecting '{literal[same]}')"
    return at, "looking for beginning of value"


def _after_value(text: str, at: int) -> tuple[int, str]:
    if text[at - 1].isdigit() and text.startswith((".", "e", "E"), at):
        if text[at] == ".":
            return at + 1, "after decimal point in numeric literal"
        return _after(text, at + 1, "+-"), "in exponent of numeric literal"
    in_list = _innermost(_TEXT_OR_FLAT.sub("", text[:at])) == "["
    return at, f"after {'array element' if in_list else 'object key:value pair'}"


def _innermost(brackets: str) -> str:
    """The last bracket that is still open; empty where none is."""
    closed = 0
    for bracket in reversed(brackets):
        if bracket in "]}":
            closed += 1
        elif closed:
            closed -= 1
        else:
            return bracket
    return ""


def _after(text: str, at: int, characters: str) -> int:
    while at < len(text) and text[at] in characters:
        at += 1
    return at


class Fields:
    """The fields of one object by their names in lower case; `go_type` is for the complaints."""

    def __init__(self, value: Any, go_type: str) -> None:
        self._go_type = go_type
        if value is None:
            value = {}
        if not isinstance(value, dict):
            kind = KINDS[type(value)]
            raise UnreadableBody(
                400, f"json: cannot unmarshal {kind} into Go value of type {go_type}"
            )
        self.values: dict[str, Any] = {key.lower(): item for key, item in value.items()}

    def text(self, name: str) -> str:
        """A field that must be a text; empty where it is absent or null.

        Raises:
            HttpError: 400, it is something else.
        """
        value = self._typed(name, str, "string")
        return value if isinstance(value, str) else ""

    def flag(self, name: str, *, default: bool = False) -> bool:
        """A field that must be true or false.

        Raises:
            HttpError: 400, it is something else.
        """
        value = self._typed(name, bool, "bool")
        return value if isinstance(value, bool) else default

    def mapping(self, name: str) -> dict[str, Any]:
        """A field that must be an object.

        Raises:
            HttpError: 400, it is something else.
        """
        return self._typed(name, dict, "map[string]interface {}") or {}

    def digests(self, name: str) -> dict[str, str]:
        """A field that must map names to digests, such as `files`.

        Raises:
            HttpError: 400, it is something else.
        """
        value = self._typed(name, dict, "map[string]string") or {}
        for digest in value.values():
            if not isinstance(digest, str):
                self._complain(name, digest, "string")
        return dict(value)

    def model(self) -> str:
        """`model`, else `name`: the command line sends `name` and an empty `model`."""
        model, name = self.text("model"), self.text("name")
        return model or name

    def _typed(self, name: str, kind: type, go_kind: str) -> Any:
        value = self.values.get(name)
        if value is not None and type(value) is not kind:
            self._complain(name, value, go_kind)
        return value

    def _complain(self, name: str, value: Any, go_kind: str) -> NoReturn:
        field = f"{self._go_type.rpartition('.')[2]}.{name}"
        kind = KINDS.get(type(value), "value")
        raise UnreadableBody(
            400, f"json: cannot unmarshal {kind} into Go struct field {field} of type {go_kind}"
        )


def read_fields(body: bytes, go_type: str, empty: str = "missing request body") -> Fields:
    """The fields of a body that must be one object.

    Raises:
        HttpError: 400 with Go's text.
    """
    return Fields(first_value(body, empty), go_type)
