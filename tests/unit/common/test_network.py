"""The address that people type on other machines."""

from ipaddress import ip_address

import pytest

from ollama_coordinator_common.network import public_address


@pytest.mark.spec("DASH-35")
@pytest.mark.parametrize(
    ("bound", "told"),
    [
        ("127.0.0.1", None),
        ("::1", None),
        ("localhost", None),
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8::7", "[2001:db8::7]"),
        ("gpu-1.lan", "gpu-1.lan"),
    ],
)
def test_one_address_is_told_as_it_is_unless_it_is_loopback(bound: str, told: str | None) -> None:
    assert public_address(bound) == told


@pytest.mark.spec("DASH-35")
@pytest.mark.parametrize("bound", ["0.0.0.0", "::", ""])
def test_of_all_addresses_one_is_told_that_others_can_use(bound: str) -> None:
    told = public_address(bound)
    if told is not None:  # a machine without a network has none
        address = ip_address(told.strip("[]"))
        assert not address.is_unspecified
        assert not address.is_loopback
        assert (":" in told) == told.startswith("[")
