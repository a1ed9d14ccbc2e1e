"""`service install|status|uninstall`: the coordinator as a service of its machine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from ollama_coordinator_common.commandline import ending, is_given, with_settings
from ollama_coordinator_common.services import (
    CannotInstall,
    Places,
    Service,
    check_readable,
    install,
    program_of,
    status,
    uninstall,
)
from ollama_coordinator_common.settings import CoordinatorConfig

NAME = "ollama-coordinator"

FOLDER = Path("/var/lib/ollama-coordinator")
"""What systemd keeps for the service, and all that its user can write to."""

service = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Run the coordinator as a service: install, status, uninstall.",
)

OwnService = Annotated[
    bool, typer.Option("--user", help="A service of this user alone, without root.")
]


def read(texts: Mapping[str, str]) -> CoordinatorConfig:
    """The configuration as the operator gave it, see `settings.read`."""
    from .settings import read  # most of a start's time, for which no other command waits

    return read(texts)


@service.command("install")
@with_settings(read, CoordinatorConfig.settings(), typer.Option)
def install_service(
    context: typer.Context,
    settings: CoordinatorConfig,
    user: OwnService = False,
    write: Annotated[
        bool, typer.Option("--write", help="On macOS and Windows: write the file, not only show.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Change nothing: show all of it.")] = False,
) -> None:
    """Install and start the coordinator as a service, with the settings that are given here.

    Those that an earlier installation wrote stay, unless they are given again.
    """
    given = {
        one.variable: str(context.params[one.name])
        for one in CoordinatorConfig.settings()
        if is_given(context, one.name)
    }
    with ending(settings.log_format):
        places = _places(user)
        made, given = coordinator_service(places, settings, given)
        typer.echo(install(made, given, places, shows=show, writes=write))


@service.command("status")
def service_status(user: OwnService = False) -> None:
    """Show how the service is; the exit code is 0 while it runs."""
    with ending():
        raise typer.Exit(status(NAME, _places(user)))


@service.command("uninstall")
def uninstall_service(user: OwnService = False) -> None:
    """Stop the service and remove it; its settings and its database stay."""
    with ending():
        typer.echo(uninstall(NAME, _places(user)))


def coordinator_service(
    places: Places, settings: CoordinatorConfig, given: Mapping[str, str]
) -> tuple[Service, dict[str, str]]:
    """The coordinator as a service, and its settings: those given, and a place for its data.

    Where the system runs it, it is nobody else's user.

    Raises:
        CannotInstall: such a user cannot run the program, or write to the database.
    """
    program, given = program_of(NAME), dict(given)
    # COORDINATOR_DRAIN_TIMEOUT, and 100 s to end in order.
    lines = [f"TimeoutStopSec={settings.drain_timeout + 100:.0f}", "KillMode=mixed"]
    if places.system.startswith("linux"):
        lines += [
            "StateDirectory=ollama-coordinator",
            "Environment=DATABASE_URL=sqlite:///%S/ollama-coordinator/coordinator.db",
        ]
    else:
        file = places.settings.parent / "coordinator.db"
        given.setdefault("DATABASE_URL", f"sqlite:///{file.as_posix().lstrip('/')}")
    if not places.is_user and places.system.startswith("linux"):
        check_readable(program, None)
        _check_database(given.get("DATABASE_URL", ""))
        # Ports below 1024 are root's otherwise.
        capability = "CAP_NET_BIND_SERVICE"
        lines += [f"CapabilityBoundingSet={capability}", f"AmbientCapabilities={capability}"]
        lines += ["PrivateDevices=yes", "ProtectHome=yes", "ProtectProc=invisible"]
    made = Service(
        name=NAME,
        description="Ollama Coordinator: many Ollama machines behind one endpoint",
        program=program,
        lines=tuple(lines),
    )
    return made, given


def _check_database(url: str) -> None:
    from .db.address import database_path

    path = database_path(url) if url.startswith("sqlite:") else None
    if path is not None and not path.is_relative_to(FOLDER):
        raise CannotInstall(
            f"DATABASE_URL={url}: a service of the system can write to {FOLDER} alone. Leave it out"
            " and bring the data there (`ollama-coordinator restore`), give PostgreSQL's, or --user"
        )


def _places(is_user: bool) -> Places:
    return Places.of(NAME, is_user=is_user, home=Path.home())
