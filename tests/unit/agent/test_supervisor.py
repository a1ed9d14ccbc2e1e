"""When `ollama serve` is started, and when not."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ollama_coordinator_agent.ollama import Presence
from ollama_coordinator_agent.pacing import AgentPace
from ollama_coordinator_agent.process import ServeCommand
from ollama_coordinator_agent.state import StateFolder
from ollama_coordinator_agent.supervisor import Supervisor

ABSENT, SILENT, FOREIGN, ANSWERING = (
    Presence.ABSENT,
    Presence.SILENT,
    Presence.FOREIGN,
    Presence.ANSWERING,
)


class FakeCommand:
    """Starts children that live until the test ends them."""

    binary = Path("ollama")

    def __init__(self) -> None:
        self.environ: dict[str, str] = {}
        self.children: list[Any] = []
        self.error: OSError | None = None

    def start(self) -> Any:
        if self.error:
            raise self.error
        child = SimpleNamespace(pid=1, created=0.0, exit_code=1, lives=True)
        child.is_alive = lambda: child.lives
        self.children.append(child)
        return child


def supervisor_of(command: FakeCommand | None, folder: Path, **settings: Any) -> Supervisor:
    program = cast(ServeCommand | None, command)
    return Supervisor(program, StateFolder(folder, 11434), AgentPace(), **settings)


def starts(
    supervisor: Supervisor, command: FakeCommand, presence: Presence, until: int
) -> list[int]:
    """The seconds at which a server is started while the port shows one thing."""
    started = []
    for now in range(until):
        before = len(command.children)
        supervisor.observe(presence, now)
        if len(command.children) > before:
            started.append(now)
            command.children[-1].lives = False
    return started


@pytest.mark.spec("AGENT-23")
def test_servers_that_die_at_once_are_started_at_growing_distances(tmp_path: Path) -> None:
    command = FakeCommand()
    supervisor = supervisor_of(command, tmp_path)
    times = starts(supervisor, command, ABSENT, 400)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times[0] == 2
    assert gaps[-1] >= 30
    assert len(times) < 25


@pytest.mark.spec("AGENT-23")
def test_a_server_that_ran_for_long_is_restarted_soon(tmp_path: Path) -> None:
    command = FakeCommand()
    supervisor = supervisor_of(command, tmp_path)
    starts(supervisor, command, ABSENT, 200)
    for now in range(1000, 1003):  # the last one may have died in the very last second
        supervisor.observe(ABSENT, now)
    assert supervisor.child is not None
    supervisor.observe(ANSWERING, 1003)
    command.children[-1].lives = False
    count = len(command.children)
    for now in range(2000, 2005):
        supervisor.observe(ABSENT, now)
    assert len(command.children) == count + 1


@pytest.mark.spec("AGENT-24")
def test_an_adopted_server_gets_time_to_come_back(tmp_path: Path) -> None:
    command = FakeCommand()
    supervisor = supervisor_of(command, tmp_path)
    supervisor.observe(ANSWERING, 0)
    assert starts(supervisor, command, ABSENT, 31)[:1] == [30]


@pytest.mark.spec("AGENT-30")
@pytest.mark.parametrize("presence", [SILENT, FOREIGN, ANSWERING])
def test_an_open_port_is_never_taken(tmp_path: Path, presence: Presence) -> None:
    command = FakeCommand()
    assert starts(supervisor_of(command, tmp_path), command, presence, 300) == []


@pytest.mark.spec("AGENT-25")
@pytest.mark.parametrize(
    ("has_program", "may_start", "advice"),
    [(False, True, "OLLAMA_BINARY"), (True, False, "AGENT_MANAGE_OLLAMA")],
)
def test_without_program_or_permission_it_says_what_to_do_and_keeps_looking(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    has_program: bool,
    may_start: bool,
    advice: str,
) -> None:
    command = FakeCommand()
    supervisor = supervisor_of(command if has_program else None, tmp_path, may_start=may_start)
    assert starts(supervisor, command, ABSENT, 100) == []
    assert 2 <= caplog.text.count(advice) <= 5


@pytest.mark.spec("AGENT-31")
def test_another_program_on_the_port_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor_of(None, tmp_path).observe(FOREIGN, 0)
    assert "another program has Ollama's port" in caplog.text


@pytest.mark.spec("AGENT-25")
def test_a_program_that_cannot_be_started_is_told_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = FakeCommand()
    command.error = PermissionError("not executable")
    supervisor = supervisor_of(command, tmp_path)
    assert starts(supervisor, command, ABSENT, 20) == []
    assert "not executable" in caplog.text
    command.error = None
    assert starts(supervisor, command, ABSENT, 200)


@pytest.mark.spec("AGENT-60")
async def test_a_server_that_hangs_is_ended_and_started_again(tmp_path: Path) -> None:
    command = FakeCommand()
    supervisor = supervisor_of(command, tmp_path)
    now = 0
    while not command.children:
        supervisor.observe(ABSENT, now)
        now += 1
    (child,) = command.children
    supervisor.observe(ANSWERING, now)

    async def stop(seconds: float) -> None:
        child.lives = False

    child.stop = stop
    await supervisor.restart("it does not answer for m")
    assert not child.lives
    for later in range(now, now + 10):
        supervisor.observe(ABSENT, later)
    assert len(command.children) == 2


@pytest.mark.spec("AGENT-60")
async def test_a_server_of_somebody_else_is_not_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = FakeCommand()
    supervisor = supervisor_of(command, tmp_path)
    supervisor.observe(ANSWERING, 0)
    await supervisor.restart("it does not answer for m")
    assert "restart it" in caplog.text
    assert command.children == []
