"""Uploaded model files, kept by digest until the model is created from them.

Ollama's clients upload files before they say for which model, so which agents need them is not
known yet. The files are kept beside the database, verified, within a limit. An unfinished file is
deleted at the next start; a finished one after the model was created, or after a day in which no
operation needed it.
"""

import asyncio
import hashlib
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Collection
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory

from .types import OperationError

log = logging.getLogger(__name__)

KEPT_SECONDS = 24 * 3600.0
"""How long an unused file is kept: a client whose upload failed may try again the next day."""

PIECE_BYTES = 1024 * 1024
"""Read and written at once: large enough that the thread change of each piece costs little."""

PART = ".part-"
"""In the names of unfinished files."""

_DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")


class UploadError(OperationError):
    """An uploaded file is refused; `status` is what Ollama, or HTTP, would answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def digest_of(text: str) -> str:
    """The canonical digest: `sha256:` and 64 lower-case hexadecimal digits.

    Raises:
        UploadError: 400, the text is no digest.
    """
    match = _DIGEST.fullmatch(text)
    if match is None:
        raise UploadError(400, "invalid digest format")
    return f"sha256:{match[1].lower()}"


class Uploads:
    """Files by digest in `folder`; with `None`, in a temporary folder of this process.

    `limit_bytes` may change while it is open.
    """

    def __init__(self, folder: Path | None, limit_bytes: int) -> None:
        self._given = folder
        self.limit_bytes = limit_bytes
        self._temporary: TemporaryDirectory[str] | None = None
        self._folder = Path()
        self._sizes: dict[str, int] = {}
        self._arriving = 0

    async def __aenter__(self) -> "Uploads":
        await asyncio.to_thread(self._open)
        return self

    async def __aexit__(self, *raised: object) -> None:
        if self._temporary is not None:
            await asyncio.to_thread(self._temporary.cleanup)

    def _open(self) -> None:
        if self._given is None:
            self._temporary = TemporaryDirectory(prefix="ollama-coordinator-")
            self._folder = Path(self._temporary.name)
            return
        self._folder = self._given
        if not self._folder.is_dir():
            return  # made by the first upload
        for file in self._folder.iterdir():
            if PART in file.name:
                file.unlink(missing_ok=True)
            elif _DIGEST.fullmatch(file.name):
                self._sizes[digest_of(file.name)] = file.stat().st_size

    # ── reading ───────────────────────────────────────────────────────────────────────────────

    def size(self, digest: str) -> int | None:
        """The size of a file in bytes, `None` if it is not here."""
        return self._sizes.get(digest)

    @property
    def used_bytes(self) -> int:
        """The bytes of all files, unfinished ones included."""
        return sum(self._sizes.values()) + self._arriving

    async def read(self, digest: str) -> AsyncIterator[bytes]:
        """The file in pieces."""
        file = await asyncio.to_thread(self._file(digest).open, "rb")
        try:
            while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
                yield piece
        finally:
            file.close()

    def _file(self, digest: str) -> Path:
        return self._folder / digest.replace(":", "-")

    # ── writing and dropping ──────────────────────────────────────────────────────────────────

    async def take(self, asked: str, pieces: AsyncIterator[bytes]) -> None:
        """Write a file, and keep it if its content has the digest.

        `asked` is the digest as the client wrote it: Ollama compares it case-sensitively.

        Raises:
            UploadError: 400, the digest differs; 507, the disk or the limit is full.
        """
        digest = digest_of(asked)
        part = self._folder / f"{digest.replace(':', '-')}{PART}{token_hex(6)}"
        size = 0
        try:
            await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
            found = hashlib.sha256()
            file = await asyncio.to_thread(part.open, "wb")
            try:
                async for piece in _joined(pieces):
                    self._arriving += len(piece)
                    size += len(piece)
                    self._check_room()
                    await asyncio.to_thread(_write, file, found, piece)
            finally:
                await asyncio.to_thread(file.close)
            _check(asked, found.hexdigest())
            await asyncio.to_thread(part.replace, self._file(digest))
            self._sizes[digest] = size
        except OSError as exc:
            raise UploadError(507, f"cannot keep the file: {exc.strerror}; free some disk") from exc
        finally:
            self._arriving -= size
            part.unlink(missing_ok=True)

    def _check_room(self) -> None:
        if self.used_bytes > self.limit_bytes:
            limit = self.limit_bytes / 2**30
            text = f"uploaded files may take {limit:g} GiB (COORDINATOR_MAX_SPOOL_GIB)"
            raise UploadError(507, text)

    def touch(self, digest: str) -> None:
        """A client relies on the file: it is kept for `KEPT_SECONDS` more."""
        with suppress(OSError):
            os.utime(self._file(digest))

    def expire(self, needed: Collection[str]) -> None:
        """Drop the files that were not used for `KEPT_SECONDS`, but none of those `needed`."""
        oldest = time.time() - KEPT_SECONDS
        for digest in self._sizes.keys() - needed:
            file = self._file(digest)
            if not file.exists() or file.stat().st_mtime < oldest:
                self.drop(digest)

    def drop(self, digest: str) -> None:
        """Delete a file."""
        if self._sizes.pop(digest, None) is not None:
            self._file(digest).unlink(missing_ok=True)
            log.info("uploaded file dropped", extra={"digest": digest})


def _check(asked: str, found: str) -> None:
    if asked != f"sha256:{found}":
        raise UploadError(400, f'digest mismatch, expected "{asked}", got "sha256:{found}"')


def _write(file: object, found: "hashlib._Hash", piece: bytes) -> None:
    found.update(piece)
    file.write(piece)  # type: ignore[attr-defined]


async def _joined(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Join small pieces to `PIECE_BYTES`, so that they are not written one by one."""
    joined = bytearray()
    async for piece in pieces:
        joined += piece
        if len(joined) >= PIECE_BYTES:
            yield bytes(joined)
            joined.clear()
    if joined:
        yield bytes(joined)
