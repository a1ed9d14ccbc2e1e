"""Models made and pushed: files that wait at the coordinator, agents that build."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from ollama_coordinator.operations import runner
from support.coordinator import Running, running
from support.ollama import Model, StandIn
from support.transfers import names, progress

BLOB = b"GGUF" * 200_000
DIGEST = f"sha256:{hashlib.sha256(BLOB).hexdigest()}"


async def _upload(coordinator: Running, blob: bytes = BLOB, digest: str = DIGEST) -> int:
    async with coordinator.session.post(
        f"{coordinator.url}/api/blobs/{digest}", data=blob
    ) as response:
        return response.status


def _files(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "c.db.blobs").glob("*"))


@pytest.mark.spec("SURFACE-24")
@pytest.mark.spec("SURFACE-25")
async def test_a_model_is_created_from_files_on_every_agent(tmp_path: Path) -> None:
    async with (
        running(database_url=f"sqlite:///{tmp_path}/c.db") as coordinator,
        StandIn([]) as first,
        StandIn([]) as second,
    ):
        await coordinator.register(first, "first")
        await coordinator.register(second, "second")
        assert await _upload(coordinator) == 201
        assert _files(tmp_path) == [DIGEST.replace(":", "-")]
        body = {"model": "mine", "files": {"a.gguf": DIGEST}}
        lines = await progress(coordinator, "/api/create", body)
        assert lines[-1] == {"status": "success"}
        for ollama in (first, second):
            assert names(ollama) == ["mine:latest"]
            assert ollama.models.uploaded == {DIGEST: len(BLOB)}
        assert _files(tmp_path) == []
        assert (await coordinator.chat("mine"))[0] == 200


@pytest.mark.spec("SURFACE-24")
async def test_an_agent_that_has_the_file_is_not_sent_it_again(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    await coordinator.session.post(f"{ollama.url}/api/blobs/{DIGEST}", data=BLOB)
    assert await _upload(coordinator) == 201
    body = {"model": "mine", "from": "llama3.2", "adapters": {"lora": DIGEST}, "stream": False}
    assert await coordinator.post("/api/create", body) == (200, {"status": "success"})
    path = f"/api/blobs/{DIGEST}"
    methods = [[record.method for record in each.seen.of(path)] for each in (ollama, spare)]
    assert [each.count("POST") for each in methods] == [1, 1]


@pytest.mark.spec("SURFACE-24")
async def test_a_file_that_is_not_there_is_400(coordinator: Running, ollama: StandIn) -> None:
    body = {"model": "mine", "files": {"a.gguf": DIGEST}}
    status, answer = await coordinator.post("/api/create", body)
    assert status == 400
    assert DIGEST in answer["error"]
    bad = {"model": "mine", "files": {"a.gguf": "md5:1"}}
    answer = await coordinator.post("/api/create", bad)
    assert answer == (400, {"error": "invalid digest format"})
    beside = {**body, "from": "llama3.2", "stream": False}  # where Ollama passes files over
    assert await coordinator.post("/api/create", beside) == (200, {"status": "success"})


@pytest.mark.spec("SURFACE-24")
async def test_an_upload_with_another_digest_is_not_kept(tmp_path: Path) -> None:
    async with running(database_url=f"sqlite:///{tmp_path}/c.db") as coordinator:
        assert await _upload(coordinator, b"something else") == 400
        assert _files(tmp_path) == []
        assert await _upload(coordinator) == 201
        assert await _upload(coordinator, b"not read") == 200


@pytest.mark.spec("SURFACE-24")
@pytest.mark.parametrize(
    "digest",
    [
        "sha256:../../outside", "sha256-..%2f..%2foutside", "..%2f..%2foutside", "%2e%2e/outside",
        "..%5c..%5coutside", "sha256:" + "..%2f" * 12 + "outside", "sha256:" + "a" * 63 + "%00",
        "sha256:" + "a" * 64 + "%2f..%2f..%2foutside", "sha256:" + "a" * 65, "sha512:" + "a" * 64,
        "", ".", "sha256:" + "%C3%A9" * 64,
    ],
)  # fmt: skip
async def test_a_file_whose_digest_is_a_path_is_written_and_asked_for_nowhere(
    tmp_path: Path, digest: str
) -> None:
    async with (
        running(database_url=f"sqlite:///{tmp_path}/c.db") as coordinator,
        StandIn() as ollama,
    ):
        await coordinator.register(ollama)
        before = sorted(tmp_path.rglob("*"))
        url = URL(f"{coordinator.url}/api/blobs/{digest}", encoded=True)
        for method in ("HEAD", "POST"):
            async with coordinator.session.request(
                method, url, data=BLOB if method == "POST" else None, allow_redirects=False
            ) as response:
                assert response.status in (307, 400, 404, 405), response.status
        assert sorted(tmp_path.rglob("*")) == before
        assert not any("blobs" in path or "outside" in path for path in ollama.seen.counts)


@pytest.mark.spec("SURFACE-24")
async def test_a_file_that_is_there_is_answered_while_its_client_still_sends(
    coordinator: Running,
) -> None:
    assert await _upload(coordinator) == 201
    rest = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield BLOB
        await rest.wait()
        yield BLOB

    async with coordinator.session.post(
        f"{coordinator.url}/api/blobs/{DIGEST}", data=slowly()
    ) as response:
        assert response.status == 200
        rest.set()


@pytest.mark.spec("SURFACE-24")
async def test_files_have_a_limit(tmp_path: Path) -> None:
    settings = {"database_url": f"sqlite:///{tmp_path}/c.db", "max_spool_gibibytes": 1e-4}
    async with running(**settings) as coordinator:
        async with coordinator.session.post(
            f"{coordinator.url}/api/blobs/{DIGEST}", data=BLOB
        ) as response:
            assert response.status == 507
            assert "COORDINATOR_MAX_SPOOL_GIB" in (await response.json())["error"]
        assert _files(tmp_path) == []
        small = b"small"
        assert (
            await _upload(coordinator, small, f"sha256:{hashlib.sha256(small).hexdigest()}") == 201
        )


@pytest.mark.spec("SURFACE-24")
async def test_a_client_that_leaves_during_an_upload_leaves_nothing(tmp_path: Path) -> None:
    async with running(database_url=f"sqlite:///{tmp_path}/c.db") as coordinator:
        sent = asyncio.Event()

        async def half() -> AsyncIterator[bytes]:
            yield BLOB
            yield BLOB
            sent.set()
            await asyncio.Event().wait()

        uploading = asyncio.create_task(
            coordinator.session.post(f"{coordinator.url}/api/blobs/{DIGEST}", data=half())
        )
        await sent.wait()
        await coordinator.until(lambda: _files(tmp_path))
        uploading.cancel()
        await asyncio.gather(uploading, return_exceptions=True)
        await coordinator.until(lambda: not _files(tmp_path))


@pytest.mark.spec("SURFACE-24")
async def test_unfinished_files_are_gone_after_a_restart_and_finished_ones_are_there(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "c.db.blobs"
    folder.mkdir()
    (folder / f"{DIGEST.replace(':', '-')}.part-abc").write_bytes(b"half")
    (folder / DIGEST.replace(":", "-")).write_bytes(BLOB)
    async with running(database_url=f"sqlite:///{tmp_path}/c.db") as coordinator:
        assert _files(tmp_path) == [DIGEST.replace(":", "-")]
        async with coordinator.session.head(f"{coordinator.url}/api/blobs/{DIGEST}") as response:
            assert response.status == 200


@pytest.mark.spec("SURFACE-25")
async def test_a_model_is_created_where_its_source_is(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    async with StandIn([Model("other")]) as other:
        await coordinator.register(other, "other")
        body = {"model": "mine", "from": "llama3.2", "system": "be brief"}
        await progress(coordinator, "/api/create", body)
        assert [("mine:latest" in names(each)) for each in (ollama, spare, other)] == [
            True,
            True,
            False,
        ]
        _, shown = await coordinator.post("/api/show", {"model": "mine"})
        assert shown["system"] == "be brief"


@pytest.mark.spec("SURFACE-25")
async def test_an_agent_pulls_the_source_that_nobody_has(coordinator: Running) -> None:
    async with StandIn([], registry=[Model("base", size_bytes=1000)]) as ollama:
        await coordinator.register(ollama, "first")
        lines = await progress(coordinator, "/api/create", {"model": "mine", "from": "base"})
        assert lines[0] == {"status": "pulling manifest"}
        assert lines[-1] == {"status": "success"}
        assert names(ollama) == ["base:latest", "mine:latest"] or names(ollama) == ["mine:latest"]


@pytest.mark.spec("SURFACE-25")
async def test_a_push_comes_from_the_agent_labelled_push(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    agent_id = next(agent.id for agent in coordinator.parts.registry if agent.name == "spare")
    await coordinator.session.patch(
        f"{coordinator.url}/api/agents/{agent_id}", json={"labels": ["push"]}
    )
    lines = await progress(coordinator, "/api/push", {"name": "llama3.2", "model": ""})
    assert lines[-1] == {"status": "success"}
    assert (ollama.seen.count("/api/push"), spare.seen.count("/api/push")) == (0, 1)


@pytest.mark.spec("SURFACE-25")
async def test_a_push_that_is_not_allowed_says_so(coordinator: Running) -> None:
    async with StandIn(may_push=False) as ollama:
        await coordinator.register(ollama, "first")
        lines = await progress(coordinator, "/api/push", {"model": "llama3.2"})
        assert lines[-1] == {"error": "you are not authorized to push to this namespace"}


async def _head(coordinator: Running, query: str = "") -> int:
    async with coordinator.session.head(f"{coordinator.url}/api/blobs/{DIGEST}{query}") as response:
        return response.status


async def _made(coordinator: Running, name: str = "mine", query: str = "") -> Any:
    body = {"model": name, "files": {"a.gguf": DIGEST}, "stream": False}
    return await coordinator.post(f"/api/create{query}", body)


def _sent(*agents: StandIn) -> list[int]:
    """How often each agent was sent the file."""
    return [
        sum(record.method == "POST" for record in agent.seen.of(f"/api/blobs/{DIGEST}"))
        for agent in agents
    ]


@pytest.mark.spec("SURFACE-42")
async def test_a_file_that_a_model_was_made_of_is_there(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    assert await _head(coordinator) == 404
    assert await _upload(coordinator) == 201
    assert await _made(coordinator) == (200, {"status": "success"})
    assert await _head(coordinator, "?placement=label:nobody") == 404
    assert await _head(coordinator) == 200
    assert await _upload(coordinator, b"not read") == 200
    assert await _made(coordinator, "again") == (200, {"status": "success"})
    assert _sent(ollama, spare) == [1, 1]
    for agent in (ollama, spare):
        assert names(agent) == ["again:latest", "llama3.2:latest", "mine:latest"]


@pytest.mark.spec("SURFACE-42")
async def test_a_file_that_one_agent_lacks_has_to_come_again(
    coordinator: Running, ollama: StandIn
) -> None:
    await _upload(coordinator)
    await _made(coordinator)
    async with StandIn([]) as newcomer:
        await coordinator.register(newcomer, "newcomer")
        assert await _head(coordinator) == 404
        assert await _upload(coordinator) == 201
        assert await _made(coordinator, "again") == (200, {"status": "success"})
        assert _sent(ollama, newcomer) == [1, 1]


@pytest.mark.spec("SURFACE-42")
async def test_where_a_number_is_enough_the_agents_that_have_the_file_are_chosen(
    ollama: StandIn,
) -> None:
    async with running(pull_placement="1") as coordinator, StandIn([]) as having:
        for number in range(3):
            await coordinator.register(ollama, f"without-{number}", ollama_port=ollama.port)
        await coordinator.session.post(f"{having.url}/api/blobs/{DIGEST}", data=BLOB)
        assert await _head(coordinator) == 404
        await coordinator.register(having, "having")
        status, answer = await _made(coordinator, query="?placement=2")
        assert (status, "does not have blob" in answer["error"]) == (400, True)
        assert await _made(coordinator) == (200, {"status": "success"})
        assert names(having) == ["mine:latest"]
        assert "mine:latest" not in names(ollama)


@pytest.mark.spec("SURFACE-42")
@pytest.mark.parametrize("placement", ["all", "1", "label:old"])
async def test_an_agent_that_would_be_left_with_an_old_model_has_to_have_the_file(
    placement: str,
) -> None:
    async with (
        running(pull_placement=placement) as coordinator,
        StandIn([]) as having,
        StandIn([Model("mine")]) as old,
    ):
        await coordinator.session.post(f"{having.url}/api/blobs/{DIGEST}", data=BLOB)
        for name, agent in (("having", having), ("old", old)):
            agent_id = await coordinator.register(agent, name)
            settings = {"labels": ["old"], "draining": agent is old}
            url = f"{coordinator.url}/api/agents/{agent_id}"
            await coordinator.session.patch(url, json=settings)
        status, answer = await _made(coordinator)
        assert (status, "agent old does not have" in answer["error"]) == (400, True)
        assert names(having) == []
        assert await _head(coordinator) == 404
        assert await _upload(coordinator) == 201
        assert await _made(coordinator) == (200, {"status": "success"})
        assert old.models.uploaded == {DIGEST: len(BLOB)}
        models = (await coordinator.get("/api/models"))["models"]
        assert [model["conflict"] for model in models] == [False]


@pytest.mark.spec("SURFACE-42")
async def test_the_error_of_a_missing_file_says_what_to_do(
    coordinator: Running, ollama: StandIn
) -> None:
    status, answer = await _made(coordinator)
    assert status == 400
    assert "agent first does not have blob" in answer["error"]
    assert f"POST /api/blobs/{DIGEST}" in answer["error"]


@pytest.mark.spec("SURFACE-42")
async def test_an_agent_that_is_away_has_the_files_that_it_reported(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    await _upload(coordinator)
    await _made(coordinator)
    away = next(agent.id for agent in coordinator.parts.registry if agent.name == "spare")
    tags = await coordinator.session.get(f"{spare.url}/api/tags")
    report = {"tags": await tags.json(), "model_blobs": {"mine:latest": DIGEST}}
    assert await coordinator.heartbeat(away, **report) == 200
    assert await coordinator.heartbeat(away, **report, leaving=True) == 200
    assert await _head(coordinator) == 200
    await coordinator.heartbeat(away, tags={"models": []}, leaving=True)
    assert await _head(coordinator) == 404


@pytest.mark.spec("SURFACE-42")
async def test_an_agent_that_does_not_say_holds_no_upload_up(
    coordinator: Running, ollama: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ollama_coordinator.operations.blobs.HEAD_SECONDS", 0.1)
    with ollama.faults.hang(paths=("/api/blobs/*",)):
        assert await _upload(coordinator) == 201


@pytest.mark.spec("SURFACE-24")
async def test_a_digest_is_compared_as_it_was_written(coordinator: Running) -> None:
    written = DIGEST.replace(":", "-")
    async with coordinator.session.post(
        f"{coordinator.url}/api/blobs/{written}", data=BLOB
    ) as response:
        assert response.status == 400
        told = f'digest mismatch, expected "{written}", got "{DIGEST}"'
        assert await response.json() == {"error": told}


async def _create(coordinator: Running, system: str, query: str = "", **more: Any) -> Any:
    body = {"model": "mine", "from": "llama3.2", "system": system, "stream": False, **more}
    return await coordinator.post(f"/api/create{query}", body)


def _systems(*agents: StandIn) -> list[str | None]:
    """What each agent's `mine` is told; `None` where there is none."""
    models = [agent.models.find("mine") for agent in agents]
    return [None if model is None else model.system for model in models]


@pytest.mark.spec("SURFACE-23")
async def test_an_agent_that_was_away_makes_the_newest_of_several_models(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    away = next(agent.id for agent in coordinator.parts.registry if agent.name == "spare")
    await coordinator.heartbeat(away, leaving=True)
    for system in ("old", "new"):
        assert await _create(coordinator, system) == (200, {"status": "success"})
    await coordinator.heartbeat(away)
    await coordinator.until(lambda: not coordinator.parts.operations.pending())
    assert _systems(ollama, spare) == ["new", "new"]
    assert spare.seen.count("/api/create") == 1


@pytest.mark.spec("SURFACE-25")
async def test_where_a_number_is_enough_a_model_is_made_where_requests_go(
    ollama: StandIn, spare: StandIn
) -> None:
    async with running(pull_placement="1") as coordinator:
        for agent in (ollama, spare):
            await coordinator.register(agent)
        draining, other = sorted(agent.id for agent in coordinator.parts.registry)
        await _set(coordinator, draining, draining=True)
        assert await _create(coordinator, "brief") == (200, {"status": "success"})
        assert (await coordinator.chat("mine"))[0] == 200
        await _set(coordinator, other, draining=True)
        status, answer = await _create(coordinator, "long")
        assert (status, answer) == (200, {"status": "success"})
        assert sorted(_systems(ollama, spare), key=str) == [None, "long"]


@pytest.mark.spec("SURFACE-25")
@pytest.mark.parametrize("placement", ["1", "all"])
async def test_where_everybody_drains_nothing_new_is_made(
    coordinator: Running, ollama: StandIn, placement: str
) -> None:
    agent = next(iter(coordinator.parts.registry))
    await _set(coordinator, agent.id, draining=True)
    async with StandIn([]) as without:
        await coordinator.register(without, "without")
        status, answer = await _create(coordinator, "brief", f"?placement={placement}")
        assert (status, "(first: draining)" in answer["error"]) == (503, True)


@pytest.mark.spec("SURFACE-25")
async def test_a_number_updates_the_agents_that_have_the_model_already(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    assert await _create(coordinator, "old") == (200, {"status": "success"})
    assert await _create(coordinator, "new", "?placement=1") == (200, {"status": "success"})
    assert _systems(ollama, spare) == ["new", "new"]


@pytest.mark.spec("SURFACE-24")
async def test_a_file_stays_as_long_as_another_model_is_made_of_it(
    coordinator: Running, ollama: StandIn, spare: StandIn
) -> None:
    assert await _upload(coordinator) == 201
    with spare.faults.hang(paths=("/api/blobs/*",)):
        waiting = asyncio.create_task(_made(coordinator, "second", "?placement=agents:spare"))
        await spare.seen.wait_for(lambda seen: seen.faulted == 1)
        made = await _made(coordinator, "first", "?placement=agents:first")
        assert made == (200, {"status": "success"})
    assert await waiting == (200, {"status": "success"})
    assert _sent(ollama, spare) == [1, 1]
    assert await _head(coordinator, "?placement=label:nobody") == 404


@pytest.mark.spec("SURFACE-45")
async def test_a_file_that_an_absent_agent_needs_is_kept_however_old_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "EXPIRE_SECONDS", 0.0)
    url = f"sqlite:///{tmp_path}/c.db"
    unused = hashlib.sha256(b"unused").hexdigest()
    async with StandIn([]) as here, StandIn([]) as away:
        async with running(database_url=url) as coordinator:
            await coordinator.register(here, "here")
            agent_id = await coordinator.register(away, "away")
            await coordinator.heartbeat(agent_id, leaving=True)
            assert await _upload(coordinator) == 201
            assert await _upload(coordinator, b"unused", f"sha256:{unused}") == 201
            assert await _made(coordinator, "mine") == (200, {"status": "success"})
            assert names(away) == []
            for file in (tmp_path / "c.db.blobs").iterdir():
                os.utime(file, (0, 0))
            await coordinator.until(lambda: _files(tmp_path) == [DIGEST.replace(":", "-")])
        async with running(database_url=url) as coordinator:
            await coordinator.heartbeat(agent_id)
            await coordinator.until(lambda: names(away) == ["mine:latest"])
            await coordinator.until(lambda: _files(tmp_path) == [])


@pytest.mark.spec("SURFACE-45")
async def test_a_file_that_a_client_was_told_of_is_kept_for_another_day(tmp_path: Path) -> None:
    async with running(database_url=f"sqlite:///{tmp_path}/c.db") as coordinator:
        assert await _upload(coordinator) == 201
        os.utime(tmp_path / "c.db.blobs" / DIGEST.replace(":", "-"), (0, 0))
        assert await _head(coordinator, "") == 200
        coordinator.parts.uploads.expire(())
        assert await _head(coordinator, "") == 200


async def _set(coordinator: Running, agent_id: str, **settings: Any) -> None:
    url = f"{coordinator.url}/api/agents/{agent_id}"
    async with coordinator.session.patch(url, json=settings) as response:
        assert response.status == 200
