"""Every developer command; `nox -l` lists them. Without a name: lint, types, tests."""

import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "tests"]

ROOT = nox.project.load_toml("pyproject.toml")
CONSTRAINTS = ("-c", "packages/constraints.txt")
BY_PATH = " @ {root:parent:uri}/common"
BESIDE = ("-n", str(os.cpu_count() or 1), "--dist", "worksteal")
"""A process for each core: most of its time a test waits for sockets."""


def install_workspace(session: nox.Session, *groups: str, constrained: bool = True) -> None:
    """Install the three packages in editable mode, and the named dependency groups."""
    dependencies = [d for g in groups for d in nox.project.dependency_groups(ROOT, g)]
    constraints = CONSTRAINTS if constrained else ()
    session.install(
        "-e", "packages/coordinator", "-e", "packages/agent", *dependencies, *constraints
    )
    # In a call of its own: pip takes an editable and a path install of one package for a conflict.
    session.install("--no-deps", "-e", "packages/common")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff; `nox -s lint -- --fix` mends what it can."""
    session.install(*nox.project.dependency_groups(ROOT, "lint"), *CONSTRAINTS)
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", *([] if "--fix" in session.posargs else ["--check"]))


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of packages and tests with mypy, strictly."""
    install_workspace(session, "types")
    session.run("mypy", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run all tests but the browser's and the slow ones; options go to pytest."""
    install_workspace(session, "test", "clients")
    session.run("pytest", *BESIDE, *session.posargs)


@nox.session(default=False)
def coverage(session: nox.Session) -> None:
    """Run the tests and show which lines they miss."""
    install_workspace(session, "test", "clients", "coverage")
    session.run("coverage", "run", "-m", "pytest", *session.posargs)
    session.run("coverage", "report", "--show-missing", "--skip-covered")


@nox.session(default=False)
def e2e(session: nox.Session) -> None:
    """Run the real programs as processes, and the dashboard in Chromium where there is one."""
    install_workspace(session, "test", "clients", "browser")
    session.run("pytest", "-m", "e2e", *session.posargs)


@nox.session(default=False)
def chaos(session: nox.Session) -> None:
    """Run the long fault tests: agents and the coordinator are killed under load."""
    install_workspace(session, "test", "clients")
    session.run("pytest", "-m", "chaos", *session.posargs)


@nox.session(default=False)
def conformance(session: nox.Session) -> None:
    """Aim the wire contract's cases at any URL: `nox -s conformance -- http://localhost:11434`."""
    install_workspace(session, "test", "clients")
    url, *rest = session.posargs or session.error("give the URL to aim at")
    session.run("pytest", "tests/contract", "--url", url, *rest)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Measure what the coordinator adds; `-- --against PATH` compares with another checkout's."""
    install_workspace(session, "test")
    session.run("python", "tests/benchmarks/proxy.py", *session.posargs)


@nox.session(default=False)
def holds(session: nox.Session) -> None:
    """Measure for how long hostile requests hold the event loop; `-- --copies 8` at once."""
    install_workspace(session, "test")
    session.run("python", "tests/benchmarks/loop_holds.py", *session.posargs)


@nox.session(default=False)
def trace(session: nox.Session) -> None:
    """Count the modules and functions that a warm streamed chat passes; `-- --list` names them."""
    install_workspace(session, "test")
    session.run("python", "tests/benchmarks/request_trace.py", *session.posargs)


@nox.session(default=False)
def simulate(session: nox.Session) -> None:
    """Compare the scheduling policies on a simulated fleet; `-- --quick` for a short run."""
    install_workspace(session, "test")
    results = "specs/SPEC-005-scheduling/results.md"
    options = session.posargs or ["--write", results]
    session.run("python", "tests/benchmarks/sim_policies.py", *options)


@nox.session(default=False)
def live(session: nox.Session) -> None:
    """Play the same traces through a real coordinator under each policy, against stand-ins."""
    install_workspace(session, "test")
    session.run("python", "tests/benchmarks/live.py", *session.posargs)


@nox.session(default=False)
def soak(session: nox.Session) -> None:
    """Load a fleet for an hour with the dashboard open; `-- --minutes 30` for another time."""
    install_workspace(session, "test", "browser")
    session.run("python", "tests/benchmarks/soak.py", *session.posargs)


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Start a coordinator with three agents to try; `-- --own` takes this machine's own Ollama."""
    install_workspace(session, "demo")
    session.run("python", "-m", "support.demo", *session.posargs, env={"PYTHONPATH": "tests"})


@nox.session(default=False)
def minimums(session: nox.Session) -> None:
    """Run the tests with the lowest versions that the packages claim to work with (needs uv)."""
    if session.venv_backend != "uv":
        session.skip("only uv resolves to the lowest versions")
    dependencies = [d for g in ("test", "clients") for d in nox.project.dependency_groups(ROOT, g)]
    session.install(*dependencies, *CONSTRAINTS)
    # Upgrading makes uv choose anew, also what the tests' own dependencies have brought along.
    lowest = ("--upgrade", "--resolution=lowest-direct")
    session.install(*lowest, "-e", "packages/coordinator", "-e", "packages/agent")
    session.install("--no-deps", "-e", "packages/common")
    session.run("pytest", *session.posargs)


@nox.session(default=False)
def build(session: nox.Session) -> None:
    """Build the three wheels into dist/, with `common` pinned by version instead of by path."""
    staging = Path(session.create_tmp()) / "packages"
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree("packages", staging)
    version = nox.project.load_toml("packages/common/pyproject.toml")["project"]["version"]
    for pyproject in staging.glob("*/pyproject.toml"):
        text = pyproject.read_text(encoding="utf-8")
        pyproject.write_text(text.replace(BY_PATH, f"=={version}"), encoding="utf-8")
    shutil.rmtree("dist", ignore_errors=True)
    session.install("build", *CONSTRAINTS)
    for package in ("common", "coordinator", "agent"):
        session.run(
            "python", "-m", "build", "--outdir", "dist", str(staging / package), silent=True
        )


@nox.session(default=False, reuse_venv=False)
@nox.parametrize("component", ["coordinator", "agent"])
def dist(session: nox.Session, component: str) -> None:
    """Install one component alone from its wheel and start it (after `nox -s build`)."""
    name = "ollama_coordinator" if component == "coordinator" else "ollama_coordinator_agent"
    wheels = [next(Path("dist").glob(f"{n}-*.whl")) for n in ("ollama_coordinator_common", name)]
    session.install(*map(str, wheels))
    session.run(name.replace("_", "-"), "--version")


@nox.session(default=False, venv_backend="none")
def constraints(session: nox.Session) -> None:
    """Rewrite packages/constraints.txt with the versions that uv resolves today."""
    session.run(
        *("uv", "export", "--quiet", "--no-emit-workspace", "--no-hashes", "--no-annotate"),
        *("--no-header", "--all-groups", "-o", "packages/constraints.txt"),
        silent=True,
        external=True,
    )
