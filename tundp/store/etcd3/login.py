"""The login at etcd's v3 API: the token in use, and when to ask for another one.

A token ends with the server that gave it (simple tokens), of age, and for JWTs with any change
of a user or role. Requests find that out; the first one to do so logs in for all. Checking a
password costs etcd a good part of a CPU second (bcrypt), so a login that does not help is not
repeated at once, as a thousand nodes would do it together.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from grpclib.client import UnaryUnaryMethod
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from tundp.errors import AccessDenied
from tundp.store.access import EtcdAccess
from tundp.store.etcd3.words import AuthAnswer
from tundp.store.etcd3rpc import tundp_etcd3_pb2 as rpc

if TYPE_CHECKING:
    from tundp.store.etcd3.channel import EtcdChannel

_log = logging.getLogger(__name__)

IN_VAIN: Final = 2
"""Logins in a row whose tokens did not work, after which VAIN_PAUSE_S passes between two."""
VAIN_PAUSE_S: Final = 10.0
DENIED_AGE_S: Final = 60.0
"""Age from which a token is replaced when etcd denies permission: etcd 3.4 denies a watch so for
whatever is wrong with a token. A younger one is as good as a new one."""
REFUSED_FIRST_S: Final = 1.0
REFUSED_MAX_S: Final = 30.0
"""Pause after a refused login; it doubles from the first to the longest."""


class Login:
    """The login of one connection, as one user. Without a user name there is none."""

    def __init__(self, access: EtcdAccess) -> None:
        self.token = ""
        """Metadata of every request; empty without a login, and where auth is not enabled."""
        self._access = access
        self._is_done = False
        self._at = float("-inf")
        self._in_vain = 0
        self._was_done = False
        self._refusal = ""
        self._refused_at = float("-inf")
        self._pause_s = REFUSED_FIRST_S

    @property
    def is_due(self) -> bool:
        """Whether to log in before the next request."""
        return bool(self._access.username) and not self._is_done

    def is_worth_another_try(self, token: str, answer: AuthAnswer) -> bool:
        """Whether a request that etcd refused for `token` is to be sent again, after a login."""
        if not self._access.username:
            return False
        if token != self.token or not self._is_done:
            return True  # another request has found that out
        age_s = asyncio.get_running_loop().time() - self._at
        if answer is AuthAnswer.DENIED and age_s < DENIED_AGE_S:
            return False
        if self._in_vain >= IN_VAIN and age_s < VAIN_PAUSE_S:
            return False
        self._is_done = False
        return True

    def worked(self, token: str) -> None:
        """Report that etcd accepted `token`."""
        if token == self.token:
            self._in_vain = 0

    async def perform(self, channel: EtcdChannel, limit_s: float) -> None:
        """Authenticate within `limit_s`: keep a token, or that authentication is not enabled.

        AccessDenied if etcd refuses user or password; within a pause after that, at once.
        """
        now = asyncio.get_running_loop().time()
        if now < self._refused_at + self._pause_s and self._refusal:
            raise AccessDenied(self._refusal)
        method = UnaryUnaryMethod(
            channel,
            "/etcdserverpb.Auth/Authenticate",
            rpc.AuthenticateRequest,
            rpc.AuthenticateResponse,
        )
        name, password = self._access.user.renew()
        request = rpc.AuthenticateRequest(name=name, password=password)
        try:
            answer = await method(request, timeout=limit_s)
        except GRPCError as error:
            if error.status is Status.FAILED_PRECONDITION and "not enabled" in str(error.message):
                self._done("")  # everybody is let in
                return
            if error.status is Status.INVALID_ARGUMENT:
                self._refuse(channel.endpoint.url, str(error.message))
            raise
        self._done(str(answer.token))
        if self._was_done:
            _log.info(
                "etcd at %s: logged in again as %s; the login before was refused",
                channel.endpoint.url,
                name,
            )
        self._was_done = True

    def _done(self, token: str) -> None:
        self.token, self._is_done = token, True
        self._at = asyncio.get_running_loop().time()
        self._in_vain += 1
        self._refusal, self._pause_s = "", REFUSED_FIRST_S

    def _refuse(self, url: str, message: str) -> None:
        if self._refusal:
            self._pause_s = min(2 * self._pause_s, REFUSED_MAX_S)
        self._refused_at = asyncio.get_running_loop().time()
        self._refusal = (
            f"etcd at {url} denies access ({message}): check --etcd-username and --etcd-password"
        )
        if self._was_done:
            self._refusal += f"; they were accepted before: {self._access.user.advice}"
        raise AccessDenied(self._refusal) from None
