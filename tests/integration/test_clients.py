"""Unmodified clients against a fleet, as their users call them."""

from collections.abc import AsyncIterator
from pathlib import Path

import anthropic
import ollama as ollama_python
import openai
import pytest

from support.coordinator import Running, running
from support.ollama import Model, StandIn

EMBEDDER = Model("embedder", capabilities=("embedding",))
ASKED = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def fleet() -> AsyncIterator[Running]:
    """Two agents that have the same models and can pull one more."""
    registry = [Model("tiny", size_bytes=1_000_000)]
    async with (
        running() as coordinator,
        StandIn([Model("llama3.2"), EMBEDDER], registry=registry) as first,
        StandIn([Model("llama3.2"), EMBEDDER], registry=registry) as second,
    ):
        await coordinator.register(first, "first")
        await coordinator.register(second, "second")
        yield coordinator


@pytest.fixture
async def client(fleet: Running) -> AsyncIterator[ollama_python.AsyncClient]:
    """Ollama's own client for Python."""
    client = ollama_python.AsyncClient(host=fleet.url)
    yield client
    await client.close()  # type: ignore[no-untyped-call]


@pytest.mark.spec("SURFACE-3")
async def test_ollama_python_generates_and_embeds(client: ollama_python.AsyncClient) -> None:
    chat = await client.chat("llama3.2", ASKED)
    assert chat.done
    assert chat.message.content
    parts = [part async for part in await client.chat("llama3.2", ASKED, stream=True)]
    assert parts[-1].done_reason == "stop"
    assert "".join(part.message.content or "" for part in parts) == chat.message.content
    said = [part async for part in await client.generate("llama3.2", "say", stream=True)]
    assert said[-1].done
    assert len((await client.embed("embedder", ["a", "b"])).embeddings) == 2
    assert (await client.embeddings("embedder", "a")).embedding


@pytest.mark.spec("SURFACE-3")
async def test_ollama_python_manages_models(
    client: ollama_python.AsyncClient, tmp_path: Path
) -> None:
    states = [part.status async for part in await client.pull("tiny", stream=True)]
    assert states[-1] == "success"
    assert (await client.pull("tiny")).status == "success"
    assert {row.model for row in (await client.list()).models} >= {"tiny:latest"}
    assert (await client.show("tiny")).details is not None
    assert (await client.copy("tiny", "mine")).status == "success"
    assert (await client.push("mine")).status == "success"
    file = tmp_path / "weights.gguf"
    file.write_bytes(b"GGUF" * 1000)
    digest = await client.create_blob(file)
    made = await client.create("made", files={"weights.gguf": digest})
    assert made.status == "success"
    assert (await client.create("brief", from_="made", system="be brief")).status == "success"
    await client.generate("brief", "say")
    assert [row.model for row in (await client.ps()).models] == ["brief:latest"]
    for name in ("tiny", "mine", "made", "brief"):
        assert (await client.delete(name)).status == "success"


@pytest.mark.spec("SURFACE-3")
async def test_ollama_python_hears_of_errors(client: ollama_python.AsyncClient) -> None:
    with pytest.raises(ollama_python.ResponseError, match="model 'nope' not found") as raised:
        await client.chat("nope", ASKED)
    assert raised.value.status_code == 404
    with pytest.raises(ollama_python.ResponseError, match="file does not exist"):
        [part async for part in await client.pull("nope", stream=True)]
    with pytest.raises(ollama_python.ResponseError, match="file does not exist"):
        await client.pull("nope")


@pytest.mark.spec("SURFACE-3")
async def test_openai(fleet: Running) -> None:
    async with openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="ignored") as client:
        chat = await client.chat.completions.create(
            model="llama3.2", messages=[{"role": "user", "content": "hello"}]
        )
        assert chat.choices[0].message.content
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                model="llama3.2",
                messages=[{"role": "user", "content": "hello"}],
                stream=True,
                stream_options={"include_usage": True},
            )
        ]
        assert chunks[-1].usage is not None
        called = await client.chat.completions.create(
            model="llama3.2",
            messages=[{"role": "user", "content": "use the tool"}],
            tools=[{"type": "function", "function": {"name": "look", "parameters": {}}}],
        )
        (call,) = called.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert call.function.name == "look"
        vectors = await client.embeddings.create(model="embedder", input=["a", "b"])
        assert len(vectors.data) == 2
        assert (await client.responses.create(model="llama3.2", input="hi")).output_text
        assert "llama3.2:latest" in {model.id async for model in client.models.list()}
        assert (await client.models.retrieve("llama3.2")).owned_by == "library"
        heard = await client.audio.transcriptions.create(model="llama3.2", file=("a.wav", b"RIFF"))
        assert heard.text
        with pytest.raises(openai.NotFoundError, match="model 'nope' not found"):
            await client.completions.create(model="nope", prompt="x")


@pytest.mark.spec("SURFACE-3")
async def test_anthropic(fleet: Running) -> None:
    async with anthropic.AsyncAnthropic(base_url=fleet.url, api_key="ignored") as client:
        message = await client.messages.create(
            model="llama3.2", max_tokens=8, messages=[{"role": "user", "content": "hello"}]
        )
        assert message.content[0].type == "text"
        async with client.messages.stream(
            model="llama3.2", max_tokens=8, messages=[{"role": "user", "content": "hello"}]
        ) as stream:
            assert await stream.get_final_text()
        called = await client.messages.create(
            model="llama3.2",
            max_tokens=8,
            messages=[{"role": "user", "content": "use the tool"}],
            tools=[{"name": "look", "input_schema": {"type": "object"}}],
        )
        assert (called.content[-1].type, called.stop_reason) == ("tool_use", "tool_use")
        with pytest.raises(anthropic.NotFoundError, match="not found"):
            await client.messages.create(
                model="nope", max_tokens=8, messages=[{"role": "user", "content": "hello"}]
            )
