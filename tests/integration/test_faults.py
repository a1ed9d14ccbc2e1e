"""A machine that cannot do it is found out, whatever it says: fleets in which one is broken.

Texts and statuses are those of real versions of Ollama, from 0.5 to 0.33, and of what stands before
one: proxies, firewalls, other programs on its port.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from ollama_coordinator.registry import AgentState
from support.coordinator import Running, running
from support.deadline import DEADLINE_SECONDS
from support.ollama import Fault, Hardware, Injected, StandIn

CHAT = ("/api/chat", "/v1/chat/completions")


def named(coordinator: Running, name: str) -> AgentState:
    return next(agent for agent in coordinator.parts.registry if agent.name == name)


@asynccontextmanager
async def fleet(
    coordinator: Running,
    size: int,
    models: tuple[str, ...] = ("llama3.2",),
    hardware: Hardware | None = None,
) -> AsyncIterator[list[StandIn]]:
    """So many machines, of which the first has the model in memory and so is the cheapest."""
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(StandIn(list(models), hardware=hardware))
            for _ in range(size)
        ]
        await nodes[0].load(models[0])
        for number, node in enumerate(nodes):
            await coordinator.register(node, f"machine-{number}")
        yield nodes


def asked(node: StandIn) -> int:
    """How many requests of clients a machine has seen."""
    return sum(node.seen.count(path) for path in CHAT)


def over(agent: AgentState) -> None:
    """The time is over in which others are asked first."""
    for model, cooldown in agent.model_cooldowns.items():
        agent.model_cooldowns[model] = structs.replace(cooldown, until=cooldown.since)


def says(status: int, text: str | None) -> Callable[[StandIn], Injected]:
    def inject(node: StandIn) -> Injected:
        if text is None:
            return node.faults.status(status, raw="", paths=CHAT)
        return node.faults.status(status, text, paths=CHAT)

    return inject


def raw(status: int, body: str, **headers: str) -> Callable[[StandIn], Injected]:
    return lambda node: node.faults.status(status, raw=body, headers=headers, paths=CHAT)


TEXTS = [
    (500, "CUDA error: an illegal memory access was encountered"),
    (500, "CUDA error: no kernel image is available for execution on the device"),
    (500, "llama runner process has terminated: exit status 2"),
    (500, "llama runner process has terminated: cudaMalloc failed: out of memory"),
    (500, "llama-server process has terminated: exit status 0xc0000409"),
    (500, "llama runner process no longer running: -1 error:fault"),
    (500, "timed out waiting for llama runner to start - progress 0.00 - "),
    (500, "model requires more system memory (9.4 GiB) than is available (3.1 GiB)"),
    (500, "unable to load model: /usr/share/ollama/.ollama/models/blobs/sha256-dde5aa3fc5ff"),
    (500, 'tensor "blk.0.attn_q.weight" offset+size (12) exceeds file size (7)'),
    (500, "invalid file magic"),
    (500, "open /usr/share/ollama/.ollama/models/blobs/sha256-1: no such file or directory"),
    (500, "read /mnt/models/blobs/sha256-1: input/output error"),
    (500, "failed to decode batch: could not find a kv cache slot"),
    (500, "failed to sample token: sample: logits sum to NaN, check model output"),
    (500, "no available cache slots"),
    (500, "GGML_ASSERT(n_tokens_all <= cparams.n_batch) failed"),
    (500, "hipErrorNoBinaryForGpu: Unable to find code object for all current devices"),
    (500, "error starting runner: fork/exec /usr/bin/ollama: no such file or directory"),
    (500, "fork/exec /usr/local/bin/ollama: too many open files"),
    (500, "unsupported model architecture: 'qwen3next'"),
    (500, "this model may be incompatible with your version of Ollama"),
    (500, "template: :3:14: executing at <.Tools>: error calling json"),
    (500, "dial tcp 127.0.0.1:35719: connectex: No connection could be made"),
    (500, None),
    (400, '"llama3.2" does not support generate'),
    (400, "do embedding request: Post http://127.0.0.1:36427/embedding: EOF"),
    (400, "llama-server error"),
    (401, "unauthorized"),
    (402, "license has expired"),
    (403, "access denied by policy"),
    (405, "method not allowed"),
    (412, "this version of Ollama is too old for this model"),
    (413, "request entity too large"),
    (418, "out of order"),
    (429, "too many requests"),
    (501, "not implemented"),
    (503, "Service Unavailable"),
    (521, "web server is down"),
    (524, "a time-out occurred"),
]

FAULTS: dict[str, Callable[[StandIn], Any]] = {
    **{f"{status} {text}": says(status, text) for status, text in TEXTS},
    "page of a proxy": raw(502, "<html><body>Bad Gateway</body></html>"),
    "page of another program": raw(200, "<html><body>It works!</body></html>"),
    "moved": raw(301, "", Location="http://localhost/elsewhere"),
    "temporarily elsewhere": raw(307, "", Location="/login"),
    "no content": raw(204, ""),
    "empty": raw(200, ""),
    "accepted": raw(202, '{"status":"queued"}'),
    "text": raw(200, "Ollama is running"),
    "JSON of another program": raw(200, '{"status":"ok","service":"router"}'),
    "comments": raw(200, ": keep-alive\n\n", **{"Content-Type": "text/event-stream"}),
    "an error with a good status": raw(200, '{"error":"CUDA error: device lost"}'),
    "half an object": raw(200, '{"model":"llama3.2","message":'),
    "reset": lambda node: node.faults.rst(paths=CHAT),
    "closed": lambda node: node.faults.fin(paths=CHAT),
}

STREAMS: dict[str, Callable[[StandIn], Any]] = {
    "error as the first record": lambda node: node.faults.error_line("CUDA error", after=0),
    "no JSON as the first record": lambda node: node.faults.malformed(after=0),
    "cut before the first record": lambda node: node.faults.cut(after=0),
}


@pytest.mark.spec("PROXY-7")
@pytest.mark.spec("FLEET-18")
@pytest.mark.parametrize("fault", FAULTS)
async def test_what_another_machine_can_serve_is_served(fault: str) -> None:
    """Also on `/v1`, streamed or not; the broken machine is asked once, then left alone."""
    async with running() as coordinator, fleet(coordinator, 3) as nodes:
        FAULTS[fault](nodes[0])
        for number in range(4):
            path = CHAT[number % 2]
            async with coordinator.stream(path, stream=number > 1) as response:
                assert response.status == 200
                assert b"error" not in await response.read()
        assert 1 <= asked(nodes[0]) <= 2
        broken = named(coordinator, "machine-0")
        # One whose connection was lost is back in rotation after a probe, and still avoided.
        await coordinator.until(lambda: not broken.resting)
        assert broken.model_cooldowns
        await coordinator.until(coordinator.at_rest)


@pytest.mark.spec("PROXY-7")
@pytest.mark.parametrize("fault", STREAMS)
@pytest.mark.parametrize("path", CHAT)
async def test_a_stream_that_begins_wrong_is_served_by_another(fault: str, path: str) -> None:
    async with running() as coordinator, fleet(coordinator, 2) as nodes:
        STREAMS[fault](nodes[0])
        for _ in range(4):
            async with coordinator.stream(path) as response:
                assert response.status == 200
                body = await response.read()
            assert b'"done":true' in body or b"[DONE]" in body
        assert 1 <= asked(nodes[0]) <= 2


@pytest.mark.spec("FLEET-18")
async def test_a_model_that_an_agent_lists_and_does_not_find_is_asked_for_elsewhere() -> None:
    async with running() as coordinator, fleet(coordinator, 2) as nodes:
        broken = named(coordinator, "machine-0")
        async with coordinator.session.get(f"{nodes[0].url}/api/tags") as response:
            tags = await response.json()
        says(404, "model 'llama3.2' not found")(nodes[0])
        for _ in range(4):
            assert (await coordinator.chat())[0] == 200
            await coordinator.heartbeat(broken.id, tags=tags)
            assert broken.inventory.available
        assert asked(nodes[0]) == 1


@pytest.mark.spec("FLEET-18")
async def test_what_is_no_http_is_not_asked_for_again_after_a_probe() -> None:
    async with running() as coordinator, fleet(coordinator, 2) as nodes:
        broken = named(coordinator, "machine-0")
        nodes[0].faults.garbage(paths=CHAT)
        for _ in range(4):
            assert (await coordinator.chat())[0] == 200
            await coordinator.until(lambda: not broken.resting)
        assert asked(nodes[0]) == 1


@pytest.mark.spec("FLEET-18")
async def test_while_a_probe_tries_a_model_in_memory_no_request_does() -> None:
    async with running() as coordinator, fleet(coordinator, 2) as nodes:
        broken = named(coordinator, "machine-0")
        says(500, "CUDA error")(nodes[0])
        assert (await coordinator.chat())[0] == 200
        assert asked(nodes[0]) == 1
        nodes[0].faults.clear()
        nodes[0].faults.hang(paths=CHAT)
        over(broken)
        coordinator.parts.registry.changes += 1
        for _ in range(3):
            assert (await coordinator.chat())[0] == 200
        assert all(b"num_predict" in one.body for one in nodes[0].seen.of(CHAT[0])[1:])


@pytest.mark.spec("FLEET-18")
async def test_while_one_request_tries_a_machine_the_others_do_not() -> None:
    """They would have to wait long for the other one: a trial costs less."""
    slow = Hardware(decode_tokens_per_second=200)
    async with running() as coordinator, fleet(coordinator, 2, hardware=slow) as nodes:
        broken = named(coordinator, "machine-0")
        says(500, "CUDA error")(nodes[0])
        long = {"num_predict": 60}
        assert (await coordinator.chat(options=long))[0] == 200
        over(broken)
        coordinator.parts.registry.changes += 1
        answers = await asyncio.gather(*(coordinator.chat(options=long) for _ in range(12)))
        assert {status for status, _ in answers} == {200}
        assert asked(nodes[0]) == 2


@pytest.mark.spec("FLEET-18")
async def test_a_model_that_failed_everywhere_but_on_one_machine_is_served_there() -> None:
    """A machine on which a model failed a moment ago is the last resort, and not out."""
    async with running() as coordinator, fleet(coordinator, 3) as nodes:
        for node in nodes[:2]:
            says(500, "CUDA error")(node)
        assert (await coordinator.chat())[0] == 200
        for node in nodes[:2]:
            node.faults.clear()
        says(500, "CUDA error")(nodes[2])
        for _ in range(3):
            assert (await coordinator.chat())[0] == 200


@pytest.mark.spec("PROXY-10")
@pytest.mark.spec("FLEET-18")
async def test_what_every_machine_says_is_the_requests_and_blames_none() -> None:
    async with running() as coordinator, fleet(coordinator, 4) as nodes:
        for node in nodes:
            says(500, "embedding contains NaN or Inf values")(node)
        told = await coordinator.chat()
        assert told == (500, {"error": "embedding contains NaN or Inf values"})
        assert [asked(node) for node in nodes] == [1, 1, 1, 1]
        assert not any(agent.model_cooldowns for agent in coordinator.parts.registry)


@pytest.mark.spec("PROXY-9")
@pytest.mark.parametrize(
    ("status", "text"),
    [
        (400, "json: cannot unmarshal string into Go struct field ChatRequest.messages"),
        (400, '"llama3.2" does not support thinking'),
        (400, "the input length exceeds the context length"),
        (400, "this model only supports one image while more than one image requested"),
        (500, 'option "num_ctx" must be of type integer'),
    ],
)
async def test_a_requests_own_error_is_asked_for_once(status: int, text: str) -> None:
    async with running() as coordinator, fleet(coordinator, 3) as nodes:
        for node in nodes:
            says(status, text)(node)
        assert await coordinator.chat() == (status, {"error": text})
        assert sum(map(asked, nodes)) == 1
        assert not any(agent.model_cooldowns for agent in coordinator.parts.registry)


@pytest.mark.spec("PROXY-27")
@pytest.mark.parametrize(
    ("text", "blamed"),
    [
        ("an error was encountered while running the model: CUDA error", True),
        ("error parsing tool call: raw='{', err=unexpected end of JSON input", False),
    ],
)
async def test_an_error_in_mid_stream_counts_unless_the_model_wrote_it(
    text: str, blamed: bool
) -> None:
    async with running() as coordinator, fleet(coordinator, 2) as nodes:
        nodes[0].faults.error_line(text, after=2)
        for _ in range(3):
            async with coordinator.stream() as response:
                assert response.status == 200
                last = json.loads((await response.read()).splitlines()[-1])
            if not blamed:
                assert last == {"error": text}
        assert asked(nodes[0]) == (1 if blamed else 3)


# ── poison ────────────────────────────────────────────────────────────────────────────────────

DEATHS: dict[str, Fault] = {
    "reset": Fault(kind="rst", paths=CHAT),
    "closed": Fault(kind="fin", paths=CHAT),
    "cut": Fault(kind="cut", paths=CHAT),
    "stopped": Fault(kind="status", paths=CHAT, body="model runner has unexpectedly stopped"),
    "EOF": Fault(kind="status", paths=CHAT, body='Post "http://127.0.0.1:37017/completion": EOF'),
}


async def count(coordinator: Running, nodes: list[StandIn], deaths: str) -> list[int]:
    """How often each machine is asked by one request under which all of them die."""
    faults = [node.faults.add(DEATHS[deaths]) for node in nodes]
    before = [asked(node) for node in nodes]
    async with coordinator.stream(messages=[{"role": "user", "content": "poison"}]) as response:
        assert response.status >= 500 or b"error" in await response.read()
    for fault in faults:
        fault.clear()
    return [asked(node) - then for node, then in zip(nodes, before, strict=True)]


def all_have_answered(coordinator: Running) -> None:
    """Every machine has served a request well."""
    for agent in coordinator.parts.registry:
        coordinator.parts.registry.succeeded(agent, "llama3.2:latest")


@pytest.mark.spec("PROXY-28")
@pytest.mark.parametrize("deaths", DEATHS)
async def test_a_request_that_kills_touches_two_machines(deaths: str) -> None:
    async with running() as coordinator, fleet(coordinator, 5) as nodes:
        all_have_answered(coordinator)
        killed = await count(coordinator, nodes, deaths)
        assert sum(number > 0 for number in killed) == 2
        # Again: it gets one try.
        killed = await count(coordinator, nodes, deaths)
        assert sum(number > 0 for number in killed) == 1
        # Everybody else is served, and nobody is blamed for longer than a probe takes.
        assert (await coordinator.chat())[0] == 200
        registry = coordinator.parts.registry
        await coordinator.until(lambda: not any(agent.resting for agent in registry))


@pytest.mark.spec("PROXY-28")
async def test_machines_that_failed_before_are_no_evidence_against_a_request() -> None:
    async with running() as coordinator, fleet(coordinator, 4, ("llama3.2", "other")) as nodes:
        for node in nodes[:3]:
            says(500, "CUDA error")(node)
        assert (await coordinator.chat("other"))[0] == 200
        for node in nodes[:3]:
            node.faults.clear()
            node.faults.add(DEATHS["stopped"])
        assert (await coordinator.chat())[0] == 200


@pytest.mark.spec("PROXY-28")
@pytest.mark.parametrize("deaths", DEATHS)
async def test_machines_that_never_answered_are_no_evidence_against_a_request(deaths: str) -> None:
    async with running() as coordinator, fleet(coordinator, 4) as nodes:
        for node in nodes[:3]:
            node.faults.add(DEATHS[deaths])
        assert (await coordinator.chat())[0] == 200


@pytest.mark.spec("PROXY-28")
@pytest.mark.parametrize("policy", ["predicted", "round-robin"])
@pytest.mark.parametrize("deaths", DEATHS)
async def test_a_request_that_kills_touches_two_machines_that_never_answered(
    deaths: str, policy: str
) -> None:
    """They answer the question whether they were well, and so it was the request."""
    async with running(policy=policy) as coordinator, fleet(coordinator, 5) as nodes:
        for node in nodes:
            node.faults.add(structs.replace(DEATHS[deaths], saying="poison"))
        async with coordinator.stream(messages=[{"role": "user", "content": "poison"}]) as response:
            assert response.status >= 500 or b"error" in await response.read()
        assert sum(asked(node) > 0 for node in nodes) == 2
        assert (await coordinator.chat())[0] == 200
        await coordinator.until(coordinator.at_rest)


@pytest.mark.spec("PROXY-28")
@pytest.mark.parametrize("proven", [False, True])
async def test_machines_that_are_gone_were_well_until_the_request(proven: bool) -> None:
    """Also where they go so soon that the request is sent once more, and finds nobody."""
    async with running() as coordinator, fleet(coordinator, 4) as nodes:
        if proven:
            all_have_answered(coordinator)
        for node in nodes:
            node.hold_prompts()
        killing = asyncio.create_task(coordinator.chat())
        for _ in range(2):
            async with asyncio.timeout(DEADLINE_SECONDS):
                while not (busy := [node for node in nodes if node.seen.active]):
                    await asyncio.sleep(0.01)
            await busy[0].kill()
        assert (await killing)[0] == 503
        assert sum(asked(node) > 0 for node in nodes) == 2


@pytest.mark.spec("PROXY-28")
async def test_a_machine_that_answered_before_a_restart_is_evidence(tmp_path: Path) -> None:
    database = f"sqlite:///{(tmp_path / 'c.db').as_posix()}"
    async with StandIn(hardware=Hardware(decode_tokens_per_second=100)) as ollama:
        async with running(database_url=database) as coordinator:
            await coordinator.register(ollama)
            for _ in range(3):
                assert (await coordinator.chat())[0] == 200
        async with running(database_url=database) as coordinator:
            assert all(agent.proven for agent in coordinator.parts.registry)
            async with StandIn() as other:
                agent_id = await coordinator.register(other)
                assert not coordinator.agent(agent_id).proven


@pytest.mark.spec("PROXY-45")
@pytest.mark.parametrize("policy", ["predicted", "least-connections"])
async def test_a_full_queue_refuses_no_request_that_an_agent_failed(policy: str) -> None:
    async with (
        running(max_queue=1, policy=policy) as coordinator,
        StandIn(slots=1) as one,
        StandIn(slots=1) as two,
    ):
        chats = []
        for node in (one, two):
            node.hold()
            agent_id = await coordinator.register(node)
            await coordinator.heartbeat(agent_id, runner={"num_parallel": 1})
            chats.append(asyncio.create_task(coordinator.chat()))
            await node.seen.wait_for(lambda seen: seen.active == 1)
        chats.append(asyncio.create_task(coordinator.chat()))
        await coordinator.until(lambda: coordinator.parts.scheduler.waiting_count() == 1)
        assert (await coordinator.chat())[0] == 503
        await one.kill()
        await coordinator.until(lambda: coordinator.parts.scheduler.waiting_count() == 2)
        two.release()
        assert [status for status, _ in await asyncio.gather(*chats)] == [200] * 3


@pytest.mark.spec("PROXY-28")
async def test_copies_of_a_request_on_one_machine_are_one_death() -> None:
    async with running() as coordinator, StandIn(slots=4) as one, StandIn(slots=4) as two:
        agent_id = await coordinator.register(one)
        await coordinator.heartbeat(agent_id, runner={"num_parallel": 4})
        one.hold()
        chats = [asyncio.create_task(coordinator.chat()) for _ in range(4)]
        await one.seen.wait_for(lambda seen: seen.active == 4)
        await coordinator.register(two)
        await one.kill()
        answers = await asyncio.gather(*chats)
        assert [status for status, _ in answers] == [200] * 4


@pytest.mark.spec("PROXY-28")
async def test_an_answer_clears_a_request_that_was_suspected() -> None:
    async with running() as coordinator, fleet(coordinator, 2) as nodes:
        all_have_answered(coordinator)
        await count(coordinator, nodes, "stopped")
        messages = [{"role": "user", "content": "poison"}]
        async with coordinator.stream(messages=messages) as response:
            assert b'"done":true' in await response.read()
        all_have_answered(coordinator)
        killed = await count(coordinator, nodes, "stopped")
        assert sum(number > 0 for number in killed) == 2
