"""Writes a model that comes from another machine into the folder of this machine's Ollama.

Each file comes into a temporary one, is hashed while it comes, is written through to the disk and
gets its name only then. The manifest comes last, below a name of its own: so Ollama sees nothing
that is not whole. What was cut goes on where it ended.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, BinaryIO

from msgspec import Struct

from ollama_coordinator_common.error import InvalidModelName
from ollama_coordinator_common.names import ModelName
from ollama_coordinator_common.tickets import DIGEST

from .client import CoordinatorClient, CoordinatorError
from .manifests import Layer, all_layers

log = logging.getLogger(__name__)

PIECE_BYTES = 1024 * 1024
"""Hashed and written at a time."""

REPORT_SECONDS = 0.1
"""The least time between two lines of progress on one file."""

TRIES = 6
"""For one file; after each failure the coordinator names another machine that has it."""

PART = ".part"
"""How a temporary file's name ends. Ollama removes it at its start, as no name of a file."""

STALE_SECONDS = 3600.0
"""After so long nobody goes on with a temporary file: it is removed, as Ollama's start would."""

_PART = re.compile(r"(sha256-[0-9a-f]{64}|manifest-\d+)\.part")

RESERVE_BYTES = 512 * 1024 * 1024
"""Free disk that is left in any case."""

MISMATCH = "digest mismatch, file must be downloaded again"
"""Ollama's own words."""

Progress = dict[str, Any]


class Incoming(Struct, frozen=True):
    """`POST` to the agent's models' port: fetch a model and keep it under `name`.

    Its files are at the coordinator, below `path`.
    """

    name: str
    path: str
    manifest: bytes


class _Broken(Exception):
    """A file did not come whole; the text says why."""


class ModelWriter:
    """Brings models one after the other."""

    def __init__(self, client: CoordinatorClient) -> None:
        self._client = client
        self._turn = asyncio.Lock()

    async def bring(self, folder: Path, order: Incoming) -> AsyncIterator[Progress]:
        """Fetch what is missing, then write the manifest; the last line is success or an error."""
        try:
            async with self._turn:
                async for line in self._bring(folder, order):
                    yield line
            yield {"status": "success"}
        except (_Broken, InvalidModelName) as exc:
            yield {"error": str(exc)}
        except OSError as exc:
            yield {"error": f"cannot write the model: {exc.strerror or exc}"}

    async def _bring(self, folder: Path, order: Incoming) -> AsyncIterator[Progress]:
        name = ModelName.parse(order.name)
        layers = {layer.digest: layer for layer in all_layers(order.manifest)}
        if not layers or not all(DIGEST.fullmatch(digest) for digest in layers):
            raise _Broken("the manifest names no files, or names them in a way that is not known")
        yield {"status": "pulling manifest"}
        await asyncio.to_thread(_check_room, folder, list(layers.values()))
        for layer in layers.values():
            async for line in self._file(folder, order.path, layer):
                yield line
        yield {"status": "verifying sha256 digest"}
        yield {"status": "writing manifest"}
        place = Path("manifests", name.host, name.namespace, name.model, name.tag)
        await asyncio.to_thread(_write_manifest, folder, place, order.manifest)

    async def _file(self, folder: Path, path: str, layer: Layer) -> AsyncIterator[Progress]:
        target = _file_of(folder, layer.digest)
        total = layer.size or 0
        report = {"status": f"pulling {layer.digest[7:19]}", "digest": layer.digest, "total": total}
        if not await asyncio.to_thread(_is_whole, target, layer):
            part = target.with_name(target.name + PART)
            for attempt in range(TRIES):
                try:
                    async for size in self._fetched(part, path, layer):
                        yield {**report, "completed": size}
                    await asyncio.to_thread(_keep, part, target)
                    break
                except (CoordinatorError, _Broken, FileNotFoundError) as exc:
                    # An Ollama that starts removes the temporary file: it comes anew.
                    facts = {"digest": layer.digest, "reason": str(exc), "attempt": attempt + 1}
                    log.warning("a file of a model did not come whole", extra=facts)
                    if attempt + 1 == TRIES:
                        raise _Broken(str(exc)) from exc
                    await asyncio.sleep(min(0.1 * 2**attempt, 2.0))
        yield {**report, "completed": total}

    async def _fetched(self, part: Path, path: str, layer: Layer) -> AsyncIterator[int]:
        """Fetch what is missing of a file; yields its bytes so far.

        Raises:
            CoordinatorError: it did not come, or not to its end.
            _Broken: it is another file.
        """
        loop = asyncio.get_running_loop()
        found = hashlib.sha256()
        file, size = await asyncio.to_thread(_resumed, part, found, layer.size)
        try:
            reported = loop.time()
            yield size
            if layer.size is None or size < layer.size:
                url = f"{path}/blobs/{layer.digest}?part=1"
                async for piece in self._client.file(url, size, PIECE_BYTES):
                    await asyncio.to_thread(_write, file, found, piece)
                    size += len(piece)
                    if layer.size is not None and size > layer.size:
                        break
                    if loop.time() - reported >= REPORT_SECONDS:
                        reported = loop.time()
                        yield size
            if layer.size is not None and size < layer.size:
                raise CoordinatorError(f"{layer.digest} ended after {size} bytes")
            if f"sha256:{found.hexdigest()}" != layer.digest:
                await asyncio.to_thread(file.truncate, 0)
                raise _Broken(MISMATCH)
            await asyncio.to_thread(_through, file)
        except OSError:
            # The disk may be full: the room is needed more.
            await asyncio.to_thread(part.unlink, missing_ok=True)
            raise
        finally:
            file.close()


def sweep(folder: Path, now: float) -> list[str]:
    """Remove the temporary files that a killed agent left in a folder; their names.

    `now`: in seconds since 1970.

    Raises:
        OSError: the folder cannot be read, or one of them cannot be removed.
    """
    found = [one for one in (folder / "blobs").iterdir() if _PART.fullmatch(one.name)]
    stale = [one for one in found if not 0 <= now - one.stat().st_mtime <= STALE_SECONDS]
    for one in stale:
        one.unlink(missing_ok=True)
    return [one.name for one in stale]


def _file_of(folder: Path, digest: str) -> Path:
    return folder / "blobs" / digest.replace(":", "-")


def _is_whole(file: Path, layer: Layer) -> bool:
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        return False
    return layer.size is None or size == layer.size


def _check_room(folder: Path, layers: list[Layer]) -> None:
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    missing = sum(
        layer.size or 0 for layer in layers if not _is_whole(_file_of(folder, layer.digest), layer)
    )
    free = shutil.disk_usage(folder).free
    if missing and free < missing + RESERVE_BYTES:
        text = f"no space left on device: {missing} bytes are needed and {free} are free"
        raise _Broken(text)


def _resumed(part: Path, found: "hashlib._Hash", most: int | None) -> tuple[BinaryIO, int]:
    """The temporary file, at its end, and its size; what is in it is hashed."""
    file = part.open("a+b", buffering=0)
    try:
        if most is not None and os.fstat(file.fileno()).st_size > most:
            file.truncate(0)
        os.utime(part)  # somebody goes on with it
        file.seek(0)
        size = 0
        while piece := file.read(PIECE_BYTES):
            found.update(piece)
            size += len(piece)
    except BaseException:
        file.close()
        raise
    return file, size


def _write(file: BinaryIO, found: "hashlib._Hash", piece: bytes) -> None:
    found.update(piece)
    view = memoryview(piece)
    while view:
        view = view[file.write(view) :]


def _through(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _keep(part: Path, target: Path) -> None:
    """Give a whole file its name, and to whom the folder belongs."""
    _hand_over(part, target.parent)
    part.replace(target)
    _sync_folder(target.parent)


def _write_manifest(folder: Path, place: Path, content: bytes) -> None:
    target = folder / place
    above = [one for one in reversed(target.parents) if folder in one.parents]
    for one in above:
        if not one.is_dir():
            one.mkdir(exist_ok=True)
            _hand_over(one, folder, mode=0o755)
    draft = folder / "blobs" / f"manifest-{os.getpid()}{PART}"
    with draft.open("wb") as file:
        file.write(content)
        _through(file)
    _hand_over(draft, folder)
    draft.replace(target)
    _sync_folder(target.parent)


def _hand_over(path: Path, owned: Path, mode: int = 0o644) -> None:
    """Let whoever owns a folder own what was made in it: root writes for Ollama's user."""
    path.chmod(mode)
    owner = owned.stat()
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        os.chown(path, owner.st_uid, owner.st_gid)


def _sync_folder(folder: Path) -> None:
    """Write a folder's names through to the disk, where that can be done."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
