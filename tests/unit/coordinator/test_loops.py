"""Which event loop runs the coordinator."""

import sys

import pytest

from ollama_coordinator.aio import loop_of
from ollama_coordinator_common.error import ConfigError


@pytest.mark.spec("OPERATION-16")
def test_without_uvloop_asyncio_runs_it_unless_uvloop_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert loop_of("auto") is None
    with pytest.raises(ConfigError, match="COORDINATOR_LOOP=uvloop does not work") as caught:
        loop_of("uvloop")
    assert "uv tool install './packages/coordinator[fast]'" in str(caught.value)


@pytest.mark.spec("OPERATION-16")
def test_uvloop_runs_it_where_it_is_installed() -> None:
    uvloop = pytest.importorskip("uvloop")
    assert loop_of("auto") is uvloop.new_event_loop
    assert loop_of("asyncio") is None
