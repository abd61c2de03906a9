"""TLS of etcd's endpoints: certificate files, read again for each new connection.

Certificates are renewed while a daemon runs (certbot, cert-manager, Vault, a script), so no
connection goes by what was read at the start. Files that cannot be used, as a pair of which
only one half is new yet, change nothing: connections are made with what was read last, and a
warning names the file.

What is accepted of a server is what Go's etcd clients accept, under every Python: chains whose
certificates lack extensions that RFC 5280 demands (Python 3.13 sets VERIFY_X509_STRICT), and an
intermediate or the server's own certificate as trust anchor. A host name is matched with
subjectAltName only, never with the subject's CN, as in Go since 1.15.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import ssl
import stat
import threading
from collections.abc import Iterator
from typing import Final

from tundp.errors import ConfigError
from tundp.files import SMALL_LEN
from tundp.store.access import EtcdAccess, parse_endpoints
from tundp.store.base import StoreWarning

_log = logging.getLogger(__name__)

HTTP: Final = "http/1.1"
H2: Final = "h2"
"""ALPN names of what is spoken over a connection: etcd's v2 API, its v3 API."""
READINGS: Final = 3
"""Readings of files that change while they are read, before the last ones are used again."""
_UNREADABLE_STEP: Final = (
    "tundp gives up root's right to read other users' files once it has started: make the file"
    " readable for root without it, as in `chgrp root FILE; chmod g+r FILE`;"
    " with --sandbox it also reads no other folders than those the files were in at the start"
)
_UNUSABLE_STEP: Final = (
    "put certificate and key in place together; they are read again for each new connection"
)


class TlsFiles:
    """The certificate files of one EtcdAccess, and contexts made of them. Thread-safe."""

    def __init__(self, access: EtcdAccess) -> None:
        """Read the files. ConfigError names the one that cannot be used."""
        self._files = {
            flag: path
            for flag, path in (
                ("cafile", access.cafile),
                ("certfile", access.certfile),
                ("keyfile", access.keyfile),
            )
            if path
        }
        self._lock = threading.Lock()
        self._problem: StoreWarning | None = None
        endpoints = parse_endpoints(access.endpoints)
        self._is_used = any(each.scheme == "https" for each in endpoints)
        self._seen = self._look()
        self._contexts = self._load() if self._is_used or self._files else {}

    def context(self, protocol: str) -> ssl.SSLContext:
        """The context for a new connection that speaks `protocol` (HTTP or H2).

        Made of the files as they are now; of those read last if these cannot be used.
        """
        with self._lock:
            self._refresh()
            return self._contexts[protocol]

    @property
    def warnings(self) -> tuple[StoreWarning, ...]:
        """The file that cannot be used now, if there is one and an endpoint is https."""
        with self._lock:
            if self._is_used and self._files:
                self._refresh()
            return () if self._problem is None else (self._problem,)

    def _refresh(self) -> None:
        try:
            for _ in range(READINGS):
                seen = self._look()
                if seen == self._seen:
                    break
                contexts = self._load()
                if self._look() == seen:
                    self._contexts, self._seen = contexts, seen
                    _log.info("etcd: certificate files have changed: %s", self._names())
                    break
        except ConfigError as error:
            self._failed(error)
        else:
            if self._problem is not None:
                self._problem = None
                _log.info("etcd: certificate files can be used again: %s", self._names())

    def _failed(self, error: ConfigError) -> None:
        step = _UNREADABLE_STEP if isinstance(error.__cause__, PermissionError) else _UNUSABLE_STEP
        problem = StoreWarning(
            id="certificates",
            evidence=f"{error}; new connections use what was read before",
            next_step=step,
        )
        if problem != self._problem:
            self._problem = problem
            _log.warning("etcd: %s; %s", problem.evidence, step)

    def _names(self) -> str:
        return ", ".join(self._files.values()) or "the system's roots"

    def _look(self) -> tuple[bytes, ...]:
        """What tells one state of the files from another. ConfigError: one cannot be read."""
        if not self._files:
            return tuple(_system_roots()) if self._is_used else ()
        return tuple(_digest(flag, path) for flag, path in self._files.items())

    def _load(self) -> dict[str, ssl.SSLContext]:
        return {protocol: self._make(protocol) for protocol in (HTTP, H2)}

    def _make(self, protocol: str) -> ssl.SSLContext:
        """A context of the files as they are.

        Without a CA file the system's roots count. Flannel ignores a CA that comes without a
        client certificate; here it counts.
        """
        cafile, certfile, keyfile = map(self._files.get, ("cafile", "certfile", "keyfile"))
        try:
            context = ssl.create_default_context(cafile=cafile)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--etcd-cafile {cafile} is no CA certificate: {_reason(error)}"
            ) from None
        if certfile:
            try:
                context.load_cert_chain(certfile, keyfile, password=_refuse_to_ask)
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"--etcd-certfile {certfile} and --etcd-keyfile {keyfile}"
                    f" are no certificate and its key: {_reason(error)}"
                ) from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # As Go does; see the module.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.hostname_checks_common_name = False
        context.set_alpn_protocols([protocol])
        return context


def _digest(flag: str, path: str) -> bytes:
    """A hash of a PEM file; ConfigError if it cannot be read, or is not whole."""
    name = f"--etcd-{flag} {path}"
    try:
        # A pipe would be read once and never again, and a FIFO would block.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"{name} is not a regular file")
            text = file.read(SMALL_LEN + 1)
            if len(text) > SMALL_LEN:
                raise ConfigError(f"{name} has more than {SMALL_LEN} bytes: it is no PEM file")
    except FileNotFoundError:
        raise ConfigError(f"{name} does not exist") from None
    except PermissionError as error:
        raise ConfigError(f"{name} may not be read{_owner_of(path)}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    if not text.strip():
        raise ConfigError(f"{name} is empty")
    if text.count(b"-----BEGIN ") != text.count(b"-----END "):
        raise ConfigError(f"{name} is not whole: it ends inside a PEM block")
    return hashlib.sha256(text).digest()


def _owner_of(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return f" (owner {status.st_uid}:{status.st_gid}, mode {stat.S_IMODE(status.st_mode):04o})"


def _system_roots() -> Iterator[bytes]:
    places = ssl.get_default_verify_paths()
    for place in (places.cafile, places.capath):
        if place is not None:
            try:
                status = os.stat(place)
            except OSError:
                continue
            yield f"{status.st_ino} {status.st_mtime_ns} {status.st_size}".encode()


def _refuse_to_ask() -> str:
    raise ValueError("the key is encrypted; store it without a passphrase")


def _reason(error: Exception) -> str:
    """What OpenSSL says, without the line of Python's source that asked it."""
    return re.sub(r" ?\(_ssl\.c:\d+\)", "", str(error))
