"""What both command lines share: reading settings, and log lines with facts."""

import inspect
import io
import logging
from collections.abc import Iterator

import pytest

from ollama_coordinator_common.commandline import (
    EventFormatter,
    Option,
    log_to,
    number,
    one_of,
    texts,
    truth,
    whole_number,
    with_settings,
)
from ollama_coordinator_common.error import ConfigError

OPTIONS = (
    Option("PORT", "port", "8080", "PORT", "Where."),
    Option("NAME", "name", "x", "NAME", "Who."),
)


def make(*flags: str, **rest: object) -> dict[str, object]:
    return rest


def read(**given: str) -> tuple[int, str]:
    text = texts(OPTIONS, given)
    return whole_number("PORT", text["port"]), text["name"]


def test_an_option_stands_on_the_command_line_and_in_the_environment() -> None:
    parameter = Option("A_NAME", "some_name", "x", "NAME", "Who.").parameter(
        lambda *flags, **rest: (flags, rest)
    )
    assert (parameter.name, parameter.default) == ("some_name", "x")
    (flags, rest) = parameter.annotation.__metadata__[0]
    assert (flags, rest["envvar"], rest["help"]) == (("--some-name",), "A_NAME", "Who.")


def test_what_is_not_given_has_its_default() -> None:
    assert texts(OPTIONS, {"port": "1"}) == {"port": "1", "name": "x"}


def test_a_command_gets_its_settings_and_keeps_its_own_parameters() -> None:
    calls: list[tuple[str, tuple[int, str]]] = []

    @with_settings(read, OPTIONS, make)
    def command(what: str, settings: tuple[int, str]) -> None:
        calls.append((what, settings))

    command(what="go", port="1", name="y")
    assert calls == [("go", (1, "y"))]
    assert list(inspect.signature(command).parameters) == ["what", "port", "name"]


def test_a_setting_that_cannot_work_ends_the_program_with_its_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @with_settings(read, OPTIONS, make)
    def command(settings: tuple[int, str]) -> None:
        pytest.fail("must not run")

    with pytest.raises(SystemExit) as caught:
        command(port="http", name="")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "Error: PORT=http does not work: give a whole number\n"


def test_numbers_are_read_with_blanks_around_them() -> None:
    assert whole_number("V", " 12 ") == 12
    assert number("V", " 0.5 ") == 0.5


@pytest.mark.parametrize("text", ["", "x", "1.5", "0x10", "1e3"])
def test_what_is_no_whole_number_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match=r"V=.*: give a whole number"):
        whole_number("V", text)


@pytest.mark.parametrize("text", ["", "x", "1,5", "5s"])
def test_what_is_no_number_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match=r"V=.*: give a number"):
        number("V", text)


@pytest.mark.parametrize(
    ("text", "means"),
    [("true", True), (" Yes ", True), ("1", True), ("ON", True),
     ("false", False), ("no", False), ("0", False), ("Off", False)],
)  # fmt: skip
def test_truth_has_several_words(text: str, means: bool) -> None:
    assert truth("V", text) is means


@pytest.mark.parametrize("text", ["", "2", "maybe"])
def test_what_is_neither_true_nor_false_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match=r"V=.*: give true or false"):
        truth("V", text)


def test_a_choice_is_taken_in_any_letter_case_and_given_in_ours() -> None:
    assert one_of("V", " loaded-FIRST ", ("random", "loaded-first")) == "loaded-first"


@pytest.mark.parametrize("text", ["", "rand", "random,cpu"])
def test_another_choice_is_told_with_those_there_are(text: str) -> None:
    with pytest.raises(ConfigError, match=r"V=.*: give one of random, cpu"):
        one_of("V", text, ("random", "cpu"))


def record(message: str, **facts: object) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": message, "levelname": "INFO", **facts})


def test_facts_follow_the_event() -> None:
    line = EventFormatter("%(levelname)s %(message)s").format(
        record("agent offline", agent_id="a1", silent_seconds=61, model=None)
    )
    assert line == "INFO agent offline agent_id=a1 silent_seconds=61"


def test_an_event_without_facts_is_just_that() -> None:
    assert EventFormatter("%(message)s").format(record("coordinator stops")) == "coordinator stops"


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
