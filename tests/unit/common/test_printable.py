"""Text from outside that people read."""

import pytest

from ollama_coordinator_common.printable import (
    all_printable,
    check_printable,
    printable,
    quoted,
)

STEERING = (
    *("\x00", "\x07", "\x1b[2J", "\x7f", "\x9b31m"),
    *("\u200b", "\u200e", "\u202e", "\u2066", "\ufeff"),
)
SHOWN = ["gpu-1", "机器 1", "コンピューター\u3000二", "حاسوب", "naïve", "😀", "a\u00a0b", "<b>"]


@pytest.mark.spec("FLEET-36")
@pytest.mark.parametrize("character", STEERING, ids=ascii)
def test_a_name_with_a_character_that_steers_is_refused_with_a_sentence(character: str) -> None:
    code = f"U\\+{ord(character[0]):04X}"
    with pytest.raises(ValueError, match=f"machine_name has the character {code}, which is"):
        check_printable("machine_name", None, f"gpu{character}1")


@pytest.mark.spec("FLEET-36")
def test_names_of_every_script_and_notes_of_several_lines_are_taken() -> None:
    check_printable("a label", *SHOWN)
    check_printable("notes", "one\r\n\ttwo", lines=True)
    with pytest.raises(ValueError, match="U\\+000A"):
        check_printable("a label", "one\ntwo")
    with pytest.raises(ValueError, match="U\\+202E"):
        check_printable("notes", "one\n\u202etwo", lines=True)


@pytest.mark.spec("DASH-36")
def test_what_is_shown_has_an_escape_for_each() -> None:
    assert printable("a\x1b[2Jb\u202ec\nd\u200b") == r"a\x1b[2Jb\u202ec\nd\u200b"
    assert [printable(text) for text in SHOWN] == SHOWN
    decoded = {"na\x07me": ["x\ty\nz\x1b", 7, None, {"a": "\ufeff"}]}
    assert all_printable(decoded) == {r"na\x07me": ["x\ty\nz\\x1b", 7, None, {"a": r"\ufeff"}]}


@pytest.mark.spec("SURFACE-1")
@pytest.mark.parametrize(
    ("text", "as_go"),
    [
        ("a b", '"a b"'),
        ("a\"'\\", '"a\\"\'\\\\"'),
        ("\a\b\f\n\r\t\v", r'"\a\b\f\n\r\t\v"'),
        ("\0\x1f\x7f", r'"\x00\x1f\x7f"'),
        ("é模😀", '"é模😀"'),
        ("\u00a0\u202e\U000e0001", r'"\u00a0\u202e\U000e0001"'),
    ],
)
def test_a_text_in_quotes_is_as_go_writes_it(text: str, as_go: str) -> None:
    assert quoted(text) == as_go


def test_a_character_has_its_own_quotation_mark() -> None:
    assert (quoted("'", "'"), quoted('"', "'")) == (r"'\''", "'\"'")
