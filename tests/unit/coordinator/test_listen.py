"""The sockets on which the coordinator listens."""

import socket

import pytest

from ollama_coordinator.server import listen
from ollama_coordinator_common.error import ConfigError


def test_accepted_connections_notice_a_vanished_client_and_hold_no_token_back() -> None:
    (listener,) = listen("127.0.0.1", 0)
    with listener, socket.create_connection(listener.getsockname()):
        listener.setblocking(True)
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_a_port_that_is_taken_is_told() -> None:
    (listener,) = listen("127.0.0.1", 0)
    with listener, pytest.raises(ConfigError, match="stop what uses it"):
        listen("127.0.0.1", listener.getsockname()[1])
