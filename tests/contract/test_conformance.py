"""One table of requests: what Ollama answers, and that the fleet answers the same."""

import pytest

from support.conformance import Case, Endpoint, check, differences, fail_with
from support.conformance_table import CASES, DIFFERENCES, FLEET, OWN_STATE, TO_MEND

NAMED = {case.name: case for case in CASES}
ALIKE = [name for name in NAMED if name not in DIFFERENCES and name not in TO_MEND]


@pytest.mark.spec("SURFACE-1")
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", NAMED)
async def test_ollama_answers_as_the_table_says(direct: Endpoint, name: str) -> None:
    if direct.aim.url is not None:
        await _skip_what_does_not_apply(direct, NAMED[name])
    reply = await direct.ask(NAMED[name])
    if direct.aim.url is not None and "dial tcp" in (reply.error or ""):
        pytest.skip("it has no way to its registry there")
    check(direct, NAMED[name], reply)


@pytest.mark.spec("SURFACE-1")
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", [*ALIKE, *FLEET])
async def test_the_fleet_answers_as_the_table_says(fleet: Endpoint, name: str) -> None:
    case: Case = FLEET.get(name, NAMED[name])
    check(fleet, case, await fleet.ask(case))


@pytest.mark.spec("SURFACE-1")
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", ALIKE)
async def test_the_fleet_answers_as_one_ollama_does(
    direct: Endpoint, fleet: Endpoint, name: str
) -> None:
    alone, through = await direct.ask(NAMED[name]), await fleet.ask(NAMED[name])
    found = differences(alone.comparable(), through.comparable())
    fail_with(f"{NAMED[name].method} {NAMED[name].path}", found)


@pytest.mark.spec("SURFACE-1")
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", [*DIFFERENCES, *TO_MEND])
async def test_a_difference_with_a_reason_is_one(
    direct: Endpoint, fleet: Endpoint, name: str
) -> None:
    """A reason that is no longer needed has to go."""
    alone, through = await direct.ask(NAMED[name]), await fleet.ask(NAMED[name])
    assert through.comparable() != alone.comparable(), (DIFFERENCES | TO_MEND)[name]


async def _skip_what_does_not_apply(direct: Endpoint, case: Case) -> None:
    """Aimed at a URL: what hangs on its account, and on a model that it may not have."""
    if case.name in OWN_STATE:
        pytest.skip("depends on the account and the settings there")
    wanted = "{embeds}" if "{embeds}" in str(case.body) else "{model}"
    if (await direct.say("POST", "/api/show", {"model": wanted})).status == 404:
        pytest.skip(f"there is no {direct.named(wanted)} there; see --model, --embed-model")
