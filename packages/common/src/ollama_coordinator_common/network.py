"""Hosts, addresses and ports, as texts and as this machine's routes have them."""

import contextlib
import errno
import ipaddress
import re
import socket
import ssl
from asyncio.trsock import TransportSocket
from collections.abc import Sequence
from urllib.parse import urlsplit

from .types import AgentId

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

ELSEWHERE = {4: "192.0.2.1", 6: "2001:db8::1"}
"""Addresses of the networks for documentation (RFC 5737, RFC 3849): no machine has them, and the
route to them is the one to other networks."""

LOOPBACK = "127.0.0.1"
"""What `same_host` calls the machine itself."""

DISCARD_PORT = 9
"""RFC 863; nothing is sent there."""

KEEP_ALIVE_SECONDS = 15
KEEP_ALIVE_PROBES = 9
"""TCP keep-alive as Go's servers and clients have it, Ollama among them: the first probe after 15 s
of silence, one each 15 s, the end after nine without an answer. Routers and container networks
forget a silent connection after 20 s to some minutes; the kernels' own two hours are too late."""

NO_MACHINE = tuple(
    ipaddress.ip_network(text)
    for text in (
        *("0.0.0.0/8", "::/128"),  # unspecified; Linux connects it to itself
        *("169.254.0.0/16", "fe80::/10"),  # link-local, where clouds have their metadata
        *("224.0.0.0/4", "ff00::/8", "240.0.0.0/4"),  # multicast, reserved, broadcast
        *("fd00:ec2::254/128", "fd20:ce::254/128", "100.100.100.200/32"),  # more metadata: AWS,
        *("192.0.0.192/32", "168.63.129.16/32"),  # Google, Alibaba, Oracle, Azure
    )
)
"""Networks in which no Ollama can be."""

PRIVATE_NETWORKS = tuple(
    ipaddress.ip_network(text)
    for text in (
        *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"),  # RFC 1918
        "fc00::/7",  # unique local addresses, RFC 4193
        *("169.254.0.0/16", "fe80::/10"),  # link-local
        "100.64.0.0/10",  # RFC 6598: carriers' networks, Tailscale
    )
)
"""Exactly these; Python's `is_private` has others, such as 203.0.113.0/24, and lacks the last."""

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""IPv4 addresses as IPv6 hosts see them (RFC 6052)."""

METADATA_NAMES = frozenset(
    {"metadata", "metadata.google.internal", "metadata.goog", "instance-data", "metadata.internal"}
)
"""The names that clouds give to the addresses of their metadata."""

LINK_DOMAIN = ".link.internal"
"""The host of an agent that is reached by its link is its id before this. No name server is asked
for it; an Ollama on loopback takes requests for hosts in `internal`, and in few others."""

_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?")
_NUMBERS = re.compile(r"(?:.*\.)?[0-9]+\.?")

COORDINATOR_PORT = 8080
"""Of a coordinator whose URL has neither scheme nor port."""


def is_address(text: str) -> bool:
    """Whether the text is an IP address or could be a host name.

    A name whose last label is a number is neither (RFC 1123, section 2.1): 300.1.1.1.
    """
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return _HOST.fullmatch(text) is not None and not _NUMBERS.fullmatch(text)
    return True


def coordinator_url(text: str) -> str:
    """A coordinator's URL, without a slash at its end, from what a person wrote.

    As Ollama takes OLLAMA_HOST: without a scheme it is http, and then port 8080 if not given.

    Raises:
        ValueError: it is none; the text says what would be right.
    """
    scheme, separator, rest = text.strip().rpartition("://")
    host, slash, path = rest.partition("/")
    address = parse_address(host)
    if address is not None and address.version == 6:
        host = f"[{host}]"
    try:
        parts = urlsplit(f"{scheme if separator else 'http'}://{host}")
        port = parts.port
    except ValueError as exc:
        raise ValueError(f"{exc}; give a URL such as http://coordinator:8080") from None
    known = parts.scheme in ("http", "https")
    if not known or not parts.hostname or any(character.isspace() for character in text.strip()):
        raise ValueError("give a URL such as http://coordinator:8080")
    if not separator and port is None:
        host = f"{host}:{COORDINATOR_PORT}"
    return f"{parts.scheme}://{host}{slash}{path}".rstrip("/")


def link_host(agent_id: AgentId) -> str:
    """The host name of an agent that is reached by its link."""
    return f"{agent_id}{LINK_DOMAIN}"


def linked_agent(host: str) -> AgentId | None:
    """The agent of a host name that `link_host` made."""
    return AgentId(host.removesuffix(LINK_DOMAIN)) if host.endswith(LINK_DOMAIN) else None


def parse_address(text: str) -> Address | None:
    """The address of a socket name: without its zone, IPv4 where it is IPv4 inside IPv6."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host; a name other than localhost is not looked up."""
    address = parse_address(host)
    return host == "localhost" if address is None else address.is_loopback


def is_private(address: Address) -> bool:
    """Whether an address, which is not IPv4 inside IPv6, is of a private network."""
    return any(address in network for network in PRIVATE_NETWORKS)


def is_no_machine(address: Address) -> bool:
    """Whether no Ollama can be at an address, so that nothing is ever sent there."""
    inside = getattr(address, "sixtofour", None) or getattr(address, "ipv4_mapped", None)
    if inside is None and address in _NAT64:
        inside = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if inside is not None and is_no_machine(inside):
        return True
    return any(address in network for network in NO_MACHINE)


def same_host(host: str) -> str:
    """One text for the ways to write a host: letter case, IPv4 inside IPv6, names of loopback."""
    address = parse_address(host)
    if address is None:
        name = host.lower().rstrip(".")
        return LOOPBACK if name == "localhost" else name
    if address.is_unspecified or address == ipaddress.IPv6Address(1):
        return LOOPBACK  # Linux connects 0.0.0.0 to itself
    return str(address)


def is_ours(address: Address) -> bool:
    """Whether an address is one of this machine's; nothing is sent.

    Where the kernel lets programs bind others' addresses (`ip_nonlocal_bind`), the route tells: it
    leads to an address of this machine from that address itself.
    """
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    if address.is_loopback or address.is_unspecified:
        return True
    return local_address([str(address)], DISCARD_PORT) in (None, str(address))


def machine_of(host: str) -> str:
    """A host as `same_host` writes it; loopback for each address of this machine."""
    address = parse_address(host)
    if address is None or address.is_loopback or not is_ours(address):
        return same_host(host)
    return LOOPBACK


def client_network(address: str) -> str:
    """What one client has: an IPv4 address, or the 64 bits before those of its own choice."""
    found = parse_address(address)
    if found is None or found.version == 4:
        return address
    return f"{int(found) >> 64:x}::/64"


def keep_alive(
    sock: socket.socket | TransportSocket,
    *,
    idle_seconds: int = KEEP_ALIVE_SECONDS,
    interval_seconds: int = KEEP_ALIVE_SECONDS,
    probes: int = KEEP_ALIVE_PROBES,
) -> None:
    """Have TCP keep a silent connection open in every router between, and notice a dead one."""
    options = (
        ("TCP_KEEPIDLE", idle_seconds),
        ("TCP_KEEPALIVE", idle_seconds),  # macOS's name for it
        ("TCP_KEEPINTVL", interval_seconds),
        ("TCP_KEEPCNT", probes),
    )
    # Old Windows lacks some of these; macOS refuses all of them on a connection that was reset.
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options:
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def netloc(host: str, port: int) -> str:
    """Host and port as URLs have them (RFC 3986, section 3.2.2)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def local_address(remote: Sequence[str], port: int) -> str | None:
    """The address that this machine has towards the first of `remote` it has a route to.

    A UDP socket is connected: this asks the routing table and sends nothing.
    """
    for address in remote:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((address, port))
                return str(probe.getsockname()[0])
        except OSError:
            continue
    return None


def public_address(bound: str) -> str | None:
    """Where other machines reach a server that binds a host, as URLs have it.

    `None`: nowhere, or unknown. A server that binds every address is reached at the one of the
    route to other networks.
    """
    address = parse_address(bound or "0.0.0.0")
    if address is None:
        return None if bound == "localhost" else bound
    if address.is_unspecified:
        routed = local_address([ELSEWHERE[address.version]], DISCARD_PORT)
        address = parse_address(routed) if routed else None
    if address is None or address.is_loopback:
        return None
    return f"[{address}]" if address.version == 6 else str(address)


_REFUSED = "connection refused: nothing listens there"
_SILENT = "no answer in time: it is stuck or off, or a firewall drops what is sent to it"
_RESET = "it reset the connection"
_CAUSES = {
    "ECONNREFUSED": _REFUSED,
    "EHOSTUNREACH": "unreachable: no machine answers at that address, or a firewall rejects it",
    "EHOSTDOWN": "unreachable: the machine at that address is down",
    "ENETUNREACH": "no route to its network",
    "ENETDOWN": "this machine's network is down",
    "EPERM": "a firewall of this machine forbids it",
    "ECONNRESET": _RESET,
    "ECONNABORTED": _RESET,
    "EPIPE": _RESET,
    "ETIMEDOUT": _SILENT,
    "EADDRINUSE": "the port is in use",
    "EMFILE": "this process has no file descriptor left (ulimit -n)",
}
_BY_NUMBER = {getattr(errno, name): text for name, text in _CAUSES.items() if hasattr(errno, name)}

_CERTIFICATE = {
    9: "its certificate is not valid yet: is this machine's clock behind?",
    10: "its certificate has expired, or this machine's clock is ahead",
    62: "its certificate is another host's",
    64: "its certificate is another address's",
    **dict.fromkeys(
        (18, 19, 20, 21), "its certificate is vouched for by nobody whom this machine trusts"
    ),
}
"""By OpenSSL's X509_V_ERR_* (x509_vfy.h): 18 to 21 are self-signed and unknown issuers."""

_PLAIN = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")


_KINDS: tuple[tuple[type[BaseException], str], ...] = (
    (socket.gaierror, "its host name is not found"),
    (ConnectionRefusedError, _REFUSED),
    (ConnectionError, _RESET),
    (TimeoutError, _SILENT),
)


def cause_of(exc: BaseException) -> str:
    """What went wrong, in one clause for people: refused, unreachable, no route, not found, TLS.

    aiohttp keeps the system's error in another one; asyncio puts those of several addresses into
    one text, with their numbers.
    """
    for name in ("certificate_error", "os_error"):
        exc = getattr(exc, name, None) or exc
    if isinstance(exc, ssl.SSLError):
        return _cause_of_tls(exc)
    if isinstance(exc, socket.gaierror) and exc.errno == socket.EAI_AGAIN:
        return "no name server answers for its host name"
    for kind, text in _KINDS:
        if isinstance(exc, kind):
            return text
    if isinstance(exc, OSError) and exc.filename:
        return f"{exc.strerror}: {exc.filename}"
    own = getattr(exc, "errno", None)
    numbers = re.findall(r"\[Errno (\d+)\]", str(exc)) if own is None else [own]
    known = next((_BY_NUMBER[one] for one in map(int, numbers) if one in _BY_NUMBER), None)
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(exc).__name__).lower()
    return known or getattr(exc, "strerror", None) or str(exc) or words


def _cause_of_tls(exc: ssl.SSLError) -> str:
    if isinstance(exc, ssl.SSLCertVerificationError):
        known = _CERTIFICATE.get(getattr(exc, "verify_code", 0))
        return known or f"its certificate is not believed: {exc.strerror or exc}"
    reason = getattr(exc, "reason", None) or exc.strerror or "the handshake ended"
    if reason in _PLAIN:
        return "it speaks no TLS there: http in place of https?"
    return f"TLS fails: {reason.replace('_', ' ').lower()}"
