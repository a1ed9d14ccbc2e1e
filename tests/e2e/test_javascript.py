"""JavaScript clients against a fleet, where Node.js and their packages are at hand."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ollama_coordinator.access import NewKey
from support.coordinator import running
from support.ollama import Model, StandIn

pytestmark = pytest.mark.e2e

INSTALL_SECONDS = 120.0
OLLAMA = """
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

KEYS = """
import { Ollama } from 'ollama'
const [, , url, key] = process.argv
const messages = [{ role: 'user', content: 'hello' }]
const out = {}
const ways = {
  header: { host: url, headers: { Authorization: `Bearer ${key}` } },
  path: { host: `${url}/k/${key}` },
  none: { host: url },
}
for (const [name, options] of Object.entries(ways)) {
  const client = new Ollama(options)
  try {
    out[name] = (await client.list()).models.map((model) => model.name)
    for await (const part of await client.chat({ model: 'llama3.2', messages, stream: true })) {
      if (part.done) out[name].push('done')
    }
  } catch (error) {
    out[name] = [error.status_code]
  }
}
console.log(JSON.stringify(out))
"""

OPENAI = """
import OpenAI from 'openai'
const client = new OpenAI({ baseURL: process.argv[2] + '/v1', apiKey: 'unused', maxRetries: 0 })
const out = {}
const model = 'llama3.2'
const messages = [{ role: 'user', content: 'hello' }]
const chats = client.chat.completions
out.chat = (await chats.create({ model, messages })).choices[0].message.content
out.stream = ''
const options = { stream: true, stream_options: { include_usage: true } }
for await (const chunk of await chats.create({ model, messages, ...options })) {
  out.stream += chunk.choices[0]?.delta?.content ?? ''
  out.usage = chunk.usage != null
}
const tools = [{ type: 'function', function: { name: 'look', parameters: { type: 'object' } } }]
const asked = [{ role: 'user', content: 'use the tool' }]
const called = await chats.create({ model, messages: asked, tools })
out.tool = called.choices[0].message.tool_calls[0].function.name
out.embed = (await client.embeddings.create({ model: 'embedder', input: ['a', 'b'] })).data.length
out.response = (await client.responses.create({ model, input: 'hi' })).output_text
out.list = []
for await (const one of client.models.list()) out.list.push(one.id)
try {
  await chats.create({ model: 'nope', messages })
} catch (error) {
  out.status = error.status
  out.error = error.message
}
console.log(JSON.stringify(out))
"""
ANTHROPIC = """
import Anthropic from '@anthropic-ai/sdk'
const client = new Anthropic({ baseURL: process.argv[2], apiKey: 'unused', maxRetries: 0 })
const out = {}
const base = { model: 'llama3.2', max_tokens: 16 }
const messages = [{ role: 'user', content: 'hello' }]
out.message = (await client.messages.create({ ...base, messages })).content[0].text
out.stream = await client.messages.stream({ ...base, messages }).finalText()
const tools = [{ name: 'look', input_schema: { type: 'object' } }]
const asked = [{ role: 'user', content: 'use the tool' }]
const called = (await client.messages.create({ ...base, messages: asked, tools })).content.at(-1)
out.tool = [called.type, called.name]
try {
  await client.messages.create({ ...base, model: 'nope', messages })
} catch (error) {
  out.status = error.status
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


async def _say(folder: Path, package: str, program: str, *, with_key: bool = False) -> Any:
    """What a program with this client has to say of a fleet of two."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("there is no Node.js here")
    (folder / "package.json").write_text('{"type": "module", "private": true}')
    (folder / "program.js").write_text(program)
    code, said = await _run(npm, "install", "--no-audit", "--no-fund", package, folder=folder)
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
        key = ""
        if with_key:
            wanted = NewKey(name="anna", in_path=True)
            _, key = coordinator.parts.access.keys.create(wanted)
            coordinator.parts.access.mode = "keys"
        code, said = await _run(node, "program.js", coordinator.url, key, folder=folder)
    assert code == 0, said
    return json.loads(said)


@pytest.mark.spec("SURFACE-3")
@pytest.mark.timeout(300)
async def test_ollama_js(tmp_path: Path) -> None:
    out = await _say(tmp_path, "ollama", OLLAMA)
    assert out["chat"] == out["stream"]
    assert out["pull"][-1] == out["create"] == out["delete"] == "success"
    assert (out["show"], out["embed"], out["error"]) == ("gguf", 2, "model 'nope' not found")
    assert "tiny:latest" in out["list"]


@pytest.mark.spec("SURFACE-3")
@pytest.mark.timeout(300)
async def test_openai_js(tmp_path: Path) -> None:
    out = await _say(tmp_path, "openai", OPENAI)
    assert out["chat"] == out["stream"] != ""
    assert (out["tool"], out["embed"], out["usage"]) == ("look", 2, True)
    assert (out["status"], "model 'nope' not found" in out["error"]) == (404, True)
    assert out["response"]
    assert "llama3.2:latest" in out["list"]


@pytest.mark.spec("SURFACE-3")
@pytest.mark.timeout(300)
async def test_anthropic_js(tmp_path: Path) -> None:
    out = await _say(tmp_path, "@anthropic-ai/sdk", ANTHROPIC)
    assert out["message"] == out["stream"] != ""
    assert out["tool"] == ["tool_use", "look"]
    assert (out["status"], "model 'nope' not found" in out["error"]) == (404, True)


@pytest.mark.spec("ACCESS-7")
async def test_ollamas_client_comes_in_with_a_key(tmp_path: Path) -> None:
    out = await _say(tmp_path, "ollama", KEYS, with_key=True)
    listed = ["embedder:latest", "llama3.2:latest", "done"]
    assert {name: sorted(out[name]) for name in ("header", "path")} == {
        "header": sorted(listed), "path": sorted(listed),
    }  # fmt: skip
    assert out["none"] == [401]
