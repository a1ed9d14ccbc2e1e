"""Imports point one way, and the environment has one reader."""

import ast
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import ollama_coordinator
import ollama_coordinator_agent
import ollama_coordinator_common

COORDINATOR = Path(ollama_coordinator.__file__).parent
COMMON = Path(ollama_coordinator_common.__file__).parent
AGENT = Path(ollama_coordinator_agent.__file__).parent

OUTSIDE = {
    "starlette", "aiohttp", "hypercorn", "sqlite_utils", "sqlite3", "asyncio", "typer", "time",
    "rich", "socket", "threading", "random", "logging",
}  # fmt: skip
RANDOM = {"counting.py"}
"""The policy that draws lots needs something to draw them from."""


@cache
def nodes(module: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(module.read_text("utf-8"))))


def imported(module: Path) -> set[str]:
    """The top-level packages that a module imports; relative ones by their names in full."""
    names: set[str] = set()
    for node in nodes(module):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def from_ours(module: Path) -> set[str]:
    """The other modules and packages of the coordinator that a module imports from."""
    place = module.relative_to(COORDINATOR).parts
    found: set[str] = set()
    for node in nodes(module):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            inside = [*place[: len(place) - node.level], *(node.module or "").split(".")]
            path = [name for name in inside if name]
        else:
            package, *path = (node.module or "").split(".")
            if package != "ollama_coordinator":
                continue
        found |= {path[0]} if path else {alias.name for alias in node.names}
    return found - {place[0].removesuffix(".py")}


LAYERS = (
    {"main"},
    {"workers", "service"},
    {"server"},
    {"app"},
    {"front"},
    {"carry"},
    {"api"},
    {"metrics"},
    {"parts"},
    {"feed"},
    {"attention"},
    {"settings"},
    {"operations"},
    {"agent_queries"},
    {"journal", "monitor", "commands"},
    {"model_probes", "traces", "wake"},
    {"aliases", "dispatch", "simulation"},
    {"scheduler", "upstream", "agent_store", "saved_state", "access", "cluster", "tls", "identity"},
    {"registry", "db", "http1", "aio", "agent_logs", "batches", "link", "agent_wheels", "memory"},
    {"clock"},
)
"""The modules and packages of the coordinator; each imports from lower layers only."""

CORE = [*COORDINATOR.glob("registry/**/*.py"), *COORDINATOR.glob("scheduler/**/*.py")]


def test_the_core_is_there() -> None:
    assert len(CORE) > 10


@pytest.mark.parametrize("module", CORE, ids=lambda path: str(path.relative_to(COORDINATOR)))
def test_the_core_knows_nothing_of_http_databases_clocks_and_loops(module: Path) -> None:
    allowed = {"random"} if module.name in RANDOM else set()
    assert imported(module) & (OUTSIDE - allowed) == set()


@pytest.mark.parametrize("module", sorted(COMMON.glob("*.py")), ids=lambda path: path.name)
def test_what_both_sides_share_knows_neither_and_needs_msgspec_alone(module: Path) -> None:
    foreign = {"ollama_coordinator", "ollama_coordinator_agent", "typer", "aiohttp", "starlette"}
    assert imported(module) & foreign == set()


def test_the_agent_and_the_coordinator_do_not_know_each_other() -> None:
    for module in AGENT.rglob("*.py"):
        assert "ollama_coordinator" not in imported(module), module
    for module in COORDINATOR.rglob("*.py"):
        assert "ollama_coordinator_agent" not in imported(module), module


@pytest.mark.parametrize("number", range(len(LAYERS)))
def test_imports_point_to_lower_layers_only(number: int) -> None:
    lower = set().union(*LAYERS[number + 1 :])
    for name in LAYERS[number]:
        package = COORDINATOR / name
        modules = package.rglob("*.py") if package.is_dir() else [package.with_suffix(".py")]
        for module in modules:
            assert from_ours(module) <= lower, module


def test_every_module_has_a_layer() -> None:
    found = {path.relative_to(COORDINATOR).parts[0] for path in COORDINATOR.rglob("*.py")}
    assert {name.removesuffix(".py") for name in found} - {"__init__"} == set().union(*LAYERS)


def test_the_sketch_in_the_specifications_has_the_layers_in_their_order() -> None:
    sketch = (Path(__file__).parents[3] / "specs" / "README.md").read_text("utf-8")
    line, _, _ = sketch.partition("coordinator:  ")[2].partition("at the side")
    groups = [{name.strip() for name in group.split(",")} for group in line.split("→")]
    layers = [number for group in groups for number, one in enumerate(LAYERS) if group & one]
    assert groups[-1] == {"common"}
    assert all(any(group <= one for one in LAYERS) for group in groups[:-1])
    assert layers == sorted(layers)


REAL_TIME = {
    "clock.py": "it is what `Clock.timeout` is made of",
    "server.py": "how long stopping may take",
    "monitor.py": "a pause between two looks",
    "feed/feed.py": "a pause between two snapshots",
    "http1/limits.py": "how long a refused client is read from",
    "link/links.py": "how long closing may take",
    "front/front.py": "how long a client waits for a leader",
    "carry/front.py": "how long a request that is answered is kept for its leader",
    "identity.py": "how long closing may take",
}
"""Where `asyncio.timeout` ends something of our own. Elsewhere a time in which the coordinator did
not run must not count."""


@pytest.mark.spec("OPERATION-35")
def test_time_outs_for_others_leave_out_when_the_coordinator_did_not_run() -> None:
    used = {
        module.relative_to(COORDINATOR).as_posix()
        for module in COORDINATOR.rglob("*.py")
        if module.parent.name != "commands"  # those are clients
        for node in nodes(module)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("asyncio.timeout", "asyncio.timeout_at", "asyncio.wait_for")
    }
    assert used == set(REAL_TIME)


def called(module: Path) -> set[str]:
    """The names of the functions and classes that a module calls."""
    return {
        node.func.id
        for node in nodes(module)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }


@pytest.mark.parametrize(("name", "place"), [("Parts", "app.py"), ("Endpoint", "api/routes.py")])
def test_parts_are_put_together_and_routes_are_listed_in_one_place(name: str, place: str) -> None:
    makers = [module for module in COORDINATOR.rglob("*.py") if name in called(module)]
    assert makers == [COORDINATOR / place]


def reads_environment(module: Path) -> bool:
    return any(
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
        and node.attr in ("environ", "getenv", "environb")
        for node in nodes(module)
    )


def test_only_the_command_lines_read_the_environment() -> None:
    readers = {
        module.relative_to(package.parent).as_posix()
        for package in (COORDINATOR, COMMON, AGENT)
        for module in package.rglob("*.py")
        if reads_environment(module)
    }
    allowed = {
        f"{package.name}/{name}.py"
        for package in (COORDINATOR, AGENT)
        for name in ("main", "settings")
    }
    assert readers <= allowed


def test_a_class_name_has_one_meaning_in_all_three_packages() -> None:
    names = Counter(
        node.name
        for package in (COORDINATOR, COMMON, AGENT)
        for module in package.rglob("*.py")
        for node in nodes(module)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, times in names.items() if times > 1] == []


def test_a_command_that_only_asks_imports_neither_the_server_nor_a_database_engine() -> None:
    listed = "import sys, ollama_coordinator.main; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True)
    assert {"hypercorn", "starlette.applications", "sqlite_utils", "psycopg"}.isdisjoint(
        ran.stdout.split()
    )
