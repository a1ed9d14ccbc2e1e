"""A join token: with one, a machine joins a fleet. The coordinator makes it, the agent sends it.

`oc1.CERTIFICATE.SECRET`: the SHA-256 of the coordinator's own certificate in hexadecimal digits, or
`-` where it has none; and a key with the right `join` alone.
"""

import re
from typing import Self

from msgspec import Struct

_TEXT = re.compile(r"oc1\.(-|[0-9a-f]{64})\.(oc_[A-Za-z0-9_-]{43})")

_CERTIFICATE = re.compile(r"[0-9a-f]{64}")

EXPECTED = "give a join token: `ollama-coordinator join-token create` makes one"


def certificate_in(text: str) -> str:
    """The SHA-256 of a certificate, in hexadecimal digits with or without colons; or empty.

    Raises:
        ValueError: the text is none; its sentence says what would be one.
    """
    digits = text.strip().replace(":", "").lower()
    if digits and _CERTIFICATE.fullmatch(digits) is None:
        raise ValueError("give the 64 hexadecimal digits of its SHA-256; a join token has them")
    return digits


class JoinToken(Struct, frozen=True):
    """A token's parts; `certificate` is empty where the coordinator has none of its own."""

    secret: str
    certificate: str = ""

    @property
    def text(self) -> str:
        """What people copy."""
        return f"oc1.{self.certificate or '-'}.{self.secret}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The token of a text.

        Raises:
            ValueError: it is none; its sentence does not repeat the text.
        """
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise ValueError(EXPECTED)
        return cls(match[2], match[1].removeprefix("-"))
