"""What README and the specifications say is what the programs do."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from starlette.routing import BaseRoute, Route

from ollama_coordinator import main as coordinator
from ollama_coordinator.app import create_app
from ollama_coordinator_agent import main as agent
from ollama_coordinator_common import protocol
from ollama_coordinator_common.config import CoordinatorConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
JAPANESE = (ROOT / "README.ja.md").read_text("utf-8")
SPECS = {path: path.read_text("utf-8") for path in sorted(ROOT.glob("specs/*/spec.md"))}

PROGRAMS = {"Coordinator": coordinator.app, "Agent": agent.app}


# ── settings ──────────────────────────────────────────────────────────────────────────────────


def section(title: str) -> str:
    """The text under a heading of README, up to the next heading."""
    _, _, rest = README.partition(f"\n### {title}\n")
    return re.split(r"^#", rest, maxsplit=1, flags=re.MULTILINE)[0]


def documented(title: str) -> dict[str, str]:
    """Variables and defaults of a table: the first two columns, in backticks."""
    rows = re.findall(r"^\| `([A-Z_]+)` \| (?:`([^`]*)`)? ?\|", section(title), re.MULTILINE)
    return dict(rows)


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


@pytest.mark.parametrize("title", PROGRAMS)
def test_the_table_of_settings_is_what_the_program_reads(title: str) -> None:
    table = documented(title)
    assert table
    assert table == options(typer.main.get_command(PROGRAMS[title]))


@pytest.mark.parametrize("title", PROGRAMS)
def test_a_command_reads_no_variable_that_no_table_has(title: str) -> None:
    known = documented("Coordinator").keys() | documented("Agent").keys()
    found = list(commands(typer.main.get_command(PROGRAMS[title])))
    assert len(found) > 1
    for command in found:
        assert options(command).keys() <= known, command.name


def test_the_japanese_readme_gives_the_same_defaults() -> None:
    told = dict(re.findall(r"`([A-Z_]+)`\s*（`([^`]*)`", JAPANESE))
    assert told
    assert told.items() <= (documented("Coordinator") | documented("Agent")).items()


# ── routes ────────────────────────────────────────────────────────────────────────────────────

ROUTE = re.compile(r"`((?:GET|POST|PUT|PATCH|DELETE|HEAD)) (/[^`\s?]*)")


def anonymous(path: str) -> str:
    """A path without the names of its parameters."""
    return re.sub(r"\{[^}]*\}", "{}", path)


def served(routes: list[BaseRoute]) -> set[tuple[str, str]]:
    """The methods and paths of a route table."""
    found = set()
    for route in routes:
        assert isinstance(route, Route), route
        methods: Iterable[str] = route.methods or getattr(route.app, "by_method", {})
        found |= {(method, anonymous(route.path)) for method in methods}
    return found


@pytest.fixture(scope="module")
def table() -> set[tuple[str, str]]:
    return served(create_app(CoordinatorConfig(database_url="sqlite://:memory:")).routes)


def test_every_route_in_readmes_table_exists(table: set[tuple[str, str]]) -> None:
    _, _, api = README.partition("\n## API\n")
    told = {(method, anonymous(path)) for method, path in ROUTE.findall(api.split("\n## ")[0])}
    assert told
    assert told - table == set()


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
    documents = [*ROOT.glob("*.md"), *ROOT.glob("specs/**/*.md")]
    missing = [
        f"{document.relative_to(ROOT)}: {link}"
        for document in documents
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text("utf-8"))
        if not (document.parent / link).exists()
    ]
    assert missing == []
