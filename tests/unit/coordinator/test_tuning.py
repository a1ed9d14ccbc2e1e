"""The table of settings on the page against the options of the program."""

import pytest

from ollama_coordinator.settings import OPTIONS
from ollama_coordinator.tuning import SETTINGS
from ollama_coordinator_common.config import CoordinatorConfig

NOT_OF_A_COORDINATOR = {"log_level", "loop"}
"""Options of the process rather than of the coordinator in it."""


@pytest.mark.spec("DASH-16")
def test_every_option_is_on_the_page() -> None:
    options = {option.name for option in OPTIONS} - NOT_OF_A_COORDINATOR
    assert {setting.option for setting in SETTINGS} == options


def test_every_setting_is_a_field_with_a_name_of_its_own() -> None:
    fields = [setting.field for setting in SETTINGS]
    assert len(fields) == len(set(fields))
    assert set(fields) <= set(CoordinatorConfig.__struct_fields__)


def test_variables_are_those_of_the_options() -> None:
    variables = {option.name: option.variable for option in OPTIONS}
    assert all(variables[setting.option] == setting.variable for setting in SETTINGS)
