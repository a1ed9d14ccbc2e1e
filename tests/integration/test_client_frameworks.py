"""The frameworks that many applications call Ollama through, unmodified, against a fleet.

They send what other clients do not: options that are `null`, and tools as their schemas have them.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.ollama import OllamaEmbedding  # type: ignore[import-untyped]
from llama_index.llms.ollama import Ollama  # type: ignore[import-untyped]

from support.coordinator import Running, running
from support.ollama import Model, StandIn

T = TypeVar("T")

EMBEDDER = Model("embedder", capabilities=("embedding",))


@pytest.fixture
async def fleet() -> AsyncIterator[Running]:
    """Two agents with the same models."""
    async with (
        running() as coordinator,
        StandIn([Model("llama3.2"), EMBEDDER]) as first,
        StandIn([Model("llama3.2"), EMBEDDER]) as second,
    ):
        await coordinator.register(first, "first")
        await coordinator.register(second, "second")
        yield coordinator


@asynccontextmanager
async def using(model: T) -> AsyncIterator[T]:
    """The framework's object, and its connections closed at the end, which it has no way for."""
    yield model
    await model._async_client.close()  # type: ignore[attr-defined]


def look(city: str) -> str:
    """What the weather is like in a city."""
    return f"it rains in {city}"


@pytest.mark.spec("SURFACE-3")
async def test_langchain_chats_and_uses_a_tool(fleet: Running) -> None:
    async with using(ChatOllama(model="llama3.2", base_url=fleet.url)) as model:
        whole = await model.ainvoke("hello")
        parts = [part async for part in model.astream("hello")]
        assert "".join(str(part.content) for part in parts) == whole.content != ""
        asked = HumanMessage("use the look tool")
        able = model.bind_tools([tool(look)])
        called = await able.ainvoke([asked])
        assert isinstance(called, AIMessage)
        (call,) = called.tool_calls
        assert call["name"] == "look"
        heard = ToolMessage(look(**call["args"]), tool_call_id=call["id"])
        assert (await able.ainvoke([asked, called, heard])).content


@pytest.mark.spec("SURFACE-3")
async def test_langchain_completes_and_embeds(fleet: Running) -> None:
    async with using(OllamaLLM(model="llama3.2", base_url=fleet.url)) as model:
        assert await model.ainvoke("say")
    async with using(OllamaEmbeddings(model="embedder", base_url=fleet.url)) as embeddings:
        one, other = await embeddings.aembed_documents(["a", "b"])
        assert one != other
        assert await embeddings.aembed_query("a") == one


@pytest.mark.spec("SURFACE-3")
async def test_llama_index_chats_and_uses_a_tool(fleet: Running) -> None:
    """It asks for the context's length first, and does so without yielding to the loop."""

    def talk() -> None:
        model = Ollama("llama3.2", base_url=fleet.url)
        asked = [ChatMessage(role="user", content="hello")]
        whole = model.chat(asked)
        parts = list(model.stream_chat(asked))
        assert parts[-1].message.content == whole.message.content != ""
        assert model.complete("say").text
        function = FunctionTool.from_defaults(look)
        called = model.chat_with_tools([function], "use the look tool")
        (call,) = model.get_tool_calls_from_response(called)
        assert call.tool_name == "look"
        model.client.close()

    await asyncio.to_thread(talk)


@pytest.mark.spec("SURFACE-3")
async def test_llama_index_embeds(fleet: Running) -> None:
    async with using(OllamaEmbedding("embedder", base_url=fleet.url)) as model:
        one, other = await model.aget_text_embedding_batch(["a", "b"])
        assert one != other
        assert await model.aget_query_embedding("a") == one
