"""Text from outside, where people read it: nothing in it steers a terminal, hides, or turns around.

Names, versions and labels with such characters are refused. Other texts (names of models, errors,
output of programs) are shown with an escape in place of each.
"""

import re
from typing import Any

_STEERING = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # control characters
    "\u00ad\u180e\u200b-\u200d\u2060-\u2064\ufeff"  # invisible ones
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"  # those that set the direction of text
    "\u2028\u2029\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_BREAKS = re.compile(r"[\r\n\t]")


def check_printable(where: str, *texts: str | None, lines: bool = False) -> None:
    """Refuse a text that would not be shown as it is; `lines`: it may have line ends and tabs.

    Raises:
        ValueError: with a sentence; `where` names what the text is.
    """
    for text in texts:
        found = _STEERING.search(_BREAKS.sub("", text or "") if lines else text or "")
        if found is not None:
            raise ValueError(
                f"{where} has the character U+{ord(found[0]):04X}, which is invisible or changes"
                " how the text around it is shown; leave it out"
            )


def printable(text: str) -> str:
    r"""The text on one line, with an escape such as `\x1b` in place of each such character."""
    return _STEERING.sub(_escape, text)


def all_printable(value: Any) -> Any:
    """Decoded JSON whose texts are printable; they keep their line ends and tabs."""
    if isinstance(value, str):
        return _STEERING.sub(_escape_all_but_breaks, value)
    if isinstance(value, list):
        return [all_printable(item) for item in value]
    if isinstance(value, dict):
        return {all_printable(key): all_printable(item) for key, item in value.items()}
    return value


def _escape_all_but_breaks(found: re.Match[str]) -> str:
    return found[0] if found[0] in "\n\t" else _escape(found)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


# ── as Go quotes it ──────────────────────────────────────────────────────────────────────────

_ESCAPED = {"\a": "a", "\b": "b", "\t": "t", "\n": "n", "\v": "v", "\f": "f", "\r": "r", "\\": "\\"}


def quoted(text: str, mark: str = '"') -> str:
    """A text as Go's `%q` writes it, and so Ollama in its errors."""
    return f"{mark}{''.join(_escaped(character, mark) for character in text)}{mark}"


def _escaped(character: str, mark: str) -> str:
    code = ord(character)
    if character == mark or character in _ESCAPED:
        return f"\\{_ESCAPED.get(character, character)}"
    if character.isprintable():
        return character
    if code < 0x20 or code == 0x7F:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
