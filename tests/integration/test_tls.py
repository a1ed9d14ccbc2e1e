"""TLS of the coordinator's own: served, pinned by agents, and its files read again, on sockets."""

import asyncio
import io
import json
import shutil
import socket
import ssl
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography.hazmat.primitives import serialization
from typer.testing import CliRunner

from ollama_coordinator import tls
from ollama_coordinator.access import NewKey
from ollama_coordinator.http1 import ConnectionLimits, hypercorn_hook
from ollama_coordinator.main import app
from ollama_coordinator.tls import Tls
from ollama_coordinator_agent.client import CoordinatorClient, CoordinatorError
from ollama_coordinator_common.error import ConfigError
from ollama_coordinator_common.join_token import JoinToken
from ollama_coordinator_common.names import model_key
from ollama_coordinator_common.settings import AgentConfig, CoordinatorConfig
from support import agent_world
from support.coordinator import Running, running, serving
from support.ollama import StandIn


def own(folder: Path, name: str = "a.db", **more: Any) -> dict[str, Any]:
    """The settings of a coordinator with a certificate of its own."""
    return {"database_url": f"sqlite:///{folder}/{name}", "tls": "self", **more}


def certificate(folder: Path) -> Path:
    """A certificate with its key, in one file: made as the coordinator makes its own."""
    folder.mkdir(exist_ok=True)
    Tls(CoordinatorConfig(**own(folder)))
    return folder / "a.db.tls.pem"


async def shown(url: str, alpn: tuple[str, ...] = ()) -> tuple[str, str | None]:
    """The SHA-256 of the certificate at a URL, and the protocol that was agreed on."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if alpn:
        context.set_alpn_protocols(list(alpn))
    port = int(url.rpartition(":")[2])
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    secured = writer.get_extra_info("ssl_object")
    found = sha256(secured.getpeercert(binary_form=True)).hexdigest()
    agreed = secured.selected_alpn_protocol()
    writer.transport.abort()
    return found, agreed


# ── served ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.spec("ACCESS-25")
@pytest.mark.parametrize("http", ["auto", "hypercorn"])
async def test_all_is_served_over_tls(tmp_path: Path, http: str) -> None:
    async with running(**own(tmp_path, http=http)) as coordinator, StandIn() as ollama:
        assert coordinator.url.startswith("https:")
        await coordinator.register(ollama)
        assert (await coordinator.chat())[0] == 200
        async with coordinator.stream() as answer:
            records = [json.loads(line) async for line in answer.content]
        assert records[-1]["done"]
        body = b'{"model":"llama3.2","stream":false,"prompt":"' + b"x" * 5_000_000 + b'"}'
        async with coordinator.session.post(
            f"{coordinator.url}/api/generate", data=io.BytesIO(body)
        ) as large:
            assert large.status == 200
        assert (await shown(coordinator.url, ("h2", "http/1.1")))[1] == "http/1.1"
        _, key = coordinator.parts.access.keys.create(NewKey(name="anna", rights=("operate",)))
        url = f"{coordinator.url}/dashboard/session"
        async with coordinator.session.post(url, data={"key": key}, allow_redirects=False) as begun:
            assert "Secure" in begun.headers["set-cookie"]
            assert "strict-transport-security" not in begun.headers
        # Who speaks plain HTTP gets no byte, and certainly no answer.
        with pytest.raises(aiohttp.ClientError):
            await coordinator.session.get(coordinator.url.replace("https:", "http:"))
        await coordinator.until(coordinator.at_rest)


@pytest.mark.spec("ACCESS-25")
async def test_a_client_that_leaves_over_tls_ends_its_request(tmp_path: Path) -> None:
    async with running(**own(tmp_path)) as coordinator, StandIn() as ollama:
        await coordinator.register(ollama)
        ollama.hold(after=2)
        async with coordinator.stream() as answer:
            await answer.content.readline()
        await coordinator.until(coordinator.at_rest)
        ollama.release()
        assert (await coordinator.chat())[0] == 200


@pytest.mark.spec("ACCESS-25")
async def test_a_hypercorn_that_does_not_fit_serves_over_tls_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hypercorn_hook, "_misfit", lambda: "it is another one")
    async with running(**own(tmp_path)) as coordinator:
        assert (await coordinator.get("/api/version"))["version"]
        assert (await shown(coordinator.url))[0] == coordinator.parts.tls.fingerprint


@pytest.mark.spec("ACCESS-25")
async def test_a_connection_without_a_handshake_is_counted_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hypercorn_hook, "HANDSHAKE_SECONDS", 0.2)
    limits, secured = ConnectionLimits(most=3), Tls(CoordinatorConfig(**own(tmp_path)))

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    async with serving(answer, limits=limits, tls=secured) as url:
        port = int(url.rpartition(":")[2])
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        while limits.open < 2:
            await asyncio.sleep(0.005)
        for reader, writer in opened:
            assert await reader.read() == b""
            writer.transport.abort()
        while limits.open:
            await asyncio.sleep(0.005)
        # One more than there is room for hears so, over TLS as well.
        monkeypatch.setattr(hypercorn_hook, "HANDSHAKE_SECONDS", 30)
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        while limits.open < 3:
            await asyncio.sleep(0.005)
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=False)) as session,
            session.get(url) as refused,
        ):
            assert refused.status == 503
            assert "room" in await refused.text()
        for _, writer in opened:
            writer.transport.abort()


# ── files ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.spec("ACCESS-25")
async def test_files_are_read_again_and_no_answer_is_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "LOOK_SECONDS", 0.02)
    first, second = certificate(tmp_path / "1"), certificate(tmp_path / "2")
    file = tmp_path / "used.pem"
    shutil.copy(first, file)
    async with running(tls=f"{file}, {file}") as coordinator, StandIn() as ollama:
        await coordinator.register(ollama)
        assert coordinator.parts.tls.fingerprint == ""  # it changes when it is renewed
        before = (await shown(coordinator.url))[0]
        ollama.hold(after=2)
        async with coordinator.stream() as answer:
            await answer.content.readline()
            shutil.copy(second, file)
            async with asyncio.timeout(20):
                while (await shown(coordinator.url))[0] == before:
                    await asyncio.sleep(0.02)
            ollama.release()
            assert b'"done":true' in await answer.read()
        after = (await shown(coordinator.url))[0]
        file.write_text("no certificate")
        await coordinator.until(lambda: "old one stays" in caplog.text)
        file.unlink()
        assert (await shown(coordinator.url))[0] == after
        assert (await coordinator.chat())[0] == 200


@pytest.mark.spec("ACCESS-26")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
async def test_an_own_certificate_is_made_once_for_its_owners_eyes(tmp_path: Path) -> None:
    seen = set()
    for _ in range(2):
        async with running(**own(tmp_path, hosts=("ollama.example",))) as coordinator:
            seen.add((await shown(coordinator.url))[0])
            seen.add(coordinator.parts.tls.fingerprint)
            status, made = await coordinator.post(
                "/api/keys", {"name": f"rack-{len(seen)}{_}", "rights": ["join"]}
            )
            assert status == 201
            seen.add(JoinToken.parse(made["join_token"]).certificate)
    assert len(seen) == 1
    file = tmp_path / "a.db.tls.pem"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    # Whoever believes this very certificate can check its names too.
    context = ssl.create_default_context(cafile=str(file))
    async with running(**own(tmp_path)) as coordinator:
        port = int(coordinator.url.rpartition(":")[2])
        for name in ("localhost", "127.0.0.1", "ollama.example", socket.gethostname()):
            _, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=context, server_hostname=name
            )
            writer.transport.abort()


@pytest.mark.spec("ACCESS-25")
@pytest.mark.spec("ACCESS-26")
def test_what_cannot_work_is_refused_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, other = certificate(tmp_path / "1"), certificate(tmp_path / "2")
    text = good.read_text("ascii")
    at = text.index("-----BEGIN CERT")
    locked, bare = tmp_path / "locked.pem", tmp_path / "bare.pem"
    locked.write_bytes(
        serialization.load_pem_private_key(text[:at].encode(), None).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    bare.write_text(text[at:])
    cases = (
        ("on", "give off, self, or CERT,KEY"),
        ("a.pem", "give off, self, or CERT,KEY"),
        (f"{tmp_path}/no.pem,{good}", "No such file"),
        (f"{bare},{other}", "mismatch"),
        (f"{good},{bare}", "cannot be used"),
        (f"{bare},{locked}", "cannot be used"),
        (f"{locked},{good}", "cannot be used"),
    )
    for setting, sentence in cases:
        with pytest.raises(ConfigError, match="COORDINATOR_TLS") as refused:
            Tls(CoordinatorConfig(tls=setting))
        assert sentence.lower() in str(refused.value).lower(), setting
    with pytest.raises(ConfigError, match="give DATABASE_URL a file"):
        Tls(CoordinatorConfig(tls="self", database_url="sqlite://:memory:"))
    monkeypatch.setattr(tls, "CAN_MAKE", False)
    with pytest.raises(ConfigError, match=r"install ollama-coordinator\[tls\]"):
        Tls(CoordinatorConfig(**own(tmp_path)))
    # What was made before is used without it, and so is a certificate of others.
    assert Tls(CoordinatorConfig(**own(tmp_path / "1"))).fingerprint
    assert Tls(CoordinatorConfig(tls=f"{good},{good}")).context is not None


# ── agents and the command line ───────────────────────────────────────────────────────────────


@asynccontextmanager
async def joined(
    coordinator: Running, folder: Path, token: str, transport: str
) -> AsyncIterator[StandIn]:
    """An agent that joined over TLS, as its program does it."""
    async with StandIn() as ollama:
        config = AgentConfig(
            coordinator_url=coordinator.url, ollama_port=ollama.port, state_dir=folder,
            machine_name="m", manage_ollama=False, join_token=token, transport=transport,
        )  # fmt: skip
        async with agent_world.running(config):
            registry, key = coordinator.parts.registry, model_key("llama3.2")
            await coordinator.until(
                lambda: any(not one.out_of_rotation() for one in registry.holders(key))
            )
            yield ollama


@pytest.mark.spec("ACCESS-26")
@pytest.mark.parametrize("transport", ["direct", "link"])
async def test_an_agent_joins_by_its_token_and_believes_that_certificate(
    tmp_path: Path, transport: str
) -> None:
    async with running(**own(tmp_path, access="keys")) as coordinator:
        text = coordinator.parts.access.keys.create(NewKey(name="rack", rights=("join",)))[1]
        token = JoinToken(text, coordinator.parts.tls.fingerprint).text
        _, key = coordinator.parts.access.keys.create(NewKey(name="anna"))
        coordinator.session.headers["Authorization"] = f"Bearer {key}"
        async with joined(coordinator, tmp_path / "agent", token, transport):
            [agent] = coordinator.parts.registry
            assert agent.linked == (transport == "link")
            assert (await coordinator.chat())[0] == 200
            async with coordinator.stream() as answer:
                assert b'"done":true' in await answer.read()


@pytest.mark.spec("ACCESS-26")
async def test_nothing_is_sent_to_another_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        running(**own(tmp_path)) as coordinator,
        aiohttp.ClientSession() as session,
    ):
        asked: list[str] = []
        access = coordinator.parts.access
        identify = access.identify

        def noted(scope: Any) -> None:
            asked.append(scope["path"])
            identify(scope)

        monkeypatch.setattr(access, "identify", noted)
        for certificate, sentence in (("ab" * 32, "not the one"), ("", "COORDINATOR_CERTIFICATE")):
            client = CoordinatorClient(session, coordinator.url, certificate=certificate)
            for sending in (client.agents, lambda: client.upgrade("/api/agents/x/link")):  # noqa: B023
                with pytest.raises(CoordinatorError, match=sentence):
                    await sending()
        assert asked == []
        connections = coordinator.parts.connections
        assert connections is not None
        await coordinator.until(lambda: connections.open == 0)


@pytest.mark.spec("ACCESS-26")
@pytest.mark.spec("JOIN-10")
async def test_the_command_line_reaches_its_own_coordinator_over_tls(tmp_path: Path) -> None:
    settings = own(tmp_path, access="keys")
    async with running(**settings) as coordinator:

        async def run(*arguments: str, **environment: str) -> Any:
            given = {"DATABASE_URL": settings["database_url"], **environment}
            runner = CliRunner(env={"COORDINATOR_URL": coordinator.url, **given})
            return await asyncio.to_thread(runner.invoke, app, list(arguments))

        for command in (("agents", "list"), ("keys", "list"), ("top", "--once")):
            done = await run(*command)
            assert done.exit_code == 0, done.output
        made = await run("join-token", "create")
        assert coordinator.parts.tls.fingerprint in made.stdout
        assert f"--pinnedpubkey '{coordinator.parts.tls.pin}'" in made.stderr
        own_one = coordinator.parts.tls.fingerprint
        assert (await run("keys", "list", COORDINATOR_CERTIFICATE=own_one)).exit_code == 0
        # In a process of its own: aiohttp leaves the refused connection to the end of the program.
        refused = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", "from ollama_coordinator.main import app; app()"),
            *("keys", "list", "--url", coordinator.url, "--certificate", "ab" * 32),
            stderr=asyncio.subprocess.PIPE,
        )
        assert b"another certificate" in (await refused.communicate())[1]
        assert refused.returncode == 1
        port = coordinator.url.rpartition(":")[2]
        plain = await run("keys", "list", COORDINATOR_URL=f"http://127.0.0.1:{port}")
        assert "http against https" in plain.output
        wrong = await run("keys", "list", COORDINATOR_CERTIFICATE="x")
        assert "64 hexadecimal digits" in wrong.output
