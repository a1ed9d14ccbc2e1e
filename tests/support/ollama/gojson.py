"""Request bodies read as Go's decoder reads them, its error texts included."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

_KINDS = {
    str: "string",
    bool: "bool",
    int: "number",
    float: "number",
    list: "array",
    dict: "object",
}
_COMPLAINTS = {
    "Expecting property name": "looking for beginning of object key string",
    "Illegal trailing comma": "looking for beginning of object key string",
    "Expecting ':'": "after object key",
    "Expecting ','": "after object key:value pair",
    "Invalid control character": "in string literal",
    "Invalid \\": "in string escape code",
}


_CUT_NUMBER = re.compile(r"-|-?\d+(\.|(\.\d+)?[eE][-+]?)")

EARLY_FLAGS = ("stream", "insecure", "verbose", "truncate", "raw")
EARLY_TEXTS = ("role", "username", "password")
"""They have the same type wherever they occur; checked before the route looks at anything."""


class BadBody(Exception):
    """The body is not what the route takes; the text is Go's."""


def _no_constant(name: str) -> NoReturn:
    raise BadBody(f"invalid character '{name[0]}' looking for beginning of value")


# Python would take NaN and Infinity; Go does not.
_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def first_value(body: bytes) -> Any:
    """The first JSON value; whatever follows it is ignored, as Go's stream decoder does."""
    text = body.decode("utf-8", "replace").lstrip(" \t\r\n")
    if not text:
        raise BadBody("EOF")
    if _CUT_NUMBER.fullmatch(text):
        raise BadBody("unexpected EOF")
    try:
        value, _ = _DECODER.raw_decode(text)
    except json.JSONDecodeError as exc:
        raise BadBody(_complaint(text, exc)) from None
    return value


def _complaint(text: str, exc: json.JSONDecodeError) -> str:
    at = exc.pos
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    if at >= len(text) or exc.msg.startswith("Unterminated"):
        return "unexpected EOF"
    where = next(
        (said for start, said in _COMPLAINTS.items() if exc.msg.startswith(start)),
        "looking for beginning of value",
    )
    return f"invalid character {_quoted(text[at])} {where}"


def _quoted(character: str) -> str:
    if character == "'":
        return r"'\''"
    return "'" + json.dumps(character, ensure_ascii=False)[1:-1].replace('\\"', '"') + "'"


def fold(value: dict[str, Any]) -> dict[str, Any]:
    """Keys in lower case; of several spellings the last wins."""
    return {key.lower(): item for key, item in value.items()}


class Fields:
    """One decoded object, read field by field with Go's complaints about wrong types."""

    def __init__(self, struct: str, value: Any) -> None:
        self._struct = struct
        if value is None:
            value = {}
        if not isinstance(value, dict):
            self._complain(value, "", f"api.{struct}")
        self.raw: dict[str, Any] = fold(value)
        for key in EARLY_FLAGS:
            self.flag(key)
        if struct == "ShowRequest":
            self.mapping("options")
        for key in EARLY_TEXTS:
            self.text(key)

    def text(self, key: str, default: str = "") -> str:
        return self._typed(key, str, "string", default)

    def flag(self, key: str, default: bool = False) -> bool:
        return self._typed(key, bool, "bool", default)

    def number(self, key: str) -> float | None:
        value = self.raw.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            self._complain(value, key, "int")
        return value

    def array(self, key: str, go_type: str = "[]interface {}") -> list[Any]:
        return self._typed(key, list, go_type, [])

    def mapping(self, key: str, values: str = "interface {}") -> dict[str, Any]:
        return self._typed(key, dict, f"map[string]{values}", {})

    def objects(self, key: str, go_list: str, go_item: str) -> list[Fields]:
        """The objects of a list, with the names of its type and theirs; `null` is an empty one."""
        items = self.array(key, go_list)
        for item in items:
            if not isinstance(item, dict | None):
                self._complain(item, key, go_item)
        return [Fields(f"{self._struct}.{key}", item) for item in items]

    def name(self) -> str:
        """`model`, else `name`: an empty `model` falls through, which the CLI relies on."""
        model, name = self.text("model"), self.text("name")
        return model or name

    def _typed(self, key: str, kind: Callable[..., T], go_type: str, default: T) -> T:
        value = self.raw.get(key)
        if value is None:
            return default
        if type(value) is not kind:
            self._complain(value, key, go_type)
        return value  # type: ignore[no-any-return]

    def _complain(self, value: Any, key: str, go_type: str) -> NoReturn:
        kind = _KINDS.get(type(value), "value")
        place = f"Go struct field {self._struct}.{key}" if key else "Go value"
        raise BadBody(f"json: cannot unmarshal {kind} into {place} of type {go_type}")
