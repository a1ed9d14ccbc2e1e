"""The real clients take the stand-in for the real thing."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path

import anthropic
import ollama
import openai
import pytest

from support.ollama import Model, StandIn
from support.ollama.routes.openai import packed

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def node() -> AsyncIterator[StandIn]:
    models = [
        Model("llama3.2"),
        Model("deep", capabilities=("completion", "tools", "thinking")),
        Model("nomic-embed-text", capabilities=("embedding",), embedding_length=8),
    ]
    async with StandIn(models, registry=[Model("tiny", size_bytes=1000)]) as node:
        yield node


@pytest.fixture
async def client(node: StandIn) -> AsyncIterator[ollama.AsyncClient]:
    client = ollama.AsyncClient(host=node.url)
    yield client
    await client._client.aclose()


async def test_ollama_streams_a_chat(client: ollama.AsyncClient) -> None:
    lines = [line async for line in await client.chat("llama3.2", HI, stream=True)]
    assert [line.done for line in lines] == [False] * 16 + [True]
    assert all(line.message.content for line in lines[:-1])
    assert lines[-1].done_reason == "stop"
    assert lines[-1].eval_count == 16
    whole = await client.chat("llama3.2", HI)
    assert whole.message.content == "".join(line.message.content or "" for line in lines)
    assert (whole.total_duration or 0) >= (whole.load_duration or 0) > 0


async def test_ollama_generates_as_many_tokens_as_asked(client: ollama.AsyncClient) -> None:
    answer = await client.generate("LLAMA3.2:Latest", "hello", options={"num_predict": 3})
    assert answer.model == "LLAMA3.2:Latest"
    assert (answer.eval_count, answer.done_reason) == (3, "length")
    assert answer.context == [1, 2, 3]


async def test_ollama_calls_a_tool_and_then_answers(client: ollama.AsyncClient) -> None:
    asked = {"role": "user", "content": "what does get_weather say?"}
    called = await client.chat("llama3.2", [asked], tools=[WEATHER])
    assert called.message.tool_calls
    call = called.message.tool_calls[0]
    assert (call.function.name, call.function.arguments) == ("get_weather", {"city": "amber"})
    result = {"role": "tool", "content": "sunny"}
    answered = await client.chat("llama3.2", [asked, called.message, result], tools=[WEATHER])
    assert answered.message.content
    assert not answered.message.tool_calls


async def test_ollama_thinks_before_it_speaks(client: ollama.AsyncClient) -> None:
    lines = [line async for line in await client.chat("deep", HI, stream=True, think=True)]
    thoughts = [bool(line.message.thinking) for line in lines]
    assert thoughts == [True] * 4 + [False] * 17
    silent = await client.chat("deep", HI, think=False)
    assert silent.message.thinking is None
    with pytest.raises(ollama.ResponseError, match=r'"llama3\.2" does not support thinking'):
        await client.chat("llama3.2", HI, think=True)


async def test_ollama_embeds(client: ollama.AsyncClient) -> None:
    answer = await client.embed("nomic-embed-text", ["a", "b", "a"])
    assert answer.embeddings[0] == answer.embeddings[2] != answer.embeddings[1]
    assert len(answer.embeddings[0]) == 8
    assert len((await client.embeddings("nomic-embed-text", "a")).embedding) == 8
    assert (await client.embed("nomic-embed-text", "")).embeddings == []


async def test_ollama_lists_shows_and_sees_what_runs(client: ollama.AsyncClient) -> None:
    listed = await client.list()
    assert {model.model for model in listed.models} >= {"llama3.2:latest", "deep:latest"}
    shown = await client.show("llama3.2")
    assert shown.modelinfo
    assert "FROM /" in (shown.modelfile or "")
    assert shown.capabilities == ["completion", "tools"]
    assert (await client.ps()).models == []
    await client.generate("llama3.2", "")
    running = (await client.ps()).models
    assert [model.name for model in running] == ["llama3.2:latest"]
    assert running[0].context_length == 32_768
    await client.generate("llama3.2", "", keep_alive=0)
    assert (await client.ps()).models == []


async def test_ollama_pulls_copies_creates_and_deletes(client: ollama.AsyncClient) -> None:
    lines = [line async for line in await client.pull("tiny", stream=True)]
    assert lines[0].status == "pulling manifest"
    assert [line.status for line in lines[-3:]] == [
        "verifying sha256 digest",
        "writing manifest",
        "success",
    ]
    await client.copy("tiny", "mine")
    assert (await client.create("wise", from_="tiny", system="Be wise.")).status == "success"
    assert (await client.show("wise")).modelfile
    assert (await client.push("mine")).status == "success"
    for name in ("tiny", "mine", "wise"):
        await client.delete(name)
    with pytest.raises(ollama.ResponseError, match="model 'tiny' not found"):
        await client.delete("tiny")
    with pytest.raises(ollama.ResponseError, match="pull model manifest: file does not exist"):
        await client.pull("unheard-of")


async def test_ollama_uploads_a_blob(client: ollama.AsyncClient, tmp_path: Path) -> None:
    file = tmp_path / "weights.gguf"
    file.write_bytes(b"weights" * 1000)
    digest = await client.create_blob(file)
    created = await client.create("own", files={"weights.gguf": digest})
    assert created.status == "success"
    assert (await client.show("own")).modelfile
    await client.create_blob(file)


async def test_the_synchronous_ollama_client_works_too(node: StandIn) -> None:
    def talk() -> list[str | None]:
        with ollama.Client(host=node.url) as client:
            return [line.message.content for line in client.chat("llama3.2", HI, stream=True)]

    assert len(await asyncio.to_thread(talk)) == 17


@pytest.fixture
async def gpt(node: StandIn) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{node.url}/v1", api_key="-", max_retries=0) as client:
        yield client


async def test_openai_chats(gpt: openai.AsyncOpenAI) -> None:
    chunks = [
        chunk
        async for chunk in await gpt.chat.completions.create(
            model="llama3.2",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=5,
            stream=True,
            stream_options={"include_usage": True},
        )
    ]
    assert [len(chunk.choices) for chunk in chunks] == [1] * 6 + [0]
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == 5
    whole = await gpt.chat.completions.create(
        model="llama3.2", messages=[{"role": "user", "content": "hi"}], max_tokens=5
    )
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert whole.choices[0].message.content == streamed


async def test_openai_completes_and_embeds(gpt: openai.AsyncOpenAI) -> None:
    completed = await gpt.completions.create(model="llama3.2", prompt="hi", max_tokens=2)
    assert completed.choices[0].finish_reason == "length"
    texts = [
        c.choices[0].text
        async for c in await gpt.completions.create(
            model="llama3.2", prompt="hi", max_tokens=2, stream=True
        )
    ]
    assert "".join(texts) == completed.choices[0].text
    coded = await gpt.embeddings.create(model="nomic-embed-text", input=["a"])
    plain = await gpt.embeddings.create(
        model="nomic-embed-text", input=["a"], encoding_format="float"
    )
    assert coded.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-6)


async def test_openai_lists_models_and_reads_errors(gpt: openai.AsyncOpenAI) -> None:
    listed = [model.id async for model in gpt.models.list()]
    assert "deep:latest" in listed
    assert (await gpt.models.retrieve("deep")).id == "deep"
    with pytest.raises(openai.NotFoundError) as caught:
        await gpt.models.retrieve("nope")
    assert caught.value.body == {
        "message": "model 'nope' not found",
        "type": "not_found_error",
        "param": None,
        "code": None,
    }
    with pytest.raises(openai.BadRequestError):
        await gpt.chat.completions.create(model="deep", messages=[])


async def test_openai_responds_in_events(gpt: openai.AsyncOpenAI) -> None:
    async with gpt.responses.stream(model="deep", input="hi", max_output_tokens=3) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_text.delta") == 3
    whole = await gpt.responses.create(model="deep", input="hi", max_output_tokens=3)
    assert whole.output_text == final.output_text


async def test_openai_transcribes(gpt: openai.AsyncOpenAI) -> None:
    heard = await gpt.audio.transcriptions.create(model="llama3.2", file=("a.wav", b"RIFF"))
    assert len(heard.text.split()) == 8


@pytest.fixture
async def claude(node: StandIn) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=node.url, api_key="-", max_retries=0) as client:
        yield client


async def test_anthropic_streams_messages(claude: anthropic.AsyncAnthropic) -> None:
    async with claude.messages.stream(
        model="llama3.2", max_tokens=4, messages=[{"role": "user", "content": "hi"}]
    ) as stream:
        text = "".join([text async for text in stream.text_stream])
        final = await stream.get_final_message()
    assert final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 4
    whole = await claude.messages.create(
        model="llama3.2", max_tokens=4, messages=[{"role": "user", "content": "hi"}]
    )
    assert whole.content[0].type == "text"
    assert whole.content[0].text == text


async def test_anthropic_uses_a_tool(claude: anthropic.AsyncAnthropic) -> None:
    async with claude.messages.stream(
        model="deep",
        max_tokens=2048,
        thinking={"type": "enabled", "budget_tokens": 1024},
        messages=[{"role": "user", "content": "use the tool"}],
        tools=[{"name": "look", "input_schema": {"type": "object", "properties": {}}}],
    ) as stream:
        final = await stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "tool_use"]
    assert final.stop_reason == "tool_use"


async def test_anthropic_reads_errors(claude: anthropic.AsyncAnthropic, node: StandIn) -> None:
    with pytest.raises(anthropic.NotFoundError):
        await claude.messages.create(model="nope", max_tokens=4, messages=HI)  # type: ignore[arg-type]
    with node.faults.busy(), pytest.raises(anthropic.APIStatusError) as caught:
        await claude.messages.create(model="deep", max_tokens=4, messages=HI)  # type: ignore[arg-type]
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["error"]["type"] == "overloaded_error"


def test_base64_is_little_endian_float32() -> None:
    assert base64.b64decode(packed([1.0])) == b"\x00\x00\x80?"
