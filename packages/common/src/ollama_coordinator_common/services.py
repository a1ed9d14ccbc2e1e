"""A program of ours as a service of the system: systemd, launchd, a task of Windows.

Pure but for `carry_out`: a plan says which files are written and which commands run. Settings are
in a file that its owner alone can read, and never in the service's own file, which others can.
"""

import os
import plistlib
import re
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from .error import OllamaCoordinatorError

SYSTEMD = Path("/run/systemd/system")
"""It exists where systemd is what runs the system (sd_booted(3))."""

HARDENED = """\
NoNewPrivileges=yes
CapabilityBoundingSet=
LockPersonality=yes
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectSystem=strict
RemoveIPC=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_NETLINK AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
UMask=0077
"""
"""What every service of ours lives with. Without MemoryDenyWriteExecute: GPU libraries compile."""

WITHOUT_ROOT = ("NoNewPrivileges", "Lock", "Restrict", "SystemCall", "UMask")
"""How those lines begin that a user's own systemd can keep too, without namespaces."""


class CannotInstall(OllamaCoordinatorError):
    """A service cannot be installed so; says what to do."""


class Service(Struct, frozen=True, kw_only=True):
    """A program as a service. `lines` are those of its own in the unit's section [Service].

    `account`: the user that the system runs it as; empty: one that systemd makes for it alone.
    `after`: units that it starts after where they are there.
    """

    name: str
    description: str
    program: Path
    lines: tuple[str, ...] = ()
    account: str = ""
    after: tuple[str, ...] = ()


class ServicePlan(Struct, frozen=True):
    """Files with what they hold, those to remove, and commands that follow.

    Files are for their owner alone, but for those in `public`.
    """

    files: dict[Path, str] = {}
    public: frozenset[Path] = frozenset()
    removed: tuple[Path, ...] = ()
    commands: tuple[tuple[str, ...], ...] = ()


def program_of(name: str) -> Path:
    """The program of ours with this name in the environment that runs."""
    return Path(sysconfig.get_path("scripts"), name + (".exe" if os.name == "nt" else ""))


# ── texts ─────────────────────────────────────────────────────────────────────────────────────


def settings_text(settings: Mapping[str, str], before: str = "") -> str:
    """The file with the settings, as systemd and `sh` read it; other lines of `before` stay.

    Raises:
        CannotInstall: a value has several lines.
    """
    lines = [] if before else ["# Settings of the service; restart it after a change."]
    kept = [line for line in before.splitlines() if line.partition("=")[0] not in settings]
    for name, value in settings.items():
        if not value.isprintable():
            raise CannotInstall(f"{name} has a character that a file of settings cannot have")
        lines.append(f'{name}="{_escaped(value)}"')
    return "\n".join([*kept, *lines]) + "\n"


def _escaped(value: str) -> str:
    """A value between double quotes, as both of them read it."""
    return re.sub(r'(["\\$`])', r"\\\1", value)


def system_unit(service: Service, settings_file: Path) -> str:
    """The unit of a service of the system, for systemd."""
    who = f"User={service.account}" if service.account else "DynamicUser=yes"
    hardened = HARDENED.splitlines()
    return _unit(service, settings_file, [who, *hardened, *service.lines], "multi-user.target")


def user_unit(service: Service, settings_file: Path) -> str:
    """The unit of a service of one user, for that user's systemd."""
    hardened = [line for line in HARDENED.splitlines() if line.startswith(WITHOUT_ROOT)]
    lines = [*hardened, *service.lines]
    return _unit(service, settings_file, lines, "default.target", is_system=False)


def _unit(
    service: Service,
    settings_file: Path,
    lines: Sequence[str],
    target: str,
    *,
    is_system: bool = True,
) -> str:
    after = " ".join(["network-online.target", *service.after])
    # A user's systemd has no network-online.target; both programs wait for the network themselves.
    network = ["Wants=network-online.target", f"After={after}"] if is_system else []
    return "\n".join([
        "[Unit]",
        f"Description={service.description}",
        *network,
        "",
        "[Service]",
        "Type=exec",
        f"ExecStart={_quoted(str(service.program))}",
        f"EnvironmentFile=-{str(settings_file).replace('%', '%%')}",
        "Restart=on-failure",
        "RestartSec=5",
        *lines,
        "",
        "[Install]",
        f"WantedBy={target}",
        "",
    ])  # fmt: skip


def _quoted(word: str) -> str:
    """One word of a unit's command line (systemd.service(5), "Command lines")."""
    plain = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{plain}"' if re.search(r"[\s'\"]", word) else plain


def launchd_plist(service: Service, settings_file: Path, log_file: Path) -> str:
    """The property list of a service of macOS, which reads the settings itself."""
    reading = 'set -a; [ ! -r "$0" ] || . "$0"; exec "$1"'
    return plistlib.dumps({
        "Label": service.name,
        "ProgramArguments": ["/bin/sh", "-c", reading, str(settings_file), str(service.program)],
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 5,
        "StandardOutPath": str(log_file),
        "StandardErrorPath": str(log_file),
    }, sort_keys=False).decode()  # fmt: skip


def windows_script(service: Service, settings: Mapping[str, str]) -> str:
    """A batch file with the settings that runs the program, for a task of Windows."""
    lines = [f'set "{name}={value.replace("%", "%%")}"' for name, value in settings.items()]
    return "\r\n".join(["@echo off", "chcp 65001 >nul", *lines, f'"{service.program}"', ""])


def windows_command(service: Service, script: Path) -> tuple[str, ...]:
    """What registers and starts a task that runs a batch file when its user logs on."""
    name, file = (text.replace("'", "''") for text in (service.name, str(script)))
    return ("powershell", "-NoProfile", "-Command", (
        f"Register-ScheduledTask '{name}' -Force"
        " -Trigger (New-ScheduledTaskTrigger -AtLogOn -User $env:USERNAME)"
        f" -Action (New-ScheduledTaskAction -Execute '\"{file}\"')"
        " -Settings (New-ScheduledTaskSettingsSet -ExecutionTimeLimit 0 -RestartCount 999"
        " -RestartInterval (New-TimeSpan -Minutes 1) -AllowStartIfOnBatteries"
        f" -DontStopIfGoingOnBatteries); Start-ScheduledTask '{name}'"
    ))  # fmt: skip


# ── plans ─────────────────────────────────────────────────────────────────────────────────────


class Places(Struct, frozen=True):
    """Where a service's file and its settings are, on one system for one kind of service."""

    file: Path
    settings: Path
    is_user: bool
    system: str

    @classmethod
    def of(cls, name: str, *, is_user: bool, home: Path, system: str = sys.platform) -> "Places":
        """The usual ones; `system` is `sys.platform`."""
        if system == "win32":
            folder = home / "AppData" / "Local" / "ollama-coordinator"
            return cls(folder / f"{name}.cmd", folder / f"{name}.cmd", True, system)
        if system == "darwin":
            folder = (home if is_user else Path("/")) / "Library"
            file = folder / ("LaunchAgents" if is_user else "LaunchDaemons") / f"{name}.plist"
            settings = folder / "Application Support" / "ollama-coordinator" / f"{name}.env"
            return cls(file, settings, is_user, system)
        if is_user:
            config = home / ".config"
            settings = config / "ollama-coordinator" / f"{name}.env"
            return cls(config / "systemd/user" / f"{name}.service", settings, True, system)
        etc = Path("/etc")
        return cls(etc / "systemd/system" / f"{name}.service", etc / f"{name}.env", False, system)


def installing(service: Service, settings: Mapping[str, str], places: Places) -> ServicePlan:
    """What installs and starts a service, and starts it again where it was installed before."""
    file, own = places.file, places.settings
    if places.system == "win32":
        script = windows_script(service, settings)
        return ServicePlan({file: script}, commands=(windows_command(service, file),))
    before = own.read_text("utf-8") if own.exists() else ""
    files = {own: settings_text(settings, before)}
    if places.system == "darwin":
        log = own.with_suffix(".log")
        files[file] = launchd_plist(service, own, log)
        domain = _domain(places)
        start = ("launchctl", "bootstrap", domain, str(file))
        return ServicePlan(files, frozenset({file}), commands=(start,))
    files[file] = (user_unit if places.is_user else system_unit)(service, own)
    control = _systemctl(places)
    commands = (
        (*control, "daemon-reload"),
        (*control, "enable", service.name),
        (*control, "restart", service.name),
    )
    return ServicePlan(files, frozenset({file}), commands=commands)


def removing(name: str, places: Places) -> ServicePlan:
    """What stops a service and takes it away; its settings and its data stay."""
    if places.system == "win32":
        task = ("schtasks", "/Delete", "/TN", name, "/F")
        return ServicePlan(commands=(("schtasks", "/End", "/TN", name), task))
    if places.system == "darwin":
        leaving = ("launchctl", "bootout", f"{_domain(places)}/{name}")
        return ServicePlan(removed=(places.file,), commands=(leaving,))
    control = _systemctl(places)
    commands = ((*control, "disable", "--now", name), (*control, "daemon-reload"))
    return ServicePlan(removed=(places.file,), commands=commands)


def asking(name: str, places: Places) -> tuple[str, ...]:
    """The command that says how a service is; its exit code is 0 while it runs."""
    if places.system == "win32":
        return ("schtasks", "/Query", "/TN", name, "/V", "/FO", "LIST")
    if places.system == "darwin":
        return ("launchctl", "print", f"{_domain(places)}/{name}")
    return (*_systemctl(places), "status", "--no-pager", "--lines=10", name)


def _systemctl(places: Places) -> tuple[str, ...]:
    return ("systemctl", "--user") if places.is_user else ("systemctl",)


def _domain(places: Places) -> str:
    return f"gui/{os.getuid()}" if places.is_user and hasattr(os, "getuid") else "system"


def as_text(plan: ServicePlan) -> str:
    """A plan for people: each file and what it holds, then the commands."""
    parts = [f"# {file}\n{text}" for file, text in plan.files.items()]
    parts += [f"# remove {file}\n" for file in plan.removed]
    return "\n".join([*parts, *(f"$ {subprocess.list2cmdline(one)}" for one in plan.commands)])


def carry_out(plan: ServicePlan, *, run: bool = True) -> None:
    """Write the files, run the commands if wanted; files are removed after the first of them.

    Raises:
        CannotInstall: a file cannot be written, or a command fails.
    """
    try:
        for file, text in plan.files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            draft = file.with_name(f"{file.name}.{os.getpid()}")
            draft.touch(0o644 if file in plan.public else 0o600)
            draft.write_text(text, "utf-8", newline="")
            draft.replace(file)
        for position, command in enumerate(plan.commands if run else ()):
            done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 (our own)
            if done.returncode and not plan.removed:
                said = (done.stderr or done.stdout).strip()
                raise CannotInstall(f"`{subprocess.list2cmdline(command)}` failed: {said}")
            if position == 0:
                _remove(plan)
        if not run:
            _remove(plan)
    except OSError as exc:
        where = f"{exc.filename or plan.commands}: {exc.strerror}"
        remedy = "run it as root (sudo), or with --user for a service of your own"
        raise CannotInstall(f"{where}; {remedy}") from exc


def _remove(plan: ServicePlan) -> None:
    for file in plan.removed:
        file.unlink(missing_ok=True)


def install(
    service: Service,
    settings: Mapping[str, str],
    places: Places,
    *,
    shows: bool,
    writes: bool,
) -> str:
    """Install and start a service; on macOS and Windows its file alone, where that is wanted.

    The text that is returned says what was done, and what is left to do. `shows`: nothing is done.

    Raises:
        CannotInstall: see `carry_out`.
    """
    plan = installing(service, settings, places)
    is_linux = places.system.startswith("linux")
    if shows or not (is_linux or writes):
        return as_text(plan)
    runs = is_linux and SYSTEMD.exists()
    carry_out(plan, run=runs)
    done = [f"written: {file}" for file in plan.files]
    if runs:
        done.append(f"{service.name} is started, and starts with the machine")
        if places.is_user:
            done.append("without anybody logged in, once `loginctl enable-linger` was run")
    else:
        left = (subprocess.list2cmdline(one) for one in plan.commands)
        done += ["to start it:", *(f"  {line}" for line in left)]
    return "\n".join(done)


def uninstall(name: str, places: Places) -> str:
    """Stop a service and remove it; says what was done.

    Raises:
        CannotInstall: see `carry_out`.
    """
    if places.system.startswith("linux"):
        if not places.file.exists():
            return f"{name} is not installed: there is no {places.file}"
        carry_out(removing(name, places), run=SYSTEMD.exists())
        return f"removed: {places.file}; its settings stay in {places.settings}"
    return as_text(removing(name, places))


def status(name: str, places: Places) -> int:
    """Have the system say how a service is; 0 while it runs."""
    if places.system.startswith("linux") and not places.file.exists():
        print(f"{name} is not installed: there is no {places.file}")  # noqa: T201
        return 4
    try:
        return subprocess.run(asking(name, places)).returncode  # noqa: S603 (our own)
    except OSError as exc:
        raise CannotInstall(f"{asking(name, places)[0]}: {exc.strerror}") from exc


def check_readable(program: Path, account_home: Path | None) -> None:
    """Refuse a program that the service's user cannot run: as in another user's home.

    `account_home` is that user's own home, where it may be.

    Raises:
        CannotInstall: it cannot.
    """
    if account_home is not None and program.is_relative_to(account_home):
        return
    for folder in program.resolve().parents:
        if not folder.stat().st_mode & 0o001 or folder in (Path("/home"), Path("/root")):
            raise CannotInstall(
                f"a service cannot run {program}: {folder} is for its owner alone. Install the"
                " program in a folder such as /opt/ollama-coordinator, or give --user"
            )
