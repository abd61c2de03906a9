"""One HTTP/2 connection to an etcd: made to the address that answers first, kept alive by pings.

grpclib's channel, with what it lacks: names looked up apart from the event loop, several
addresses at once, a connection that counts only when the server has spoken HTTP/2 (RFC 9113
section 3.4), and pings that yield to a server that asks for fewer.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import socket
import ssl
from typing import Any, Final

from grpclib.client import Channel, Handler
from grpclib.config import Configuration
from grpclib.protocol import H2Protocol
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, RemoteSettingsChanged

from tundp.store import dial
from tundp.store.access import Endpoint
from tundp.store.etcd3.words import why_failed
from tundp.store.names import Names

_TCP_KEEPALIVE: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 8),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
)
"""A dead host or path is noticed by the kernel's probes, also where pings have become rare."""


class EtcdProtocol(H2Protocol):
    """The connection's protocol; says when the server has spoken, and how it ended."""

    is_told_to_calm_down = False
    """Whether the server ended it because of our pings (GOAWAY with ENHANCE_YOUR_CALM)."""
    is_hung = False
    """Whether it ended because a ping was not answered."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.has_spoken = asyncio.Event()
        self.has_ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        with contextlib.suppress(OSError, AttributeError):
            for level, option, value in _TCP_KEEPALIVE:
                sock.setsockopt(level, option, value)
        processors: Any = self.processor.processors
        processors[RemoteSettingsChanged] = self._on_settings
        processors[ConnectionTerminated] = self._on_goaway

    def connection_lost(self, exc: BaseException | None) -> None:
        """See asyncio.Protocol."""
        unanswered = self.connection._close_by_ping_handler  # noqa: SLF001  (no other way to know)
        now = asyncio.get_running_loop().time()
        self.is_hung = unanswered is not None and unanswered.when() <= now
        self.has_ended = True
        self.has_spoken.set()
        super().connection_lost(exc)

    async def wait_for_server(self) -> None:
        """Until the server's first SETTINGS frame is here; OSError if it hangs up before."""
        await self.has_spoken.wait()
        self.require_open()

    def require_open(self) -> None:
        """ConnectionResetError if the connection has ended by now."""
        if self.has_ended or self.connection.is_closing():
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    def _on_settings(self, event: RemoteSettingsChanged) -> None:
        self.has_spoken.set()
        self.processor.process_remote_settings_changed(event)

    def _on_goaway(self, event: ConnectionTerminated) -> None:
        self.is_told_to_calm_down = event.error_code == ErrorCodes.ENHANCE_YOUR_CALM
        self.processor.process_connection_terminated(event)


class EtcdChannel(Channel):
    """A grpclib channel whose endpoint's name is looked up by `names`, not by the event loop."""

    def __init__(
        self,
        endpoint: Endpoint,
        tls: ssl.SSLContext | None,
        names: Names,
        config: Configuration,
        limit_s: float,
    ) -> None:
        """limit_s: of connecting, whatever the number of addresses."""
        super().__init__(endpoint.host.strip("[]"), endpoint.port, ssl=tls, config=config)
        self.endpoint = endpoint
        self._names = names
        self._limit_s = limit_s
        self._is_used = False
        self._last: EtcdProtocol | None = None
        self._address = ""

    @property
    def is_connected(self) -> bool:
        """Whether the connection it was made for is still there."""
        return bool(self._connected)

    def close(self) -> None:
        """Close the connection. A TLS one does not wait for the server's close_notify."""
        transport = getattr(getattr(self._protocol, "connection", None), "_transport", None)
        super().close()
        if transport is not None and self._ssl:
            transport.abort()

    def blame_address(self) -> None:
        """Try the endpoint's other addresses first from now on: this one does not answer."""
        self._names.blame(self._host, self._address)

    @property
    def is_told_to_calm_down(self) -> bool:
        """Whether the server ended the connection because of our pings."""
        return self._last is not None and self._last.is_told_to_calm_down

    @property
    def is_hung(self) -> bool:
        """Whether the connection was given up since a ping was not answered."""
        return self._last is not None and self._last.is_hung

    def _protocol_factory(self) -> EtcdProtocol:
        return EtcdProtocol(Handler(), self._config, self._h2_config)

    async def _create_connection(self) -> EtcdProtocol:
        """Connect to the first address of the endpoint that answers; called by grpclib."""
        if self._is_used:
            # grpclib would connect anew, with certificates of before, and nobody would close it.
            raise ConnectionResetError(errno.ECONNRESET, "the connection was lost")
        self._is_used = True
        async with asyncio.timeout(self._limit_s):
            addresses = await self._names.addresses(self._host, self._limit_s)
            try:
                winner = await dial.first(
                    [functools.partial(self._connect_to, address) for address in addresses],
                    stagger_s=dial.address_stagger_s(len(addresses), self._limit_s),
                    discard=_close,
                )
            except dial.NoneSucceededError as error:
                failures = error.failures
                reasons = [why_failed(failure, self.endpoint) for failure in failures]
                if len(set(reasons)) == 1:
                    raise failures[0] from None
                raise OSError(", ".join(map("{}: {}".format, addresses, reasons))) from None
        self._last, self._address = winner.result, addresses[winner.number]
        self._last.require_open()
        return winner.result

    async def _connect_to(self, address: str) -> EtcdProtocol:
        _, protocol = await asyncio.get_running_loop().create_connection(
            self._protocol_factory,
            address,
            self._port,
            ssl=self._ssl,
            server_hostname=self._host if self._ssl else None,
        )
        try:
            await protocol.wait_for_server()
        except BaseException:
            _close(protocol)
            raise
        return protocol


def _close(protocol: EtcdProtocol) -> None:
    protocol.processor.close()
