"""Whatever comes in: no 500, no hang, nothing left behind."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ollama_coordinator_common.settings import HTTP_CHOICES
from support.coordinator import Running, running
from support.deadline import DEADLINE_SECONDS
from support.ollama import Model, StandIn

ROUTES = (
    *(("POST", f"/api/{name}") for name in ("chat", "generate", "embed", "embeddings", "show")),
    *(("POST", f"/api/{name}") for name in ("pull", "push", "create", "copy", "operations")),
    *(("POST", f"/api/{name}") for name in ("agents", "health", "me", "signout")),
    *(("POST", f"/v1/{name}") for name in ("chat/completions", "completions", "embeddings")),
    *(("POST", f"/v1/{name}") for name in ("responses", "messages", "audio/transcriptions")),
    ("DELETE", "/api/delete"),
    ("POST", "/api/blobs/sha256:" + "0" * 64),
    ("PATCH", "/api/agents/nobody"),
)
FIELDS = (
    *("model", "name", "MODEL", "messages", "prompt", "input", "options", "keep_alive", "stream"),
    *("source", "destination", "from", "files", "adapters", "kind", "placement", "insecure"),
    *("shift", "verbose", "max_tokens", "agent_id", "machine_name", "ip_address", "ollama_port"),
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(min_value=-(10**40), max_value=10**40)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["nope", "llama3.2", "llama3.2:cloud", "a/b/c/d", "x:local:cloud", "sha256:0", "-1s"]
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
BODIES = st.one_of(
    st.binary(max_size=200),
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6),
    VALUES,
    st.sampled_from(
        [
            b"[" * 100_000,
            b'{"model":' * 5_000,
            b'{"model":"\\ud800"}',
            b'{"model":"x","options":{"num_ctx":' + b"9" * 10_000 + b"}}",
            b'{"MODEL":' + b"1" * 5_000 + b"}",
            b'{"model":"a","model":7}',
            b"\xff\xfe\x00{",
            b'\xef\xbb\xbf{"model":"x"}',
            b'{"name":"a\\u0000b"}',
        ]
    ),
)
TEXT = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40)
HEADERS = st.dictionaries(
    st.sampled_from(
        [
            *("Content-Type", "Content-Encoding", "Origin", "Accept", "X-Forwarded-Prefix"),
            *("X-Ollama-Coordinator-Placement", "X-Ollama-Coordinator-Detach", "Authorization"),
        ]
    ),
    TEXT,
    max_size=3,
)
PATHS = st.lists(TEXT, max_size=4).map(lambda parts: "/" + "/".join(parts))

WRONG_OPTION = "must be of type"
"""What Ollama answers with 500 although the request was wrong: an option of the wrong type."""

FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@asynccontextmanager
async def _fleet(http: str) -> AsyncIterator[tuple[Running, StandIn]]:
    async with running(http=http) as coordinator, StandIn() as ollama:
        await coordinator.register(ollama, "first")
        yield coordinator, ollama


class _Fuzzed:
    """A coordinator with one agent, in a loop of its own: Hypothesis calls from outside one."""

    def __init__(self, runner: asyncio.Runner, coordinator: Running, ollama: StandIn) -> None:
        self.runner = runner
        self.coordinator = coordinator
        self.ollama = ollama

    def ask(self, method: str, path: str, body: Any, headers: dict[str, str]) -> None:
        """Ask; the answer has to come, and where it is a 5xx it has to be the agent's own."""
        asked = len(self.ollama.seen.requests)
        status, text = self.runner.run(self._ask(method, path, body, headers))
        if status >= 500:
            given = list(self.ollama.seen.requests)[asked:]
            told = [(record.path, record.status) for record in given]
            assert (path, status) in told, f"the coordinator itself answers {status}: {text}"
            assert WRONG_OPTION in text, text

    async def _ask(
        self, method: str, path: str, body: Any, headers: dict[str, str]
    ) -> tuple[int, str]:
        sent = {"data": body} if isinstance(body, bytes) else {"json": body}
        async with (
            asyncio.timeout(DEADLINE_SECONDS),
            self.coordinator.session.request(
                method, self.coordinator.url + path, headers=headers, allow_redirects=False, **sent
            ) as response,
        ):
            return response.status, await response.text(errors="replace")


@pytest.fixture(scope="module", params=HTTP_CHOICES)
def fuzzed(request: pytest.FixtureRequest) -> Iterator[_Fuzzed]:
    """One fleet for all examples: what one leaves behind, the next ones meet."""
    with asyncio.Runner() as runner:
        fleet = _fleet(request.param)
        yield _Fuzzed(runner, *runner.run(fleet.__aenter__()))
        runner.run(fleet.__aexit__(None, None, None))


@pytest.mark.spec("SURFACE-9")
@FUZZ
@example(
    route=("POST", "/api/generate"),
    body={"model": "llama3.2", "prompt": "x", "options": {"num_ctx": "8k"}},
    headers={},
)
@given(route=st.sampled_from(ROUTES), body=BODIES, headers=HEADERS)
def test_no_body_is_too_strange(
    fuzzed: _Fuzzed, route: tuple[str, str], body: Any, headers: dict[str, str]
) -> None:
    fuzzed.ask(*route, body, headers)


@pytest.mark.spec("SURFACE-9")
@FUZZ
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "BREW"]),
    prefix=st.sampled_from(["", "/api", "/v1", "/v1/models", "/api/blobs", "/api/agents"]),
    path=PATHS,
)
def test_no_path_is_too_strange(fuzzed: _Fuzzed, method: str, prefix: str, path: str) -> None:
    fuzzed.ask(method, prefix + path.replace("#", "").replace("\\", ""), b"", {})


@pytest.mark.spec("SURFACE-9")
def test_nothing_is_left_behind(fuzzed: _Fuzzed) -> None:
    """Runs after the examples above, on the same fleet."""
    coordinator = fuzzed.coordinator
    fuzzed.ollama.models.add(Model("llama3.2"))  # one of them may have deleted it
    fuzzed.runner.run(coordinator.until(coordinator.at_rest))
    operations = coordinator.parts.operations
    fuzzed.runner.run(
        coordinator.until(lambda: all(view.ended_at is not None for view in operations.views()))
    )
    status, _ = fuzzed.runner.run(coordinator.chat())
    assert status == 200


@pytest.mark.spec("SURFACE-9")
async def test_half_a_request_holds_nobody_up(coordinator: Running, ollama: StandIn) -> None:
    port = int(coordinator.url.rpartition(":")[2])
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    await writer.drain()
    assert (await coordinator.chat())[0] == 200
    writer.close()
    await writer.wait_closed()
    await coordinator.until(coordinator.at_rest)


@pytest.mark.spec("OPERATION-30")
@pytest.mark.parametrize("value", [b"9" * 100_000, b" " * 100_000 + b"0"])
async def test_a_long_value_beside_an_unknown_model_is_no_failure(
    coordinator: Running, ollama: StandIn, value: bytes
) -> None:
    await coordinator.register(ollama)
    body = b'{"model":"zz","x":%b}' % value
    url = f"{coordinator.url}/api/chat"
    async with coordinator.session.post(url, data=body) as response:
        assert response.status == 404, await response.text()


@pytest.mark.spec("SURFACE-9")
async def test_a_header_block_without_end_is_refused(coordinator: Running) -> None:
    with pytest.raises((aiohttp.ClientError, AssertionError)):
        async with coordinator.session.get(
            f"{coordinator.url}/", headers={"X-Long": "x" * 300_000}
        ) as response:
            assert response.status == 200
