"""How urgent a request is, and how fast it is read."""

import asyncio

import pytest

from ollama_coordinator.scheduler import Lane
from support.coordinator import Running
from support.ollama import StandIn

CHAT = {"model": "llama3.2", "messages": [{"role": "user", "content": "hello"}], "stream": False}


async def ask(
    coordinator: Running,
    lane: str | None = None,
    wait: str | None = None,
    pace: str | None = None,
) -> tuple[int, str]:
    given = {"Lane": lane, "Max-Wait": wait, "Pace": pace}
    headers = {f"X-Ollama-Coordinator-{k}": v for k, v in given.items() if v is not None}
    url = f"{coordinator.url}/api/chat"
    async with coordinator.session.post(url, json=CHAT, headers=headers) as response:
        return response.status, await response.text()


@pytest.mark.spec("PROXY-24")
@pytest.mark.parametrize(
    ("header", "lane"), [(None, Lane.INTERACTIVE), ("interactive", Lane.INTERACTIVE)]
)
async def test_a_request_is_interactive_unless_it_says_otherwise(
    coordinator: Running, ollama: StandIn, header: str | None, lane: Lane
) -> None:
    ollama.hold()
    asked = asyncio.create_task(ask(coordinator, header))
    await ollama.seen.wait_for(lambda seen: seen.held == 1)
    assert [held.lease.request.lane for held in coordinator.parts.dispatch.held()] == [lane]
    ollama.release()
    assert (await asked)[0] == 200


@pytest.mark.spec("PROXY-24")
async def test_interactive_requests_go_before_batch(coordinator: Running, ollama: StandIn) -> None:
    agent_id = (await coordinator.get("/api/agents"))[0]["id"]
    await coordinator.heartbeat(agent_id, runner={"num_parallel": 1})
    ollama.hold()
    first = asyncio.create_task(ask(coordinator, None))
    await ollama.seen.wait_for(lambda seen: seen.held == 1)
    scheduler = coordinator.parts.scheduler
    batch = asyncio.create_task(ask(coordinator, "batch"))
    await coordinator.until(lambda: len(scheduler.waiting(coordinator.parts.clock.now())) == 1)
    urgent = asyncio.create_task(ask(coordinator, None))
    await coordinator.until(lambda: len(scheduler.waiting(coordinator.parts.clock.now())) == 2)
    line = scheduler.waiting(coordinator.parts.clock.now())
    assert [waiting.request.lane for waiting in line] == [Lane.INTERACTIVE, Lane.BATCH]
    ollama.release()
    answers = await asyncio.gather(first, urgent, batch)
    assert {status for status, _ in answers} == {200}


@pytest.mark.spec("PROXY-24")
async def test_a_lane_that_is_none_is_told(coordinator: Running, ollama: StandIn) -> None:
    status, text = await ask(coordinator, "express")
    assert status == 400
    assert "interactive or batch" in text


@pytest.mark.spec("PROXY-26")
async def test_who_waits_no_longer_is_told_so_and_served_when_there_is_a_place(
    coordinator: Running, ollama: StandIn
) -> None:
    agent_id = (await coordinator.get("/api/agents"))[0]["id"]
    await coordinator.heartbeat(agent_id, runner={"num_parallel": 1})
    assert (await ask(coordinator, wait="0"))[0] == 200
    ollama.hold()
    first = asyncio.create_task(ask(coordinator))
    await ollama.seen.wait_for(lambda seen: seen.held == 1)
    status, text = await ask(coordinator, wait="0.1")
    assert (status, "server busy" in text) == (503, True)
    assert not list(coordinator.parts.scheduler.waiting(coordinator.parts.clock.now()))
    ollama.release()
    assert (await first)[0] == 200


@pytest.mark.spec("PROXY-26")
@pytest.mark.parametrize("wait", ["soon", "-1", "nan", "inf", ""])
async def test_a_wait_that_is_no_number_of_seconds_is_told(
    coordinator: Running, ollama: StandIn, wait: str
) -> None:
    status, text = await ask(coordinator, wait=wait)
    assert status == 400
    assert "number of seconds" in text


@pytest.mark.spec("PROXY-29")
async def test_the_pace_is_the_headers_or_the_settings(
    coordinator: Running, ollama: StandIn
) -> None:
    async def pace_of(header: str | None) -> float:
        ollama.hold()
        asked = asyncio.create_task(ask(coordinator, pace=header))
        await ollama.seen.wait_for(lambda seen: seen.held == 1)
        (held,) = coordinator.parts.dispatch.held()
        ollama.release()
        assert (await asked)[0] == 200
        return held.lease.request.pace

    assert await pace_of(None) == 15.0
    assert await pace_of("40") == 40.0
    url = f"{coordinator.url}/api/settings"
    async with coordinator.session.patch(url, json={"reading_pace": 8}) as response:
        assert response.status == 200
    assert await pace_of(None) == 8.0


@pytest.mark.spec("PROXY-29")
@pytest.mark.parametrize("pace", ["fast", "0", "-1", "nan", "inf", ""])
async def test_a_pace_that_is_no_number_is_refused(
    coordinator: Running, ollama: StandIn, pace: str
) -> None:
    status, text = await ask(coordinator, pace=pace)
    assert status == 400
    assert "tokens a second" in text


def summary(number: int) -> dict[str, object]:
    return {"model": "llama3.2", "prompt": f"Summarise this text: {number}", "stream": False}


@pytest.mark.spec("SCHED-100")
@pytest.mark.spec("SCHED-101")
async def test_a_script_goes_to_the_batch_lane_and_why_says_so(
    coordinator: Running, ollama: StandIn
) -> None:
    async def send(number: int, **headers: str) -> None:
        url = f"{coordinator.url}/api/generate"
        async with coordinator.session.post(url, json=summary(number), headers=headers) as answer:
            assert answer.status == 200

    async def lanes() -> list[str]:
        rows = (await coordinator.get("/api/history?limit=100"))["requests"]
        return sorted(row["lane"] for row in rows)

    # All at once: however slow the machine is, each follows within a second of the one before.
    await asyncio.gather(*(send(number) for number in range(20)))
    assert await lanes() == ["batch"] * 11 + ["interactive"] * 9
    rows = (await coordinator.get("/api/history?limit=100"))["requests"]
    row = next(one for one in rows if one["lane"] == "batch")
    why = await coordinator.get(f"/api/requests/{row['id']}")
    assert "ten requests" in why["attempts"][0]["decision"]["lane_reason"]
    await asyncio.gather(
        *(send(number, **{"X-Ollama-Coordinator-Lane": "interactive"}) for number in range(12))
    )
    assert await lanes() == ["batch"] * 11 + ["interactive"] * 21


@pytest.mark.spec("SCHED-101")
async def test_the_lane_of_a_key_is_that_of_its_requests_unless_they_name_one(
    coordinator: Running, ollama: StandIn
) -> None:
    async def lane(key: str, number: int, **headers: str) -> tuple[str, str]:
        url = f"{coordinator.url}/api/generate"
        headers["Authorization"] = f"Bearer {key}"
        async with coordinator.session.post(url, json=summary(number), headers=headers) as answer:
            assert answer.status == 200
            name = answer.headers["X-Ollama-Coordinator-Request"]
        told = await coordinator.get(f"/api/requests/{name}")
        decision = told["attempts"][0]["decision"]
        return decision["lane"], decision.get("lane_reason", "")

    keys = {}
    for name, lane_of_key in (("nightly", "batch"), ("people", "interactive")):
        body = {"name": name, "lane": lane_of_key}
        status, made = await coordinator.post("/api/keys", body)
        assert (status, made["lane"]) == (201, lane_of_key)
        keys[name] = made["key"]
    assert await lane(keys["nightly"], 0) == ("batch", "the key 'nightly' has this lane")
    header = {"X-Ollama-Coordinator-Lane": "interactive"}
    assert await lane(keys["nightly"], 1, **header) == ("interactive", "")
    told = await asyncio.gather(*(lane(keys["people"], number) for number in range(15)))
    assert set(told) == {("interactive", "the key 'people' has this lane")}


@pytest.mark.spec("SCHED-101")
async def test_a_page_of_several_people_is_not_taken_for_a_batch(
    coordinator: Running, ollama: StandIn
) -> None:
    for person in ("one", "two"):
        said = [{"role": "user", "content": person}, {"role": "assistant", "content": "yes"}]
        status, _ = await coordinator.chat(messages=[*said, {"role": "user", "content": "and?"}])
        assert status == 200

    async def title(number: int) -> None:
        async with coordinator.session.post(
            f"{coordinator.url}/api/generate", json=summary(number)
        ) as answer:
            assert answer.status == 200

    await asyncio.gather(*(title(number) for number in range(20)))
    rows = (await coordinator.get("/api/history?limit=100"))["requests"]
    assert {row["lane"] for row in rows} == {"interactive"}
