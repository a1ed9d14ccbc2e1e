"""The signature of an `ollama` program, which `OLLAMA_AUTH=1` puts on each of its requests.

`Authorization: PUB:SIG`: its public key, and its Ed25519 signature of `METHOD,/path?ts=UNIX`, both
in base64. The path is that of the API, without what stands before it in OLLAMA_HOST; the body is
not signed. A repetition within the window is no different from the request, as Ed25519 signs the
same the same.
"""

import base64
import binascii
from urllib.parse import parse_qs

from starlette.types import Scope

try:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
except ImportError:  # the extra [tls] is not installed
    CAN_VERIFY = False
else:
    CAN_VERIFY = True

WINDOW_SECONDS = 300
"""How far its clock may be off, as ollama.com has it."""

KEY_BYTES, SIGNATURE_BYTES = 32, 64

MISSING = (
    "signatures of ollama programs need the package 'cryptography': install ollama-coordinator[tls]"
)


def split(authorization: bytes) -> tuple[str, bytes] | None:
    """The public key, as `id_ed25519.pub` has it, and the signature; `None` for another form."""
    public, colon, signature = authorization.partition(b":")
    if not colon or not public.startswith(b"AAAA"):
        return None
    try:
        return public.decode("ascii"), base64.b64decode(signature, validate=True)
    except (binascii.Error, ValueError):
        return None


def is_true(public: str, signature: bytes, scope: Scope, at: float) -> bool:
    """Whether the owner of a public key has signed this request within `WINDOW_SECONDS` of `at`."""
    stamps = parse_qs(scope["query_string"].decode("latin-1")).get("ts", [])
    if not CAN_VERIFY or len(stamps) != 1 or not (stamps[0].isascii() and stamps[0].isdigit()):
        return False
    if len(stamps[0]) > 12 or abs(int(stamps[0]) - at) > WINDOW_SECONDS:
        return False
    signed = f"{scope['method']},{scope['path']}?ts={stamps[0]}".encode()
    try:
        raw = base64.b64decode(public, validate=True)[-KEY_BYTES:]
        Ed25519PublicKey.from_public_bytes(raw).verify(signature, signed)
    except (InvalidSignature, binascii.Error, ValueError):
        return False
    return True
