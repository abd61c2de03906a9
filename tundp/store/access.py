"""How to reach etcd, whichever API is spoken: endpoints, credentials, key prefix."""

from __future__ import annotations

import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from tundp.errors import ConfigError

REQUEST_TIMEOUT_S: Final = 5.0
"""Of one request to one endpoint, connecting included."""
DEFAULT_PORT: Final = 2379
CERTIFICATE_HINT: Final = (
    "perhaps it wants a client certificate, or another one: --etcd-certfile, --etcd-keyfile"
)


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


def tls_context(access: EtcdAccess) -> ssl.SSLContext:
    """The context of an https endpoint. ConfigError names the file that cannot be used.

    Without a CA file the system's roots count. Flannel ignores a CA that comes without a
    client certificate; here it counts.
    """
    for flag, path in (
        ("cafile", access.cafile),
        ("certfile", access.certfile),
        ("keyfile", access.keyfile),
    ):
        if path and not os.access(path, os.R_OK):
            why = "may not be read" if os.path.exists(path) else "does not exist"
            raise ConfigError(f"--etcd-{flag} {path} {why}")
    try:
        context = ssl.create_default_context(cafile=access.cafile or None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--etcd-cafile {access.cafile} is no CA certificate: {error}") from None
    if access.certfile:
        try:
            context.load_cert_chain(access.certfile, access.keyfile)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--etcd-certfile {access.certfile} and --etcd-keyfile {access.keyfile}"
                f" are no certificate and its key: {error}"
            ) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


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
