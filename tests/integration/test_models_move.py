"""Models go from machine to machine: real agents, real files, and what a stock Ollama asks for."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from integration.test_operate import run
from ollama_coordinator.access import limits_of_names
from ollama_coordinator.api.models import files
from ollama_coordinator_agent import metrics, model_server, watch
from ollama_coordinator_agent.ollama import Ollama
from ollama_coordinator_common.settings import AgentConfig
from support import agent_world
from support.coordinator import Running, running
from support.ollama import Model, StandIn
from support.ollama.disk import DiskStore
from support.transfers import assert_is_one_clean_stream, names, progress

TINY = Model("tiny", size_bytes=350_000)
PULL = {"model": "tiny"}
KEY = "registry.ollama.ai/library/tiny:latest"

Fleet = tuple[Running, list[StandIn]]
Machines = Callable[..., Any]


def disk(ollama: StandIn) -> DiskStore:
    assert isinstance(ollama.models, DiskStore)
    return ollama.models


def manifest(ollama: StandIn, name: str = "tiny") -> bytes:
    return disk(ollama).manifest(name).read_bytes()


def left_over(ollama: StandIn) -> list[str]:
    """What no manifest names, and names of passage."""
    folder = disk(ollama).folder
    wanted = {file.name for file in (folder / "blobs").iterdir()} - {
        d.replace(":", "-") for m in folder.glob("manifests/*/*/*/*") for d in _named(m)
    }
    return sorted(wanted) + [str(m) for m in folder.glob("manifests/*/transfer-*/*/*")]


def _named(file: Path) -> set[str]:
    read = json.loads(file.read_bytes())
    return {one["digest"] for one in [*read["layers"], read["config"]]}


def from_internet(ollamas: list[StandIn]) -> list[str]:
    """The pulls that went to the model registry, by the machine's number."""
    return [
        str(number)
        for number, ollama in enumerate(ollamas)
        for record in ollama.seen.requests
        if record.path == "/api/pull" and b"transfer-" not in record.body
    ]


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    """Makes fleets of agents whose Ollamas keep their models in folders."""
    folders: dict[int, Path] = {}

    def environment(port: int) -> dict[str, str]:
        return {"OLLAMA_MODELS": str(folders[port])}

    monkeypatch.setattr(watch, "environment_of_listener", environment)

    @asynccontextmanager
    async def made(
        *held: list[Model], agent: dict[str, Any] | None = None, **settings: Any
    ) -> AsyncIterator[Fleet]:
        async with AsyncExitStack() as stack:
            coordinator = await stack.enter_async_context(running(**settings))
            ollamas = []
            for number, models in enumerate(held):
                folder = tmp_path / f"machine-{number}"
                ollama = await stack.enter_async_context(
                    StandIn(models, registry=[TINY], on_disk=True, models_path=str(folder))
                )
                folders[ollama.port] = folder
                config = AgentConfig(
                    coordinator_url=coordinator.url, ollama_port=ollama.port,
                    certificate=coordinator.parts.tls.shown, machine_name=f"machine-{number}",
                    state_dir=tmp_path / f"state-{number}",
                    manage_ollama=False, ip_address="127.0.0.1", **(agent or {}),
                )  # fmt: skip
                await stack.enter_async_context(agent_world.running(config))
                ollamas.append(ollama)
            await coordinator.until(lambda: _ready(coordinator, len(held)))
            yield coordinator, ollamas

    return made


def _ready(coordinator: Running, count: int) -> bool:
    agents = list(coordinator.parts.registry)
    return len(agents) == count and all(
        agent.store is not None and agent.store.readable and agent.store.writable
        for agent in agents
    )


def named(coordinator: Running, number: int) -> Any:
    return next(a for a in coordinator.parts.registry if a.name == f"machine-{number}")


@pytest.mark.spec("SURFACE-76")
async def test_a_pull_comes_from_the_internet_once(machines: Machines) -> None:
    async with machines([], [], [], []) as (coordinator, ollamas):
        lines = await progress(coordinator, "/api/pull", PULL)
        assert_is_one_clean_stream(lines)
        assert len(from_internet(ollamas)) == 1
        assert [names(ollama) for ollama in ollamas] == [["tiny:latest"]] * 4
        assert len({manifest(ollama) for ollama in ollamas}) == 1
        assert [left_over(ollama) for ollama in ollamas] == [[]] * 4
        said = " ".join(str(line.get("status")) for line in lines)
        assert "from machine to machine" in said
        assert said.count(" gets it from ") == 3
        tags = await coordinator.get("/api/tags")
        assert [model["name"] for model in tags["models"]] == ["tiny:latest"]


async def brought(coordinator: Running, number: int, origin: str = "fleet") -> dict[str, Any]:
    """Bring `tiny` to a machine from the others; the ended operation."""
    order = {"kind": "pull", **PULL, "from": origin, "placement": f"agents:machine-{number}"}
    status, started = await coordinator.post("/api/operations", order)
    assert status == 202, started
    await coordinator.parts.operations.get(started["id"]).feed.over()
    ended: dict[str, Any] = await coordinator.get(f"/api/operations/{started['id']}")
    return ended


def spoil(ollama: StandIn) -> None:
    """Change a byte of the weights on a disk."""
    model = disk(ollama).find("tiny")
    assert model is not None
    file = disk(ollama).file(model.blob)
    file.write_bytes(b"?" + file.read_bytes()[1:])


@pytest.mark.spec("SURFACE-77")
@pytest.mark.parametrize("owns", [False, True], ids=["ollama pulls", "agent writes"])
async def test_a_spoilt_file_is_refused_and_taken_from_elsewhere(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, owns: bool
) -> None:
    monkeypatch.setattr(watch.Watch, "owns_server", owns)
    async with machines([TINY], [TINY], []) as (coordinator, ollamas):
        spoilt = min(named(coordinator, 0), named(coordinator, 1), key=lambda agent: agent.id)
        number = int(spoilt.name[-1])
        spoil(ollamas[number])
        ended = await brought(coordinator, 2)
        assert ended["state"] == "done", json.dumps(ended)
        model = disk(ollamas[2]).find("tiny")
        assert model is not None
        good = disk(ollamas[1 - number]).file(model.blob).read_bytes()
        assert disk(ollamas[2]).file(model.blob).read_bytes() == good
        assert manifest(ollamas[2]) == manifest(ollamas[0])
        assert left_over(ollamas[2]) == []
        assert from_internet(ollamas) == []
        assert any(b"transfer-" in r.body for r in ollamas[2].seen.of("/api/pull")) is not owns


@pytest.mark.spec("SURFACE-77")
async def test_of_two_that_gave_a_spoilt_file_together_the_good_one_gives_it_alone(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, cut = model_server.ModelServer._send, 0
    async with machines([TINY], [TINY], []) as (coordinator, ollamas):
        first = min(named(coordinator, 0), named(coordinator, 1), key=lambda agent: agent.id)
        spoil(ollamas[int(first.name[-1])])

        async def cuts_one(server: Any, request: web.BaseRequest, file: Any) -> Any:
            nonlocal cut
            is_last = request.headers.get("Range", "").endswith(f"-{TINY.size_bytes - 1}")
            if is_last and server.port == first.store.port and not cut:
                cut += 1
                assert request.transport is not None
                request.transport.abort()
            return await send(server, request, file)

        monkeypatch.setattr(model_server.ModelServer, "_send", cuts_one)
        ended = await brought(coordinator, 2)
        assert (ended["state"], cut) == ("done", 1), json.dumps(ended)
        assert manifest(ollamas[2]) == manifest(ollamas[0])
        assert left_over(ollamas[2]) == []


@pytest.mark.spec("SURFACE-77")
async def test_a_model_that_was_deleted_at_the_machine_itself_comes_again(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags, known = Ollama.tags, dict[int, Any]()

    async def first_ones(self: Ollama) -> Any:
        if self.port not in known:
            known[self.port] = await tags(self)
        return known[self.port]

    monkeypatch.setattr(Ollama, "tags", first_ones)  # as of an agent that has not looked again
    async with machines([TINY], [TINY]) as (coordinator, ollamas):
        disk(ollamas[1]).remove("tiny")
        ended = await brought(coordinator, 1)
        assert ended["state"] == "done", json.dumps(ended)
        assert names(ollamas[1]) == ["tiny:latest"]


@pytest.mark.spec("SURFACE-77")
async def test_a_model_goes_over_links_where_no_port_is_reached(machines: Machines) -> None:
    async with machines([TINY], [], agent={"transport": "link"}) as (coordinator, ollamas):
        code, output = await run(coordinator, "models", "copy", "tiny", "machine-1")
        assert code == 0, output
        code, output = await run(coordinator, "models", "pull", "tiny", "--from", "machine-1")
        assert code == 0, output
        code, output = await run(coordinator, "models", "copy", "tiny", "--from", "elsewhere")
        assert (code, "does not have tiny" in output) == (1, True)
        assert manifest(ollamas[1]) == manifest(ollamas[0])
        assert left_over(ollamas[1]) == []


@pytest.mark.spec("SURFACE-77")
async def test_with_tls_of_the_coordinators_own_the_agent_writes(
    machines: Machines, tmp_path: Path
) -> None:
    url = f"sqlite://{tmp_path}/db"
    async with machines([TINY], [], tls="self", database_url=url) as (coordinator, ollamas):
        ended = await brought(coordinator, 1)
        assert ended["state"] == "done", json.dumps(ended)
        assert manifest(ollamas[1]) == manifest(ollamas[0])
        assert ollamas[1].seen.count("/api/pull") == 0


@pytest.mark.spec("SURFACE-78")
async def test_the_registry_needs_a_ticket_or_the_right_to_use_models(machines: Machines) -> None:
    async with machines([TINY], access="open") as (coordinator, ollamas):
        base = f"{coordinator.url}/v2/library/tiny"
        session = coordinator.session
        async with session.get(f"{base}/manifests/latest") as answer:
            assert (answer.status, await answer.read()) == (200, manifest(ollamas[0]))
        model = disk(ollamas[0]).find("tiny")
        assert model is not None
        url = f"{base}/blobs/{model.blob}"
        async with session.head(url) as answer:
            assert (answer.status, answer.headers["content-length"]) == (200, "350000")
        async with session.get(url, allow_redirects=False) as answer:
            other = f"http://[::ffff:127.0.0.1]:{answer.url.port}/"
            assert answer.status == 307
            assert answer.headers["location"].startswith(other)
        content = disk(ollamas[0]).file(model.blob).read_bytes()
        for _ in range(5):  # whoever else asks for the same piece gets it too
            async with session.get(f"{url}?part=1", headers={"Range": "bytes=10-19"}) as answer:
                assert (answer.status, await answer.read()) == (206, content[10:20])
        agent = named(coordinator, 0)
        ways = coordinator.parts.transfers
        async with session.get(ways.url(agent, "tiny", "sha256:" + "0" * 64, "read")) as answer:
            assert answer.status == 404
        once = ways.url(agent, "tiny", model.blob, "read")
        for expected in (200, 403):
            async with session.get(once) as answer:
                assert answer.status == expected
        async with session.get(once.replace("/v2/", "/v2/0")) as answer:
            assert answer.status == 403
        coordinator.parts.access.mode = "keys"
        for asked in (f"{base}/manifests/latest", url, f"{coordinator.url}/v2"):
            async with session.get(asked) as answer:
                assert (answer.status, "'use'" in await answer.text()) == (401, True)


@pytest.mark.spec("SURFACE-78")
async def test_without_a_ticket_files_are_had_within_the_limits(machines: Machines) -> None:
    async with machines([TINY], [], access="open") as (coordinator, ollamas):
        base, session = f"{coordinator.url}/v2/library/tiny", coordinator.session
        model = disk(ollamas[0]).find("tiny")
        assert model is not None
        usage = coordinator.parts.access.usage
        usage.of_names = limits_of_names("* requests_per_minute=2")
        asked = f"{base}/manifests/latest", f"{base}/blobs/{model.blob}?part=1"
        for url, expected in zip((*asked, *asked), (200, 200, 429, 429), strict=True):
            async with session.get(url) as answer:
                assert answer.status == expected
                assert ("Retry-After" in answer.headers) == (expected == 429)
        assert (await brought(coordinator, 1))["state"] == "done"  # by a ticket
        usage.of_names = ()
        async with session.get(asked[1]) as answer:
            assert answer.status == 200


@pytest.mark.spec("SURFACE-78")
async def test_pieces_take_turns_among_their_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_PIECES", 3)
    monkeypatch.setattr(files, "MOST_OF_ONE", 2)
    turns, began, ends = files.PieceTurns(), list[str](), dict[str, asyncio.Event]()

    async def piece(name: str) -> None:
        ends[name] = asyncio.Event()
        async with turns.turn(name[0]):
            began.append(name)
            await ends[name].wait()

    async with asyncio.TaskGroup() as tasks:
        running = {}
        for name in ("a1", "a2", "a3", "a4", "b1", "b2", "c1"):
            running[name] = tasks.create_task(piece(name))
            await settled()
        assert began == ["a1", "a2", "b1"]
        running["c1"].cancel()  # it left while it waited
        await settled()
        ends["a1"].set()
        await settled()
        assert began == ["a1", "a2", "b1", "a3"]
        ends["a2"].set()
        await settled()
        assert began[4:] == ["a4"]
        ends["b1"].set()
        await settled()
        assert began[5:] == ["b2"]
        for name in ("a3", "a4", "b2"):
            ends[name].set()
    assert not turns._open
    assert not turns._waiting


@pytest.mark.spec("SURFACE-78")
async def test_clients_that_leave_at_once_take_no_turn_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(files, "MOST_PIECES", 1)
    turns, began = files.PieceTurns(), list[str]()

    async def piece(client: str) -> None:
        async with turns.turn(client):
            began.append(client)
            await asyncio.Event().wait()

    tasks = [asyncio.create_task(piece(client)) for client in "abc"]
    await settled()
    for leaving in tasks[:2]:  # the one that has a piece, and the next one
        leaving.cancel()
    left = await asyncio.gather(*tasks[:2], return_exceptions=True)
    assert [type(one) for one in left] == [asyncio.CancelledError] * 2
    await settled()
    assert began == ["a", "c"]
    tasks[2].cancel()
    await settled()
    assert not turns._open
    assert not turns._waiting


async def settled() -> None:
    """Let every task go on as far as it can."""
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.spec("SURFACE-78")
@pytest.mark.parametrize(
    "content",
    [b"no manifest", b'{"layers":[%b{}]}' % (b"{}," * 200_000), b'{"layers":[{"size":1e400}]}'],
    ids=["no JSON", "many layers", "size"],
)
async def test_what_is_no_manifest_is_not_shown(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    async with machines([TINY], access="open") as (coordinator, _):
        digest = f"sha256:{sha256(content).hexdigest()}"
        monkeypatch.setattr("ollama_coordinator.operations.transfers._digest", lambda _: digest)

        async def fetched(*_: object, **__: object) -> tuple[int, bytes]:
            return 200, content

        monkeypatch.setattr(coordinator.parts.upstreams, "fetch", fetched)
        url = f"{coordinator.url}/v2/library/tiny/manifests/latest"
        async with coordinator.session.get(url) as answer:
            assert answer.status == 404


GIB = 1024**3


@pytest.mark.spec("AGENT-85")
async def test_the_disk_is_that_of_the_servers_models(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def free(folder: Path) -> int:
        return 7 * GIB if folder == tmp_path / "machine-0" else 0

    monkeypatch.setattr(metrics, "_free_bytes", free)
    async with machines([TINY]) as (coordinator, _):
        agent = named(coordinator, 0)
        await coordinator.until(lambda: agent.report.disk_free_bytes == 7 * GIB)


@asynccontextmanager
async def registry(size: int) -> AsyncIterator[str]:
    """A model registry that says of every model that it has so many bytes; its host and port."""
    layer = {"digest": "sha256:" + "a" * 64, "size": size, "mediaType": "m"}

    async def answer(request: web.BaseRequest) -> web.Response:
        return web.json_response({"layers": [layer]})

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.spec("SURFACE-79")
@pytest.mark.parametrize(
    ("placement", "left_out"),
    [
        ("fitting", {"no-disk": "no room on its disk", "no-memory": "too little memory"}),
        ("all", {"no-disk": "no room on its disk"}),
        ("1", {}),
        ("3", {"no-disk": "no room on its disk", "no-memory": "too little memory"}),
    ],
)
async def test_a_machine_that_cannot_hold_a_model_gets_none_of_it(
    placement: str, left_out: dict[str, str]
) -> None:
    async with registry(20 * GIB) as host, running(pull_placement=placement) as coordinator:
        name = f"{host}/library/large:latest"
        model = Model(name, size_bytes=20 * GIB)
        async with AsyncExitStack() as stack:
            ollamas = {}
            memory_of = {"no-disk": (64, 5), "no-memory": (16, 500), "able": (64, 400)}
            for machine, (memory, free) in memory_of.items():
                ollama = await stack.enter_async_context(StandIn([], registry=[model]))
                ollamas[machine] = ollama
                agent_id = await coordinator.register(ollama, machine)
                facts = {"memory_total_bytes": memory * GIB, "disk_free_bytes": free * GIB}
                assert await coordinator.heartbeat(agent_id, **facts) == 200
            lines = await progress(coordinator, "/api/pull", {"model": name, "insecure": True})
            assert lines[-1] == {"status": "success"}
            said = [str(line["status"]) for line in lines if "status" in line]
            for machine, reason in left_out.items():
                assert any(text.startswith(f"not on {machine}: {reason}") for text in said)
                assert ollamas[machine].seen.count("/api/pull") == 0
            assert ollamas["able"].seen.count("/api/pull") == 1
            view = (await coordinator.get("/api/operations"))["operations"][0]
            states = {one["agent"]: one["state"] for one in view["targets"]}
            assert {one for one, state in states.items() if state == "left out"} == set(left_out)
            again = await coordinator.post("/api/pull?placement=agents:no-disk", {
                "model": name, "insecure": True,
            })  # fmt: skip
            assert again[0] == 503
            assert "no machine has room" in again[1]["error"]


@pytest.mark.spec("SURFACE-77")
@pytest.mark.parametrize("owns", [False, True], ids=["ollama pulls", "agent writes"])
async def test_a_machine_that_gives_nothing_any_more_is_left_at_once(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, owns: bool
) -> None:
    monkeypatch.setattr(watch.Watch, "owns_server", owns)
    async with machines([TINY], []) as (coordinator, ollamas):
        monkeypatch.setattr(model_server, "digests_of", lambda content: set[str]())
        ended = await brought(coordinator, 1)
        assert ended["state"] == "failed"
        assert "do not answer any more" in ended["error"], ended["error"]
        assert names(ollamas[1]) == []
