"""What both command lines share: reading settings, and log lines with facts."""

import inspect
import io
import logging
from collections.abc import Iterator, Mapping

import pytest

from ollama_coordinator_common.commandline import EventFormatter, log_to, with_settings
from ollama_coordinator_common.settings import Setting

TABLE = (
    Setting("PORT", "Where", metavar="PORT", bounds=(1, 9), name="port", kind=int, default=8),
    Setting("NAME", "Who", metavar="NAME", name="name", option="a_name", default="x"),
)


def make(*flags: str, **rest: object) -> dict[str, object]:
    return rest


def read(texts: Mapping[str, str]) -> tuple[object, ...]:
    return tuple(setting.read(texts[setting.name]) for setting in TABLE)


def test_an_option_stands_on_the_command_line_and_in_the_environment() -> None:
    @with_settings(read, TABLE, lambda *flags, **rest: (flags, rest))
    def command(settings: tuple[object, ...]) -> None:
        pytest.fail("must not run")

    parameter = inspect.signature(command).parameters["name"]
    assert parameter.default == "x"
    (flags, rest) = parameter.annotation.__metadata__[0]
    assert (flags, rest["envvar"], rest["help"]) == (("--a-name",), "NAME", "Who.")


def test_a_command_gets_its_settings_and_keeps_its_own_parameters() -> None:
    calls: list[tuple[str, tuple[object, ...]]] = []

    @with_settings(read, TABLE, make)
    def command(what: str, settings: tuple[object, ...]) -> None:
        calls.append((what, settings))

    command(what="go", port="2", name="y")
    assert calls == [("go", (2, "y"))]
    assert list(inspect.signature(command).parameters) == ["what", "port", "name"]


def test_a_setting_that_cannot_work_ends_the_program_with_its_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @with_settings(read, TABLE, make)
    def command(settings: tuple[object, ...]) -> None:
        pytest.fail("must not run")

    with pytest.raises(SystemExit) as caught:
        command(port="http", name="")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "Error: PORT=http does not work: give a port from 1 to 9\n"


def record(message: str, **facts: object) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": message, "levelname": "INFO", **facts})


def test_facts_follow_the_event() -> None:
    line = EventFormatter("%(levelname)s %(message)s").format(
        record("agent offline", agent_id="a1", silent_seconds=61, model=None)
    )
    assert line == "INFO agent offline agent_id=a1 silent_seconds=61"


def test_an_event_without_facts_is_just_that() -> None:
    assert EventFormatter("%(message)s").format(record("coordinator stops")) == "coordinator stops"


@pytest.mark.spec("DASH-36")
def test_a_line_steers_no_terminal_and_is_one_line() -> None:
    formatter = EventFormatter("%(message)s")
    line = formatter.format(record("agent\x1b[2J offline", reason="no\nway\u202e"))
    assert line == r"agent\x1b[2J offline reason=no\nway\u202e"
    try:
        raise ValueError("\x1b[31mred")
    except ValueError as exc:
        text = formatter.formatException((ValueError, exc, exc.__traceback__))
    assert text.endswith(r"ValueError: \x1b[31mred")
    assert "\n" in text


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, put back as it was."""
    logger = logging.getLogger()
    handlers, level = list(logger.handlers), logger.level
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)


def test_libraries_speak_up_from_warnings_on(root: logging.Logger) -> None:
    out = io.StringIO()
    log_to(logging.StreamHandler(out), "DEBUG", "%(name)s %(message)s")
    logging.getLogger("aiohttp.client").info("chatter")
    logging.getLogger("hypercorn.error").warning("trouble")
    logging.getLogger("ollama_coordinator").debug("fact", extra={"n": 1})
    assert out.getvalue() == "hypercorn.error trouble\nollama_coordinator fact n=1\n"
