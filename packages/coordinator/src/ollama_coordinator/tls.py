"""TLS of the coordinator's own: whose certificate it shows, and when its files are read again.

With `self` the certificate is made at the first start and kept beside the database, as its SHA-256
is what agents believe (`JoinToken`): another one would lock them out, so it is valid for long.
"""

import asyncio
import logging
import re
import socket
import ssl
from base64 import b64encode
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path

from ollama_coordinator_common.error import ConfigError
from ollama_coordinator_common.network import parse_address, public_address
from ollama_coordinator_common.settings import CoordinatorConfig

from .aio import OFF
from .db import files_beside, write_for_owner

try:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID
except ImportError:  # the extra [tls] is not installed
    CAN_MAKE = False
else:
    CAN_MAKE = True

log = logging.getLogger(__name__)

VARIABLE = "COORDINATOR_TLS"

SELF = "self"

EXPECTED = "give off, self, or CERT,KEY: the files of a certificate with its chain, and of its key"

MISSING = (
    "a certificate of its own is made with the package 'cryptography': install "
    "ollama-coordinator[tls], or give the files of another one"
)

LOOK_SECONDS = 5.0
"""How often it is seen whether the files have changed."""

VALID_DAYS = 3650
"""Ten years; nobody renews it, since agents believe this very certificate."""

_PEM = re.compile(r"-----BEGIN CERTIFICATE-----[^-]++-----END CERTIFICATE-----")


def files_of(setting: str) -> tuple[Path, Path] | None:
    """The files of a certificate and its key; `None` where the setting names none.

    Raises:
        ConfigError: the setting cannot work.
    """
    if setting.lower() in (OFF, SELF):
        return None
    names = [part.strip() for part in setting.split(",")]
    if len(names) != 2 or not all(names):
        raise ConfigError(VARIABLE, setting, EXPECTED)
    return Path(names[0]).expanduser(), Path(names[1]).expanduser()


class Tls:
    """What the next connections are secured with. `context` is `None` where TLS is off.

    `shown`: the SHA-256 of the certificate that they see, in hexadecimal digits; empty without TLS.
    `fingerprint`: the SHA-256 of a certificate that the coordinator has made itself, in hexadecimal
    digits; empty for others, which change when they are renewed. `pin`: of its public key, as
    curl's `--pinnedpubkey` takes it.

    Raises:
        ConfigError: the files cannot be read, or are no certificate and its key.
    """

    def __init__(self, config: CoordinatorConfig) -> None:
        self.context: ssl.SSLContext | None = None
        self.shown = self.fingerprint = self.pin = ""
        self.files = files_of(config.tls)
        self._is_own = config.tls.lower() == SELF
        self._seen: object = None
        if self._is_own:
            file = _own_file(config)
            if not file.exists():
                write_for_owner(file, _made(_names(config)))
            self.files = file, file
        if self.files is not None:
            self._seen = self._look()
            self._read()

    def _read(self) -> None:
        if self.files is None:
            return
        certificate, key = self.files
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.set_alpn_protocols(["http/1.1"])
        try:
            # A key with a passphrase is an error, and no question at a terminal that nobody sees.
            context.load_cert_chain(certificate, key, password="")
            der = ssl.PEM_cert_to_DER_cert(_PEM.findall(certificate.read_text("ascii"))[0])
        except (OSError, ValueError, IndexError) as exc:
            reason = getattr(exc, "strerror", None) or str(exc) or "it is no certificate"
            given = f"{certificate},{key}"
            raise ConfigError(VARIABLE, given, f"it cannot be used ({reason}); {EXPECTED}") from exc
        self.context = context
        self.shown = sha256(der).hexdigest()
        if self._is_own:
            self.fingerprint = self.shown
            self.pin = _pin_of(der)

    def _look(self) -> object:
        """What changes when the files do."""
        try:
            looks = [file.stat() for file in self.files or ()]
        except OSError:
            return None  # one of them is being replaced
        return [(one.st_mtime_ns, one.st_size, one.st_ino) for one in looks]

    async def run(self) -> None:
        """Read the files again when they have changed; open connections go on as they are."""
        while self.files is not None:
            await asyncio.sleep(LOOK_SECONDS)
            await asyncio.to_thread(self.look)

    def look(self) -> None:
        """Read the files again if they have changed; what cannot be used leaves all as it is."""
        seen = self._look()
        if seen is None or seen == self._seen:
            return
        self._seen = seen
        try:
            self._read()
        except ConfigError as exc:
            log.error("the new certificate cannot be used; the old one stays: %s", exc)
        else:
            log.info("the certificate was read again", extra={"file": str((self.files or [""])[0])})


def _own_file(config: CoordinatorConfig) -> Path:
    """Where the certificate is that the coordinator makes, with its key.

    Raises:
        ConfigError: the database is in memory.
    """
    beside = files_beside(config.database_url)
    if beside is None:
        text = "its certificate is kept beside the database, which is in memory alone here"
        raise ConfigError(VARIABLE, config.tls, f"{text}; give DATABASE_URL a file")
    return beside.with_name(f"{beside.name}.tls.pem")


def _names(config: CoordinatorConfig) -> list[str]:
    """By what this machine is called: for browsers and others who compare names."""
    host = socket.gethostname().lower()
    known = ["localhost", "127.0.0.1", "::1", host, f"{host.partition('.')[0]}.local"]
    outside = (public_address(config.host) or "").strip("[]")
    return list(dict.fromkeys(name for name in (*known, outside, *config.hosts) if name))


def _made(names: Iterable[str]) -> bytes:
    """A new key and its certificate for these names and addresses, in one PEM text.

    Raises:
        ConfigError: the extra [tls] is not installed.
    """
    if not CAN_MAKE:
        raise ConfigError(VARIABLE, SELF, MISSING)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Ollama Coordinator")])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks differ
        .not_valid_after(now + timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectAlternativeName([_name(one) for one in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ) + builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _name(text: str) -> "x509.GeneralName":
    if parse_address(text) is not None:
        return x509.IPAddress(ip_address(text))
    return x509.DNSName(text.encode("idna").decode())


def _pin_of(der: bytes) -> str:
    """The SHA-256 of the public key, as curl's `--pinnedpubkey` takes it; empty without [tls]."""
    if not CAN_MAKE:
        return ""
    spki = x509.load_der_x509_certificate(der).public_key()
    encoded = spki.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return f"sha256//{b64encode(sha256(encoded).digest()).decode()}"
