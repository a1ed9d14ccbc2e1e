"""The JavaScript client of Ollama against a fleet, where Node.js and its packages are at hand."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from support.coordinator import running
from support.ollama import Model, StandIn

pytestmark = pytest.mark.e2e

INSTALL_SECONDS = 120.0
PROGRAM = """
import { Ollama } from 'ollama'
const client = new Ollama({ host: process.argv[2] })
const out = {}
const asked = [{ role: 'user', content: 'hello' }]
out.chat = (await client.chat({ model: 'llama3.2', messages: asked })).message.content
let text = ''
for await (const part of await client.chat({ model: 'llama3.2', messages: asked, stream: true })) {
  text += part.message.content
}
out.stream = text
out.pull = []
for await (const part of await client.pull({ model: 'tiny', stream: true })) {
  out.pull.push(part.status)
}
out.list = (await client.list()).models.map((model) => model.name).sort()
out.show = (await client.show({ model: 'tiny' })).details.format
await client.copy({ source: 'tiny', destination: 'mine' })
out.create = (await client.create({ model: 'brief', from: 'mine', system: 'x' })).status
for (const model of ['tiny', 'mine', 'brief']) out.delete = (await client.delete({ model })).status
out.embed = (await client.embed({ model: 'embedder', input: ['a', 'b'] })).embeddings.length
out.ps = (await client.ps()).models.length
try {
  await client.chat({ model: 'nope', messages: asked })
} catch (error) {
  out.error = error.message
}
console.log(JSON.stringify(out))
"""


async def _run(*command: str, folder: Path) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(INSTALL_SECONDS):
        out, errors = await process.communicate()
    return process.returncode or 0, out.decode() if process.returncode == 0 else errors.decode()


@pytest.mark.spec("SURFACE-3")
@pytest.mark.timeout(180)
async def test_ollama_js(tmp_path: Path) -> None:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("there is no Node.js here")
    (tmp_path / "package.json").write_text('{"type": "module", "private": true}')
    (tmp_path / "program.js").write_text(PROGRAM)
    code, said = await _run(npm, "install", "--no-audit", "--no-fund", "ollama", folder=tmp_path)
    if code:
        pytest.skip(f"the client cannot be installed here: {said[-200:]}")
    models = [Model("llama3.2"), Model("embedder", capabilities=("embedding",))]
    registry = [Model("tiny", size_bytes=1_000_000)]
    async with (
        running() as coordinator,
        StandIn(models, registry=registry) as first,
        StandIn(models, registry=registry) as second,
    ):
        await coordinator.register(first, "first")
        await coordinator.register(second, "second")
        code, said = await _run(node, "program.js", coordinator.url, folder=tmp_path)
    assert code == 0, said
    out = json.loads(said)
    assert out["chat"] == out["stream"]
    assert out["pull"][-1] == out["create"] == out["delete"] == "success"
    assert (out["show"], out["embed"], out["error"]) == ("gguf", 2, "model 'nope' not found")
    assert "tiny:latest" in out["list"]
