"""Unmodified clients with keys, as their users give them, where a key is asked for."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import anthropic
import ollama as ollama_python
import openai
import pytest

from ollama_coordinator.access import NewKey
from support.coordinator import Running, running
from support.ollama import Model, StandIn

ASKED: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def closed() -> AsyncIterator[Running]:
    """A coordinator that asks everybody for a key, with a machine that has two models."""
    async with (
        running(access="keys") as coordinator,
        StandIn([Model("llama3.2"), Model("secret")]) as ollama,
    ):
        _, boss = coordinator.parts.access.keys.create(NewKey(name="boss", rights=("operate",)))
        coordinator.session.headers["Authorization"] = f"Bearer {boss}"
        await coordinator.register(ollama)
        yield coordinator


@pytest.fixture
def key(closed: Running) -> str:
    """A key for one of the models, which may stand in a path."""
    wanted = NewKey(name="anna", in_path=True, models=("llama3.2",))
    return closed.parts.access.keys.create(wanted)[1]


async def served(coordinator: Running, count: int) -> None:
    """So many requests are in the history as anna's."""
    page = await coordinator.get("/api/history?client=anna&limit=100")
    assert len(page["requests"]) == count


Client = Callable[[str, str], ollama_python.AsyncClient]


@pytest.mark.spec("ACCESS-7")
@pytest.mark.parametrize(
    "opened",
    [
        lambda url, key: ollama_python.AsyncClient(url, headers={"Authorization": f"Bearer {key}"}),
        lambda url, key: ollama_python.AsyncClient(f"{url}/k/{key}"),
    ],
    ids=["header", "path"],
)
async def test_ollama_python(closed: Running, key: str, opened: Client) -> None:
    client = opened(closed.url, key)
    try:
        assert (await client.chat("llama3.2", ASKED)).done
        parts = [part async for part in await client.generate("llama3.2", "say", stream=True)]
        assert parts[-1].done
        assert [one.model for one in (await client.list()).models] == ["llama3.2:latest"]
        with pytest.raises(ollama_python.ResponseError, match="may not use this model") as refused:
            await client.chat("secret", ASKED)
        assert refused.value.status_code == 403
        with pytest.raises(ollama_python.ResponseError, match="needs the right 'manage'"):
            await client.delete("llama3.2")
    finally:
        await client.close()  # type: ignore[no-untyped-call]
    await served(closed, 2)


@pytest.mark.spec("ACCESS-7")
async def test_ollama_python_takes_the_key_of_its_variable(
    closed: Running, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", key)
    client = ollama_python.AsyncClient(closed.url)
    try:
        assert (await client.chat("llama3.2", ASKED)).done
    finally:
        await client.close()  # type: ignore[no-untyped-call]
    await served(closed, 1)


@pytest.mark.spec("ACCESS-7")
@pytest.mark.spec("ACCESS-8")
async def test_openai(closed: Running, key: str) -> None:
    for url, given in ((f"{closed.url}/v1", key), (f"{closed.url}/k/{key}/v1", "unused")):
        async with openai.AsyncOpenAI(base_url=url, api_key=given, max_retries=0) as client:
            answer = await client.chat.completions.create(model="llama3.2", messages=ASKED)
            assert answer.choices[0].message.content
            assert [one.id async for one in client.models.list()] == ["llama3.2:latest"]
            with pytest.raises(openai.PermissionDeniedError, match="may not use this model"):
                await client.chat.completions.create(model="secret", messages=ASKED)
    async with openai.AsyncOpenAI(
        base_url=f"{closed.url}/v1", api_key="unused", max_retries=0
    ) as client:
        with pytest.raises(openai.AuthenticationError, match="none that is in force"):
            await client.models.list()
    await served(closed, 2)


@pytest.mark.spec("ACCESS-7")
@pytest.mark.spec("ACCESS-8")
async def test_anthropic(closed: Running, key: str) -> None:
    for url, given in ((closed.url, key), (f"{closed.url}/k/{key}", "unused")):
        async with anthropic.AsyncAnthropic(base_url=url, api_key=given, max_retries=0) as client:
            answer = await client.messages.create(model="llama3.2", max_tokens=50, messages=ASKED)
            assert answer.content
    async with anthropic.AsyncAnthropic(
        base_url=closed.url, api_key="unused", max_retries=0
    ) as client:
        with pytest.raises(anthropic.AuthenticationError, match="none that is in force"):
            await client.messages.create(model="llama3.2", max_tokens=50, messages=ASKED)
    await served(closed, 2)


@pytest.mark.spec("ACCESS-7")
async def test_langchain(closed: Running, key: str) -> None:
    langchain_ollama = pytest.importorskip("langchain_ollama")
    headers = {"Authorization": f"Bearer {key}"}
    for given in (
        {"base_url": closed.url, "client_kwargs": {"headers": headers}},
        {"base_url": f"{closed.url}/k/{key}"},
        {"base_url": closed.url.replace("http://", f"http://anna:{key}@")},
    ):
        chat = langchain_ollama.ChatOllama(model="llama3.2", **given)
        try:
            assert (await chat.ainvoke("hello")).content
        finally:
            await chat._async_client.close()
    await served(closed, 3)


@pytest.mark.spec("ACCESS-8")
@pytest.mark.spec("ACCESS-11")
async def test_the_calls_of_open_webui(closed: Running) -> None:
    """What its backend sends for a connection to an Ollama: a key, and its users if told to."""
    _, key = closed.parts.access.keys.create(NewKey(name="webui", names_users=True))

    async def sent(method: str, path: str, key: str, body: Any = None, user: str = "") -> int:
        headers = {"Authorization": f"Bearer {key}", "User-Agent": "Python/3.11 aiohttp/3.12"}
        if user:
            headers |= {"X-OpenWebUI-User-Name": "Bob%20B", "X-OpenWebUI-User-Email": user}
        async with closed.session.request(
            method, closed.url + path, json=body, headers=headers
        ) as answer:
            await answer.read()
            return answer.status

    assert await sent("GET", "/api/version", "wrong") == 401  # its button "verify connection"
    for path in ("/api/version", "/api/tags", "/api/ps"):
        assert await sent("GET", path, key) == 200
    chat = {"model": "llama3.2", "messages": ASKED, "stream": True}
    assert await sent("POST", "/api/chat", key, chat, user="bob@example.org") == 200
    assert await sent("POST", "/api/show", key, {"model": "llama3.2"}) == 200
    page = await closed.get("/api/history?client=bob@example.org")
    assert len(page["requests"]) == 1


@pytest.mark.spec("ACCESS-7")
@pytest.mark.spec("ACCESS-8")
async def test_the_calls_of_the_ollama_program(closed: Running, key: str) -> None:
    """`OLLAMA_HOST=http://HOST/k/KEY ollama run`: the sign of life, then the path before each."""
    agent = {"User-Agent": "ollama/0.33.0 (amd64 linux) Go/go1.24.1", "Authorization": ""}

    async def sent(method: str, path: str, body: Any = None) -> tuple[int, str]:
        async with closed.session.request(
            method, closed.url + path, json=body, headers=agent
        ) as answer:
            return answer.status, await answer.text()

    assert (await sent("HEAD", f"/k/{key}/"))[0] == 200
    assert (await sent("HEAD", "/"))[0] == 200
    assert (await sent("POST", f"/k/{key}/api/show", {"model": "llama3.2"}))[0] == 200
    assert (await sent("GET", f"/k/{key}/api/tags"))[0] == 200
    body = {"model": "llama3.2", "messages": ASKED}
    assert '"done":true' in (await sent("POST", f"/k/{key}/api/chat", body))[1]
    # It shows this sentence for 403, and one about ollama.com for 401.
    status, text = await sent("GET", "/api/tags")
    assert (status, "send it as" in text) == (403, True)
    await served(closed, 1)
