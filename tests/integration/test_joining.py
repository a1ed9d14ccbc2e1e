"""`GET /join`: a machine with Python and curl joins in one line."""

import asyncio
import base64
import hashlib
import html
import importlib.metadata
import io
import os
import re
import shutil
import signal
import sys
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ollama_coordinator.agent_wheels import (
    CHECKOUT,
    PACKAGES,
    agent_wheels,
    build_wheel,
    pip_wheel,
)
from ollama_coordinator.api.own import joining
from support.coordinator import Running, running
from support.deadline import DEADLINE_SECONDS
from support.ollama import StandIn

BROWSER = {"accept": "text/html,*/*", "user-agent": "Mozilla/5.0 Firefox/150"}
POWERSHELL = {"user-agent": "Mozilla/5.0 (Windows NT 10.0) WindowsPowerShell/5.1", "accept": ""}
CURL = {"user-agent": "curl/8.0", "accept": "*/*"}

SHELL_TOOLS = ("sh", "curl", "mkdir", "mktemp", "rm")
"""All that the script may need beside Python."""


def _repacked(name: str, folder: Path, seen: set[str]) -> None:
    """Write an installed distribution, and what it needs, as wheels: an index without a network."""
    if name.lower() in seen:
        return
    seen.add(name.lower())
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return  # not for this platform
    inside = [path for path in found.files or () if ".." not in path.parts]
    tags = re.findall(r"^Tag: (.+)-(.+)-(.+)$", found.read_text("WHEEL") or "", re.MULTILINE)
    tag = "-".join(".".join(sorted(set(column))) for column in zip(*tags, strict=True))
    normal = re.sub(r"[-_.]+", "_", found.name)
    with zipfile.ZipFile(folder / f"{normal}-{found.version}-{tag}.whl", "w") as archive:
        for path in inside:
            if path.name not in ("INSTALLER", "REQUESTED", "direct_url.json"):
                archive.write(path.locate(), path.as_posix())
    for need in found.requires or ():
        if "extra ==" not in need:
            _repacked(re.split(r"[^A-Za-z0-9._-]", need)[0], folder, seen)


@pytest.fixture(scope="module")
def links(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the agent needs but ours."""
    folder = tmp_path_factory.mktemp("links")
    seen = {"ollama-coordinator-common"}
    for need in importlib.metadata.requires("ollama-coordinator-agent") or ():
        _repacked(re.split(r"[^A-Za-z0-9._-]", need)[0], folder, seen)
    _repacked("uvloop", folder, seen)
    return folder


INSTALLING_SECONDS = 240
"""Until a test gives up; pip takes ten seconds on two idle cores."""


class Joined:
    """A machine that runs the line; `output` is what it printed so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.output = b""

    async def read(self) -> None:
        assert self.process.stdout is not None
        while piece := await self.process.stdout.read(4096):
            self.output += piece


def machine(home: Path, links: Path) -> dict[str, str]:
    """The environment of a machine with nothing but Python, curl and a few tools of a shell."""
    tools = home / "tools"
    if not tools.exists():
        tools.mkdir(parents=True)
        for name in SHELL_TOOLS:
            path = shutil.which(name)
            assert path is not None
            (tools / name).symlink_to(path)
        # Its path is its own, and not that of the virtual environment of the tests.
        (tools / "python3").write_text(f'#!/bin/sh\nexec "{sys.base_prefix}/bin/python3" "$@"\n')
        (tools / "python3").chmod(0o755)
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links)}
    return {"PATH": str(tools), "HOME": str(home), **index}


@asynccontextmanager
async def line(
    url: str, home: Path, links: Path, ollama: StandIn, command: str = ""
) -> AsyncIterator[Joined]:
    """Run `curl … | sh`, or another command, on such a machine."""
    environment = machine(home, links)
    process = await asyncio.create_subprocess_exec(
        f"{environment['PATH']}/sh",
        "-c",
        command or f"curl -fsSL {url}/join | sh",
        env={
            **environment,
            "AGENT_STATE_DIR": str(home / "state"),
            "AGENT_MANAGE_OLLAMA": "false",
            "MACHINE_NAME": "joined",
            "OLLAMA_PORT": str(ollama.port),
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    joined = Joined(process)
    reading = asyncio.create_task(joined.read())
    try:
        yield joined
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_SECONDS):
            await process.wait()
            await reading


async def online(coordinator: Running, joined: Joined) -> None:
    """Wait until the machine is in rotation, or until its script has ended."""
    async with asyncio.timeout(INSTALLING_SECONDS):
        while [one["status"] for one in await coordinator.get("/api/agents")] != ["online"]:
            assert joined.process.returncode is None, joined.output.decode()
            await asyncio.sleep(0.05)


@pytest.mark.e2e
@pytest.mark.spec("JOIN-1")
@pytest.mark.skipif(sys.platform == "win32", reason="there it is PowerShell's script")
async def test_a_machine_with_python_and_curl_joins_in_one_line(
    coordinator: Running, tmp_path: Path, links: Path
) -> None:
    async with StandIn() as ollama:
        for _ in range(2):  # the same line again starts it again
            async with line(coordinator.url, tmp_path / "a home", links, ollama) as joined:
                await online(coordinator, joined)
                assert (await coordinator.chat())[0] == 200
                folder = tmp_path / "a home/.local/share/ollama-coordinator-agent"
                said = joined.output.decode()
                assert f"joins the Ollama Coordinator at {coordinator.url}" in said
                assert str(folder) in said
        assert len(await coordinator.get("/api/agents")) == 1
        assert (folder / "bin" / "ollama-coordinator-agent").is_file()
        if list(links.glob("uvloop-*")):  # else it does without
            assert list(folder.glob("lib/*/site-packages/uvloop"))


async def done(*command: str, environment: dict[str, str]) -> tuple[int, str]:
    """The exit code of a command and what it printed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(INSTALLING_SECONDS):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode is not None
    return process.returncode, output.decode()


def newer(folder: Path, version: str) -> dict[str, bytes]:
    """The wheels as a coordinator of another version would have them."""
    wheels = {}
    for name in PACKAGES:
        project = folder / name
        shutil.copytree(CHECKOUT / name, project, ignore=shutil.ignore_patterns("__pycache__"))
        facts = project / "pyproject.toml"
        own = f'version = "{importlib.metadata.version("ollama-coordinator")}"'
        facts.write_text(facts.read_text("utf-8").replace(own, f'version = "{version}"'), "utf-8")
        file, content = build_wheel(project)
        wheels[file] = content
    return wheels


@pytest.mark.e2e
@pytest.mark.spec("JOIN-6")
@pytest.mark.skipif(sys.platform == "win32", reason="there it is PowerShell's script")
async def test_an_agent_that_joined_in_one_line_takes_its_coordinators_version(
    tmp_path: Path, links: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"database_url": f"sqlite:///{tmp_path}/a.db", "tls": "self"}
    async with running(**settings) as coordinator:
        folder = tmp_path / "opt" / "an agent"
        environment = machine(tmp_path, links) | {"JOIN_FOLDER": str(folder), "JOIN_START": "no"}
        shell = f"{environment['PATH']}/sh"
        pinned = f"-fsSLk --pinnedpubkey '{coordinator.parts.tls.pin}'"
        joining_line = f"curl {pinned} '{coordinator.url}/join' | sh"
        code, said = await done(shell, "-c", joining_line, environment=environment)
        assert code == 0, said
        agent = str(folder / "bin" / "ollama-coordinator-agent")
        wheels = newer(tmp_path / "newer", "99.1.0")
        monkeypatch.setattr(joining, "agent_wheels", lambda: wheels)
        # It knows its folder, its coordinator and the certificate by itself.
        code, said = await done(agent, "upgrade", environment=machine(tmp_path, links))
        assert code == 0, said
        assert str(folder) in said
        code, said = await done(agent, "--version", environment=environment)
        assert said.split() == ["ollama-coordinator-agent", "99.1.0"]
        monkeypatch.setattr(joining, "agent_wheels", dict)
        code, said = await done(agent, "upgrade", environment=environment)
        assert (code, "install the agent from the repository" in said) == (1, True)


@pytest.mark.spec("JOIN-6")
async def test_an_agent_that_was_installed_otherwise_is_not_upgraded(coordinator: Running) -> None:
    agent = str(Path(sys.executable).with_name("ollama-coordinator-agent"))
    environment = {**os.environ, "COORDINATOR_URL": coordinator.url}
    code, said = await done(agent, "upgrade", environment=environment)
    assert code == 1
    assert "not installed by its coordinator's join line" in said
    assert "uv tool install --reinstall" in said


@pytest.mark.spec("JOIN-5")
async def test_an_agent_that_is_older_than_its_coordinator_is_known_as_such(
    coordinator: Running, ollama: StandIn
) -> None:
    own = importlib.metadata.version("ollama-coordinator")
    (known,) = await coordinator.get("/api/agents")
    snapshots = coordinator.parts.snapshots
    assert not snapshots.agent(coordinator.agent(known["id"]))["outdated"]  # a bare Ollama
    for given, is_older in (
        ("0.0.9", True), (own, False), ("99.0rc1", False), ("unknown", False),
    ):  # fmt: skip
        agent = await coordinator.register(ollama, "first", agent_version=given)
        assert snapshots.agent(coordinator.agent(agent))["outdated"] is is_older, given


async def lines_of_page(coordinator: Running) -> list[str]:
    """The lines on the page, as somebody copies them."""
    async with coordinator.session.get(f"{coordinator.url}/join", headers=BROWSER) as answer:
        return [html.unescape(one) for one in re.findall(r"<pre>(.*?)</pre>", await answer.text())]


@pytest.mark.spec("JOIN-10")
@pytest.mark.skipif(sys.platform == "win32", reason="there it is PowerShell's script")
async def test_a_machine_joins_a_coordinator_with_its_own_certificate(
    tmp_path: Path, links: Path
) -> None:
    settings = {"database_url": f"sqlite:///{tmp_path}/a.db", "tls": "self"}
    async with running(**settings) as coordinator, StandIn() as ollama:
        command, by_wget, by_powershell = await lines_of_page(coordinator)
        async with line(coordinator.url, tmp_path / "home", links, ollama, command) as joined:
            await online(coordinator, joined)
            assert (await coordinator.chat())[0] == 200
        pin = coordinator.parts.tls.pin
        assert pin in by_powershell
        # The key that is pinned is the only one that is believed, by either program.
        for one in (command, by_wget):
            if shutil.which(one.split()[0]) is None:
                continue
            for wanted, is_given in ((pin, True), (f"sha256//{'A' * 43}=", False)):
                fetch = one.replace(pin, wanted).removesuffix("| sh")
                process = await asyncio.create_subprocess_shell(
                    fetch, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
                )
                text = (await process.communicate())[0].decode()
                assert (process.returncode == 0, text.startswith("#!/bin/sh")) == (
                    is_given,
                    is_given,
                )
        # Who comes through a proxy sees that one's certificate.
        behind = {**CURL, "x-forwarded-proto": "https", "host": "fleet.example"}
        async with coordinator.session.get(f"{coordinator.url}/join", headers=behind) as answer:
            assert "pin=''" in await answer.text()


@pytest.mark.spec("JOIN-2")
async def test_each_client_gets_its_own_form(coordinator: Running) -> None:
    for sent, kind, start in (
        (CURL, "text/x-shellscript", "#!/bin/sh"),
        ({"user-agent": "Wget/1.21", "accept": "*/*"}, "text/x-shellscript", "#!/bin/sh"),
        (POWERSHELL, "text/plain", "# Joins"),
        ({**POWERSHELL, "accept": "text/html"}, "text/plain", "# Joins"),
        (BROWSER, "text/html", "<!doctype html>"),
    ):
        async with coordinator.session.get(f"{coordinator.url}/join", headers=sent) as answer:
            assert answer.status == 200
            assert answer.content_type == kind
            text = await answer.text()
        assert text.startswith(start)
        assert coordinator.url in text
        assert not re.search(r"@[A-Z]", text)
    for shell, start in (("sh", "#!/bin/sh"), ("powershell", "# Joins")):
        url = f"{coordinator.url}/join?shell={shell}"
        async with coordinator.session.get(url, headers=BROWSER) as answer:
            text = await answer.text()
        assert text.startswith(start)
    dropped_by_5_1 = re.search(r"& .* (''|\"\")", text)
    assert dropped_by_5_1 is None
    async with coordinator.session.get(f"{coordinator.url}/join?shell=fish") as answer:
        assert answer.status == 400


@pytest.mark.spec("JOIN-2")
async def test_the_script_names_the_url_that_was_asked_and_nothing_that_a_shell_would_run(
    coordinator: Running,
) -> None:
    behind = {**CURL, "host": "fleet.example", "x-forwarded-proto": "https"}
    behind["x-forwarded-prefix"] = "/ollama"
    async with coordinator.session.get(f"{coordinator.url}/join", headers=behind) as answer:
        assert "url='https://fleet.example/ollama'" in await answer.text()
    for name, value in (
        ("host", "a';reboot;'"),
        ("host", "a$(reboot)"),
        ("x-forwarded-prefix", "/a';reboot;'"),
        ("x-forwarded-prefix", "/`reboot`"),
        ("x-forwarded-proto", "';reboot;'"),
    ):
        sent = {**CURL, name: value}
        async with coordinator.session.get(f"{coordinator.url}/join", headers=sent) as answer:
            assert "reboot" not in await answer.text()
            assert answer.status in (200, 400)


@pytest.mark.spec("JOIN-3")
async def test_the_files_are_wheels_of_this_version(coordinator: Running) -> None:
    version = importlib.metadata.version("ollama-coordinator")
    for name in agent_wheels():
        async with coordinator.session.get(f"{coordinator.url}/join/{name}") as answer:
            assert answer.status == 200
            archive = zipfile.ZipFile(io.BytesIO(await answer.read()))
        package = name.partition("-")[0]
        info = f"{package}-{version}.dist-info"
        listed = [row.split(",") for row in archive.read(f"{info}/RECORD").decode().splitlines()]
        assert {path for path, _, _ in listed} == set(archive.namelist())
        for path, digest, size in listed[:-1]:
            content = archive.read(path)
            found = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            assert (digest, int(size)) == ("sha256=" + found.decode(), len(content))
        metadata = archive.read(f"{info}/METADATA").decode()
        assert f"Version: {version}\n" in metadata
        assert "file:" not in metadata
        assert "{root" not in metadata
        if "agent" in package:
            assert f"Requires-Dist: ollama-coordinator-common=={version}\n" in metadata
    assert agent_wheels() == agent_wheels(), "the same content gives the same bytes"


@pytest.mark.spec("JOIN-3")
async def test_what_is_not_there_says_what_to_do(
    coordinator: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with coordinator.session.get(f"{coordinator.url}/join/pip.whl") as answer:
        assert await answer.read() == pip_wheel()
    async with coordinator.session.get(f"{coordinator.url}/join/other.whl") as answer:
        assert answer.status == 404
        assert "pip.whl" in (await answer.json())["error"]
    monkeypatch.setattr(joining, "agent_wheels", dict)
    monkeypatch.setattr(joining, "pip_wheel", lambda: None)
    for path, word in (("/join", "repository"), ("/join/pip.whl", "uv")):
        async with coordinator.session.get(coordinator.url + path, headers=CURL) as answer:
            assert answer.status == 404
            assert word in (await answer.json())["error"]
