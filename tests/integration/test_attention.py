"""What needs a person: the list, its command, and the webhook."""

import asyncio
import io
import itertools
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from rich.console import Console
from typer.testing import CliRunner

from ollama_coordinator.attention import concerns, watch
from ollama_coordinator.commands.tables import agents_table
from ollama_coordinator.dispatch import Held
from ollama_coordinator.journal import JournalEntry, sampler
from ollama_coordinator.journal.entry import JournalAttempt
from ollama_coordinator.main import app
from ollama_coordinator.model_probes import ask_restart
from ollama_coordinator.registry.agent import AgentState, Cooldown
from ollama_coordinator.scheduler import Lease, LeaseId, Outcome, Request, RequestId, Result
from ollama_coordinator_common.names import model_key
from support.coordinator import Running, running
from support.ollama import StandIn

LATER = 61.0
"""Longer than every grace, and shorter than the silence of an agent that is offline in a test."""


def open_now(coordinator: Running, after: float = LATER) -> dict[str, Any]:
    """What is open by kind, if all stays as it is for so many seconds."""
    attention, now = coordinator.parts.attention, coordinator.parts.clock.now()
    coordinator.parts.registry.agent_timeout = 10_000.0
    attention.look(now)
    attention.look(now + after)
    return {one.concern.kind: one.concern for one in attention.open()}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lasts some seconds in life takes no time here."""
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(watch, "MESSAGE_SECONDS", 0.01)
    monkeypatch.setattr(watch, "OVER_SECONDS", 0.05)
    monkeypatch.setattr(watch, "GRACE_SECONDS", {})


@pytest.mark.spec("OPERATION-43")
async def test_a_fleet_that_is_well_needs_nobody(coordinator: Running) -> None:
    async with StandIn() as ollama:
        await coordinator.register(ollama)
        assert (await coordinator.chat())[0] == 200
        assert open_now(coordinator) == {}


@pytest.mark.spec("OPERATION-43")
async def test_a_machine_out_of_rotation_a_model_without_one_and_a_fleet_without_any(
    coordinator: Running,
) -> None:
    async with StandIn() as ollama:
        await coordinator.register(ollama, "gpu-1")
        assert (await coordinator.chat())[0] == 200
        await ollama.kill()
        agent = next(iter(coordinator.parts.registry))
        await coordinator.parts.monitor.look_at(agent, seconds=5)
        found = open_now(coordinator, after=11)
        assert set(found) == {"fleet"}  # what is out for a moment only may be restarting
        found = open_now(coordinator)
        assert set(found) == {"fleet", "out", "model"}
        assert "It gets no requests: " in found["out"].text
        assert found["out"].agent_id == agent.id
        assert found["model"].text.startswith("No machine can serve it: gpu-1 ")
        worst = coordinator.parts.attention.open()[0].concern
        assert worst.severity is concerns.Severity.CRITICAL
        assert {one["concern"]["kind"] for one in await shown(coordinator)} >= {"fleet"}


async def shown(coordinator: Running) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = (await coordinator.get("/api/attention"))["attention"]
    return listed


@pytest.mark.spec("OPERATION-43")
async def test_a_silent_machine_needs_somebody_and_one_that_left_or_drains_does_not(
    coordinator: Running,
) -> None:
    async with StandIn() as ollama:
        agent_id = await coordinator.register(ollama, "gpu-1")
        assert await coordinator.heartbeat(agent_id) == 200
        agent, attention = coordinator.agent(agent_id), coordinator.parts.attention
        later = agent.heard_at + coordinator.parts.registry.agent_timeout + 1
        attention.look(later)
        attention.look(later + 31)
        texts = {one.concern.kind: one.concern.text for one in attention.open()}
        assert texts["out"].startswith("Nothing was heard of it for 92 s.")
        await coordinator.heartbeat(agent_id, leaving=True)
        assert "out" not in open_now(coordinator)


@pytest.mark.spec("OPERATION-43")
async def test_what_its_machine_lacks(coordinator: Running) -> None:
    async with StandIn() as one, StandIn() as two:
        first = await coordinator.register(one, "gpu-1", ollama_version="0.5.7")
        second = await coordinator.register(two, "gpu-2", ollama_version="0.24.0")
        gpu = {"name": "X", "memory_total_bytes": 1}
        await coordinator.heartbeat(first, gpus=[gpu, gpu], ollama_version="0.5.7")
        await coordinator.heartbeat(second, ollama_version="0.24.0")
        assert set(open_now(coordinator)) == {"version"}
        await coordinator.heartbeat(
            first,
            gpus=[gpu],
            disk_free_bytes=3 * 10**9,
            tags={"models": [{"name": "llama3.2:latest", "digest": "1" * 64, "size": 1}]},
            ps={"models": []},
            broken_models={"llama3.2:latest": "a file is missing"},
            left_behind="a killed Ollama left a model runner: end process 7",
        )
        found = open_now(coordinator)
        assert found["gpu"].text.startswith("1 of its 2 GPUs cannot be seen")
        assert found["disk"].text.startswith("Its disk has 3.0 GB left.")
        assert "a file is missing" in found["broken"].text
        assert found["left"].text == "a killed Ollama left a model runner: end process 7."
        (row,) = [row for row in await coordinator.get("/api/agents") if row["id"] == first]
        for width in (80, 200):
            screen = Console(width=width, file=io.StringIO())
            screen.print(agents_table([row], width))
            assert isinstance(screen.file, io.StringIO)
            lines = screen.file.getvalue().splitlines()
            # Where there is room it is in the row; else the row stays short, and a line follows.
            assert [n for n, line in enumerate(lines) if "left a model" in line] == [
                1 if width == 200 else 2
            ]
        assert found["version"].text == "Its Ollama is 0.5.7, others have 0.24.0."
        assert found["version"].severity is concerns.Severity.NOTE


@pytest.mark.spec("OPERATION-43")
async def test_a_model_that_became_slow(coordinator: Running) -> None:
    async with StandIn() as ollama:
        agent_id = await coordinator.register(ollama, "gpu-1")
        assert (await coordinator.chat())[0] == 200
        scheduler = coordinator.parts.scheduler
        key = next(iter(coordinator.agent(agent_id).inventory.loaded))
        estimate = scheduler.estimate(coordinator.agent(agent_id).id, key)
        assert estimate is not None
        speeds = iter([100.0, 100.0, 30.0, 30.0])

        def estimated(*_: object) -> object:
            return type(estimate)(
                agent_id=estimate.agent_id, model=key, load_seconds=1.0, slots=1,
                prefill_tokens_per_second=1.0, decode_tokens_per_second=next(speeds),
                slots_reported=False, samples=(99, 99, 1),
            )  # fmt: skip

        scheduler.estimate = estimated  # type: ignore[method-assign, assignment]
        assert "slow" not in open_now(coordinator)
        found = open_now(coordinator)
        assert found["slow"].text.startswith("llama3.2:latest writes 30 tokens/s there, once it")


@pytest.mark.spec("OPERATION-96")
async def test_a_model_that_writes_slowly_now_is_told_long_before_its_mean_has_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In virtual time: the loops that would look by themselves do not."""
    monkeypatch.setattr(sampler, "SAMPLE_SECONDS", 1e6)
    monkeypatch.setattr(watch, "LOOK_SECONDS", 1e6)
    async with running() as coordinator, StandIn() as ollama:
        agent = coordinator.agent(await coordinator.register(ollama, "gpu-1"))
        assert (await coordinator.chat())[0] == 200
        attention, now = coordinator.parts.attention, coordinator.parts.clock.now()
        speeds = coordinator.parts.observation.sampler.speeds
        coordinator.parts.registry.agent_timeout = 10_000.0
        request = Request(id=RequestId("1"), model=model_key("llama3.2"), name="", arrived_at=now)
        seconds = itertools.count()

        def write(tokens: int) -> Iterator[list[str]]:
            """One stream of so many tokens a second; what needs attention after each."""
            lease = Lease(id=LeaseId(tokens), request=request, agent_id=agent.id, granted_at=now)
            entry, held = JournalEntry(request, "/api/chat"), Held(lease, agent, now)
            held.began_at = now
            entry.attempts.append(JournalAttempt(held, None, {}))
            for second in itertools.islice(seconds, 18):
                held.records += tokens
                speeds.sample([entry], now + second)
                attention.look(now + second)
                yield [one.concern.text for one in attention.open()]

        assert list(write(50)) == [[]] * 18
        text = "llama3.2:latest writes 10 tokens/s there, once it was 50."
        assert list(write(10))[-1] == [f"{text} Does it still run on the GPU, and is that cool?"]
        assert list(write(51))[-1] == []
        for number in (100, 101):  # two requests in a row wait in vain, and go elsewhere
            lease = Lease(
                id=LeaseId(number), request=request, agent_id=agent.id, granted_at=now + number
            )
            entry, held = JournalEntry(request, "/api/chat"), Held(lease, agent, now)
            entry.attempts.append(JournalAttempt(held, None, {}))
            speeds.sample([entry], now + number)
            held.ended, held.outcome = True, Outcome(Result.TAKEN_BACK)
            speeds.sample([entry], now + number + 0.5)
        attention.look(now + 102)
        (text,) = [one.concern.text for one in attention.open()]
        assert text.startswith("2 requests in a row for llama3.2:latest got no answer there in")


@pytest.mark.spec("OPERATION-43")
async def test_a_queue_and_the_database(
    coordinator: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(concerns, "LONG_QUEUE", 3)
    async with StandIn(slots=1) as ollama:
        await coordinator.register(ollama)
        ollama.hold()
        chats = [asyncio.create_task(coordinator.chat()) for _ in range(4)]
        await coordinator.until(lambda: coordinator.parts.scheduler.waiting_count() == 3)
        coordinator.parts.store.problem = "the disk is full"
        found = open_now(coordinator)
        assert found["queue"].text.startswith("3 requests wait.")
        assert found["database"].text.startswith("the disk is full.")
        ollama.release()
        await asyncio.gather(*chats)


def looking_at(coordinator: Running, agent: AgentState) -> Callable[..., set[str]]:
    """Looks some seconds from now, with the agent in rotation or out of it; what is open then."""
    attention, now = coordinator.parts.attention, coordinator.parts.clock.now()
    coordinator.parts.registry.agent_timeout = 10_000.0

    def look(seconds: float, *, is_away: bool) -> set[str]:
        agent.resting = is_away
        agent.cooldown = Cooldown(0, now, now, "it refuses connections") if is_away else None
        attention.look(now + seconds)
        return {one.concern.kind for one in attention.open()} - {"fleet"}

    return look


@pytest.mark.spec("OPERATION-44")
async def test_a_machine_that_comes_and_goes_is_one_concern_until_it_stays_away(
    coordinator: Running,
) -> None:
    async with StandIn() as ollama:
        agent = coordinator.agent(await coordinator.register(ollama, "gpu-1"))
        attention, look = coordinator.parts.attention, looking_at(coordinator, agent)
        look(0, is_away=False)
        look(10, is_away=True)
        look(20, is_away=False)
        assert look(30, is_away=True) == {"flapping"}
        (one,) = [one.concern for one in attention.open() if one.concern.agent_id]
        assert one.text.startswith(
            "It comes and goes, 2 times within 20 s; the last time: it refuses connections. Look"
        )
        assert look(40, is_away=False) == {"flapping"}  # one concern all the time
        look(50, is_away=True)
        look(50 + watch.GONE_SECONDS + 2, is_away=True)
        assert "flapping" not in look(50 + watch.GONE_SECONDS + 4, is_away=True)
        assert "out" in look(50 + watch.GONE_SECONDS + 40, is_away=True)


@pytest.mark.spec("OPERATION-44")
async def test_a_machine_that_is_drained_and_resumed_or_leaves_does_not_come_and_go(
    coordinator: Running,
) -> None:
    async with StandIn() as ollama:
        agent_id = await coordinator.register(ollama, "gpu-1")
        attention, now = coordinator.parts.attention, coordinator.parts.clock.now()
        for number in range(8):
            change = {"draining": bool(number % 2)}
            url = f"{coordinator.url}/api/agents/{agent_id}"
            async with coordinator.session.patch(url, json=change) as response:
                assert response.status == 200
            await coordinator.heartbeat(agent_id, leaving=bool(number % 2))
            attention.look(now + number)
        assert {one.concern.kind for one in attention.open()} & {"flapping"} == set()


@pytest.mark.spec("OPERATION-44")
async def test_a_restart_that_was_announced_is_no_outage_and_one_that_was_not_is(
    coordinator: Running,
) -> None:
    async with StandIn() as ollama:
        agent_id = await coordinator.register(ollama, "gpu-1")
        agent, look = (
            coordinator.agent(agent_id),
            looking_at(coordinator, coordinator.agent(agent_id)),
        )
        await coordinator.heartbeat(agent_id, owned=True)

        async def said_goodbye(seconds: float) -> None:
            """Its agent is started again at once; its Ollama takes some seconds to start."""
            await coordinator.heartbeat(agent_id, leaving=True)
            look(seconds, is_away=False)
            await coordinator.heartbeat(agent_id, owned=True)

        async def was_asked_for(seconds: float) -> None:
            """An operator has its Ollama restarted, which begins with the next heartbeat."""
            ask_restart(agent, coordinator.parts.dispatch)
            await coordinator.heartbeat(agent_id, owned=True)

        look(0, is_away=False)
        for number, announced in enumerate((said_goodbye, was_asked_for) * 3):
            await announced(10.0 * number)
            assert "flapping" not in look(10.0 * number + 4, is_away=True)
            assert "flapping" not in look(10.0 * number + 8, is_away=False)
        later = watch.ANNOUNCED_SECONDS + 10
        look(later, is_away=True)
        look(later + 5, is_away=False)
        assert "flapping" in look(later + 10, is_away=True)


@pytest.mark.spec("DASH-40")
async def test_what_concerns_a_model_has_the_name_that_its_page_has(coordinator: Running) -> None:
    async with StandIn() as ollama:
        await coordinator.register(ollama, "gpu-1")
        assert (await coordinator.chat())[0] == 200
        agent = next(iter(coordinator.parts.registry))
        key, now = next(iter(agent.inventory.available)), coordinator.parts.clock.now()
        coordinator.parts.registry.doubt(agent, key, "it writes nothing", now)
        found = open_now(coordinator)["stuck"]
        names = [row["name"] for row in (await coordinator.get("/api/models"))["models"]]
        assert (found.agent_id, found.model) == (agent.id, names[0])


@pytest.mark.spec("OPERATION-43")
async def test_a_model_hangs_only_on_a_machine_that_is_there(coordinator: Running) -> None:
    async with StandIn() as ollama:
        agent = coordinator.agent(await coordinator.register(ollama, "gpu-1"))
        assert (await coordinator.chat())[0] == 200
        key, now = next(iter(agent.inventory.available)), coordinator.parts.clock.now()
        coordinator.parts.registry.doubt(agent, key, "it writes nothing", now)
        assert "stuck" not in open_now(coordinator, after=11)  # a moment is no hanging
        assert (
            open_now(coordinator)["stuck"].text == "llama3.2:latest hangs there: it writes nothing."
        )
        agent.resting, agent.cooldown = (
            True,
            Cooldown(0, now, now, "no answer within 2 s; is it on?"),
        )
        assert "stuck" not in open_now(coordinator)


@pytest.mark.spec("OPERATION-43")
async def test_a_machine_whose_agent_is_silent_too_may_be_off(coordinator: Running) -> None:
    async with StandIn() as ollama:
        agent_id = await coordinator.register(ollama, "gpu-1")
        await coordinator.heartbeat(agent_id)
        agent, now = coordinator.agent(agent_id), coordinator.parts.clock.now()
        agent.resting, agent.cooldown = (
            True,
            Cooldown(0, now, now, "no answer within 2 s; is it stuck?"),
        )
        coordinator.parts.registry.agent_timeout = 10_000.0
        attention = coordinator.parts.attention
        texts = []
        for seconds in (0, 31):
            agent.heard_at = now
            attention.look(now + seconds)
            texts = [one.concern.text for one in attention.open() if one.concern.kind == "out"]
        assert texts == [
            (
                "It gets no requests: no answer within 2 s; is it stuck?"
                " Nothing was heard of its agent either for 31 s: is it on?"
            )
        ]
        agent.heard_at = now + 20
        attention.look(now + 33)
        texts = [one.concern.text for one in attention.open() if one.concern.kind == "out"]
        assert texts == ["It gets no requests: no answer within 2 s; is it stuck?"]


@pytest.mark.spec("OPERATION-43")
async def test_the_command_lists_it_and_says_by_its_exit_code_whether_there_is_any(
    coordinator: Running,
) -> None:
    async with StandIn() as ollama:
        agent_id = await coordinator.register(ollama, "gpu-1")
        assert await command(coordinator) == (0, "Nothing needs attention.\n")
        await coordinator.heartbeat(agent_id, disk_free_bytes=10**9)
        open_now(coordinator)
        code, text = await command(coordinator)
        assert code == 1
        assert max(map(len, text.splitlines())) <= 80
        assert "Its disk has 1.0 GB left." in " ".join(text.split())
        code, text = await command(coordinator, "--json")
        assert code == 1
        assert [one["concern"]["kind"] for one in json.loads(text)] == ["disk"]


async def command(coordinator: Running, *options: str) -> tuple[int, str]:
    """The exit code and the output of `ollama-coordinator attention` in a thread."""
    runner = CliRunner(env={"COORDINATOR_URL": coordinator.url, "COLUMNS": "80"})
    done = await asyncio.to_thread(runner.invoke, app, ["attention", *options])
    return done.exit_code, done.stdout


# ── the webhook ───────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def hook(*statuses: int) -> AsyncIterator[tuple[str, asyncio.Queue[Any]]]:
    """A server that keeps the bodies it is sent; its first answers have these statuses."""
    bodies: asyncio.Queue[Any] = asyncio.Queue()
    left = list(statuses)

    async def take(request: web.Request) -> web.Response:
        status = left.pop(0) if left else 200
        if status == 200:
            await bodies.put(json.loads(await request.read()))
        return web.Response(status=status)

    served = web.Application()
    served.router.add_post("/hook/s3cret", take)
    runner = web.AppRunner(served, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/hook/s3cret", bodies
    finally:
        await runner.cleanup()


async def change(coordinator: Running, **settings: Any) -> tuple[int, Any]:
    path = f"{coordinator.url}/api/settings"
    async with coordinator.session.patch(path, json=settings) as response:
        return response.status, await response.json()


@pytest.mark.spec("OPERATION-44")
@pytest.mark.usefixtures("quick")
async def test_a_webhook_is_told_what_is_new_and_what_is_over(coordinator: Running) -> None:
    async with StandIn() as ollama, hook(503, 500) as (url, bodies):
        agent_id = await coordinator.register(ollama, "gpu-1")
        await coordinator.heartbeat(agent_id, disk_free_bytes=10**9)
        assert (await change(coordinator, webhook=url))[0] == 200
        told = await bodies.get()  # after two tries that failed
        assert [one["kind"] for one in told["new"]] == ["disk"]
        assert told["text"].startswith("gpu-1: Its disk has 1.0 GB left.")
        assert told["over"] == []
        await coordinator.heartbeat(agent_id, disk_free_bytes=10**12)
        told = await bodies.get()
        assert [one["kind"] for one in told["over"]] == ["disk"]
        assert told["new"] == []
        assert told["open"] == 0


@pytest.mark.spec("OPERATION-44")
@pytest.mark.usefixtures("quick")
async def test_what_returns_at_once_was_never_over(
    coordinator: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "OVER_SECONDS", 3600.0)
    async with StandIn() as ollama, hook() as (url, bodies):
        agent_id = await coordinator.register(ollama, "gpu-1")
        await change(coordinator, webhook=url)
        attention = coordinator.parts.attention
        for _ in range(5):
            await coordinator.heartbeat(agent_id, disk_free_bytes=10**9, gpus=[{"name": "X"}])
            await coordinator.until(lambda: [one.concern.kind for one in attention.open()])
            await coordinator.heartbeat(agent_id, disk_free_bytes=10**12, gpus=[{"name": "X"}])
            await coordinator.until(lambda: not attention.open())
        await coordinator.heartbeat(agent_id, disk_free_bytes=10**9)
        kinds = []
        while "gpu" not in kinds:
            kinds += [one["kind"] for one in (await bodies.get())["new"]]
        assert sorted(kinds) == ["disk", "gpu"]


@pytest.mark.spec("OPERATION-44")
def test_a_template_gets_the_text_as_json_has_it() -> None:
    message = watch.Message('say "no"\nagain', (), (), 0)
    body = watch.webhook_body(message, '{"content": "{text}", "n": 1}')
    assert json.loads(body) == {"content": 'say "no"\nagain', "n": 1}


@pytest.mark.spec("OPERATION-44")
@pytest.mark.usefixtures("quick")
async def test_the_webhooks_address_is_shown_nowhere(
    coordinator: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with StandIn() as ollama, hook(*[500] * 1000) as (url, _):
        agent_id = await coordinator.register(ollama)
        await coordinator.heartbeat(agent_id, disk_free_bytes=10**9)
        _, listed = await change(coordinator, webhook=url)
        assert {"(set)"} == {r["value"] for r in listed["settings"] if r["name"] == "webhook"}
        await coordinator.until(lambda: "the webhook failed" in caplog.messages)
    lines = [json.dumps(vars(record), default=str) for record in caplog.records]
    assert [line for line in lines if "s3cret" in line] == []


@pytest.mark.spec("OPERATION-44")
async def test_a_webhook_that_is_no_url_is_refused(coordinator: Running) -> None:
    for wrong in ("hook", "ftp://x/y", "http://"):
        status, answer = await change(coordinator, webhook=wrong)
        assert status == 400
        assert "give a URL such as https://example.org/hook" in answer["error"]


@pytest.mark.spec("DASH-40")
async def test_the_events_of_all_agents_are_one_list(coordinator: Running) -> None:
    async with StandIn() as one, StandIn() as two:
        await coordinator.register(one, "gpu-1")
        await coordinator.register(two, "gpu-2")
        events = (await coordinator.get("/api/events"))["events"]
        assert [event["agent"] for event in events] == ["gpu-2", "gpu-1"]
        assert {event["event"] for event in events} == {"agent registered"}
