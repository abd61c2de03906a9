"""How to reach etcd, whichever API is spoken: endpoints, credentials, key prefix."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from tundp.errors import ConfigError

_log = logging.getLogger(__name__)

REQUEST_TIMEOUT_S: Final = 5.0
"""Of one request to one endpoint, connecting included."""
DEFAULT_PORT: Final = 2379
CERTIFICATE_HINT: Final = (
    "perhaps it wants a client certificate, or another one: --etcd-certfile, --etcd-keyfile"
)

ALT_NAME_HINT: Final = (
    "its subjectAltName must have the endpoint's name or address; a CN does not count, as with"
    " every Go client"
)


class User:
    """User and password of etcd's authentication, as they are where they come from. Thread-safe."""

    def __init__(self, name: str, password: str) -> None:
        self._now = (name, password)
        self._read: Callable[[], tuple[str, str]] | None = None
        self._origin = ""
        self._lock = threading.Lock()
        self._failure = ""

    def follow(self, read: Callable[[], tuple[str, str]], origin: str) -> None:
        """Let `renew` read both by `read`, which raises ConfigError if that fails.

        origin: the file they come from, for messages.
        """
        self._read, self._origin = read, origin

    @property
    def now(self) -> tuple[str, str]:
        """User and password, as read last."""
        return self._now

    @property
    def advice(self) -> str:
        """What to do about a refusal."""
        if self._read is None:
            return "if changed, restart with the new ones"
        return f"if changed, write the new ones to {self._origin}, which is read at each login"

    def renew(self) -> tuple[str, str]:
        """Read both again; those read last if that fails, with a warning."""
        if self._read is None:
            return self._now
        with self._lock:
            try:
                now = self._read()
            except ConfigError as error:
                if str(error) != self._failure:
                    _log.warning("etcd: %s; user and password stay what they were", error)
                self._failure = str(error)
                return self._now
            self._failure = ""
            if now != self._now and all(now):
                self._now = now
                _log.info("etcd: user or password has changed in %s", self._origin)
            return self._now


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdAccess:
    """Where etcd is and how to be let in. The password never shows in a repr."""

    endpoints: tuple[str, ...]
    prefix: str
    username: str = ""
    password: str = field(default="", repr=False)
    cafile: str = ""
    certfile: str = ""
    keyfile: str = ""
    user: User = field(init=False, repr=False, compare=False)
    """The same user for all connections."""

    def __post_init__(self) -> None:
        """Make the user."""
        object.__setattr__(self, "user", User(self.username, self.password))


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One etcd server. `host` is as a URL has it: an IPv6 address in brackets."""

    url: str
    scheme: str
    host: str
    port: int


def parse_endpoints(texts: Sequence[str]) -> tuple[Endpoint, ...]:
    """Checked, normalised endpoints; ConfigError names the one that is wrong."""
    return tuple(_parse_endpoint(text) for text in texts)


def clean_prefix(prefix: str) -> str:
    """Flannel joins paths with Go's path.Join: duplicate and trailing slashes go.

    A prefix without a leading slash stays without; the v2 API puts one there itself.
    """
    parts = [part for part in prefix.split("/") if part]
    for part in parts:
        if part in (".", "..") or any(char in part for char in "?#%"):
            raise ConfigError(f"--etcd-prefix {prefix!r}: {part!r} cannot be part of an etcd path")
    return ("/" if prefix.startswith("/") else "") + "/".join(parts)


def _parse_endpoint(text: str) -> Endpoint:
    if "@" in text:
        raise ConfigError(
            "--etcd-endpoints: a URL with a user or password in it; use --etcd-username"
            " and FLANNELD_ETCD_PASSWORD, which are never logged"
        )
    try:
        # Without a scheme as flannel's own client takes it.
        parts = urlsplit(text.strip() if "://" in text else f"http://{text.strip()}")
        port = DEFAULT_PORT if parts.port is None else parts.port
    except ValueError as error:
        raise ConfigError(
            f"--etcd-endpoints: {text!r} is not a URL such as http://192.0.2.9:2379: {error}"
        ) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or not port:
        raise ConfigError(f"--etcd-endpoints: {text!r} is not a URL such as http://192.0.2.9:2379")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return Endpoint(f"{parts.scheme}://{host}:{port}", parts.scheme, host, port)
