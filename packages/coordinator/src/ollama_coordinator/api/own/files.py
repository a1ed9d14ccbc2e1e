"""The dashboard's files, read once: with strong tags, compressed in advance, and kept on a leash.

Nothing may be loaded from elsewhere, nothing may run that is not a file of ours.
"""

import gzip
from functools import cache
from hashlib import sha256
from importlib.resources import files
from importlib.resources.abc import Traversable

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
}
WORTH_COMPRESSING_BYTES = 500

SECURITY = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data: blob:; font-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class File(Struct, frozen=True):
    """One file as it is sent; `packed` is empty where compressing it gains nothing."""

    kind: str
    body: bytes
    packed: bytes
    tag: str
    for_ever: bool


@cache
def all_files() -> dict[str, File]:
    """Every file of the dashboard by its path below it."""
    return dict(_walk(files("ollama_coordinator") / "dashboard", ""))


def _walk(folder: Traversable, prefix: str) -> list[tuple[str, File]]:
    found: list[tuple[str, File]] = []
    for entry in folder.iterdir():
        path = prefix + entry.name
        if entry.is_dir():
            found += _walk(entry, path + "/")
        elif (kind := KINDS.get(entry.name.rpartition(".")[2])) is not None:
            found.append((path, _file(path, kind, entry.read_bytes())))
    return found


def _file(path: str, kind: str, body: bytes) -> File:
    packed = gzip.compress(body, 9, mtime=0) if len(body) > WORTH_COMPRESSING_BYTES else b""
    # A vendored file has its version in its name, so its content never changes.
    for_ever = path.startswith("vendor/")
    return File(kind, body, packed, sha256(body).hexdigest()[:24], for_ever)


def send_file(file: File, request: Request) -> Response:
    """A file, or that the browser has it already."""
    packed = bool(file.packed) and "gzip" in request.headers.get("accept-encoding", "")
    tag = f'"{file.tag}-gzip"' if packed else f'"{file.tag}"'
    headers = {
        **SECURITY,
        "etag": tag,
        "vary": "accept-encoding",
        "cache-control": "public, max-age=31536000, immutable" if file.for_ever else "no-cache",
    }
    known = request.headers.get("if-none-match", "")
    if tag in (part.strip().removeprefix("W/") for part in known.split(",")):
        return Response(status_code=304, headers=headers)
    if packed:
        headers["content-encoding"] = "gzip"
    return Response(file.packed if packed else file.body, headers=headers, media_type=file.kind)
