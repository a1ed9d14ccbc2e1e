"""Models that ollama.com runs, asked of a fleet by name: it does what one Ollama does."""

from typing import Any

import pytest

from ollama_coordinator.agent_queries import SIGNED_IN_SECONDS
from ollama_coordinator.scheduler import POLICIES
from support.coordinator import Running, running
from support.ollama import Model, StandIn

NAME = "gpt-oss:120b-cloud"
HI = [{"role": "user", "content": "hi"}]
ASKED: dict[str, dict[str, Any]] = {
    "/api/chat": {"messages": HI, "stream": False},
    "/api/generate": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": HI, "stream": True},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": HI, "max_tokens": 4},
    "/api/show": {},
}


def signed_in() -> StandIn:
    """An Ollama whose machine has an account at ollama.com."""
    return StandIn(cloud_disabled=False, signed_in_as="ada", cloud_models=[NAME])


def signed_out() -> StandIn:
    return StandIn(cloud_disabled=False, cloud_models=[NAME])


async def ask(coordinator: Running, path: str, name: str = NAME) -> tuple[int, str]:
    body = {"model": name, **ASKED[path]}
    async with coordinator.session.post(coordinator.url + path, json=body) as response:
        return response.status, await response.text()


@pytest.mark.spec("SURFACE-43")
@pytest.mark.parametrize("policy", POLICIES)
async def test_a_cloud_model_that_nobody_pulled_goes_where_an_account_is(policy: str) -> None:
    async with (
        running(policy=policy) as coordinator,
        StandIn() as disabled,
        signed_out() as unknown,
        signed_in() as known,
    ):
        for name, agent in (("a", disabled), ("b", unknown), ("c", known)):
            await coordinator.register(agent, name)
        for path in ASKED:
            status, text = await ask(coordinator, path)
            assert status == 200, text
            counts = [agent.seen.count(path) for agent in (disabled, unknown, known)]
            assert counts == [0, 0, 1], path
        await coordinator.until(coordinator.at_rest)
        assert unknown.seen.count("/api/me") <= 1


@pytest.mark.spec("SURFACE-43")
async def test_it_is_in_no_list(coordinator: Running) -> None:
    async with signed_in() as agent:
        agent_id = await coordinator.register(agent, "first")
        assert (await ask(coordinator, "/api/chat", "gpt-oss:120b:CLOUD"))[0] == 200
        for path in ("/api/tags", "/api/models"):
            names = [row["name"] for row in (await coordinator.get(path))["models"]]
            assert names == ["llama3.2:latest"]
        assert (await coordinator.get("/api/ps"))["models"] == []
        shown = await coordinator.get(f"/api/agents/{agent_id}")
        assert (shown["models"], shown["loaded_models"]) == (["llama3.2:latest"], [])
        (request,) = (await coordinator.get("/api/history"))["requests"]
        assert (request["model"], request["agent"], request["status"]) == (NAME, "first", "served")


@pytest.mark.spec("SURFACE-43")
@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("node", [StandIn, signed_out], ids=["disabled", "signed out"])
async def test_where_one_ollama_refuses_so_does_the_fleet(
    coordinator: Running, node: Any, path: str
) -> None:
    async with node() as first, node() as second:
        await coordinator.register(first, "first")
        await coordinator.register(second, "second")
        body = {"model": NAME, **ASKED[path]}
        async with coordinator.session.post(first.url + path, json=body) as response:
            alone = response.status, response.content_type, await response.json()
        async with coordinator.session.post(coordinator.url + path, json=body) as response:
            assert (response.status, response.content_type, await response.json()) == alone
        assert alone[0] in (401, 403)


@pytest.mark.spec("SURFACE-43")
async def test_what_ollama_com_does_not_have_is_not_found(coordinator: Running) -> None:
    async with signed_in() as agent:
        await coordinator.register(agent, "first")
        status, text = await ask(coordinator, "/api/chat", "no-such-model:cloud")
        assert (status, agent.seen.count("/api/chat")) == (404, 1)
        assert "not found" in text


@pytest.mark.spec("SURFACE-43")
async def test_openais_details_are_asked_for_too(coordinator: Running) -> None:
    async with signed_in() as agent:
        agent_id = await coordinator.register(agent, "first")
        assert (await coordinator.get(f"/v1/models/{NAME}"))["id"] == NAME
        await coordinator.heartbeat(agent_id, leaving=True)
        async with coordinator.session.get(f"{coordinator.url}/v1/models/{NAME}") as response:
            assert response.status == 403
            details = "ollama cloud is disabled: remote model details are unavailable"
            assert await response.json() == {"error": details}


@pytest.mark.spec("SURFACE-43")
async def test_the_agents_labelled_cloud_speak_for_the_fleet(coordinator: Running) -> None:
    async with signed_in() as other, signed_in() as chosen:
        await coordinator.register(other, "other")
        agent_id = await coordinator.register(chosen, "chosen")
        labels = {"labels": ["cloud"]}
        await coordinator.session.patch(f"{coordinator.url}/api/agents/{agent_id}", json=labels)
        for _ in range(4):
            assert (await ask(coordinator, "/api/chat"))[0] == 200
        assert (other.seen.count("/api/chat"), chosen.seen.count("/api/chat")) == (0, 4)


@pytest.mark.spec("SURFACE-43")
async def test_an_agent_that_fails_is_stood_in_for(coordinator: Running) -> None:
    async with signed_in() as first, signed_in() as second:
        await coordinator.register(first, "first")
        await coordinator.register(second, "second")
        first.faults.rst(paths=("/api/chat",))
        for _ in range(4):
            assert (await ask(coordinator, "/api/chat"))[0] == 200
        assert second.seen.count("/api/chat") == 4
        await coordinator.until(coordinator.at_rest)


@pytest.mark.spec("SURFACE-43")
async def test_an_account_is_believed_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        running(agent_timeout=1e6) as coordinator,
        signed_in() as first,
        signed_in() as other,
    ):
        await coordinator.register(first, "first")
        await coordinator.register(other, "other")
        for _ in range(2):
            assert (await ask(coordinator, "/api/chat"))[0] == 200
        assert first.seen.count("/api/me") + other.seen.count("/api/me") == 2
        later = coordinator.parts.clock.now() + SIGNED_IN_SECONDS
        monkeypatch.setattr(coordinator.parts.clock, "now", lambda: later)
        first.settings.signed_in_as = None
        for _ in range(4):
            assert (await ask(coordinator, "/api/chat"))[0] == 200
        assert first.seen.count("/api/me") + other.seen.count("/api/me") == 4


@pytest.mark.spec("SURFACE-43")
@pytest.mark.parametrize("path", ["/api/chat", "/api/show"])
async def test_an_account_that_is_signed_out_is_asked_for_again(
    coordinator: Running, path: str
) -> None:
    async with signed_in() as first, signed_in() as second:
        await coordinator.register(first, "first")
        await coordinator.register(second, "second")
        assert (await ask(coordinator, path))[0] == 200
        had = max((first, second), key=lambda agent: agent.seen.count(path))
        had.settings.signed_in_as = None
        while (await ask(coordinator, path))[0] != 401:
            pass
        for _ in range(4):
            assert (await ask(coordinator, path))[0] == 200


@pytest.mark.spec("SURFACE-43")
@pytest.mark.parametrize("silent", ["/api/me", "/api/status"])
async def test_an_agent_that_says_nothing_of_the_cloud_is_waited_for_once(
    coordinator: Running, monkeypatch: pytest.MonkeyPatch, silent: str
) -> None:
    monkeypatch.setattr("ollama_coordinator.agent_queries.STATUS_SECONDS", 0.1)
    async with signed_out() as first, signed_in() as second:
        await coordinator.register(first, "first")
        await coordinator.register(second, "second")
        with first.faults.hang(paths=(silent,)):
            for _ in range(3):
                assert (await ask(coordinator, "/api/chat"))[0] == 200
        assert first.seen.count(silent) == 1


@pytest.mark.spec("SURFACE-43")
async def test_a_stub_that_is_pulled_goes_to_its_holder(coordinator: Running) -> None:
    stub = Model(NAME, size_bytes=400, remote=True)
    holder = StandIn([stub], cloud_disabled=False, signed_in_as="ada", cloud_models=[NAME])
    async with signed_in() as other, holder:
        await coordinator.register(other, "other")
        agent_id = await coordinator.register(holder, "holder")
        assert (await ask(coordinator, "/api/chat"))[0] == 200
        assert (other.seen.count("/api/chat"), holder.seen.count("/api/chat")) == (0, 1)
        await coordinator.heartbeat(agent_id, leaving=True)
        assert (await ask(coordinator, "/api/chat"))[0] == 200
        assert other.seen.count("/api/chat") == 1


@pytest.mark.spec("SURFACE-43")
async def test_to_drop_it_from_memory_is_left_to_ollama_com(coordinator: Running) -> None:
    async with signed_in() as agent:
        await coordinator.register(agent, "first")
        body = {"model": NAME, "keep_alive": 0}
        status, answer = await coordinator.post("/api/generate", body)
        assert (status, answer["done_reason"]) == (200, "unload")


@pytest.mark.spec("SURFACE-43")
async def test_the_names_that_are_remembered_are_few(coordinator: Running) -> None:
    async with signed_in() as agent:
        agent_id = await coordinator.register(agent, "first")
        for number in range(150):
            assert (await ask(coordinator, "/api/chat", f"model-{number}:cloud"))[0] == 404
        assert len(coordinator.agent(agent_id).inventory.offered) <= 100
        assert (await ask(coordinator, "/api/chat"))[0] == 200
        assert len(await coordinator.get("/api/estimates")) <= 101
