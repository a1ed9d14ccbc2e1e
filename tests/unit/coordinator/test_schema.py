"""The steps by which a database comes about."""

import pytest

from ollama_coordinator.db.schema import ADDITIONS, STEPS, Column, Table


@pytest.mark.spec("OPERATION-72")
@pytest.mark.parametrize("name", STEPS)
def test_a_step_that_an_earlier_version_can_do_without_is_named_so(name: str) -> None:
    makes, adds = ADDITIONS
    assert isinstance(STEPS[name], {makes: Table, adds: Column}[name[: name.index("_") + 1]])
