"""Services of the system: what their files say, read as the systems read them."""

import os
import plistlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec import structs

from ollama_coordinator import server
from ollama_coordinator.db import database_path
from ollama_coordinator.service import coordinator_service
from ollama_coordinator_agent.service import agent_service
from ollama_coordinator_common.services import (
    CannotInstall,
    Places,
    Service,
    ServicePlan,
    as_text,
    carry_out,
    check_readable,
    installing,
    launchd_plist,
    removing,
    settings_text,
    windows_script,
)
from ollama_coordinator_common.settings import CoordinatorConfig

ODD = "a \"b\" $HOME `id` \\ c%d 'e'"
SERVICE = Service(name="ollama-coordinator", description="A service", program=Path("/bin/true"))
MOST_EXPOSED = 4.0

on_posix = pytest.mark.skipif(sys.platform == "win32", reason="it runs sh")
has_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="no systemd-analyze here"
)


def places(tmp_path: Path, system: str = "linux", *, is_user: bool = False) -> Places:
    found = Places.of("ollama-coordinator", is_user=is_user, home=tmp_path, system=system)
    return structs.replace(
        found, file=tmp_path / found.file.name, settings=tmp_path / "etc" / "settings.env"
    )


def units(where: Places) -> list[Service]:
    made = [coordinator_service(where, CoordinatorConfig(), {})[0], agent_service(where, "", {})]
    if not where.is_user:
        made.append(agent_service(where, "daemon", {"OLLAMA_MODELS": "/srv/models"}))
    return [structs.replace(one, program=Path("/bin/true")) for one in made]


@has_systemd
@pytest.mark.spec("OPERATION-92")
@pytest.mark.parametrize("is_user", [False, True])
def test_units_are_valid_and_hardened(tmp_path: Path, is_user: bool) -> None:
    where = places(tmp_path, is_user=is_user)
    for made in units(where):
        text = installing(made, {}, where).files[where.file]
        where.file.write_text(text)
        manager = "--user" if is_user else "--system"
        verified = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", manager, str(where.file)],
            capture_output=True, text=True,
            env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        )  # fmt: skip
        ours = [line for line in verified.stderr.splitlines() if where.file.name in line]
        assert (verified.returncode, ours) == (0, []), verified.stderr
        if is_user:
            assert "NoNewPrivileges=yes" in text
            continue
        assert "After=network-online.target" in text
        judged = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--no-pager", str(where.file)],
            capture_output=True, text=True,
        )  # fmt: skip
        exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", judged.stdout)
        assert exposure is not None
        assert float(exposure[1]) < MOST_EXPOSED, judged.stdout


@on_posix
@pytest.mark.spec("OPERATION-92")
def test_the_coordinator_gets_the_time_that_an_orderly_end_takes_and_a_database(
    tmp_path: Path,
) -> None:
    config, where = CoordinatorConfig(drain_timeout=7.0), places(tmp_path)
    text = installing(coordinator_service(where, config, {})[0], {}, where).files[where.file]
    found = re.search(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    ending = server.LAST_RECORDS_SECONDS + 3 * server.ABORTED_SECONDS + server.CLOSING_SECONDS
    assert found
    assert int(found[1]) > config.drain_timeout + ending
    url = re.search(r"^Environment=DATABASE_URL=(.*)$", text, re.MULTILINE)
    assert url
    database = database_path(url[1].replace("%S", "/var/lib"))
    assert database == Path("/var/lib/ollama-coordinator/coordinator.db")


@on_posix
@pytest.mark.spec("OPERATION-93")
def test_settings_are_a_file_for_its_owner_that_systemd_and_sh_read(tmp_path: Path) -> None:
    where = places(tmp_path)
    carry_out(installing(SERVICE, {"AGENT_JOIN_TOKEN": ODD, "A": "1"}, where), run=False)
    assert where.settings.stat().st_mode & 0o777 == 0o600
    assert where.file.stat().st_mode & 0o777 == 0o644
    assert ODD not in where.file.read_text()
    assert "AGENT_JOIN_TOKEN" not in where.file.read_text()
    reading = f'. "{where.settings}"; printf %s "$AGENT_JOIN_TOKEN"'
    assert subprocess.run(["sh", "-c", reading], capture_output=True).stdout.decode() == ODD
    where.settings.write_text(where.settings.read_text() + "# a remark\n")
    carry_out(installing(SERVICE, {"A": "2"}, where), run=False)
    lines = where.settings.read_text().splitlines()
    assert (lines[-1], "# a remark" in lines, 'A="1"' in lines) == ('A="2"', True, False)
    with pytest.raises(CannotInstall, match="A has a character"):
        settings_text({"A": "1\n2"})
    carry_out(removing(SERVICE.name, where), run=False)
    assert (where.file.exists(), where.settings.exists()) == (False, True)


@on_posix
@pytest.mark.spec("OPERATION-94")
def test_macos_gets_a_property_list_that_reads_the_settings(tmp_path: Path) -> None:
    where = places(tmp_path, "darwin", is_user=True)
    plan = installing(SERVICE, {"A": ODD}, where)
    carry_out(ServicePlan(plan.files, plan.public))
    made = plistlib.loads(where.file.read_bytes())
    assert (made["Label"], made["RunAtLoad"]) == ("ollama-coordinator", True)
    printing = tmp_path / "printing"
    printing.write_text('#!/bin/sh\nprintf %s "$A"\n')
    printing.chmod(0o755)
    program = structs.replace(SERVICE, program=printing)
    arguments = plistlib.loads(launchd_plist(program, where.settings, tmp_path / "log").encode())
    done = subprocess.run(arguments["ProgramArguments"], capture_output=True)
    assert done.stdout.decode() == ODD
    _, given = coordinator_service(where, CoordinatorConfig(), {})
    data = where.settings.parent / "coordinator.db"
    assert database_path(given["DATABASE_URL"]) == data
    shown = as_text(plan)
    assert f"launchctl bootstrap gui/{os.getuid()} {where.file}" in shown
    assert "launchctl bootout" in as_text(removing(SERVICE.name, where))


@pytest.mark.spec("OPERATION-94")
def test_windows_gets_a_script_and_a_task(tmp_path: Path) -> None:
    where = places(tmp_path, "win32")
    plan = installing(SERVICE, {"A": "100%"}, where)
    assert 'set "A=100%%"\r\n' in windows_script(SERVICE, {"A": "100%"})
    assert "Register-ScheduledTask 'ollama-coordinator'" in as_text(plan)
    assert str(where.file) in as_text(plan)
    assert "/Delete" in as_text(removing(SERVICE.name, where))


@on_posix
@pytest.mark.spec("OPERATION-92")
def test_a_program_that_a_service_cannot_run_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "home"
    program = home / "bin" / "program"
    program.parent.mkdir(parents=True)
    program.touch()
    home.chmod(0o700)
    with pytest.raises(CannotInstall, match="/opt/ollama-coordinator"):
        check_readable(program, None)
    check_readable(program, home)
    with pytest.raises(CannotInstall, match="no user nobody-at-all"):
        agent_service(places(tmp_path), "nobody-at-all", {})
    elsewhere = {"DATABASE_URL": "sqlite:///srv/coordinator.db"}
    with pytest.raises(CannotInstall, match="can write to /var/lib/ollama-coordinator alone"):
        coordinator_service(places(tmp_path), CoordinatorConfig(), elsewhere)
    coordinator_service(places(tmp_path, is_user=True), CoordinatorConfig(), elsewhere)
    blocked = structs.replace(places(tmp_path), file=program / "x.service")
    with pytest.raises(CannotInstall, match="--user"):
        carry_out(installing(SERVICE, {}, blocked))
