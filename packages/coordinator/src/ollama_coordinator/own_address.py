"""Under which address other machines reach this one."""

import socket
from ipaddress import ip_address

# Of the networks for documentation (RFC 5737, RFC 3849): no machine has them, and a route to
# anywhere leads there.
ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
DISCARD_PORT = 9


def own_address(bound: str) -> str | None:
    """Where others reach a server that binds a host, as URLs have it; `None`: nowhere, or unknown.

    One that binds every address is reached at that of the route out of here.
    """
    if bound == "localhost":
        return None
    try:
        address = ip_address(bound or "0.0.0.0")
    except ValueError:
        return bound
    if address.is_unspecified:
        routed = _address_of_route(socket.AF_INET6 if address.version == 6 else socket.AF_INET)
        if routed is None:
            return None
        address = ip_address(routed)
    if address.is_loopback:
        return None
    return f"[{address}]" if address.version == 6 else str(address)


def _address_of_route(family: socket.AddressFamily) -> str | None:
    """This machine's address on the way out; a UDP socket asks the routes and sends nothing."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((ELSEWHERE[family], DISCARD_PORT))
            return str(probe.getsockname()[0]).partition("%")[0]
    except OSError:
        return None
