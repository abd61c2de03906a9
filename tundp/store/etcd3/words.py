"""Failures of etcd's v3 API and of the connection to it: their classes and their wording."""

from __future__ import annotations

import os
import ssl
from enum import Enum, unique
from typing import Final

from google.protobuf.message import DecodeError
from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError

from tundp.errors import (
    AccessDenied,
    StoreError,
)
from tundp.printable import SENTENCE_MAX, printable
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


@unique
class AuthAnswer(Enum):
    """What etcd's refusal of a request says about who sent it."""

    LOG_IN = "log in"
    """The token is missing, unknown, expired, or older than a change of users and roles."""
    DENIED = "denied"
    """The user may not do this. etcd 3.4 denies a watch so whatever is wrong with a token."""


_AUTH_ANSWERS: Final = (
    ("invalid auth token", AuthAnswer.LOG_IN),
    ("revision of auth store is old", AuthAnswer.LOG_IN),
    ("revision in header is old", AuthAnswer.LOG_IN),
    ("user name is empty", AuthAnswer.LOG_IN),
    ("user name not found", AuthAnswer.LOG_IN),
    ("token is expired", AuthAnswer.LOG_IN),
    ("permission denied", AuthAnswer.DENIED),
)
"""etcd's words, of calls and of cancelled watches: etcd api/v3rpc/rpctypes/error.go and
server/auth/store.go. Their status codes differ between versions and between the two."""


def auth_answer(error: BaseException) -> AuthAnswer | None:
    """Whether, and how, a request was refused for who sent it. Such a request was not carried out.

    None for any other failure.
    """
    if not isinstance(error, GRPCError):
        return None
    message = error.message or ""
    for said, answer in _AUTH_ANSWERS:
        if said in message:
            return answer
    if error.status is Status.UNAUTHENTICATED:
        return AuthAnswer.LOG_IN
    return AuthAnswer.DENIED if error.status is Status.PERMISSION_DENIED else None


class EtcdLeaseGoneError(StoreError):
    """A write names an etcd lease that has expired or was revoked; nothing was written."""


def is_etcd_lease_gone(error: BaseException) -> bool:
    """Whether etcd refused a put for its etcd lease: an answer, and no failure of the server."""
    return isinstance(error, GRPCError) and "requested lease not found" in (error.message or "")


def denial(error: BaseException, endpoint: Endpoint) -> AccessDenied:
    """The error for a request that was refused for who sent it."""
    return AccessDenied(
        f"etcd at {endpoint.url} denies access ({words(error)}):"
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
        said = (error.message or error.status.name).removeprefix("etcdserver: ")
        return printable(said, SENTENCE_MAX)
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = f" ({ALT_NAME_HINT})" if error.verify_code in _MISMATCHES else ""
        return f"its certificate is not accepted: {error.verify_message}{hint}"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno).lower()  # asyncio's own text names the address again
    said = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return printable(said, SENTENCE_MAX)
