"""Slots, loads, evictions and reloads, as seen from outside; order by events, never by time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from support.ollama import Hardware, Model, Seen, StandIn
from support.ollama.wire import BUSY

GB = 1_000_000_000


class Callers:
    """Requests running at the same time."""

    def __init__(self, group: asyncio.TaskGroup, http: aiohttp.ClientSession) -> None:
        self._group = group
        self._http = http

    def generate(self, node: StandIn, model: str, **body: Any) -> asyncio.Task[tuple[int, Any]]:
        return self._group.create_task(generate(self._http, node, model, **body))


async def generate(
    http: aiohttp.ClientSession, node: StandIn, model: str, prompt: str = "hi", **body: Any
) -> tuple[int, Any]:
    sent = {"model": model, "prompt": prompt, "stream": False, **body}
    async with http.post(node.url + "/api/generate", json=sent) as answer:
        return answer.status, await answer.json()


def models(*names: str, size: int = GB) -> list[Model]:
    return [Model(name, size_bytes=size) for name in names]


@pytest.mark.parametrize("slots", [1, 2])
async def test_no_more_run_than_there_are_slots(http: aiohttp.ClientSession, slots: int) -> None:
    async with StandIn(slots=slots) as node, asyncio.TaskGroup() as group:
        node.hold()
        callers = Callers(group, http)
        running = [callers.generate(node, "llama3.2") for _ in range(5)]
        await node.seen.wait_for(lambda seen: seen.held == slots and seen.waiting == 5 - slots)
        assert node.seen.active == slots
        node.release()
        assert {(await each)[0] for each in running} == {200}
        assert (node.seen.peak, node.seen.loads) == (slots, 1)


def arrived(count: int) -> Callable[[Seen], bool]:
    return lambda seen: seen.held + seen.waiting == count


async def test_slots_are_given_first_come_first_served(http: aiohttp.ClientSession) -> None:
    finished: list[int] = []

    async def one(node: StandIn, number: int) -> None:
        await generate(http, node, "llama3.2")
        finished.append(number)

    async with StandIn() as node, asyncio.TaskGroup() as group:
        node.hold()
        for number in range(4):
            group.create_task(one(node, number))
            await node.seen.wait_for(arrived(number + 1))
        node.release()
    assert finished == [0, 1, 2, 3]


async def test_one_model_loads_at_a_time_and_loaded_ones_go_on(
    http: aiohttp.ClientSession,
) -> None:
    async with StandIn(models("a", "b", "c")) as node, asyncio.TaskGroup() as group:
        callers = Callers(group, http)
        await generate(http, node, "a")
        node.hold_loads()
        callers.generate(node, "b")
        await node.seen.wait_for(lambda seen: seen.loading == 1)
        callers.generate(node, "c")
        await node.seen.wait_for(lambda seen: seen.queued == 1)
        assert node.seen.loading == 1
        assert (await generate(http, node, "a"))[0] == 200
        node.release()
    assert node.seen.loads == 3


async def test_requests_for_a_model_being_loaded_share_the_load(
    http: aiohttp.ClientSession,
) -> None:
    async with StandIn(max_queue=0) as node, asyncio.TaskGroup() as group:
        node.hold_loads()
        callers = Callers(group, http)
        running = [callers.generate(node, "llama3.2") for _ in range(4)]
        await node.seen.wait_for(lambda seen: seen.open == 4 and seen.loading == 1)
        node.release()
        assert {(await each)[0] for each in running} == {200}
    assert node.seen.loads == 1


async def test_a_full_load_queue_answers_503(http: aiohttp.ClientSession) -> None:
    async with StandIn(models("a", "b", "c"), max_queue=1) as node, asyncio.TaskGroup() as group:
        node.hold_loads()
        callers = Callers(group, http)
        callers.generate(node, "a")
        await node.seen.wait_for(lambda seen: seen.loading == 1)
        callers.generate(node, "b")
        await node.seen.wait_for(lambda seen: seen.queued == 1)
        assert await generate(http, node, "c") == (503, {"error": BUSY})
        node.release()


async def test_the_idle_model_with_the_shortest_keep_alive_is_evicted(
    http: aiohttp.ClientSession,
) -> None:
    hardware = Hardware(vram_bytes=2 * GB)
    async with StandIn(models("a", "b", "c"), hardware=hardware) as node:
        await generate(http, node, "a", keep_alive="1h")
        await generate(http, node, "b", keep_alive="10m")
        await generate(http, node, "c", keep_alive="2h")
        assert node.loaded == ["c:latest", "a:latest"]
        assert node.seen.evictions == 1


async def test_a_busy_model_is_waited_for_before_it_is_evicted(
    http: aiohttp.ClientSession,
) -> None:
    async with StandIn(models("a", "b"), max_loaded_models=1) as node:
        async with asyncio.TaskGroup() as group:
            callers = Callers(group, http)
            node.hold()
            first = callers.generate(node, "a")
            await node.seen.wait_for(lambda seen: seen.held == 1)
            second = callers.generate(node, "b")
            await node.seen.wait_for(lambda seen: seen.open == 2)
            third = callers.generate(node, "a")
            await node.seen.wait_for(lambda seen: seen.waiting == 1)
            assert node.seen.loading == 0
            node.release()
            assert [(await each)[0] for each in (first, second, third)] == [200] * 3
        assert node.loaded == ["b:latest"]


async def test_an_idle_model_goes_when_its_keep_alive_is_over(http: aiohttp.ClientSession) -> None:
    async with StandIn(keep_alive=1.0, hardware=Hardware(speed=1000)) as node:
        await generate(http, node, "llama3.2")
        await node.seen.wait_for(lambda seen: seen.unloads == 1)
        assert node.loaded == []


async def test_unloading_answers_at_once_and_waits_for_what_runs(
    http: aiohttp.ClientSession,
) -> None:
    async with StandIn() as node, asyncio.TaskGroup() as group:
        node.hold()
        running = Callers(group, http).generate(node, "llama3.2")
        await node.seen.wait_for(lambda seen: seen.held == 1)
        _, told = await generate(http, node, "llama3.2", prompt="", keep_alive=0)
        assert told["done_reason"] == "unload"
        assert node.loaded == ["llama3.2:latest"]
        node.release()
        assert (await running)[0] == 200
        assert node.loaded == []


@pytest.mark.parametrize(
    ("first", "then", "reloads"),
    [
        ({}, {}, 0),
        ({"num_ctx": 8192}, {"num_ctx": 8192}, 0),
        ({"num_ctx": 8192}, {"num_ctx": 4096}, 1),
        ({"num_ctx": 8192}, {}, 1),
        ({}, {"num_ctx": 8192}, 1),
        ({}, {"num_ctx": 32_768}, 0),  # what this node would have chosen
        ({"num_ctx": 200_000}, {"num_ctx": 131_072}, 0),  # both come to the model's limit
        ({"num_ctx": 1}, {"num_ctx": 4}, 0),
        ({"num_gpu": 4}, {}, 0),
        ({"num_gpu": 4}, {"num_gpu": -1}, 0),
        ({"num_gpu": 4}, {"num_gpu": 5}, 1),
        ({}, {"num_thread": 4}, 1),
        ({}, {"num_batch": 64}, 1),
        ({}, {"temperature": 1, "seed": 7, "stop": ["x"]}, 0),
    ],
)
async def test_what_forces_a_reload(
    http: aiohttp.ClientSession, first: dict[str, Any], then: dict[str, Any], reloads: int
) -> None:
    async with StandIn() as node:
        await generate(http, node, "llama3.2", options=first)
        await generate(http, node, "llama3.2", options=then)
        assert node.seen.reloads == reloads
        assert node.seen.loads == 1 + reloads


async def cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_leaving_ends_a_generation(http: aiohttp.ClientSession) -> None:
    async with StandIn() as node:
        node.hold(after=2)
        caller = asyncio.create_task(generate(http, node, "llama3.2"))
        await node.seen.wait_for(lambda seen: seen.held == 1)
        await cancelled(caller)
        await node.seen.wait_for(lambda seen: seen.active == 0 and seen.cancelled == 1)
        assert node.seen.last.outcome == "cancelled"
        assert node.seen.tokens == 2


@pytest.mark.parametrize("evaluates_on", [True, False])
async def test_a_prompt_whose_client_left_may_be_evaluated_on(
    http: aiohttp.ClientSession, evaluates_on: bool
) -> None:
    async with StandIn(evaluates_on=evaluates_on) as node, asyncio.TaskGroup() as group:
        node.hold_prompts()
        caller = asyncio.create_task(generate(http, node, "llama3.2"))
        await node.seen.wait_for(lambda seen: seen.held == 1)
        await cancelled(caller)
        await node.seen.wait_for(lambda seen: seen.cancelled == 1)
        assert node.seen.active == node.seen.held == int(evaluates_on)
        other = Callers(group, http).generate(node, "llama3.2")
        await node.seen.wait_for(lambda seen: seen.waiting + seen.held == 1 + int(evaluates_on))
        assert node.seen.waiting == int(evaluates_on)
        node.release()
        assert (await other)[0] == 200
        assert node.seen.active == 0


async def test_an_unload_ends_the_evaluation_of_a_prompt_whose_client_left(
    http: aiohttp.ClientSession,
) -> None:
    async with StandIn() as node:
        node.hold_prompts()
        caller = asyncio.create_task(generate(http, node, "llama3.2"))
        await node.seen.wait_for(lambda seen: seen.held == 1)
        await cancelled(caller)
        await node.seen.wait_for(lambda seen: seen.cancelled == 1)
        await generate(http, node, "llama3.2", prompt="", keep_alive=0)
        await node.seen.wait_for(lambda seen: seen.active == 0 and seen.held == 0)
        assert node.loaded == []


async def test_what_is_being_unloaded_is_listed_until_it_is_gone(
    http: aiohttp.ClientSession,
) -> None:
    async with StandIn() as node, asyncio.TaskGroup() as group:
        await node.load("llama3.2")
        node.hold_unloads()
        await generate(http, node, "llama3.2", prompt="", keep_alive=0)
        assert node.loaded == ["llama3.2:latest"]
        again = Callers(group, http).generate(node, "llama3.2")
        await node.seen.wait_for(lambda seen: seen.open == 1)
        assert node.seen.loads == 1
        node.release()
        assert (await again)[0] == 200
        assert node.seen.loads == 2


async def test_leaving_the_line_for_a_slot_frees_the_place(http: aiohttp.ClientSession) -> None:
    async with StandIn() as node, asyncio.TaskGroup() as group:
        node.hold()
        first = Callers(group, http).generate(node, "llama3.2")
        await node.seen.wait_for(lambda seen: seen.held == 1)
        second = asyncio.create_task(generate(http, node, "llama3.2"))
        await node.seen.wait_for(lambda seen: seen.waiting == 1)
        await cancelled(second)
        await node.seen.wait_for(lambda seen: seen.waiting == 0)
        node.release()
        assert (await first)[0] == 200
        assert (await generate(http, node, "llama3.2"))[0] == 200


async def test_when_the_one_who_caused_a_load_leaves_the_next_one_loads_anew(
    http: aiohttp.ClientSession,
) -> None:
    async with StandIn() as node, asyncio.TaskGroup() as group:
        node.hold_loads()
        first = asyncio.create_task(generate(http, node, "llama3.2"))
        await node.seen.wait_for(lambda seen: seen.loading == 1)
        second = Callers(group, http).generate(node, "llama3.2")
        await node.seen.wait_for(lambda seen: seen.open == 2)
        await cancelled(first)
        await node.seen.wait_for(lambda seen: seen.loads_aborted == 1 and seen.held == 1)
        node.release()
        assert (await second)[0] == 200
        assert node.seen.loads == 1


async def test_durations_are_wall_time_at_any_speed(http: aiohttp.ClientSession) -> None:
    hardware = Hardware(
        load_bytes_per_second=1e9,
        load_overhead_seconds=1.0,
        prefill_tokens_per_second=100,
        decode_tokens_per_second=100,
        reference_bytes=GB,
        speed=50,
    )
    clock = asyncio.get_running_loop().time
    async with StandIn(models("m"), hardware=hardware) as node:
        began = clock()
        _, told = await generate(http, node, "m", prompt="x" * 400, options={"num_predict": 50})
        wall = (clock() - began) * 1e9
    assert told["load_duration"] >= 2e9 / 50
    assert told["prompt_eval_duration"] >= 1e9 / 50
    assert told["eval_duration"] >= 0.5e9 / 50
    parts = ("load_duration", "prompt_eval_duration", "eval_duration")
    assert sum(told[part] for part in parts) <= told["total_duration"] <= wall


async def test_a_remembered_beginning_is_not_evaluated_again(http: aiohttp.ClientSession) -> None:
    hardware = Hardware(prefill_tokens_per_second=100, reference_bytes=GB, speed=10)
    async with StandIn(models("m"), hardware=hardware) as node:
        prompt = "x" * 400
        _, cold = await generate(http, node, "m", prompt=prompt)
        _, warm = await generate(http, node, "m", prompt=prompt + "more")
        assert cold["prompt_eval_count"] == 100
        assert warm["prompt_eval_count"] == 101
        assert cold["prompt_eval_duration"] >= 0.1e9
        assert hardware.prefill_seconds(Model("m", size_bytes=GB), 1) == pytest.approx(0.001)


async def test_ps_reports_memory_and_expiry(http: aiohttp.ClientSession) -> None:
    model = Model("m", size_bytes=GB, kv_bytes_per_token=1000)
    hardware = Hardware(vram_bytes=GB)
    async with StandIn([model], hardware=hardware, slots=2) as node:
        await generate(http, node, "m", keep_alive=-1)
        async with http.get(node.url + "/api/ps") as answer:
            row = (await answer.json())["models"][0]
    assert row["size"] == GB + 1000 * 4096 * 2
    assert row["size_vram"] == GB
    assert row["context_length"] == 4096
    assert int(row["expires_at"][:4]) > 2200
