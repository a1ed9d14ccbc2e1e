"""`service install|status|uninstall`: the agent as a service of its machine."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from msgspec import structs

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
from ollama_coordinator_common.settings import AgentConfig

from .settings import calling_user, ollama_variables, read

NAME = "ollama-coordinator-agent"

OLLAMAS_USER = "ollama"
"""The user that Ollama's installer for Linux makes."""

service = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Run the agent as a service: install, status, uninstall.",
)

OwnService = Annotated[
    bool, typer.Option("--user", help="A service of this user alone, without root.")
]


@service.command("install")
@with_settings(read, AgentConfig.settings(), typer.Option)
def install_service(
    context: typer.Context,
    settings: AgentConfig,
    user: OwnService = False,
    account: Annotated[
        str,
        typer.Option(
            "--as",
            metavar="ACCOUNT",
            help="Whom it runs as: ollama, if there is that user, or who calls sudo.",
        ),
    ] = "",
    write: Annotated[
        bool, typer.Option("--write", help="On macOS and Windows: write the file, not only show.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Change nothing: show all of it.")] = False,
) -> None:
    """Install and start the agent as a service, with the settings that are given here.

    Those that an earlier installation wrote stay, unless they are given again.
    """
    given = ollama_variables() | {
        one.variable: str(context.params[one.name])
        for one in AgentConfig.settings()
        if is_given(context, one.name)
    }
    with ending(settings.log_format):
        places = _places(user)
        made = agent_service(places, account, given)
        typer.echo(install(made, given, places, shows=show, writes=write))


@service.command("status")
def service_status(user: OwnService = False) -> None:
    """Show how the service is; the exit code is 0 while it runs."""
    with ending():
        raise typer.Exit(status(NAME, _places(user)))


@service.command("uninstall")
def uninstall_service(user: OwnService = False) -> None:
    """Stop the service and remove it; its settings and its state stay."""
    with ending():
        typer.echo(uninstall(NAME, _places(user)))


def agent_service(places: Places, account: str, given: Mapping[str, str]) -> Service:
    """The agent as a service that gets these variables.

    Where the system runs it, that is as the user who has Ollama's models and may write to them.

    Raises:
        CannotInstall: there is no such user, or it cannot run the program.
    """
    made = Service(
        name=NAME,
        description="Ollama Coordinator's agent beside this machine's Ollama",
        program=program_of(NAME),
        lines=("KillMode=mixed", "TimeoutStopSec=60"),
    )
    if places.is_user or sys.platform == "win32" or not places.system.startswith("linux"):
        return made
    account, home = _account(account)
    check_readable(made.program, home)
    folder = "%S/ollama-coordinator-agent"
    kept = ("StateDirectory=ollama-coordinator-agent", f"Environment=AGENT_STATE_DIR={folder}")
    if home is None:
        models = ["ProtectHome=yes", f"Environment=HOME={folder}"]
    else:
        named = (given.get(name) for name in ("OLLAMA_MODELS", "AGENT_STATE_DIR"))
        writable = [home / ".ollama", *map(Path, filter(None, named))]
        models = ["ProtectHome=read-only", *(f"ReadWritePaths=-{one}" for one in writable)]
    lines = (*made.lines, *kept, *models)
    return structs.replace(made, account=account, lines=lines, after=("ollama.service",))


if sys.platform == "win32":

    def _account(wanted: str) -> tuple[str, Path | None]:
        return wanted, None

else:
    import pwd

    def _account(wanted: str) -> tuple[str, Path | None]:
        """Whom the service runs as, and that user's home; none: a user that systemd makes."""
        for name in filter(None, [wanted, OLLAMAS_USER, calling_user()]):
            with suppress(KeyError):
                return name, Path(pwd.getpwnam(name).pw_dir)
            if name == wanted:
                raise CannotInstall(f"there is no user {wanted} on this machine")
        return "", None


def _places(is_user: bool) -> Places:
    return Places.of(NAME, is_user=is_user, home=Path.home())
