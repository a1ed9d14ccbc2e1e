"""The sockets on which the coordinator listens."""

import socket

import pytest

from ollama_coordinator.server import listen
from ollama_coordinator_common.error import ConfigError
from support.sockets import asked_every_15_seconds


@pytest.mark.spec("OPERATION-26")
def test_accepted_connections_stay_open_in_routers_and_hold_no_token_back() -> None:
    (listener,) = listen("127.0.0.1", 0)
    with listener, socket.create_connection(listener.getsockname()):
        listener.setblocking(True)
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert asked_every_15_seconds(accepted)


def test_a_port_that_is_taken_is_told() -> None:
    (listener,) = listen("127.0.0.1", 0)
    with listener, pytest.raises(ConfigError, match="stop what uses it"):
        listen("127.0.0.1", listener.getsockname()[1])
