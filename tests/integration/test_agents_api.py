"""Registration, the list of agents, and what an operator does to one."""

import asyncio
from datetime import UTC, datetime

import aiohttp
import pytest

from support.coordinator import Running
from support.ollama import StandIn

SEED = {
    "machine_name": "my-machine",
    "ip_address": "127.0.0.1",
    "ollama_version": "0.1.0",
    "ollama_port": 9,
}


@pytest.mark.spec("FLEET-1")
@pytest.mark.spec("FLEET-2")
async def test_a_machine_registers_once_and_is_updated_afterwards(coordinator: Running) -> None:
    status, first = await coordinator.post("/api/agents", SEED)
    assert (status, first["status"]) == (201, "registered")
    again = {**SEED, "ollama_version": "0.2.0", "field_of_tomorrow": {"x": 1}}
    status, second = await coordinator.post("/api/agents", again)
    assert (status, second["status"]) == (200, "updated")
    assert second["agent_id"] == first["agent_id"]
    status, other = await coordinator.post("/api/agents", {**SEED, "ollama_port": 10})
    assert status == 201
    assert other["agent_id"] != first["agent_id"]


@pytest.mark.spec("FLEET-3")
async def test_a_machine_with_an_id_stays_itself(coordinator: Running) -> None:
    _, first = await coordinator.post("/api/agents", {**SEED, "machine_id": "m1"})
    renamed = {**SEED, "machine_id": "m1", "machine_name": "new-name"}
    status, second = await coordinator.post("/api/agents", renamed)
    assert (status, second["agent_id"]) == (200, first["agent_id"])
    clone = {**renamed, "machine_name": "clone", "ip_address": "127.0.0.2"}
    status, third = await coordinator.post("/api/agents", clone)
    assert status == 201
    assert third["agent_id"] != first["agent_id"]


@pytest.mark.spec("FLEET-36")
async def test_a_name_that_is_not_shown_as_it_is_is_400(
    coordinator: Running, ollama: StandIn
) -> None:
    for field in ("machine_name", "ollama_version", "agent_version", "platform"):
        status, told = await coordinator.post("/api/agents", {**SEED, field: "a\u202eb"})
        assert (status, f"{field} has the character U+202E" in told["error"]) == (400, True)
    (agent,) = await coordinator.get("/api/agents")
    url = f"{coordinator.url}/api/agents/{agent['id']}"
    for change in (
        {"display_name": "a\x1b[2Jb"},
        {"labels": ["fine", "a\u200bb"]},
        {"notes": "one\ntwo\u202e"},
    ):
        async with coordinator.session.patch(url, json=change) as response:
            assert response.status == 400
            assert "leave it out" in await response.text()
    assert await coordinator.heartbeat(agent["id"], ollama_version="1\x9b") == 400
    fine = {"display_name": "机器 1", "labels": ["حاسوب"], "notes": "one\n\ttwo"}
    async with coordinator.session.patch(url, json=fine) as response:
        assert response.status == 200


@pytest.mark.spec("FLEET-5")
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"ollama_port": 70000}, "ollama_port"),
        ({"ollama_port": "11434"}, "ollama_port"),
        ({"machine_name": ""}, "machine_name"),
        ({"machine_name": None}, "machine_name"),
        ({"ip_address": "http://1.2.3.4"}, "ip_address"),
        ({"ip_address": "1.2.3.4/x"}, "ip_address"),
        ({"ip_address": ""}, "ip_address"),
    ],
)
async def test_a_registration_that_cannot_be_right_says_what_is_wrong(
    coordinator: Running, change: dict[str, object], told: str
) -> None:
    status, answer = await coordinator.post("/api/agents", SEED | change)
    assert status == 400
    assert told in answer["error"]
    assert await coordinator.get("/api/agents") == []


@pytest.mark.spec("FLEET-5")
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"machine_name":"x"}'])
async def test_a_broken_registration_is_400(coordinator: Running, body: bytes) -> None:
    for path in ("/api/agents", "/api/health"):
        async with coordinator.session.post(coordinator.url + path, data=body) as response:
            assert response.status == 400
            assert (await response.json())["error"]


@pytest.mark.spec("FLEET-6")
async def test_the_models_are_known_when_the_registration_is_answered(coordinator: Running) -> None:
    async with StandIn() as ollama:
        await coordinator.register(ollama)
        assert (await coordinator.chat())[0] == 200


@pytest.mark.spec("FLEET-7")
async def test_the_list_has_every_time_in_utc(coordinator: Running, ollama: StandIn) -> None:
    before = datetime.now(UTC)
    agents = await coordinator.get("/api/agents")
    assert [agent["machine_name"] for agent in agents] == ["first"]
    agent = agents[0]
    assert agent["status"] == "online"
    assert agent["ollama_port"] == ollama.port
    assert agent["models"] == ["llama3.2:latest"]
    for field in ("registered_at", "last_seen"):
        at = datetime.fromisoformat(agent[field])
        assert at.tzinfo is not None
        assert abs((at - before).total_seconds()) < 60
    assert await coordinator.get(f"/api/agents/{agent['id']}") == agent


@pytest.mark.spec("FLEET-7")
async def test_in_flight_counts_the_running_requests(coordinator: Running, ollama: StandIn) -> None:
    ollama.hold(after=1)
    async with coordinator.stream() as response:
        await response.content.readline()
        assert (await coordinator.get("/api/agents"))[0]["in_flight"] == 1
    await coordinator.until(coordinator.at_rest)
    assert (await coordinator.get("/api/agents"))[0]["in_flight"] == 0


@pytest.mark.spec("FLEET-8")
async def test_a_removed_agent_finishes_what_it_has(coordinator: Running, ollama: StandIn) -> None:
    agent_id = (await coordinator.get("/api/agents"))[0]["id"]
    ollama.hold(after=1)
    async with coordinator.stream() as response:
        await response.content.readline()
        url = f"{coordinator.url}/api/agents/{agent_id}"
        async with coordinator.session.delete(url) as removed:
            assert removed.status == 204
        assert await coordinator.get("/api/agents") == []
        assert (await coordinator.chat())[0] == 503
        ollama.release()
        assert (await response.content.read()).splitlines()[-1].find(b'"done":true') > 0
    async with coordinator.session.delete(url) as again:
        assert again.status == 404
        assert "POST /api/agents" in (await again.json())["error"]
    await coordinator.until(coordinator.at_rest)


@pytest.mark.spec("FLEET-9")
async def test_a_draining_agent_gets_no_new_request(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    first = next(a for a in await coordinator.get("/api/agents") if a["machine_name"] == "first")
    url = f"{coordinator.url}/api/agents/{first['id']}"
    ollama.hold()
    spare.hold()
    running = [asyncio.create_task(coordinator.chat()) for _ in range(2)]
    await coordinator.until(lambda: ollama.seen.held + spare.seen.held == 2)
    async with coordinator.session.patch(url, json={"draining": True, "notes": "RAM"}) as response:
        assert (await response.json())["status"] == "draining"
    ollama.release()
    spare.release()
    assert {status for status, _ in await asyncio.gather(*running)} == {200}
    before = ollama.seen.count("/api/chat")
    for _ in range(4):
        assert (await coordinator.chat())[0] == 200
    assert ollama.seen.count("/api/chat") == before
    async with coordinator.session.patch(url, json={"draining": False}) as response:
        view = await response.json()
    assert (view["status"], view["notes"]) == ("online", "RAM")


@pytest.mark.spec("FLEET-9")
async def test_a_model_that_only_draining_agents_have_is_503(
    coordinator: Running, ollama: StandIn
) -> None:
    agent_id = (await coordinator.get("/api/agents"))[0]["id"]
    url = f"{coordinator.url}/api/agents/{agent_id}"
    async with coordinator.session.patch(url, json={"draining": True}):
        pass
    status, answer = await coordinator.chat()
    assert status == 503
    assert "first: draining" in answer["error"]


@pytest.mark.spec("FLEET-9")
@pytest.mark.parametrize(
    "change",
    [
        {"draining": "yes"}, {"labels": "x"}, {"preference": 0}, {"backup_seconds": -1},
        {"slots": 0}, {"memory_bytes": "8 GB"}, {"gpu": ""},
    ],
)  # fmt: skip
async def test_a_wrong_setting_of_an_agent_is_400(
    coordinator: Running, ollama: StandIn, change: dict[str, object]
) -> None:
    agent_id = (await coordinator.get("/api/agents"))[0]["id"]
    url = f"{coordinator.url}/api/agents/{agent_id}"
    async with coordinator.session.patch(url, json=change) as response:
        assert response.status == 400


@pytest.mark.spec("FLEET-9")
async def test_what_is_told_by_hand_is_shown_as_such_until_it_is_cleared(
    coordinator: Running, ollama: StandIn
) -> None:
    agent_id = (await coordinator.get("/api/agents"))[0]["id"]
    url, told = f"{coordinator.url}/api/agents/{agent_id}", {"slots": 3, "gpu": "RTX 3090"}
    async with coordinator.session.patch(url, json={**told, "memory_bytes": 2**34}) as response:
        view = await response.json()
    assert view["by_hand"] == {**told, "memory_bytes": 2**34}
    assert view["runner"]["num_parallel"] == 3
    nothing = dict.fromkeys(("slots", "memory_bytes", "gpu"))
    async with coordinator.session.patch(url, json=nothing) as response:
        view = await response.json()
    assert (view["by_hand"], view["runner"]) == (None, None)


@pytest.mark.spec("FLEET-10")
async def test_a_heartbeat_of_a_stranger_is_404(coordinator: Running) -> None:
    assert await coordinator.heartbeat("nobody") == 404


@pytest.mark.spec("FLEET-12")
async def test_a_goodbye_makes_an_agent_offline_at_once(
    coordinator: Running, ollama: StandIn
) -> None:
    agent_id = (await coordinator.get("/api/agents"))[0]["id"]
    assert await coordinator.heartbeat(agent_id, leaving=True) == 200
    assert (await coordinator.get("/api/agents"))[0]["status"] == "offline"
    assert await coordinator.heartbeat(agent_id) == 200
    assert (await coordinator.get("/api/agents"))[0]["status"] == "online"


@pytest.mark.spec("FLEET-12")
async def test_an_agent_whose_ollama_is_gone_is_out_of_rotation_at_once(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    agents = await coordinator.get("/api/agents")
    first = next(agent["id"] for agent in agents if agent["machine_name"] == "first")
    await coordinator.heartbeat(first, ollama_running=False)
    for _ in range(4):
        assert (await coordinator.chat())[0] == 200
    assert ollama.seen.count("/api/chat") == 0
    view = await coordinator.get(f"/api/agents/{first}")
    assert view["out_of_rotation"] == "its Ollama does not answer"


@pytest.mark.spec("FLEET-11")
async def test_the_lists_in_a_heartbeat_are_the_agents_models(coordinator: Running) -> None:
    async with StandIn(["a", "b"]) as ollama:
        agent_id = await coordinator.register(ollama)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{ollama.url}/api/tags") as response:
                tags = await response.json()
        tags["models"] = [row for row in tags["models"] if row["name"] == "a:latest"]
        ps = {"models": [{**tags["models"][0], "size_vram": 1, "context_length": 4096}]}
        assert await coordinator.heartbeat(agent_id, tags=tags, ps=ps) == 200
        view = await coordinator.get(f"/api/agents/{agent_id}")
        assert (view["models"], view["loaded_models"]) == (["a:latest"], ["a:latest"])
        assert (await coordinator.chat("b"))[0] == 404


@pytest.mark.spec("FLEET-11")
async def test_lists_that_are_none_are_400_and_change_nothing(
    coordinator: Running, ollama: StandIn
) -> None:
    agent_id = (await coordinator.get("/api/agents"))[0]["id"]
    assert await coordinator.heartbeat(agent_id, tags={"models": 5}) == 400
    assert await coordinator.heartbeat(agent_id, tags=[]) == 400
    assert (await coordinator.chat())[0] == 200


async def test_a_machine_called_like_markup_stays_a_name(coordinator: Running) -> None:
    async with StandIn() as ollama:
        await coordinator.register(ollama, "<script>alert('é')</script>")
        async with coordinator.stream() as response:
            assert response.headers["X-Ollama-Coordinator-Agent"].startswith("%3Cscript")
            await response.read()


async def register(coordinator: Running, **more: object) -> dict[str, str]:
    return dict((await coordinator.post("/api/agents", {**SEED, **more}))[1])


@pytest.mark.spec("FLEET-29")
async def test_one_ollama_is_one_machine_whatever_it_is_called(
    coordinator: Running, ollama: StandIn
) -> None:
    """It was registered bare by the fixture; it comes again under other names, and by its agent."""
    (known,) = await coordinator.get("/api/agents")
    own = {"ollama_port": ollama.port, "machine_id": "disk-1"}
    for ways in (
        {"machine_name": "renamed", "ollama_port": ollama.port},
        {"machine_name": "gpu", "ip_address": "localhost", "ollama_port": ollama.port},
        {"machine_name": "gpu", "ip_address": "::ffff:127.0.0.1", "ollama_port": ollama.port},
        {"machine_name": "with-agent", "instance_id": "r1", **own},
        # Bare again, as a script does at each start: the agent's row stays as it is.
        {"machine_name": "first", "ollama_port": ollama.port},
    ):
        assert await register(coordinator, **ways) == {"agent_id": known["id"], "status": "updated"}
    (row,) = await coordinator.get("/api/agents")
    assert (row["machine_name"], row["status"]) == ("with-agent", "online")
    # Another agent for the same Ollama takes it over; the first one is refused with a sentence.
    other = {"machine_name": "other", "machine_id": "disk-2", "instance_id": "s1"}
    assert (await register(coordinator, **own | other))["agent_id"] == known["id"]
    assert await coordinator.heartbeat(known["id"], instance_id="r1") == 404
    status, refused = await coordinator.post(
        "/api/agents", {**SEED, "machine_name": "with-agent", "instance_id": "r1", **own}
    )
    assert status == 409
    url = f"http://127.0.0.1:{ollama.port}"
    assert refused["error"] == (
        f"two agents ('other' and 'with-agent') report the same Ollama, {url}; stop one of them"
    )


@pytest.mark.spec("FLEET-29")
async def test_a_machine_that_moves_to_the_address_of_another_replaces_it(
    coordinator: Running,
) -> None:
    first = {"machine_id": "a", "instance_id": "a1", "machine_name": "a", "ip_address": "127.0.0.2"}
    second = {"machine_id": "b", "instance_id": "b1", "machine_name": "b"}
    ids = [(await register(coordinator, **one))["agent_id"] for one in (first, second)]
    # They swap their addresses.
    moved = {**first, "ip_address": "127.0.0.1"}
    assert (await register(coordinator, **moved))["agent_id"] == ids[0]
    assert [a["status"] for a in await coordinator.get("/api/agents")] == ["online", "offline"]
    assert await coordinator.heartbeat(ids[1], instance_id="b1") == 404
    moved = {**second, "ip_address": "127.0.0.2"}
    assert (await register(coordinator, **moved))["agent_id"] == ids[1]
    assert [a["status"] for a in await coordinator.get("/api/agents")] == ["online", "online"]
    assert await coordinator.heartbeat(ids[0], instance_id="a1") == 200


@pytest.mark.spec("FLEET-30")
@pytest.mark.parametrize("identity", [{}, {"machine_id": "disk", "instance_id": "r1"}])
async def test_a_namesake_takes_nothing_from_a_machine_that_is_alive(
    coordinator: Running, identity: dict[str, str]
) -> None:
    first = await register(coordinator, machine_name="ubuntu", **identity)
    second = await register(coordinator, machine_name="ubuntu", ip_address="127.0.0.2")
    assert second["status"] == "registered"
    assert await coordinator.heartbeat(first["agent_id"]) == 200
    rows = await coordinator.get("/api/agents")
    assert {row["ip_address"] for row in rows} == {"127.0.0.1", "127.0.0.2"}
    for row, other in zip(rows, reversed(rows), strict=True):
        assert "the same name, 'ubuntu'" in row["conflict"]
        assert f"ubuntu at {other['ip_address']}" in row["conflict"]
        assert "another machine_name" in row["conflict"]
    await coordinator.heartbeat(second["agent_id"], leaving=True)
    assert [row["conflict"] for row in await coordinator.get("/api/agents")] == [None, None]
    # Once it is gone, its name tells who it is: its address has changed.
    again = await register(coordinator, machine_name="ubuntu", ip_address="127.0.0.3", **identity)
    assert again["status"] == "updated"


@pytest.mark.spec("FLEET-30")
async def test_a_machine_whose_ollama_still_answers_is_alive(
    coordinator: Running, ollama: StandIn
) -> None:
    """It was not heard for a long time, as its agent was stopped; its Ollama runs."""
    (known,) = await coordinator.get("/api/agents")
    await coordinator.heartbeat(known["id"], leaving=True)
    assert (await coordinator.get("/api/agents"))[0]["status"] == "offline"
    namesake = {"machine_name": "first", "ip_address": "127.0.0.2", "ollama_port": ollama.port}
    assert (await register(coordinator, **namesake))["agent_id"] != known["id"]
    await ollama.stop()
    moved = {**namesake, "ip_address": "127.0.0.3"}
    agents = await coordinator.get("/api/agents")
    for agent in agents:
        await coordinator.heartbeat(agent["id"], leaving=True)
    assert (await register(coordinator, **moved))["status"] == "updated"
