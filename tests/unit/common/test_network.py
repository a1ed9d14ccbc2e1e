"""The address that people type on other machines."""

from ipaddress import ip_address

import pytest

from ollama_coordinator_common.network import coordinator_url, is_address, public_address


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


@pytest.mark.spec("AGENT-3")
@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("coordinator", "http://coordinator:8080"),
        ("10.77.0.10:9000", "http://10.77.0.10:9000"),
        ("::1", "http://[::1]:8080"),
        ("[::1]:9000", "http://[::1]:9000"),
        ("coordinator/k/oc_abc", "http://coordinator:8080/k/oc_abc"),
        ("http://coordinator/", "http://coordinator"),
        ("https://example.org/below/", "https://example.org/below"),
    ],
)
def test_a_coordinators_url_is_taken_as_ollama_takes_its_host(written: str, meant: str) -> None:
    assert coordinator_url(written) == meant


@pytest.mark.spec("AGENT-3")
@pytest.mark.parametrize("written", ["", "ftp://c", "c:99999", "http://[::1", "two words", "://c"])
def test_what_is_no_coordinators_url_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="give a URL such as http://coordinator:8080"):
        coordinator_url(written)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("192.168.1.20", True), ("gpu-1.lan", True), ("4090", False), ("300.1.1.1", False)],
)
def test_a_number_at_the_end_of_a_name_makes_it_no_address(text: str, expected: bool) -> None:
    assert is_address(text) is expected
