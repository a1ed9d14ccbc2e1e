"""The command line; the only reader of the environment and of the arguments."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.logging import RichHandler

from ollama_coordinator_common.commandline import (
    JSON,
    PLAIN,
    ending,
    is_given,
    is_typed,
    last_words,
    log_json,
    log_to,
    with_settings,
)
from ollama_coordinator_common.error import OllamaCoordinatorError
from ollama_coordinator_common.protocol import Finding
from ollama_coordinator_common.settings import AgentConfig

from . import __version__
from .assembly import assembled, diagnosed, examined
from .display import loading, plain, render, render_finding, show
from .doctor import FAILED, cards
from .installation import (
    RELEASE,
    SUMS,
    CannotInstallOllama,
    Source,
    archives,
    install_ollama,
    own_folder,
)
from .service import service
from .settings import certificate, read
from .upgrade import joined_to, upgrade

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
"""SIGHUP is POSIX's closed terminal, SIGBREAK Windows' Ctrl-Break and closed console."""

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    help="Offer this machine's Ollama to a fleet: look after it and report it to the coordinator.",
    epilog="Without a command it runs. OLLAMA_HOST, OLLAMA_MODELS and Ollama's other variables are"
    " passed on to an `ollama serve` that the agent starts.",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"ollama-coordinator-agent {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
@with_settings(read, AgentConfig.settings(), typer.Option)
def default(
    context: typer.Context,
    settings: AgentConfig | None,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Offer this machine's Ollama to a fleet: look after it and report it to the coordinator."""
    if settings is not None:
        _run(settings)
    elif any(is_typed(context, name) for name in context.params):
        typer.echo(f"Error: give options after `{context.invoked_subcommand}`", err=True)
        raise typer.Exit(2)


app.add_typer(service, name="service")


@app.command()
@with_settings(read, AgentConfig.settings(), typer.Option)
def run(settings: AgentConfig) -> None:
    """Register with the coordinator and stay registered until stopped."""
    _run(settings)


@app.command()
@with_settings(read, AgentConfig.settings(), typer.Option)
def status(
    settings: AgentConfig,
    json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Show what the agent would report; the exit code is 1 if something is wrong."""
    log_to(logging.StreamHandler(), "WARNING", PLAIN)
    view = asyncio.run(examined(settings, os.environ))
    if json:
        typer.echo(msgspec.json.encode(plain(view)))
    else:
        Console().print(render(view))
    if view.coordinator_trouble or view.ollama_trouble:
        raise typer.Exit(1)


@app.command()
@with_settings(read, AgentConfig.settings(), typer.Option)
def doctor(
    settings: AgentConfig,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Go through all that is needed, and say what is wrong and what to do; exit code 1 if so."""
    log_to(logging.StreamHandler(), "WARNING", PLAIN)
    found = asyncio.run(_diagnose(settings, None if json else Console()))
    if json:
        typer.echo(msgspec.json.encode(found))
    if any(finding.level == FAILED for finding in found):
        raise typer.Exit(1)


async def _diagnose(settings: AgentConfig, screen: Console | None) -> list[Finding]:
    found = []
    async with aclosing(diagnosed(settings, os.environ)) as findings:
        async for finding in findings:
            found.append(finding)
            if screen is not None:
                screen.print(render_finding(finding), highlight=False)
    return found


@app.command("install-ollama")
def get_ollama(
    release: Annotated[
        str, typer.Option("--release", metavar="VERSION", help="Of Ollama.")
    ] = RELEASE,
    place: Annotated[
        str,
        typer.Option("--from", metavar="FILE|URL", help="Another archive of it."),
    ] = "",
    sha256: Annotated[
        str,
        typer.Option("--sha256", metavar="HEX", help=f"The archive's; else {SUMS} beside it."),
    ] = "",
    rocm: Annotated[
        bool | None,
        typer.Option("--rocm/--no-rocm", help="With what AMD's GPUs need; if there is one."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--into", metavar="FOLDER", help="Another folder than its own.")
    ] = None,
) -> None:
    """Install Ollama in a folder of the agent's own: checked, resumable, without root.

    The agent starts that one from then on. As root it is installed for all users.
    """
    with ending():
        if sha256 and not place:
            raise CannotInstallOllama("--sha256 is for an archive that --from names")
        amd = any(card.vendor == "AMD" for card in cards())
        sources = (
            [Source(place, sha256)]
            if place
            else archives(release, rocm=amd if rocm is None else rocm)
        )
        target = folder or own_folder()
        with loading() as progress:
            program, version = asyncio.run(install_ollama(sources, target, progress))
        typer.echo(f"Ollama {version} is installed: {program}")
        if folder is None:
            typer.echo("An agent that runs finds it once it is started again.")
        else:
            typer.echo(f"Give the agent OLLAMA_BINARY={program}.")


@app.command("upgrade")
@with_settings(read, AgentConfig.settings(), typer.Option)
def to_coordinators_version(context: typer.Context, settings: AgentConfig) -> None:
    """Install the coordinator's version, where its join line has installed this one."""
    folder = Path(sys.prefix)
    try:
        url, believed = joined_to(folder)
        if is_given(context, "coordinator_url"):
            url = next(iter(settings.coordinator_urls), url)
        asyncio.run(upgrade(url, folder, os.environ, certificate=certificate(settings) or believed))
    except OllamaCoordinatorError as exc:
        last_words(str(exc), settings.log_format)
        raise typer.Exit(1) from exc
    typer.echo("Done. An agent that runs has its new version once it is started again.")


def _run(settings: AgentConfig) -> None:
    console = Console()
    live = console if console.is_terminal and settings.log_format != JSON else None
    if settings.log_format == JSON:
        log_json(settings.log_level)
    elif live is None:
        log_to(logging.StreamHandler(), settings.log_level, PLAIN)
    else:  # above the live table
        handler = RichHandler(console=live, show_path=False, markup=False)
        log_to(handler, settings.log_level, "%(message)s")
    try:
        with asyncio.Runner(loop_factory=fast_loop()) as runner:
            runner.run(_serve(settings, live))
    except OllamaCoordinatorError as exc:
        last_words(str(exc), settings.log_format)
        raise typer.Exit(1) from exc


def fast_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's event loop where it is installed (the extra `fast`); `None` for asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _serve(settings: AgentConfig, live: Console | None) -> None:
    """Run until a signal; the live status, if any, ends after the goodbye."""
    with cancelled_by_signals():
        async with (
            assembled(settings, dict(os.environ)) as daemon,
            asyncio.TaskGroup() as tasks,
        ):
            if live is not None:
                tasks.create_task(show(live, daemon.view))
            await daemon.run()


@contextmanager
def cancelled_by_signals() -> Iterator[None]:
    """Cancel the current task on a signal; the block then ends without an error.

    Plain handlers and not `loop.add_signal_handler`, which Windows does not have.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    if task is None:
        raise RuntimeError("no task to cancel")
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        loop.call_soon_threadsafe(task.cancel)

    before = {
        number: signal.signal(number, stop)
        for name in STOPPING
        if (number := getattr(signal, name, None)) is not None
        and signal.getsignal(number) is not signal.SIG_IGN  # as under nohup
    }
    try:
        yield
    except asyncio.CancelledError:
        if not asked:
            raise
        task.uncancel()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
