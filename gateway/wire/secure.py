"""TLS 1.2 and 1.3 for associations (PS3.15 B.12, B.13), of PEM files that are read again when they change."""

from __future__ import annotations

import ssl
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import structlog

from clarion.errors import ConfigError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

    from clarion.model import TlsFiles

log = structlog.get_logger()

# RFC 9325 4.2 for TLS 1.2; those of TLS 1.3 are all good. B.13 adds what the standard lists and OpenSSL has.
CIPHERS = {"bcp195": "ECDHE+AESGCM", "bcp195-modified": "ECDHE+AESGCM:ECDHE+CHACHA20:ECDHE+AESCCM"}


def acceptor_context(files: TlsFiles) -> ssl.SSLContext:
    """Make the context of who is called; with trusted certificates a peer has to show one. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # Each connection shows its certificate anew: with a ticket a peer would be let in whom nobody vouches for any more.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET
    _set_up(context, files)
    if files.trusted is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        _trust(context, files.trusted)
    return context


def requestor_context(files: TlsFiles) -> ssl.SSLContext:
    """Make the context of who calls; without trusted certificates those of the system count. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = files.check_host
    _set_up(context, files)
    if files.trusted is None:
        context.load_default_certs()
    else:
        _trust(context, files.trusted)
    return context


def _set_up(context: ssl.SSLContext, files: TlsFiles) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_ciphers(CIPHERS[files.profile])
    if files.certificate is not None and files.key is not None:
        try:
            context.load_cert_chain(files.certificate, files.key, password=_no_passphrase)
        except (OSError, ValueError) as error:
            raise ConfigError([f"{files.certificate} and {files.key}: {_said(error)}"]) from error
        until = expires(files.certificate)
        if until is not None and until < datetime.now(UTC):
            raise ConfigError([f"{files.certificate}: the certificate ended on {until:%Y-%m-%d}; renew it"])


def expires(certificate: Path) -> datetime | None:
    """Tell until when the first certificate of a file is valid; None where that cannot be read."""
    # The standard library reads a certificate of ours only by this; without it nothing is known, and nothing refused.
    read: Any = getattr(ssl._ssl, "_test_decode_cert", None)  # type: ignore[attr-defined]  # noqa: SLF001  as said
    try:
        ends = read(str(certificate))["notAfter"]
        return datetime.fromtimestamp(ssl.cert_time_to_seconds(ends), UTC)
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _no_passphrase() -> bytes:
    raise ValueError("the key is encrypted; give one that is not, readable by us alone")


def _trust(context: ssl.SSLContext, path: Path) -> None:
    try:
        context.load_verify_locations(path)
    except OSError as error:
        raise ConfigError([f"{path}: {_said(error)}"]) from error


def reason_of(error: OSError | ValueError) -> str:
    """Say why no hands were shaken, or why the other side did not like ours."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the peer's certificate is not accepted ({error.verify_message})"
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return "nothing came in time" if isinstance(error, TimeoutError) else (_said(error) or type(error).__name__)


def _said(error: OSError | ValueError) -> str:
    if isinstance(error, ssl.SSLError):
        if error.reason == "KEY_VALUES_MISMATCH":
            return "the key is not the certificate's"
        return f"no PEM file as it should be ({(error.reason or 'unreadable').lower().replace('_', ' ')})"
    return (error.strerror if isinstance(error, OSError) else "") or str(error)


class Renewed:
    """Gives the context of some files, made anew when one of them has changed. Thread-safe.

    While new files are no good, a certificate without its key for instance, the old context stays.
    """

    def __init__(self, files: TlsFiles, make: Callable[[TlsFiles], ssl.SSLContext]) -> None:
        self.files = files
        self._make = make
        self._lock = threading.Lock()
        self._context = make(files)
        self._seen = self._stamps()

    def context(self) -> ssl.SSLContext:
        """Give the present context."""
        with self._lock:
            stamps = self._stamps()
            if stamps != self._seen:
                self._seen = stamps
                try:
                    self._context = self._make(self.files)
                    log.info("tls.renewed", certificate=str(self.files.certificate))
                except ConfigError as error:
                    log.warning("tls.notrenewed", reason=str(error))
            return self._context

    def _stamps(self) -> list[tuple[int, int, int]]:
        stamps = []
        for path in (self.files.trusted, self.files.certificate, self.files.key):
            try:
                seen = path.stat() if path is not None else None
            except OSError:
                seen = None
            stamps.append((seen.st_ino, seen.st_mtime_ns, seen.st_size) if seen is not None else (0, 0, 0))
        return stamps


def accept(connection: socket.socket, context: ssl.SSLContext, seconds: float) -> ssl.SSLSocket:
    """Shake hands as who was called, within so long. Raises OSError."""
    connection.settimeout(seconds)
    return context.wrap_socket(connection, server_side=True)


def connect(connection: socket.socket, context: ssl.SSLContext, host: str, seconds: float) -> ssl.SSLSocket:
    """Shake hands as who calls, within so long. Raises OSError."""
    connection.settimeout(seconds)
    return context.wrap_socket(connection, server_hostname=host)
