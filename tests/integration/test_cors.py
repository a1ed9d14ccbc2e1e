"""Web pages: who may use the coordinator."""

import pytest

from support.coordinator import Running, running
from support.ollama import StandIn

FOREIGN = "https://chat.example"


async def _answer(
    coordinator: Running, origin: str, method: str = "GET", path: str = "/api/version"
) -> tuple[int, dict[str, str], bytes]:
    async with coordinator.session.request(
        method, coordinator.url + path, headers={"Origin": origin}
    ) as response:
        headers = {name.lower(): value for name, value in response.headers.items()}
        return response.status, headers, await response.read()


@pytest.mark.spec("SURFACE-28")
@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost",
        "https://127.0.0.1:8443",
        "http://0.0.0.0:3000",
        "app://obsidian.md",
        "file://",
        "tauri://localhost",
        "vscode-webview://abc",
    ],
)
async def test_pages_of_this_machine_and_of_apps_are_allowed(
    coordinator: Running, origin: str
) -> None:
    status, headers, _ = await _answer(coordinator, origin)
    assert (status, headers["access-control-allow-origin"]) == (200, origin)
    status, headers, body = await _answer(coordinator, origin, "OPTIONS", "/api/chat")
    assert (status, body) == (204, b"")
    assert headers["access-control-max-age"] == "43200"
    assert "x-stainless-lang" in headers["access-control-allow-headers"].lower()


@pytest.mark.spec("SURFACE-28")
@pytest.mark.parametrize(
    "origin",
    [FOREIGN, "http://localhost.evil.test", "null", "http://[", "chrome-extension://abc", "x://"],
)
@pytest.mark.parametrize("method", ["GET", "OPTIONS", "POST"])
async def test_any_other_page_gets_403_with_nothing(
    coordinator: Running, ollama: StandIn, origin: str, method: str
) -> None:
    before = len(ollama.seen.requests)
    status, headers, body = await _answer(coordinator, origin, method, "/api/chat")
    assert (status, body) == (403, b"")
    assert "access-control-allow-origin" not in headers
    assert len(ollama.seen.requests) == before


@pytest.mark.spec("SURFACE-28")
async def test_a_page_that_the_coordinator_serves_is_its_own(coordinator: Running) -> None:
    headers = {"Host": "fleet.lan:8080", "Origin": "http://fleet.lan:8080"}
    async with coordinator.session.get(f"{coordinator.url}/api/version", headers=headers) as own:
        assert own.status == 200
        assert "Access-Control-Allow-Origin" not in own.headers


@pytest.mark.spec("SURFACE-28")
@pytest.mark.parametrize(
    ("setting", "origin", "status"),
    [
        (FOREIGN, FOREIGN, 200),
        (FOREIGN, "https://other.example", 403),
        ("https://*.example", "https://chat.example", 200),
        ("https://*.example", "https://chat.example.evil.test", 403),
        ("https://a*b*c", "https://ac", 403),
        ("chrome-extension://*", "chrome-extension://abcdef", 200),
    ],
)
async def test_the_operators_own_origins(setting: str, origin: str, status: int) -> None:
    async with running(origins=(setting,)) as coordinator:
        assert (await _answer(coordinator, origin))[0] == status


@pytest.mark.spec("SURFACE-28")
async def test_a_star_allows_everybody() -> None:
    async with running(origins=("*",)) as coordinator:
        status, headers, _ = await _answer(coordinator, FOREIGN)
        assert (status, headers["access-control-allow-origin"]) == (200, "*")


@pytest.mark.spec("SURFACE-28")
async def test_streams_and_errors_carry_the_header_and_agents_see_no_origin(
    coordinator: Running, ollama: StandIn
) -> None:
    origin = {"Origin": "http://localhost:5173"}
    body = {"model": "llama3.2", "messages": [{"role": "user", "content": "hello"}]}
    for model, status in (("llama3.2", 200), ("nope", 404)):
        async with coordinator.session.post(
            f"{coordinator.url}/api/chat", json={**body, "model": model}, headers=origin
        ) as response:
            assert response.status == status
            assert response.headers["Access-Control-Allow-Origin"] == origin["Origin"]
    assert "Origin" not in ollama.seen.last.headers


@pytest.mark.spec("SURFACE-28")
async def test_a_refused_origin_leaves_one_line_in_the_log(
    coordinator: Running, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        assert (await _answer(coordinator, FOREIGN))[0] == 403
    lines = [record for record in caplog.records if "COORDINATOR_ORIGINS" in record.message]
    assert [vars(line)["origin"] for line in lines] == [repr(FOREIGN)]
