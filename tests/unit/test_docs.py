"""What README and the specifications say is what the programs do."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer

from ollama_coordinator import main as coordinator
from ollama_coordinator.api.routes import endpoints
from ollama_coordinator.app import create_app
from ollama_coordinator_agent import main as agent
from ollama_coordinator_common import protocol
from ollama_coordinator_common.settings import CoordinatorConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
JAPANESE = (ROOT / "README.ja.md").read_text("utf-8")
SPECS = {path: path.read_text("utf-8") for path in sorted(ROOT.glob("specs/*/spec.md"))}

PACKAGES = ROOT / "packages"
COORDINATOR = (PACKAGES / "coordinator" / "README.md").read_text("utf-8")
AGENT = (PACKAGES / "agent" / "README.md").read_text("utf-8")

PROGRAMS = {"coordinator": (COORDINATOR, coordinator.app), "agent": (AGENT, agent.app)}
"""Every program's reference and its command line."""


# ── settings ──────────────────────────────────────────────────────────────────────────────────


def section(title: str, text: str) -> str:
    """The text under a heading, up to the next heading."""
    _, _, rest = text.partition(f"\n## {title}\n")
    return re.split(r"^#+ ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def documented(text: str) -> dict[str, str]:
    """Variables and defaults of a reference: the first two columns of its table, in backticks."""
    pattern = r"^\| `([A-Z_]+)` \| (?:`([^`]*)`)? ?\|"
    return dict(re.findall(pattern, section("Settings", text), re.MULTILINE))


def options(command: Any) -> dict[str, str]:
    """The variables that a command reads, and what they are where nobody sets them."""
    return {
        str(parameter.envvar): "" if parameter.default is None else str(parameter.default)
        for parameter in command.params
        if parameter.envvar
    }


def commands(command: Any) -> Iterator[Any]:
    """A command and those below it; Typer's own classes or Click's, as its version has it."""
    yield command
    for inner in getattr(command, "commands", {}).values():
        yield from commands(inner)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_table_of_settings_is_what_the_program_reads(program: str) -> None:
    text, app = PROGRAMS[program]
    table = documented(text)
    assert table
    assert table == options(typer.main.get_command(app))


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_command_reads_no_variable_that_no_table_has(program: str) -> None:
    known = documented(COORDINATOR).keys() | documented(AGENT).keys()
    found = list(commands(typer.main.get_command(PROGRAMS[program][1])))
    assert len(found) > 1
    for command in found:
        assert options(command).keys() <= known, command.name


def test_the_settings_that_cannot_be_changed_while_it_runs_are_named() -> None:
    [paragraph] = [part for part in COORDINATOR.split("\n\n") if "`PATCH /api/settings`" in part]
    fixed = {setting.variable for setting in CoordinatorConfig.settings() if not setting.live}
    assert set(re.findall(r"`([A-Z_]+)`", paragraph)) == fixed


# ── Japanese ──────────────────────────────────────────────────────────────────────────────────


def test_the_japanese_readme_has_the_same_headings_routes_and_rows() -> None:
    for pattern in (r"^#+(?= )", ROUTE.pattern, r"^\| `[^`]+` \|"):
        found = [re.findall(pattern, text, re.MULTILINE) for text in (README, JAPANESE)]
        assert found[0]
        assert found[0] == found[1], pattern


def test_the_japanese_readme_has_the_same_commands_and_files() -> None:
    blocks = [fenced(text) for text in (README, JAPANESE.replace("こんにちは", "Hello!"))]
    assert blocks[0]
    assert blocks[0] == blocks[1]


# ── files to copy ─────────────────────────────────────────────────────────────────────────────


def fenced(text: str) -> list[tuple[str, str]]:
    """The blocks of a document with their languages, without remarks."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(language, re.sub(r" *# .*", "", block)) for language, block in found]


def block(language: str, text: str) -> str:
    """The one block in a language."""
    [found] = [block for of, block in fenced(text) if of == language]
    return found


# ── routes ────────────────────────────────────────────────────────────────────────────────────

ROUTE = re.compile(r"`((?:GET|POST|PUT|PATCH|DELETE|HEAD)) (/[^`\s?]*)")


def anonymous(path: str) -> str:
    """A path without the names of its parameters."""
    return re.sub(r"\{[^}]*\}", "{}", path)


@pytest.fixture(scope="module")
def table() -> set[tuple[str, str]]:
    """The methods and paths of the route table."""
    app = create_app(CoordinatorConfig(database_url="sqlite://:memory:"))
    return {(one.method, anonymous(one.path)) for one in endpoints(app.state.parts)}


def test_every_route_in_readmes_table_exists(table: set[tuple[str, str]]) -> None:
    _, _, api = README.partition("\n## API\n")
    told = {(method, anonymous(path)) for method, path in ROUTE.findall(api.split("\n## ")[0])}
    assert told
    assert told - table == set()


OTHERS = ("/healthz", "/readyz", "/api/openapi.json", "/api/signout", "/api/user/")
"""Paths that the section on proxies does not name, and that no client needs."""


def test_a_proxy_lets_clients_through_but_to_nothing_that_is_for_others(
    table: set[tuple[str, str]],
) -> None:
    found = re.search(r"^location ~ (\S+) \{", block("nginx", COORDINATOR), re.MULTILINE)
    assert found
    paths = {path for _, path in table}
    passed = {path for path in paths if re.search(found[1], path)}
    named, _, _ = section("Behind a proxy", COORDINATOR).partition("```")
    words = re.findall(r"`([^`]+)`", named)
    kept = tuple(word if word.startswith("/") else f"/api/{word}" for word in words)
    assert {path for path in passed if path.startswith(kept)} == set()
    assert {path for path in paths - passed if not path.startswith((*kept, *OTHERS))} == set()
    assert [word for word in kept if not any(path.startswith(word) for path in paths)] == []


def test_the_first_versions_routes_are_in_readmes_table() -> None:
    for route in ("POST /api/agents", "GET /api/agents", "POST /api/health"):
        assert f"| `{route}`" in README


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.parent.name)
def test_every_route_that_a_specification_names_exists(
    path: Path, table: set[tuple[str, str]]
) -> None:
    told = {(method, anonymous(route)) for method, route in ROUTE.findall(SPECS[path])}
    assert told - table == set()


# ── examples ──────────────────────────────────────────────────────────────────────────────────

EXAMPLE = re.compile(r"^<!-- (\w+) -->\n```json\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = [example for text in (README, *SPECS.values()) for example in EXAMPLE.findall(text)]


def test_there_is_an_example_of_every_message_that_agents_need() -> None:
    names = {name for name, _ in EXAMPLES}
    assert names >= {"RegisterRequest", "RegisterReply", "HealthReport", "HealthReply"}


@pytest.mark.parametrize(("name", "text"), EXAMPLES)
def test_an_example_is_a_message(name: str, text: str) -> None:
    kind: type[msgspec.Struct] = getattr(protocol, name)
    message = msgspec.json.decode(text, type=kind)
    written: dict[str, Any] = json.loads(text)
    assert written.keys() <= set(kind.__struct_fields__)
    assert written.items() <= json.loads(msgspec.json.encode(message)).items()


def test_every_file_that_a_document_links_to_is_there() -> None:
    documents = [*ROOT.glob("*.md"), *PACKAGES.glob("*/README.md"), *ROOT.glob("specs/**/*.md")]
    missing = [
        f"{document.relative_to(ROOT)}: {link}"
        for document in documents
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text("utf-8"))
        if not (document.parent / link).exists()
    ]
    assert missing == []


# ── places in the source ──────────────────────────────────────────────────────────────────────

SOURCES = (
    ROOT,
    PACKAGES / "coordinator/src/ollama_coordinator",
    PACKAGES / "agent/src/ollama_coordinator_agent",
)
DEVELOPING = {
    "README.md": README.partition("\n## Develop\n")[2],
    "README.ja.md": JAPANESE.partition("\n## 開発する\n")[2],
    "specs/README.md": (ROOT / "specs" / "README.md").read_text("utf-8").partition("Glossary")[0],
}


@pytest.mark.parametrize("document", DEVELOPING)
def test_every_place_in_the_source_that_a_document_names_is_there(document: str) -> None:
    places = re.findall(
        r"`([\w./]+(?:\.py|\.md|/)|(?:packages|tests)/[\w./]+)`", DEVELOPING[document]
    )
    assert places
    missing = [one for one in places if not any((source / one).exists() for source in SOURCES)]
    assert missing == []
