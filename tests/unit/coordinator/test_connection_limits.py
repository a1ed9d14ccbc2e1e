"""How many connections the limit on open files makes room for."""

import subprocess
import sys

import pytest

from ollama_coordinator.http1.limits import OWN_DESCRIPTORS, capacity_of


@pytest.mark.parametrize("descriptors", [256, 1024, 4096, 65_536, 1_048_576])
def test_every_client_has_a_way_to_an_agent_and_a_refusal_has_room(descriptors: int) -> None:
    capacity = capacity_of(descriptors)
    assert capacity.connections is not None
    left = descriptors - OWN_DESCRIPTORS - 2 * capacity.connections
    # Accepted at once in each of the turns of the loop that pass until a refusal is closed.
    assert left >= min(4 * capacity.backlog, 4096) - 1
    assert capacity.connections >= descriptors // 8


def test_a_tiny_limit_leaves_a_few() -> None:
    assert capacity_of(32).connections == 8


@pytest.mark.skipif(sys.platform == "win32", reason="sockets are not limited by number there")
@pytest.mark.spec("OPERATION-23")
def test_the_limit_is_raised_as_far_as_it_goes() -> None:
    code = "from ollama_coordinator.http1 import capacity; print(capacity().connections)"
    limited = 'ulimit -Sn 100; ulimit -Hn 2000; exec "$@"'
    done = subprocess.run(
        ["sh", "-c", limited, "sh", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == capacity_of(2000).connections
