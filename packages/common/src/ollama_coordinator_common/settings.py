"""Every setting of both programs, declared once: the fields of two configurations are the table.

The options and their `--help`, the checks of every value, the rows of `/api/settings` and the test
of the README tables derive from it. Nothing here reads the environment; the command lines do.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Self, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Struct, structs

from .error import ConfigError

TRUE = frozenset({"true", "yes", "on", "1"})
FALSE = frozenset({"false", "no", "off", "0"})
LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
POLICIES = ("predicted", "loaded-first", "least-connections", "round-robin", "random", "cpu")
HTTP_CHOICES = ("auto", "hypercorn")
ACCESS_CHOICES = ("auto", "open", "keys")
USAGE_CHOICES = ("people", "keys", "off")
MEBIBYTE = 1024 * 1024

UNITS = {
    "s": "seconds", "days": "days", "MiB": "mebibytes", "GiB": "gibibytes", "requests": "requests",
    "tokens/s": "tokens a second",
}  # fmt: skip
"""The word for every unit."""

SHORTEST = 0.01
"""The shortest duration in seconds; below it a loop would turn without a pause."""

LONGEST = 365 * 86_400.0
"""The longest duration in seconds, a year: longer is a slip of the pen, and timers overflow."""


class Setting(Struct, frozen=True):
    """One setting: what its field in a configuration says of it.

    A number is within `bounds`, both included; `zero` is what 0 means where it is possible beside
    them. `live`: it can be changed while the program runs. `secret`: it is never shown. `option` is
    its option without the dashes, where that is not its name. `name`, `kind` (its type) and
    `default` are the field's.
    """

    variable: str
    help: str
    metavar: str = ""
    unit: str = ""
    bounds: tuple[float, float] | None = None
    zero: str = ""
    choices: tuple[str, ...] = ()
    live: bool = False
    secret: bool = False
    option: str = ""
    name: str = ""
    kind: Any = str
    default: Any = None

    @property
    def flag(self) -> str:
        """The option on the command line."""
        return f"--{(self.option or self.name).replace('_', '-')}"

    @property
    def placeholder(self) -> str:
        """What `--help` shows in the place of a value."""
        if self.kind is bool:
            return "true|false"
        return "|".join(self.choices) or self.metavar or UNITS[self.unit].upper()

    @property
    def text(self) -> str:
        """One sentence on what the setting is, without its full stop."""
        return self.help + (f"; 0 {self.zero}" if self.zero else "")

    @property
    def default_text(self) -> str:
        """The default as a person writes it; the empty text where there is none."""
        match self.default:
            case None:
                return ""
            case bool():
                return str(self.default).lower()
            case float():
                return f"{self.default:g}"
            case tuple():
                return ",".join(self.default)
            case _:
                return str(self.default)

    @property
    def expected(self) -> str:
        """What a right value is."""
        if self.choices:
            return f"give one of {', '.join(self.choices)}"
        if self.kind is bool:
            return "give true or false"
        if self.bounds is None:
            return "give a text"
        noun = "a number" if self.kind is float else "a whole number"
        noun += f" of {UNITS[self.unit]}" if self.unit else ""
        noun = "a port" if self.metavar == "PORT" else noun
        least, most = (f"{bound:.12g}" for bound in self.bounds)
        return f"give {noun} from {least} to {most}" + (f", or 0 {self.zero}" if self.zero else "")

    def read(self, text: str) -> Any:
        """The value that the environment or the command line gives as a text.

        Raises:
            ConfigError: it means nothing, or is out of bounds.
        """
        word = text.strip()
        try:
            value = self._meaning(word)
        except ValueError:
            raise ConfigError(self.variable, text, self.expected) from None
        self.check(value, text)
        return value

    def _meaning(self, word: str) -> Any:
        """The value of a text; a `ValueError` where it has none."""
        if self.kind is bool:
            if word.lower() not in TRUE | FALSE:
                raise ValueError(word)
            return word.lower() in TRUE
        if self.kind in (int, float):
            return self.kind(word)
        if get_origin(self.kind) is tuple:
            return tuple(part.strip() for part in word.split(",") if part.strip())
        if not word and self.default is None:
            return None
        if Path in get_args(self.kind):
            return Path(word).expanduser()
        return next((choice for choice in self.choices if choice.lower() == word.lower()), word)

    def take(self, value: object) -> Any:
        """The value that JSON gives.

        Raises:
            ConfigError: it has another type, or is out of bounds.
        """
        if isinstance(value, str) and self.choices:
            return self.read(value)
        try:
            taken = msgspec.convert(value, self.kind)
        except (msgspec.ValidationError, OverflowError):
            raise ConfigError(self.variable, value, self.expected) from None
        self.check(taken, value)
        return taken

    def check(self, value: Any, given: object) -> None:
        """Refuse a value that cannot work; `given` is how the operator wrote it.

        Raises:
            ConfigError: it is out of bounds, or none of the choices.
        """
        fits = not self.choices or value in self.choices
        if self.bounds is not None:
            least, most = self.bounds
            # NaN is in no bounds.
            fits = least <= value <= most or (bool(self.zero) and value == 0)
        if not fits:
            raise ConfigError(self.variable, given, self.expected)


class Config(Struct, frozen=True, kw_only=True):
    """A configuration: every field but `given` is annotated with its `Setting`.

    `given` names the settings that the environment or the command line gives.
    """

    given: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for setting in self.settings():
            value = getattr(self, setting.name)
            setting.check(value, value)

    @classmethod
    def settings(cls) -> tuple[Setting, ...]:
        """The table."""
        return _table(cls)

    @classmethod
    def read(cls, texts: Mapping[str, str]) -> Self:
        """The configuration of some texts; what is not given has its default.

        Raises:
            ConfigError: one of them cannot work.
        """
        values = {s.name: s.read(texts[s.name]) for s in cls.settings() if s.name in texts}
        return cls(**values)


@cache
def _table(config: type[Config]) -> tuple[Setting, ...]:
    hints = get_type_hints(config, include_extras=True)
    made = []
    for field in structs.fields(config):
        kind, *notes = get_args(hints[field.name])
        for setting in notes:
            if isinstance(setting, Setting):
                known = {"name": field.name, "kind": kind, "default": field.default}
                made.append(structs.replace(setting, **known))
    return tuple(made)


def _seconds(variable: str, help: str, *, least: float = SHORTEST, zero: str = "") -> Setting:
    """A duration, which can be changed while the program runs."""
    return Setting(variable, help, unit="s", bounds=(least, LONGEST), zero=zero, live=True)


def _port(variable: str, help: str, *, zero: str = "") -> Setting:
    return Setting(variable, help, metavar="PORT", bounds=(1, 65_535), zero=zero)


# Two tables, a setting a paragraph.
# fmt: off
class CoordinatorConfig(Config, frozen=True, kw_only=True):
    """How a coordinator runs. The fields are in the order of the page of settings."""

    policy: Annotated[str, Setting(
        "COORDINATOR_POLICY", "How to choose among the agents", choices=POLICIES,
    )] = POLICIES[0]
    max_queue: Annotated[int, Setting(
        "COORDINATOR_MAX_QUEUE",
        "How many requests may wait for a place; one more is answered 503",
        unit="requests", bounds=(0, 1_000_000), live=True,
    )] = 512
    agent_timeout: Annotated[float, _seconds(
        "AGENT_TIMEOUT", "How long an agent may be silent before it counts as offline",
    )] = 60.0
    wake_patience: Annotated[float, Setting(
        "COORDINATOR_WAKE_PATIENCE",
        "How long a request waits for a machine that sleeps and is woken for it",
        unit="s", bounds=(1, 3600), zero="to wake none", live=True,
    )] = 90.0
    wake_to: Annotated[tuple[str, ...], Setting(
        "COORDINATOR_WAKE_TO",
        "Addresses, split by commas, with or without a port, where magic packets go; the broadcast"
        " address of a machine's network if not given",
        metavar="LIST",
    )] = ()
    health_check_interval: Annotated[float, _seconds(
        "HEALTH_CHECK_INTERVAL",
        "How often to ask agents that do not report their models by themselves",
    )] = 30.0
    max_body_mebibytes: Annotated[int, Setting(
        "COORDINATOR_MAX_BODY_MIB", "The largest request body; a longer one is answered 413",
        unit="MiB", bounds=(1, 1_000_000), live=True, option="max_body",
    )] = 64
    drain_timeout: Annotated[float, _seconds(
        "COORDINATOR_DRAIN_TIMEOUT",
        "How long running answers may go on after a request to stop",
        least=0,
    )] = 300.0
    stall_timeout: Annotated[float, _seconds(
        "COORDINATOR_STALL_TIMEOUT", "How long a client may take nothing of its answer",
        zero="for ever",
    )] = 300.0
    body_timeout: Annotated[float, _seconds(
        "COORDINATOR_BODY_TIMEOUT", "How long nothing may come of a request's body",
        zero="for ever",
    )] = 60.0
    larger_context: Annotated[bool, Setting(
        "COORDINATOR_LARGER_CONTEXT",
        "Serve a request on a runner with a larger context than it asks for, not by a reload",
        live=True,
    )] = True
    continue_answers: Annotated[bool, Setting(
        "COORDINATOR_CONTINUE",
        "Go on with an answer on another agent when its agent breaks it off",
        live=True, option="continue",
    )] = True
    limits: Annotated[str, Setting(
        "COORDINATOR_LIMITS",
        "How much each client may use whose name a pattern means, such as *@school.example"
        " concurrent=1 tokens_per_day=50000",
        metavar="NAME LIMIT=NUMBER,...", live=True,
    )] = ""
    reading_pace: Annotated[float, Setting(
        "COORDINATOR_READING_PACE", "How fast people read along while an answer is written",
        unit="tokens/s", bounds=(0.1, 10_000), live=True,
    )] = 15.0
    pull_placement: Annotated[str, Setting(
        "COORDINATOR_PULL_PLACEMENT", "Which agents get a model that is pulled or created",
        metavar="fitting|all|NUMBER|label:NAME|agents:NAME,...", live=True,
    )] = "fitting"
    rebalance: Annotated[str, Setting(
        "COORDINATOR_REBALANCE",
        "Whether models are copied to where the advice would have them, by themselves (auto)",
        choices=("off", "auto"), live=True,
    )] = "off"
    model_disk_gibibytes: Annotated[float, Setting(
        "COORDINATOR_MODEL_DISK_GIB",
        "How much disk of one machine models may take where advice brings another one",
        unit="GiB", bounds=(0.001, 1_000_000), zero="for what is free", live=True,
        option="model_disk",
    )] = 0.0
    history_rows: Annotated[int, Setting(
        "COORDINATOR_HISTORY_ROWS", "How many finished requests to remember (never their texts)",
        unit="requests", bounds=(1, 1_000_000_000), live=True,
    )] = 100_000
    history_days: Annotated[float, Setting(
        "COORDINATOR_HISTORY_DAYS", "How long to remember them",
        unit="days", bounds=(0.001, 365_000), live=True,
    )] = 30.0
    usage: Annotated[str, Setting(
        "COORDINATOR_USAGE",
        "Of whom to add up what they use: of people and keys, of keys alone, of nobody",
        choices=USAGE_CHOICES, live=True,
    )] = USAGE_CHOICES[0]
    pull_patience: Annotated[float, _seconds(
        "COORDINATOR_PULL_PATIENCE",
        "How long a pull waits for a lost agent when all others are done; it goes on later",
        least=0,
    )] = 15.0
    max_spool_gibibytes: Annotated[float, Setting(
        "COORDINATOR_MAX_SPOOL_GIB",
        "How much disk uploaded model files may take until their model is created",
        unit="GiB", bounds=(1e-9, 1_000_000), live=True, option="max_spool",
    )] = 64.0
    webhook: Annotated[str, Setting(
        "COORDINATOR_WEBHOOK", "The URL that is told by a POST what needs a person",
        metavar="URL", live=True, secret=True,
    )] = ""
    webhook_body: Annotated[str, Setting(
        "COORDINATOR_WEBHOOK_BODY",
        'What it is sent, with {text} for the message, such as {"content": "{text}"}',
        metavar="JSON", live=True,
    )] = ""
    host: Annotated[str, Setting(
        "COORDINATOR_HOST", "Where to listen", metavar="ADDRESS",
    )] = "0.0.0.0"
    port: Annotated[int, _port("COORDINATOR_PORT", "On which port", zero="for any")] = 8080
    database_url: Annotated[str, Setting(
        "DATABASE_URL",
        "The database: sqlite://FILE in the working folder, or postgresql://USER@HOST/DATABASE",
        metavar="URL",
    )] = "sqlite://coordinator.db"
    workers: Annotated[int, Setting(
        "COORDINATOR_WORKERS", "How many processes serve clients; one of them leads",
        metavar="NUMBER", bounds=(1, 64),
    )] = 1
    advertise: Annotated[str, Setting(
        "COORDINATOR_ADVERTISE",
        "The URL at which other coordinators on its PostgreSQL reach this one", metavar="URL",
    )] = ""
    tls: Annotated[str, Setting(
        "COORDINATOR_TLS",
        "What secures connections of clients and agents: nothing, a certificate that the"
        " coordinator makes, or the files of one and its key",
        metavar="off|self|CERT,KEY",
    )] = "off"
    origins: Annotated[tuple[str, ...], Setting(
        "COORDINATOR_ORIGINS",
        "Web pages that may use the coordinator, beside those of this machine; * is any text",
        metavar="ORIGIN,...",
    )] = ()
    access: Annotated[str, Setting(
        "COORDINATOR_ACCESS",
        "Who comes in without a key: the private network until there are keys (auto), anyone, "
        "nobody",
        choices=ACCESS_CHOICES,
    )] = ACCESS_CHOICES[0]
    key_file: Annotated[Path | None, Setting(
        "COORDINATOR_KEY_FILE",
        "A file with a key of all rights, made if there is none; the command line sends it",
        metavar="FILE",
    )] = None
    join_token: Annotated[str, Setting(
        "COORDINATOR_JOIN_TOKEN", "A join token that is in force from the start", metavar="TOKEN",
        secret=True,
    )] = ""
    trusted_proxies: Annotated[tuple[str, ...], Setting(
        "COORDINATOR_TRUSTED_PROXIES",
        "Addresses and networks of proxies that say truly for whom they ask",
        metavar="LIST",
    )] = ()
    trusted_networks: Annotated[tuple[str, ...], Setting(
        "COORDINATOR_TRUSTED_NETWORKS",
        "Addresses and networks that may use models without a key, whoever else needs one",
        metavar="LIST",
    )] = ()
    hosts: Annotated[tuple[str, ...], Setting(
        "COORDINATOR_HOSTS",
        "Names by which browsers may open the coordinator without a key, beside its own",
        metavar="NAME,...",
    )] = ()
    user_header: Annotated[tuple[str, ...], Setting(
        "COORDINATOR_USER_HEADER",
        "Headers in which trusted proxies and keys that may name users name them",
        metavar="HEADER,...",
    )] = ()
    http: Annotated[str, Setting(
        "COORDINATOR_HTTP",
        "Which HTTP/1 serves clients: the fastest that works here, or Hypercorn's own",
        choices=HTTP_CHOICES,
    )] = "auto"
    loop: Annotated[str, Setting(
        "COORDINATOR_LOOP",
        "Which event loop runs it: uvloop where it is installed, or asyncio's",
        choices=("auto", "asyncio", "uvloop"),
    )] = "auto"
    log_level: Annotated[str, Setting(
        "COORDINATOR_LOG_LEVEL", "How much to log", choices=LOG_LEVELS,
    )] = "INFO"
    log_format: Annotated[str, Setting(
        "COORDINATOR_LOG_FORMAT", "How a line of the log looks", choices=LOG_FORMATS,
    )] = LOG_FORMATS[0]
    announce: Annotated[bool, Setting(
        "COORDINATOR_ANNOUNCE",
        "Whether agents on the private network that have no URL find it, by multicast DNS",
    )] = True
    otlp_endpoint: Annotated[str, Setting(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "Where traces of requests are sent, by OTLP over HTTP; needs the extra [otel]",
        metavar="URL",
    )] = ""
    access_log: Annotated[bool, Setting(
        "COORDINATOR_ACCESS_LOG", "Whether each request is a line of the log",
    )] = False

    @property
    def max_body_bytes(self) -> int:
        """The largest request body that is accepted; a longer one is answered 413."""
        return self.max_body_mebibytes * MEBIBYTE


class AgentConfig(Config, frozen=True, kw_only=True):
    """How an agent runs."""

    coordinator_url: Annotated[str, Setting(
        "COORDINATOR_URL",
        "The coordinator; several, split by commas, are tried in turn; looked for if not given",
        metavar="URL",
    )] = ""
    join_token: Annotated[str, Setting(
        "AGENT_JOIN_TOKEN", "The join token with which this machine comes into the fleet",
        metavar="TOKEN", secret=True,
    )] = ""
    certificate: Annotated[str, Setting(
        "COORDINATOR_CERTIFICATE",
        "The SHA-256 of the coordinator's own certificate, the only one that is then believed; a"
        " join token has it",
        metavar="SHA256",
    )] = ""
    ollama_port: Annotated[int, _port("OLLAMA_PORT", "The local Ollama's port")] = 11434
    machine_name: Annotated[str | None, Setting(
        "AGENT_MACHINE_NAME", "What people call this machine; its host name if not given",
        metavar="NAME",
    )] = None
    ip_address: Annotated[str | None, Setting(
        "AGENT_IP_ADDRESS", "Where the coordinator reaches this machine; found out if not given",
        metavar="ADDRESS",
    )] = None
    state_dir: Annotated[Path | None, Setting(
        "AGENT_STATE_DIR",
        "Where the machine's id and Ollama's log are kept; the user's state folder if not given",
        metavar="FOLDER",
    )] = None
    manage_ollama: Annotated[bool, Setting(
        "AGENT_MANAGE_OLLAMA", "Whether to start `ollama serve` when no Ollama answers",
    )] = True
    keep_ollama: Annotated[bool, Setting(
        "AGENT_KEEP_OLLAMA", "Whether an `ollama serve` that the agent started outlives it",
    )] = False
    ollama_binary: Annotated[Path | None, Setting(
        "OLLAMA_BINARY",
        "The ollama program; looked for on PATH and where it is installed if not given",
        metavar="FILE",
    )] = None
    transport: Annotated[str, Setting(
        "AGENT_TRANSPORT",
        "How the coordinator reaches Ollama: at its port, by a link that the agent opens, or the"
        " first that works",
        choices=("auto", "direct", "link"),
    )] = "auto"
    schedule: Annotated[str | None, Setting(
        "AGENT_SCHEDULE",
        "When this machine serves, such as `mon-fri 18:00-08:00, sat-sun`; always if not given",
        metavar="TIMES",
    )] = None
    idle_after: Annotated[float, Setting(
        "AGENT_IDLE_AFTER",
        "Serve only after so long without input, while no other program uses the GPU, and not on"
        " battery",
        unit="s", bounds=(1, 86_400), zero="to serve always",
    )] = 0.0
    relay: Annotated[str, Setting(
        "AGENT_RELAY",
        "Whether to relay the coordinator to an Ollama that listens on loopback only",
        choices=("auto", "always", "never"),
    )] = "auto"
    relay_port: Annotated[int, _port("AGENT_RELAY_PORT", "The relay's port", zero="for any")] = 0
    relay_allow: Annotated[tuple[str, ...], Setting(
        "AGENT_RELAY_ALLOW",
        "Addresses and networks, split by commas, that may use the relay besides the coordinator",
        metavar="LIST",
    )] = ()
    models: Annotated[str, Setting(
        "AGENT_MODELS",
        "Where other machines of the fleet get this machine's models, with a ticket of the"
        " coordinator: at any free port, at an address, over the link alone, or nowhere",
        metavar="auto|HOST:PORT|link|off",
    )] = "auto"
    log_level: Annotated[str, Setting(
        "AGENT_LOG_LEVEL", "How much to log", choices=LOG_LEVELS,
    )] = "INFO"
    log_format: Annotated[str, Setting(
        "AGENT_LOG_FORMAT", "How a line of the log looks", choices=LOG_FORMATS,
    )] = LOG_FORMATS[0]

    @property
    def coordinator_urls(self) -> tuple[str, ...]:
        """The coordinators that are tried in turn; none: it is looked for."""
        return tuple(url.strip() for url in self.coordinator_url.split(",") if url.strip())
# fmt: on
