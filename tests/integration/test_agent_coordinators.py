"""Which coordinator an agent speaks to: several that it was given, or one that it finds."""

from pathlib import Path

import pytest

from ollama_coordinator_agent import coordinators
from ollama_coordinator_common.join_token import JoinToken
from ollama_coordinator_common.settings import AgentConfig
from support.agent_world import Coordinator, eventually, free_port, running

TOKEN = JoinToken("oc_" + "t" * 43)
NOWHERE = "http://127.0.0.1:1"


def config_of(folder: Path, *urls: str, **more: str) -> AgentConfig:
    return AgentConfig(
        coordinator_url=",".join(urls),
        ollama_port=free_port(),
        state_dir=folder,
        manage_ollama=False,
        **more,  # type: ignore[arg-type]
    )


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URLs that coordinators announce; nothing is at the default one."""
    urls: list[str] = []

    async def announced_urls(seconds: float) -> list[str]:
        return list(urls)

    monkeypatch.setattr(coordinators, "DEFAULT", NOWHERE)
    monkeypatch.setattr(coordinators, "announced_urls", announced_urls)
    # All of them are on this machine's loopback.
    monkeypatch.setattr(coordinators, "_is_local", lambda url: url == coordinators.DEFAULT)
    return urls


@pytest.mark.spec("JOIN-8")
async def test_several_urls_are_tried_in_turn(tmp_path: Path) -> None:
    async with Coordinator() as first, Coordinator() as second:
        await first.stop()
        async with running(config_of(tmp_path, NOWHERE, first.url, second.url)):
            await second.until(lambda seen: len(seen.reports) > 1)
            await first.start()
            await second.stop()
            await first.until(lambda seen: len(seen.reports) > 1)
            await second.start()
            await first.stop()
            seen = len(second.reports)
            await second.until(lambda coordinator: len(coordinator.reports) > seen + 1)


@pytest.mark.spec("JOIN-9")
async def test_the_only_coordinator_is_taken_and_no_other_one_followed(
    tmp_path: Path, network: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tmp_path, join_token=TOKEN.text)
    async with Coordinator(identity="one") as one, Coordinator(identity="two") as two:
        network[:] = [one.url, two.url]
        async with running(config):
            await eventually(lambda: "several coordinators answer" in caplog.text)
            assert one.registrations == two.registrations == []
            network[:] = [NOWHERE, one.url]
            await one.until(lambda seen: len(seen.reports) > 1)
            # It found a stranger: that gets no token, and nothing before it is chosen.
            assert one.tokens == [None]
            headers = {name for asked in (*one.asked_by, *two.asked_by) for name in asked}
            assert not {name.lower() for name in headers} & {"x-agent-secret", "x-api-key"}
            network[:] = [two.url]
            await one.stop()
            await eventually(lambda: "another one is not followed" in caplog.text)
            # Its coordinator, known by its id, has moved.
            async with Coordinator(identity="one") as moved:
                network[:] = [moved.url, two.url]
                await moved.until(lambda seen: len(seen.reports) > 1)
                assert moved.tokens == [TOKEN.secret]
        async with Coordinator(identity="one") as again:  # and over a restart of the agent
            network[:] = [two.url, again.url]
            async with running(config):
                await again.until(lambda seen: len(seen.reports) > 1)
        assert two.registrations == []


@pytest.mark.spec("JOIN-9")
async def test_a_coordinator_on_this_machine_is_asked_first(
    tmp_path: Path, network: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Coordinator(identity="near") as near, Coordinator(identity="far") as far:
        network[:] = [far.url]
        monkeypatch.setattr(coordinators, "DEFAULT", near.url)
        async with running(config_of(tmp_path, join_token=TOKEN.text)):
            await near.until(lambda seen: len(seen.reports) > 1)
            assert near.tokens == [TOKEN.secret]
            # Set up anew it is another one, at the same place.
            near.identity, near.known = "newer", set()
            await near.until(lambda seen: len(seen.registrations) > 1)
            await near.stop()
            await near.start()
            seen = len(near.reports)
            await near.until(lambda coordinator: len(coordinator.reports) > seen + 1)
        assert far.registrations == []


@pytest.mark.spec("JOIN-9")
async def test_one_that_was_found_elsewhere_is_not_replaced_by_one_on_this_machine(
    tmp_path: Path,
    network: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Coordinator(identity="far") as far, Coordinator(identity="near") as near:
        network[:] = [far.url]
        async with running(config_of(tmp_path)):
            await far.until(lambda seen: len(seen.reports) > 1)
            monkeypatch.setattr(coordinators, "DEFAULT", near.url)
            await far.stop()
            await eventually(lambda: "another one is not followed" in caplog.text)
            await far.start()
            seen = len(far.reports)
            await far.until(lambda coordinator: len(coordinator.reports) > seen + 1)
        assert near.registrations == []
