"""A registry of models as Ollama's: `python -m support.model_registry HOST OTHER NAME=BYTES...`.

A file is had from another host name, by ranges, as from a content delivery network.
"""

import asyncio
import hashlib
import json
import sys

from aiohttp import web

from .ollama.disk import CONFIG, WEIGHTS, weights_of

PORT = 80
"""A port would become a part of the models' names."""


def manifest_of(contents: list[bytes]) -> bytes:
    weights, config = (
        {"digest": f"sha256:{hashlib.sha256(one).hexdigest()}", "size": len(one)}
        for one in contents
    )
    layers = [{**weights, "mediaType": WEIGHTS}]
    config["mediaType"] = "application/json"
    return json.dumps({"schemaVersion": 2, "config": config, "layers": layers}).encode()


class Registry:
    """Its models by name, and its files by digest; `other`: the host that gives the files."""

    def __init__(self, other: str, sizes: dict[str, int]) -> None:
        self._other = other
        self._manifests: dict[str, bytes] = {}
        self._files: dict[str, bytes] = {}
        for name, size in sizes.items():
            contents = [weights_of(name, size), CONFIG]
            self._manifests[name] = manifest_of(contents)
            for content in contents:
                self._files[f"sha256:{hashlib.sha256(content).hexdigest()}"] = content

    async def answer(self, request: web.BaseRequest) -> web.Response:
        *_, model, kind, which = request.path.split("/")
        found = (self._manifests if kind == "manifests" else self._files).get(
            model if kind == "manifests" else which
        )
        if found is None:
            return web.Response(status=404)
        if kind == "manifests":
            return web.Response(body=found, content_type="application/json")
        if request.method == "HEAD":
            return web.Response(headers={"Content-Length": str(len(found))})
        if request.host.partition(":")[0] != self._other:
            raise web.HTTPTemporaryRedirect(f"http://{self._other}{request.path}")
        part = found[request.http_range]
        return web.Response(body=part, status=206 if "Range" in request.headers else 200)


async def _serve(host: str, other: str, *models: str) -> None:
    sizes = {name: int(float(size)) for name, _, size in (one.partition("=") for one in models)}
    runner = web.ServerRunner(web.Server(Registry(other, sizes).answer))
    await runner.setup()
    for each in (host, other):
        await web.TCPSite(runner, each, PORT).start()
    print("serves", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(*sys.argv[1:]))
