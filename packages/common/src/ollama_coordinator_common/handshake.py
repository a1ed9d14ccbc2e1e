"""The handshake before the first request of a connection to an agent's relay.

Each side shows that it knows the agent's secret, or rather its hash, as nobody else does:

    coordinator   ollama-coordinator-handshake NONCE
    relay         NONCE PROOF
    coordinator   PROOF

A proof is HMAC-SHA-256 (RFC 2104) over both nonces: what was heard on the network opens nothing. It
says who is at the other end, and does not hide or guard what follows.
"""

import hmac
import re
import secrets
from functools import lru_cache
from hashlib import sha256

GREETING = b"ollama-coordinator-handshake "
"""How a connection begins that has a handshake; no method of HTTP does."""

_NONCE = re.compile(rb"[0-9a-f]{32}")

HELLO_BYTES = len(GREETING) + 32 + 1
ANSWER_BYTES = 32 + 1 + 64 + 1
PROOF_BYTES = 64 + 1
"""Of each line, with its end."""

MOST_KEYS = 4096
"""Keys that are kept: of more agents they are made anew."""


class NotProven(OSError):
    """The other side does not show that it knows the secret."""

    def __init__(self) -> None:
        super().__init__(
            "what listens there is not this agent's relay; does the agent run, and has no other "
            "program its port?"
        )


@lru_cache(MOST_KEYS)
def relay_key(key: str) -> str:
    """What opens an agent's relay, and nothing else; `key` is the hash of its secret."""
    return hmac.new(key.encode(), b"relay", sha256).hexdigest() if key else ""


class CoordinatorSide:
    """The coordinator's side; `line` goes out first. `key` is the relay's."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._nonce = secrets.token_hex(16).encode()
        self.line = b"%b%b\n" % (GREETING, self._nonce)

    def proof(self, answer: bytes) -> bytes:
        """The line that follows what the relay answers.

        Raises:
            NotProven: it does not know the secret.
        """
        nonce, _, proof = answer.removesuffix(b"\n").partition(b" ")
        known = _NONCE.fullmatch(nonce) and _proof(self._key, b"relay", self._nonce, nonce)
        if not known or not hmac.compare_digest(known, proof):
            raise NotProven
        return _proof(self._key, b"coordinator", self._nonce, nonce) + b"\n"


class RelaySide:
    """The relay's side, to a hello; `line` goes out.

    Raises:
        NotProven: it is no hello.
    """

    def __init__(self, key: str, hello: bytes) -> None:
        asked = hello.removeprefix(GREETING).removesuffix(b"\n")
        if len(hello) != HELLO_BYTES or not _NONCE.fullmatch(asked):
            raise NotProven
        nonce = secrets.token_hex(16).encode()
        self._wanted = _proof(key, b"coordinator", asked, nonce) + b"\n"
        self.line = b"%b %b\n" % (nonce, _proof(key, b"relay", asked, nonce))

    def is_proof(self, line: bytes) -> bool:
        """Whether the coordinator knows the secret."""
        return hmac.compare_digest(line, self._wanted)


def _proof(key: str, *about: bytes) -> bytes:
    return hmac.new(key.encode(), b"\n".join(about), sha256).hexdigest().encode()
