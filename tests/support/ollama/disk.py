"""A node's disk as real files, and a pull from a registry over HTTP, as Ollama 0.24 does it.

The facts are those of Ollama's `server/download.go` and `server/images.go`: HEAD for the length, a
GET that must redirect to another host name, pieces by range from there with six tries each, then
the check of the digest, and the manifest last, byte for byte.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
from yarl import URL

from . import names
from .models import Model, Store
from .wire import StreamError

WEIGHTS = "application/vnd.ollama.image.model"
MISMATCH = "digest mismatch, file must be downloaded again"
CONFIG = b'{"model":"stand-in"}'
TRIES, PARTS = 6, 16
STALL_SECONDS = 30.0
NO_SPACE = "write {}: no space left on device"
PART_BYTES = 100_000  # Ollama's own are 100 MB and more
Progress = Callable[..., Awaitable[None]]


def weights_of(name: str, size: int) -> bytes:
    """The same bytes for the same model everywhere."""
    start = hashlib.sha256(name.encode()).digest()
    return (start * (size // len(start) + 1))[:size]


class DiskStore(Store):
    """A store whose models are files in `folder`."""

    def __init__(self, folder: Path, models: Iterable[Model]) -> None:
        self.folder = folder
        for part in ("blobs", "manifests"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        super().__init__(models)

    def file(self, digest: str) -> Path:
        return self.folder / "blobs" / digest.replace(":", "-")

    def manifest(self, name: str) -> Path:
        parsed = names.parse(name)
        assert parsed is not None, name
        return self.folder / "manifests" / parsed.path

    def layers(self, model: Model) -> list[tuple[str, int]]:
        """Digest and size of what a model in the registry consists of."""
        contents = weights_of(model.key, model.size_bytes), CONFIG
        return [(_digest_of(content), len(content)) for content in contents]

    def add(self, model: Model) -> Model:
        """Write a model's files, unless they are there."""
        content = weights_of(model.key, model.size_bytes)
        layers = [{**self._keep(content), "mediaType": WEIGHTS}]
        config = {**self._keep(CONFIG), "mediaType": "application/json"}
        manifest = {"schemaVersion": 2, "config": config, "layers": layers}
        return self.keep_manifest(model.name, json.dumps(manifest).encode(), model)

    def keep_manifest(self, name: str, content: bytes, model: Model | None = None) -> Model:
        """Write a manifest; the model is what it says."""
        read = json.loads(content)
        weights = next(one for one in read["layers"] if one["mediaType"] == WEIGHTS)
        file = self.manifest(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        facts = {
            "digest": hashlib.sha256(content).hexdigest(), "blob": weights["digest"],
            "size_bytes": weights["size"], "modified_at": time.time(),
        }  # fmt: skip
        made = Model(name, **facts) if model is None else replace(model, name=name, **facts)
        return super().add(made)

    def copy(self, source: Model, destination: str, **changes: Any) -> Model:
        return self.keep_manifest(destination, self.manifest(source.name).read_bytes(), source)

    def remove(self, name: str) -> Model | None:
        found = super().remove(name)
        if found is not None:
            gone = self.manifest(found.name)
            mine = _digests(gone.read_bytes())
            gone.unlink()
            others = (one.read_bytes() for one in self.folder.glob("manifests/*/*/*/*"))
            for digest in mine - {digest for one in others for digest in _digests(one)}:
                self.file(digest).unlink(missing_ok=True)
        return found

    def has_blob(self, digest: str) -> bool:
        return self.file(digest).exists()

    def find(self, name: str) -> Model | None:
        """Also what somebody else wrote: Ollama reads the disk each time."""
        found, parsed = super().find(name), names.parse(name)
        if found is None and parsed is not None and self.manifest(name).is_file():
            return self.keep_manifest(name, self.manifest(name).read_bytes())
        return found

    def written(self) -> None:
        """See the models that somebody else wrote, as Ollama does with each list."""
        for file in self.folder.glob("manifests/*/*/*/*"):
            host, namespace, model, tag = file.parts[-4:]
            self.find(f"{host}/{namespace}/{model}:{tag}")

    def _keep(self, content: bytes) -> dict[str, Any]:
        digest = _digest_of(content)
        if not self.has_blob(digest):
            self.file(digest).write_bytes(content)
        return {"digest": digest, "size": len(content)}


def _digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _digests(manifest: bytes) -> set[str]:
    read = json.loads(manifest)
    return {one["digest"] for one in [*read["layers"], read["config"]]}


async def pull(store: DiskStore, name: names.Name, progress: Progress, *, insecure: bool) -> Model:
    """Pull a model from the registry that its name has as its host."""
    base = f"{'http' if insecure else 'https'}://{name.host}/v2/{name.namespace}/{name.model}"
    async with aiohttp.ClientSession() as session:
        async with session.get(_connectable(f"{base}/manifests/{name.tag}")) as response:
            if response.status == 404:
                raise StreamError("pull model manifest: file does not exist")
            content = await response.read()
            if response.status >= 400:
                text = f"pull model manifest: {response.status}: {content.decode()}"
                raise StreamError(text)
        manifest = json.loads(content)
        fresh = []
        for layer in [*manifest["layers"], manifest["config"]]:
            digest = layer["digest"]
            if store.has_blob(digest):
                size = store.file(digest).stat().st_size
                await progress(f"pulling {digest[7:19]}", digest=digest, total=size, completed=size)
                continue
            await _download(session, f"{base}/blobs/{digest}", store, digest, progress)
            fresh.append(digest)
    await progress("verifying sha256 digest")
    for digest in fresh:
        found = hashlib.sha256(store.file(digest).read_bytes()).hexdigest()
        if f"sha256:{found}" != digest:
            store.file(digest).unlink()
            raise StreamError(MISMATCH)
    await progress("writing manifest")
    short = f"{name.host}/{name.namespace}/{name.model}:{name.tag}"
    return store.keep_manifest(short, content)


async def _download(
    session: aiohttp.ClientSession, url: str, store: DiskStore, digest: str, progress: Progress
) -> None:
    async with session.head(_connectable(url)) as response:
        if response.status >= 400:
            raise StreamError(f"{response.status}: ")
        total = int(response.headers["Content-Length"])
    direct = await _direct(session, url)
    part_file = store.file(digest).with_name(f"{store.file(digest).name}-partial")
    content = bytearray(total)
    starts = list(range(0, total, PART_BYTES))
    done = 0
    stall = aiohttp.ClientTimeout(sock_read=STALL_SECONDS)
    status = f"pulling {digest[7:19]}"
    limit = asyncio.Semaphore(PARTS)

    async def part(start: int) -> None:
        nonlocal done
        stop, at = min(start + PART_BYTES, total), start
        for attempt in range(TRIES):
            begun = at
            try:
                async with limit, session.get(
                    _connectable(direct), headers={"Range": f"bytes={at}-{stop - 1}"},
                    allow_redirects=True, timeout=stall,
                ) as response:  # fmt: skip
                    async for piece in response.content.iter_any():
                        taken = piece[: stop - at]  # io.CopyN, whatever the status says
                        content[at : at + len(taken)] = taken
                        at, done = at + len(taken), done + len(taken)
                        await progress(status, digest=digest, total=total, completed=done)
                if at < stop:  # io.EOF, as after an error: rolled back; what was cut is kept
                    at, done = begun, done - (at - begun)
            except aiohttp.ClientError:
                pass
            if at >= stop:
                return
            await asyncio.sleep(0.01 * 2**attempt)
        raise StreamError("max retries exceeded: unexpected EOF")

    await asyncio.gather(*map(part, starts))
    try:
        part_file.write_bytes(content)
    except OSError as exc:
        part_file.unlink(missing_ok=True)
        raise StreamError(NO_SPACE.format(part_file)) from exc
    part_file.rename(store.file(digest))


async def _direct(session: aiohttp.ClientSession, url: str) -> str:
    """The first redirect that leaves the host; without one there is no file."""
    asked = url
    for _ in range(10):
        async with session.get(_connectable(asked), allow_redirects=False) as response:
            location = response.headers.get("Location")
            if response.status not in (200, 307):
                raise StreamError(f"unexpected status code {response.status}")
            if location is None:
                raise StreamError("http: no Location header in response")
        if _host(location) != _host(url):
            return location
        asked = location
    raise StreamError("maximum redirects exceeded (10) for directURL")


def _host(url: str) -> str:
    netloc = url.partition("://")[2].partition("/")[0]
    return netloc.rpartition(":")[0] if netloc.rpartition(":")[2].isdecimal() else netloc


def _connectable(url: str) -> URL:
    """Go's dialler takes IPv4 inside IPv6 for IPv4."""
    return URL(url.replace("[::ffff:", "").replace("]", "", 1) if "[::ffff:" in url else url,
               encoded=True)  # fmt: skip
