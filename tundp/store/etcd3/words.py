"""Failures of etcd's v3 API and of the connection to it: their classes and their wording."""

from __future__ import annotations

import os
import ssl
from typing import Final

from google.protobuf.message import DecodeError
from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError

from tundp.errors import (
    AccessDenied,
)
from tundp.store.access import (
    ALT_NAME_HINT,
    CERTIFICATE_HINT,
    Endpoint,
)

FAILURES: Final = (
    GRPCError,
    ProtocolError,
    StreamTerminatedError,
    OSError,
    ssl.SSLError,
    TimeoutError,
    DecodeError,
)
_MISMATCHES: Final = frozenset({62, 64})
"""X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH of openssl/x509_vfy.h."""
NO_USER: Final = "user name is empty"
"""etcd's answer to a request without a token while authentication is enabled."""


_UNTOUCHED: Final = frozenset({Status.UNAUTHENTICATED, Status.PERMISSION_DENIED})
"""Statuses that mean the request was not carried out."""


def is_untouched(error: BaseException) -> bool:
    """Whether the request was refused before anything was done."""
    return isinstance(error, GRPCError) and error.status in _UNTOUCHED


def wants_login(error: GRPCError) -> bool:
    """Whether the request had no token, or one etcd does not know (any more)."""
    return error.status is Status.UNAUTHENTICATED or NO_USER in (error.message or "")


def denial(error: GRPCError, endpoint: Endpoint) -> AccessDenied | None:
    """The error for a request that was refused for who sent it; None for other failures."""
    message = error.message or ""
    if error.status is not Status.PERMISSION_DENIED and not wants_login(error):
        return None
    return AccessDenied(
        f"etcd at {endpoint.url} denies access ({message}):"
        " check --etcd-username, --etcd-password and the role's permissions"
    )


def why_failed(error: BaseException, endpoint: Endpoint) -> str:
    """The reason in a few words, with what a TLS failure may mean at this endpoint."""
    if isinstance(error, ssl.SSLError):
        return f"TLS: {words(error)}"
    if endpoint.scheme == "https" and isinstance(error, (StreamTerminatedError, ConnectionError)):
        # With TLS 1.3 the handshake is over for us before the server looks at our certificate.
        return f"{words(error)} ({CERTIFICATE_HINT})"
    return words(error)


def words(error: BaseException) -> str:
    """The reason in a few words."""
    if isinstance(error, GRPCError):
        return (error.message or error.status.name).removeprefix("etcdserver: ")
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = f" ({ALT_NAME_HINT})" if error.verify_code in _MISMATCHES else ""
        return f"its certificate is not accepted: {error.verify_message}{hint}"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno).lower()  # asyncio's own text names the address again
    return str(getattr(error, "strerror", None) or error) or type(error).__name__
