"""Ollamas without an agent that are added by their URLs: behind TLS, a path, an API key."""

import asyncio
import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

from ollama_coordinator.access import NewKey
from ollama_coordinator.main import app
from support.coordinator import Running, running
from support.ollama import StandIn

KEY = "sk-of-the-gateway"


class Gateway:
    """A reverse proxy with a path, and perhaps TLS and a key, before an Ollama."""

    def __init__(self, ollama: StandIn, *, key: str = "", path: str = "/ollama/one") -> None:
        self.key = key
        self.sent: list[tuple[str, str | None]] = []
        self._ollama = ollama
        self._path = path
        self._session: aiohttp.ClientSession | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        assert self._session is not None
        given = request.headers.get("Authorization")
        self.sent.append((request.path, given))
        if self.key and given != f"Bearer {self.key}":
            return web.json_response({"error": "unauthorized"}, status=401)
        if not request.path.startswith(self._path + "/"):
            raise web.HTTPNotFound
        url = self._ollama.url + request.path.removeprefix(self._path)
        body = await request.read()
        async with self._session.request(request.method, url, data=body) as answer:
            response = web.StreamResponse(status=answer.status)
            response.content_type = answer.content_type
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            return response

    @asynccontextmanager
    async def open(self, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
        """Serve; yields the URL below which the Ollama is."""
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self.handle)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        async with aiohttp.ClientSession() as self._session:
            site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
            try:
                await site.start()
                assert site._server is not None
                port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
                yield f"http{'s' if context else ''}://127.0.0.1:{port}{self._path}"
            finally:
                await runner.cleanup()


def contexts(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS of a server with a certificate of its own, and of a client that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gateway")])
    now = datetime.datetime.now(datetime.UTC)
    hosts = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(hosts, critical=False)
        .sign(key, hashes.SHA256())
    )
    file = folder / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = made.public_bytes(serialization.Encoding.PEM)
    file.write_bytes(private + public)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(file)
    return server, ssl.create_default_context(cadata=public.decode())


async def add(coordinator: Running, url: str, **more: Any) -> tuple[int, Any]:
    return await coordinator.post("/api/agents", {"url": url, **more})


@pytest.mark.spec("JOIN-7")
async def test_an_ollama_behind_tls_a_path_and_a_key_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server, client = contexts(tmp_path)
    # What SSL_CERT_FILE does before the start.
    monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", client)
    settings = {"database_url": f"sqlite:///{tmp_path}/fleet.db"}
    async with StandIn() as ollama:
        gateway = Gateway(ollama, key=KEY)
        async with gateway.open(server) as url:
            async with running(**settings) as coordinator:
                status, made = await add(coordinator, url + "/", api_key=KEY)
                assert (status, made["status"]) == (201, "registered")
                assert (await coordinator.chat())[0] == 200
                async with coordinator.stream() as answer:
                    assert b'"done":true' in await answer.read()
                body = {"model": "tiny", "stream": False}
                assert (await coordinator.post("/api/show", {"model": "llama3.2"}))[0] == 200
                assert (await coordinator.post("/api/pull", body))[0] in (200, 404, 500)
                (listed,) = await coordinator.get("/api/agents")
                assert listed["url"] == url
                assert listed["machine_name"] == url.removeprefix("https://")
                shown = [listed, await coordinator.get(f"/api/agents/{listed['id']}/details")]
                shown.append(await coordinator.get("/api/events"))
                assert KEY not in repr(shown)
            async with running(**settings) as coordinator:  # it is kept, with its key
                await coordinator.until(
                    lambda: all(one.out_of_rotation() is None for one in coordinator.parts.registry)
                )
                assert (await coordinator.chat())[0] == 200
                status, made = await add(coordinator, url, api_key=KEY)
                assert (status, made["status"]) == (200, "updated")
                assert made["agent_id"] == listed["id"]
    assert all(given == f"Bearer {KEY}" for _, given in gateway.sent)
    assert KEY not in caplog.text


@pytest.mark.spec("JOIN-7")
async def test_what_does_not_answer_as_an_ollama_is_not_kept(coordinator: Running) -> None:
    async with StandIn() as ollama, Gateway(ollama, key=KEY).open() as url:
        host = url.removesuffix("/ollama/one")
        for asked, says in (
            ({"url": url}, "asks for an API key"),
            ({"url": url, "api_key": "sk-wrong"}, "asks for an API key"),
            ({"url": host, "api_key": KEY}, "status 404"),
            ({"url": "http://127.0.0.1:1"}, "cannot connect"),
            ({"url": "ftp://gateway.example"}, "give a URL such as"),
            ({"url": "gateway.example"}, "give a URL such as"),
            ({"url": "http://x:99999"}, "url:"),
            ({"url": "http://a b"}, "url:"),
            ({"url": "http://anna:secret@gateway.example"}, "give the key as api_key"),
            ({"url": "http://gateway.example?key=secret"}, "without a query"),
            ({"url": "http://gateway.example/a b"}, "without a query"),
            ({"url": url, "api_key": "a\r\nb"}, "api_key"),
            ({"url": url, "key": KEY}, "there is no field 'key'"),
            ({"url": 1}, "url"),
            ({"url": coordinator.url}, "in circles"),
            ({"url": "http://169.254.169.254/latest"}, "no machine"),
        ):
            status, answer = await coordinator.post("/api/agents", asked)
            assert status == 400, (asked, answer)
            assert says in answer["error"], (asked, answer)
    assert await coordinator.get("/api/agents") == []


@pytest.mark.spec("JOIN-7")
async def test_a_key_goes_to_its_own_ollama_alone(coordinator: Running) -> None:
    async with StandIn() as one, StandIn() as two, StandIn() as three:
        first, second = Gateway(one, key=KEY), Gateway(two, path="/ollama")
        async with first.open() as url, second.open() as other:
            ids = [
                (await add(coordinator, url, api_key=KEY))[1]["agent_id"],
                (await add(coordinator, other))[1]["agent_id"],
                await coordinator.register(three, "third"),
            ]
            assert len(set(ids)) == 3
            for agent in ids:  # each one serves
                others = [one for one in ids if one != agent]
                for name in others:
                    await coordinator.session.patch(
                        f"{coordinator.url}/api/agents/{name}", json={"draining": True}
                    )
                assert (await coordinator.chat())[0] == 200
                for name in others:
                    await coordinator.session.patch(
                        f"{coordinator.url}/api/agents/{name}", json={"draining": False}
                    )
            assert all(given == f"Bearer {KEY}" for _, given in first.sent)
            assert all(given is None for _, given in second.sent)
            names = {name.lower() for one in three.seen.requests for name in one.headers}
            assert "authorization" not in names
            # Another key takes the place of the first one; one that is forgotten is not sent.
            first.key = "sk-new"
            await add(coordinator, url, api_key="sk-new")
            assert first.sent[-1][1] == "Bearer sk-new"
            await coordinator.session.delete(f"{coordinator.url}/api/agents/{ids[0]}")
            assert not any(coordinator.parts.registry.api_keys.values())


@pytest.mark.spec("JOIN-7")
async def test_two_ollamas_behind_one_host_are_two(coordinator: Running) -> None:
    async with StandIn() as one, StandIn(["qwen3:8b"]) as two:

        class Both(Gateway):
            async def handle(self, request: web.Request) -> web.StreamResponse:
                is_first = request.path.startswith("/a/")
                self._ollama, self._path = (one, "/a") if is_first else (two, "/b")
                return await super().handle(request)

        async with Both(one, path="").open() as url:
            assert (await add(coordinator, f"{url}/a"))[0] == 201
            assert (await add(coordinator, f"{url}/b"))[0] == 201
            for model in ("llama3.2", "qwen3:8b"):
                assert (await coordinator.chat(model))[0] == 200
        assert len(await coordinator.get("/api/agents")) == 2


@pytest.mark.spec("JOIN-7")
async def test_only_an_operator_adds_urls() -> None:
    async with running(access="keys") as coordinator, StandIn() as ollama:
        keys = coordinator.parts.access.keys
        for rights, expected in ((("join",), 403), (("manage",), 403), (("operate",), 201)):
            _, key = keys.create(NewKey(name=rights[0], rights=rights))
            async with coordinator.session.post(
                f"{coordinator.url}/api/agents",
                json={"url": ollama.url},
                headers={"Authorization": f"Bearer {key}"},
            ) as answer:
                assert answer.status == expected, await answer.text()


@pytest.mark.spec("JOIN-7")
async def test_the_command_adds_several_and_says_which_one_it_did_not(
    coordinator: Running, tmp_path: Path
) -> None:
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    async with StandIn() as one, StandIn() as two:
        async with Gateway(one, key=KEY).open() as url, Gateway(two).open() as other:
            wanted = ["agents", "add", "http://127.0.0.1:1", url, other]
            runner = CliRunner(env={"COORDINATOR_URL": coordinator.url, "COLUMNS": "200"})
            done = await asyncio.to_thread(
                runner.invoke, app, [*wanted, "--api-key-file", str(file)]
            )
            assert done.exit_code == 1
            assert "http://127.0.0.1:1 was not added: cannot connect" in done.stderr
            assert done.stdout.count("registered: 127.0.0.1:") == 2
            assert KEY not in done.output
        assert len(await coordinator.get("/api/agents")) == 2
