"""A difference is told so that it can be read."""

import aiohttp
import pytest

from support.conformance import Aim, Case, Endpoint, Reply, check, differences


def test_differences_are_told_by_where_they_are() -> None:
    alone = {"status": 200, "records": [{"a": 1, "b": "x"}, {}]}
    through = {"status": 404, "records": [{"a": 1, "c": "x"}]}
    assert list(differences(alone, through)) == [
        "records: 2 of them alone, 1 through the fleet",
        "records[0].b: 'x' alone, '(absent)' through the fleet",
        "records[0].c: '(absent)' alone, 'x' through the fleet",
        "status: 200 alone, 404 through the fleet",
    ]
    assert list(differences(alone, alone)) == []


async def test_what_is_not_as_expected_is_told_at_once() -> None:
    async with aiohttp.ClientSession() as session:
        endpoint = Endpoint("http://here", Aim(None, "m", "e"), session)
        case = Case("c", "GET", "/x", status=200, kind="a/b", says="no {model}", has=("done",))
        reply = Reply(500, {"content-type": "c/d"}, b'{"error":"other"}')
        with pytest.raises(pytest.fail.Exception) as caught:
            check(endpoint, case, reply)
    told = str(caught.value)
    for part in ("GET http://here/x", "expected 200, got 500", "'no m', got 'other'", "lacks done"):
        assert part in told
