"""Request bodies compressed with zstd, which Ollama takes on five of its `/v1` routes.

The bytes are forwarded as they came; only what routing reads is decompressed here.
"""

import asyncio
from collections.abc import Mapping

import zstandard

from .dialects import InferenceRoute
from .errors import HttpError

ROUTES = frozenset(
    f"/v1/{route}"
    for route in ("chat/completions", "completions", "embeddings", "responses", "messages")
)
WINDOW_BYTES = 8 * 1024 * 1024
PLAIN_BYTES = 20 * 1024 * 1024
"""Ollama's own limits on the decoder's memory and on the decompressed body."""


class NotDecompressed(HttpError):
    """A compressed body cannot be read; told in the native shape on every route, as Ollama does."""


async def plain_body(surface: InferenceRoute, headers: Mapping[bytes, bytes], body: bytes) -> bytes:
    """The body as JSON text, decompressed where the route allows it.

    Raises:
        NotDecompressed: it is not zstd, or too large.
    """
    encoding = headers.get(b"content-encoding", b"").strip().lower()
    if encoding != b"zstd" or surface.path not in ROUTES:
        return body
    return await asyncio.to_thread(_decompress, body)


def _decompress(body: bytes) -> bytes:
    decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES)
    try:
        with decompressor.stream_reader(body) as reader:
            plain = reader.read(PLAIN_BYTES + 1)
    except zstandard.ZstdError as exc:
        raise NotDecompressed(400, f"zstd: {exc}") from exc
    if len(plain) > PLAIN_BYTES:
        raise NotDecompressed(413, "request body too large")
    return plain
