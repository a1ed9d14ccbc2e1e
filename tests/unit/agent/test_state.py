"""What the agent keeps on its disk."""

import re
import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest

from ollama_coordinator_agent.settings import state_folder
from ollama_coordinator_agent.state import (
    AlreadyRunning,
    ChildRecord,
    LastRun,
    StateFolder,
    host_folder,
    host_id,
)
from ollama_coordinator_common.settings import AgentConfig


@pytest.mark.spec("AGENT-19")
def test_the_machine_id_is_the_same_for_every_agent_and_every_run(tmp_path: Path) -> None:
    first = StateFolder(tmp_path / "state", 11434).machine_id()
    assert first
    assert StateFolder(tmp_path / "state", 11435).machine_id() == first


MAKE_ID = """
import sys
from pathlib import Path
from ollama_coordinator_agent.state import StateFolder
print(StateFolder(Path(sys.argv[1]), int(sys.argv[2])).machine_id())
"""


@pytest.mark.spec("AGENT-19")
def test_agents_that_start_at_the_same_moment_agree(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", MAKE_ID, str(tmp_path), str(11434 + n)] for n in range(8)]
    agents = [subprocess.Popen(command, stdout=subprocess.PIPE) for command in commands]
    ids = {agent.communicate()[0] for agent in agents}
    assert len(ids) == 1
    assert ids != {b"None\n"}
    assert [file.name for file in tmp_path.iterdir()] == ["machine-id"]


@pytest.mark.spec("AGENT-19")
def test_two_machines_have_two_ids(tmp_path: Path) -> None:
    assert (
        StateFolder(tmp_path / "a", 1).machine_id() != StateFolder(tmp_path / "b", 1).machine_id()
    )


@pytest.mark.spec("AGENT-20")
@pytest.mark.parametrize("content", [b"", b"\x00\xff", b"../../etc", b"x" * 5000])
def test_a_damaged_machine_id_is_told_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    (tmp_path / "machine-id").write_bytes(content)
    fresh = StateFolder(tmp_path, 11434).machine_id()
    assert fresh
    assert "damaged" in caplog.text
    assert StateFolder(tmp_path, 11434).machine_id() == fresh


@pytest.mark.spec("AGENT-20")
def test_a_folder_that_cannot_be_used_is_told_and_survived(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    state = StateFolder(tmp_path / "file" / "state", 11434)
    assert state.machine_id() is None
    assert "AGENT_STATE_DIR" in caplog.text
    state.remember(agent_id="a")
    assert state.last_run.agent_id == "a"


@pytest.mark.spec("AGENT-42")
def test_what_was_remembered_is_known_to_the_next_run(tmp_path: Path) -> None:
    child = ChildRecord(pid=12, created=3.5)
    StateFolder(tmp_path, 11434).remember(relay_port=4000, child=child)
    assert StateFolder(tmp_path, 11434).last_run == LastRun(relay_port=4000, child=child)
    assert StateFolder(tmp_path, 11435).last_run == LastRun()


@pytest.mark.spec("AGENT-20")
def test_a_damaged_memory_is_told_and_forgotten(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "agent-11434.json").write_text('{"agent_id": 5')
    assert StateFolder(tmp_path, 11434).last_run == LastRun()
    assert "starting afresh" in caplog.text


@pytest.mark.spec("AGENT-21")
def test_the_lock_is_held_once_and_free_afterwards(tmp_path: Path) -> None:
    first, second = (StateFolder(tmp_path / "state", 11434) for _ in range(2))
    with (
        first.only_agent(),
        pytest.raises(AlreadyRunning, match="OLLAMA_PORT"),
        second.only_agent(),
    ):
        pass
    with second.only_agent(), StateFolder(tmp_path / "state", 11435).only_agent():
        pass


@pytest.mark.spec("AGENT-21")
def test_a_place_that_cannot_lock_is_told_and_survived(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with StateFolder(tmp_path / "file", 11434).only_agent():
        assert "unnoticed" in caplog.text


@pytest.mark.spec("AGENT-20")
@pytest.mark.skipif(sys.platform == "win32", reason="links there are another matter")
def test_a_file_system_without_links_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError("links are not supported")

    monkeypatch.setattr("os.link", no_links)
    first = StateFolder(tmp_path, 11434).machine_id()
    assert first == StateFolder(tmp_path, 11434).machine_id()


# ── a state folder that hosts share ───────────────────────────────────────────────────────────


@pytest.mark.spec("AGENT-50")
def test_hosts_that_share_a_home_have_an_id_and_a_lock_each(tmp_path: Path) -> None:
    one, other = (
        StateFolder(host_folder(tmp_path, name, own_id, take_over=True), 11434)
        for name, own_id in (("lab-1", "a" * 12), ("lab-2", "b" * 12))
    )
    with one.only_agent(), other.only_agent():
        assert one.machine_id() != other.machine_id()
    # Copies of one image have one id of the host; their names tell them apart.
    with one.only_agent():
        copy = StateFolder(host_folder(tmp_path, "lab-3", "a" * 12, take_over=True), 11434)
        with copy.only_agent():
            assert one.machine_id() != copy.machine_id()


@pytest.mark.spec("AGENT-50")
def test_a_host_that_is_renamed_keeps_its_folder(tmp_path: Path) -> None:
    before = StateFolder(host_folder(tmp_path, "old.local", "a" * 12, take_over=True), 11434)
    known = before.machine_id()
    before.remember(agent_id="x")
    assert host_folder(tmp_path, "new", "a" * 12, take_over=False) == before.folder
    after = StateFolder(host_folder(tmp_path, "new", "a" * 12, take_over=True), 11434)
    assert (after.folder.name, after.machine_id()) == ("new-aaaaaaaaaaaa", known)
    assert after.last_run.agent_id == "x"
    assert not before.folder.exists()


@pytest.mark.spec("AGENT-50")
def test_the_first_host_takes_over_the_files_of_an_earlier_version(tmp_path: Path) -> None:
    earlier = StateFolder(tmp_path, 11434)
    known = earlier.machine_id()
    earlier.remember(agent_id="x")
    with earlier.only_agent():  # of another host, say
        in_use = host_folder(tmp_path, "lab-0", "f" * 12, take_over=True)
        assert not (in_use / "machine-id").exists()
    assert host_folder(tmp_path, "lab-1", "a" * 12, take_over=False) == tmp_path
    first = StateFolder(host_folder(tmp_path, "lab-1", "a" * 12, take_over=True), 11434)
    second = StateFolder(host_folder(tmp_path, "lab-2", "b" * 12, take_over=True), 11434)
    assert (first.machine_id(), first.last_run.agent_id) == (known, "x")
    assert second.machine_id() != known
    assert second.last_run.agent_id is None


@pytest.mark.spec("AGENT-50")
def test_the_id_of_the_host_is_short_and_says_nothing() -> None:
    assert host_id() == host_id()
    assert re.fullmatch("[0-9a-f]{12}", host_id())
    for file in (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id")):
        if file.exists():
            assert host_id() not in file.read_text()


@pytest.mark.spec("AGENT-50")
def test_a_folder_that_the_operator_names_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert state_folder(AgentConfig(state_dir=tmp_path)) == tmp_path
    monkeypatch.setattr(platformdirs, "user_state_path", lambda *_, **__: tmp_path)
    assert state_folder(AgentConfig()).parent == tmp_path
