"""The table of settings: what texts and values mean, and how an impossible one is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from ollama_coordinator_common.error import ConfigError
from ollama_coordinator_common.settings import AgentConfig, Config, CoordinatorConfig, Setting


def test_the_defaults_are_those_of_the_first_version() -> None:
    config = CoordinatorConfig()
    assert (config.host, config.port) == ("0.0.0.0", 8080)
    assert config.database_url == "sqlite://coordinator.db"
    assert (config.health_check_interval, config.agent_timeout) == (30, 60)
    assert AgentConfig().ollama_port == 11434


@pytest.mark.parametrize(
    ("variable", "setting"),
    [
        ("HEALTH_CHECK_INTERVAL", {"health_check_interval": 0.0}),
        ("HEALTH_CHECK_INTERVAL", {"health_check_interval": float("nan")}),
        ("AGENT_TIMEOUT", {"agent_timeout": -1.0}),
        ("AGENT_TIMEOUT", {"agent_timeout": float("inf")}),
        ("COORDINATOR_MAX_BODY_MIB", {"max_body_mebibytes": 0}),
        ("COORDINATOR_MAX_QUEUE", {"max_queue": -1}),
        ("COORDINATOR_DRAIN_TIMEOUT", {"drain_timeout": -0.5}),
        ("COORDINATOR_STALL_TIMEOUT", {"stall_timeout": -1}),
        ("COORDINATOR_BODY_TIMEOUT", {"body_timeout": float("inf")}),
        ("COORDINATOR_DRAIN_TIMEOUT", {"drain_timeout": float("nan")}),
        ("COORDINATOR_DRAIN_TIMEOUT", {"drain_timeout": float("inf")}),
        ("COORDINATOR_PORT", {"port": -1}),
        ("COORDINATOR_PORT", {"port": 65536}),
    ],
)
def test_an_impossible_number_names_its_variable_and_value(
    variable: str, setting: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="give ") as caught:
        CoordinatorConfig(**setting)
    assert caught.value.variable == variable
    assert caught.value.value is next(iter(setting.values()))
    assert f"{variable}={next(iter(setting.values()))}" in str(caught.value)


def test_nothing_may_wait_and_nothing_may_linger() -> None:
    config = CoordinatorConfig(max_queue=0, drain_timeout=0, port=0)
    assert (config.max_queue, config.drain_timeout, config.port) == (0, 0, 0)


def test_the_body_limit_is_given_in_mebibytes() -> None:
    assert CoordinatorConfig(max_body_mebibytes=3).max_body_bytes == 3 * 1024 * 1024


CONFIGS: list[type[Config]] = [CoordinatorConfig, AgentConfig]
SETTINGS = [(config, setting) for config in CONFIGS for setting in config.settings()]
EACH = pytest.mark.parametrize(
    ("config", "setting"), SETTINGS, ids=[setting.variable for _, setting in SETTINGS]
)
NUMBERS = [setting for _, setting in SETTINGS if setting.kind in (int, float)]


@EACH
def test_every_field_of_a_configuration_is_a_setting(
    config: type[Config], setting: Setting
) -> None:
    names = [setting.name for setting in config.settings()]
    assert set(names) == set(config.__struct_fields__) - {"given"}
    variables = [setting.variable for setting in config.settings()]
    assert len(set(variables)) == len(variables)


@EACH
def test_a_default_is_what_its_text_means(config: type[Config], setting: Setting) -> None:
    assert setting.read(setting.default_text) == setting.default
    assert setting.take(json.loads(json.dumps(setting.default, default=str))) == setting.default


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda setting: setting.variable)
def test_a_number_has_two_bounds_and_cannot_be_beyond_them(setting: Setting) -> None:
    assert setting.bounds is not None
    least, most = setting.bounds
    for text in (f"{most * 2}", "1e300", "nan", "inf", "-inf", "-1", "", "x", "9" * 5000):
        with pytest.raises(ConfigError, match="give a") as caught:
            setting.read(text)
        assert str(caught.value).startswith(f"{setting.variable}={text} does not work: ")
    wrong: tuple[object, ...] = (
        most * 2, 1e300, float("nan"), float("inf"), -1, True, "1", None, [], 10**400,
    )  # fmt: skip
    for value in wrong:
        with pytest.raises(ConfigError, match="give a"):
            setting.take(value)
    for value in (least, most):
        assert setting.take(setting.kind(value)) == setting.read(f"{value:.12g}") == value


def test_numbers_are_read_with_blanks_around_them() -> None:
    settings = {setting.name: setting for setting in CoordinatorConfig.settings()}
    assert settings["max_queue"].read(" 12 ") == 12
    assert settings["agent_timeout"].read(" 0.5 ") == 0.5


@pytest.mark.parametrize("text", ["1.5", "0x10", "1e3"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    setting = Setting("V", "How many", bounds=(0, 9), kind=int)
    with pytest.raises(ConfigError, match=r"V=.*: give a whole number from 0 to 9"):
        setting.read(text)


@pytest.mark.parametrize(
    ("text", "means"),
    [("true", True), (" Yes ", True), ("1", True), ("ON", True),
     ("false", False), ("no", False), ("0", False), ("Off", False)],
)  # fmt: skip
def test_truth_has_several_words(text: str, means: bool) -> None:
    assert Setting("V", "Whether", kind=bool).read(text) is means


@pytest.mark.parametrize("text", ["", "2", "maybe"])
def test_what_is_neither_true_nor_false_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"V=.*: give true or false"):
        Setting("V", "Whether", kind=bool).read(text)


def test_a_choice_is_taken_in_any_letter_case_and_given_in_ours() -> None:
    setting = Setting("V", "How", choices=("random", "loaded-first", "INFO"))
    assert setting.read(" loaded-FIRST ") == setting.take("LOADED-first") == "loaded-first"
    assert setting.read("info") == "INFO"


@pytest.mark.parametrize("text", ["", "rand", "random,cpu"])
def test_another_choice_is_refused_with_those_there_are(text: str) -> None:
    setting = Setting("V", "How", choices=("random", "cpu"))
    for take in (setting.read, setting.take):
        with pytest.raises(ConfigError, match=r"V=.*: give one of random, cpu"):
            take(text)


def test_what_may_be_missing_is_none_where_nothing_is_given() -> None:
    config = AgentConfig.read({"machine_name": " ", "state_dir": "", "relay_allow": " , "})
    assert (config.machine_name, config.state_dir, config.relay_allow) == (None, None, ())
    assert AgentConfig.read({"state_dir": "~/a"}).state_dir == Path.home() / "a"
