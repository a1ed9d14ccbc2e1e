"""`GET /metrics`: what Prometheus scrapes, and the dashboard and alerts made for it."""

import asyncio
import json
import re
import shutil
import subprocess
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner
from yarl import URL

from ollama_coordinator import aio, metrics
from ollama_coordinator.access import KeyLimits, NewKey
from ollama_coordinator.journal import Histogram
from ollama_coordinator.main import app
from support.coordinator import Running
from support.ollama import StandIn

PREFIX = "ollama_coordinator_"


async def scraped(coordinator: Running) -> str:
    async with coordinator.session.get(f"{coordinator.url}/metrics") as response:
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/plain; version=")
        return await response.text()


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Every sample by its name without the prefix and its labels' values, in the labels' order."""
    found: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            key = (one.name.removeprefix(PREFIX), *(one.labels[k] for k in sorted(one.labels)))
            assert key not in found, f"{key} twice"
            found[key] = one.value
    return found


@pytest.mark.spec("OPERATION-40")
async def test_requests_tokens_and_times_are_counted(coordinator: Running) -> None:
    async with StandIn() as ollama:
        await coordinator.register(ollama, "gpu-1")
        for _ in range(3):
            assert (await coordinator.chat())[0] == 200
        async with coordinator.stream("/v1/chat/completions") as response:
            await response.read()
        found = samples(await scraped(coordinator))
        model = "llama3.2:latest"
        assert found["requests_total", "ollama", model, "served"] == 3
        assert found["requests_total", "openai", model, "served"] == 1
        assert found["attempts_total", "gpu-1", "served"] == 4
        assert found["request_duration_seconds_count", model] == 4
        assert found["time_to_first_token_seconds_count", model] == 4
        assert found["time_to_first_token_seconds_bucket", "+Inf", model] == 4
        assert found["queue_time_seconds_count", "interactive"] == 4
        assert found["tokens_total", model, "output"] > 0
        assert found["tokens_total", model, "input"] > 0
        assert found["model_loads_total", "gpu-1"] == 1
        assert found["model_load_seconds_count", model] == 1


@pytest.mark.spec("OPERATION-40")
async def test_the_machines_readings_are_shown(coordinator: Running) -> None:
    async with StandIn() as ollama:
        agent_id = await coordinator.register(ollama, "gpu-1")
        gpu = {"name": "X", "memory_total_bytes": 24, "memory_used_bytes": 6}
        gpu |= {"utilization_percent": 50.0}
        await coordinator.heartbeat(
            agent_id, gpus=[gpu], memory_total_bytes=64, disk_free_bytes=9, cpu_usage=25
        )
        await coordinator.until(lambda: coordinator.parts.observation.sampler.standing)
        found = samples(await scraped(coordinator))
        assert found["agent_up", "gpu-1"] == 1
        assert found["agents", "online"] == 1
        assert found["agent_cpu_ratio", "gpu-1"] == 0.25
        assert found["agent_memory_total_bytes", "gpu-1"] == 64
        assert found["agent_disk_free_bytes", "gpu-1"] == 9
        assert found["gpu_memory_used_bytes", "gpu-1", "0"] == 6
        assert found["gpu_utilization_ratio", "gpu-1", "0"] == 0.5
        assert ("gpu_temperature_celsius", "gpu-1", "0") not in found
        await coordinator.heartbeat(agent_id, leaving=True)
        assert samples(await scraped(coordinator))["agent_up", "gpu-1"] == 0


@pytest.mark.spec("OPERATION-40")
async def test_what_needs_a_person_and_learned_speeds_are_shown(coordinator: Running) -> None:
    async with StandIn() as ollama:
        agent_id = await coordinator.register(ollama, "gpu-1")
        await coordinator.chat()
        await coordinator.heartbeat(agent_id, disk_free_bytes=9)
        attention, now = coordinator.parts.attention, coordinator.parts.clock.now()
        attention.look(now)
        found = samples(await scraped(coordinator))
        assert found["attention", "disk", "warning", "gpu-1"] == 1
        assert found["model_tokens_per_second", "gpu-1", "llama3.2:latest"] > 0
        await coordinator.heartbeat(agent_id, disk_free_bytes=10**12)
        attention.look(now + 1)
        assert not any(name[0] == "attention" for name in samples(await scraped(coordinator)))


@pytest.mark.spec("OPERATION-40")
async def test_a_retry_is_counted_with_its_reason(coordinator: Running) -> None:
    async with StandIn() as one, StandIn() as two:
        await coordinator.register(one, "one")
        one.hold()
        chat = asyncio.create_task(coordinator.chat())
        await one.seen.wait_for(lambda seen: seen.active == 1)
        await coordinator.register(two, "two")
        await one.kill()
        assert (await chat)[0] == 200
        found = samples(await scraped(coordinator))
        assert found["attempts_total", "one", "unreachable"] == 1
        assert found["attempts_total", "two", "served"] == 1
        assert found["retries_total", "unreachable"] == 1


@pytest.mark.spec("OPERATION-40")
async def test_names_that_no_agent_has_served_are_one_series(coordinator: Running) -> None:
    async with StandIn() as ollama:
        await coordinator.register(ollama)
        for number in range(5):
            assert (await coordinator.chat(f"no-such-{number}"))[0] == 404
        text = await scraped(coordinator)
        assert samples(text)["requests_total", "ollama", "other", "refused"] == 5
        assert "no-such" not in text


@pytest.mark.spec("OPERATION-40")
async def test_a_key_has_its_requests_tokens_and_refusals(coordinator: Running) -> None:
    keys = coordinator.parts.access.keys

    async def chat(text: str, path: str = "/api/chat", model: str = "llama3.2") -> int:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": False}
        sent = {"Authorization": f"Bearer {text}"}
        url = coordinator.url + path
        async with coordinator.session.post(url, json=body, headers=sent) as response:
            await response.read()
            return response.status

    async with StandIn() as ollama:
        await coordinator.register(ollama)
        limits = KeyLimits(requests_per_minute=1)
        _, anna = keys.create(NewKey(name="anna", models=("llama3.2",)))
        _, ben = keys.create(NewKey(name="ben", limits=limits))
        keys.create(NewKey(name="unused"))
        assert [await chat(anna), await chat(anna)] == [200, 200]
        assert await chat(anna, model="other") == 403
        assert await chat(anna, "/api/pull") == 403
        assert [await chat(ben), await chat(ben)] == [200, 429]
        assert await chat("oc_wrong") == 200, "on loopback a dummy key is nobody"
        found = samples(await scraped(coordinator))
        assert found["key_requests_total", "anna"] == 2
        assert found["key_refusals_total", "anna"] == 2
        assert found["key_requests_total", "ben"] == 1
        assert found["key_refusals_total", "ben"] == 1
        assert found["key_tokens_total", "anna"] == 2 * found["key_tokens_total", "ben"] > 0
        assert {key[1] for key in found if key[0] == "key_requests_total"} == {"anna", "ben"}

        # Another key of a name that is free again goes on with its series.
        keys.revoke("anna")
        _, anna = keys.create(NewKey(name="anna"))
        assert await chat(anna) == 200
        assert samples(await scraped(coordinator))["key_requests_total", "anna"] == 3


@pytest.mark.spec("OPERATION-40")
async def test_open_connections_are_those_of_now(coordinator: Running) -> None:
    url = URL(coordinator.url)
    before = samples(await scraped(coordinator))[("open_connections",)]
    assert before >= 1
    writers = [(await asyncio.open_connection(url.host, url.port))[1] for _ in range(3)]
    served = coordinator.parts.connections
    assert served is not None
    await coordinator.until(lambda: served.open >= before + 3)
    assert samples(await scraped(coordinator))[("open_connections",)] == before + 3
    for writer in writers:
        writer.close()
    await coordinator.until(lambda: served.open <= before)
    assert samples(await scraped(coordinator))[("open_connections",)] == before


@pytest.mark.spec("OPERATION-40")
async def test_two_machines_of_one_name_have_series_of_their_own(coordinator: Running) -> None:
    async with StandIn() as one, StandIn() as two:
        for ollama in (one, two):
            agent_id = await coordinator.register(ollama)
            async with coordinator.session.patch(
                f"{coordinator.url}/api/agents/{agent_id}", json={"display_name": "same"}
            ) as response:
                assert response.status == 200
        names = [key[1] for key in samples(await scraped(coordinator)) if key[0] == "agent_up"]
        assert len(set(names)) == 2
        assert all(name.startswith("same (") for name in names)


@pytest.mark.spec("OPERATION-40")
async def test_a_removed_machine_leaves_no_series(coordinator: Running) -> None:
    async with StandIn() as ollama:
        agent_id = await coordinator.register(ollama, "gone")
        assert (await coordinator.chat())[0] == 200
        path = f"{coordinator.url}/api/agents/{agent_id}"
        async with coordinator.session.delete(path) as response:
            assert response.status < 300
        assert "gone" not in await scraped(coordinator)
        sampler = coordinator.parts.observation.sampler
        await coordinator.until(lambda: not sampler.counters.agents)


@pytest.mark.spec("OPERATION-41")
async def test_others_run_while_the_text_is_made(
    coordinator: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):
        facts = {"ollama_port": 1 + number, "machine_name": f"gpu-{number}"}
        facts |= {"ip_address": "127.0.0.1", "ollama_version": "0.33.0"}
        await coordinator.post("/api/agents", facts)
    monkeypatch.setattr(metrics, "SLICE_SAMPLES", 7)
    monkeypatch.setattr(aio, "SLICE_SECONDS", 0.0)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(count())
    pieces = [piece async for piece in metrics.Metrics(coordinator.parts).text()]
    counting.cancel()
    assert turns >= len(pieces) - 1 > 20
    assert max(piece.count(b"\n") for piece in pieces) <= 7 + 2
    found = samples(b"".join(pieces).decode())
    assert sum(key[0] == "agent_up" for key in found) == 30


@pytest.mark.parametrize(("value", "counts"), [(1.0, [1, 0, 0]), (1.5, [0, 1, 0]), (9, [0, 0, 1])])
def test_a_bound_belongs_to_the_values_below_it(value: float, counts: list[int]) -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.observe(value)
    assert histogram.counts == counts


def printed(command: str) -> str:
    result = CliRunner().invoke(app, [command])
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.spec("OPERATION-42")
@pytest.mark.parametrize("command", ["grafana", "alerts"])
async def test_every_number_that_dashboard_and_alerts_use_is_served(
    coordinator: Running, command: str
) -> None:
    text = await scraped(coordinator)
    served = set(re.findall(rf"^# TYPE ({PREFIX}\w+)", text, re.MULTILINE))
    served |= {f"{name}_{part}" for name in set(served) for part in ("bucket", "count", "sum")}
    used = set(re.findall(rf"{PREFIX}\w+", printed(command)))
    assert len(used) > 3
    assert used - served == set()


@pytest.mark.spec("OPERATION-42")
def test_the_dashboard_has_panels_side_by_side_and_asks_for_its_data_source() -> None:
    dashboard = json.loads(printed("grafana"))
    assert [one["name"] for one in dashboard["__inputs"]] == ["DS_PROMETHEUS"]
    assert dashboard["uid"] == "ollama-coordinator"
    places = Counter(
        (x, y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    )
    assert max(places.values()) == 1
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus' promtool is not here")
async def test_prometheus_accepts_the_text_and_the_rules(coordinator: Running) -> None:
    async with StandIn() as ollama:
        await coordinator.register(ollama)
        await coordinator.chat()
        text = await scraped(coordinator)
    checked = await asyncio.to_thread(_promtool, "check", "metrics", given=text)
    problems = [line for line in checked.splitlines() if "ollama" in line]
    assert problems == []
    rules = Path(str(files("ollama_coordinator") / "prometheus" / "alerts.yml"))
    assert "6 rules found" in await asyncio.to_thread(_promtool, "check", "rules", str(rules))


def _promtool(*arguments: str, given: str = "") -> str:
    done = subprocess.run(
        ["promtool", *arguments], input=given, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    return done.stdout + done.stderr
