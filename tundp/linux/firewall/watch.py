"""Notice of changes to the nf_tables rulesets of this network namespace, over nfnetlink."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

from tundp.linux import uapi

_log = logging.getLogger(__name__)

_RECEIVE_BUFFER: Final = 4096
"""Bytes. A small buffer is enough: any notification, even an overrun, means "rules changed"."""


@contextlib.asynccontextmanager
async def watch_ruleset() -> AsyncIterator[Callable[[float], Awaitable[bool]]]:
    """Gives `changed(timeout_s)`: True as soon as any nf_tables ruleset changed, else False.

    Nothing from the moment the block is entered is missed, our own changes included. A
    busy kube-proxy changes rules many times a second: whoever acts on this keeps a pause.
    iptables-legacy changes nothing the kernel tells of, and without CAP_NET_ADMIN it may
    tell nothing at all: then False comes at the timeout, and looking is the caller's.
    """
    is_changed = asyncio.Event()

    async def changed(timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await is_changed.wait()
        except TimeoutError:
            return False
        is_changed.clear()
        return True

    try:
        watcher = _open_watcher()
    except OSError as error:
        _log.info("no firewall change notifications from the kernel (%s): polling instead", error)
        yield changed
        return

    def drain() -> None:
        is_changed.set()
        while True:
            try:
                watcher.recv(1)  # the rest of the message goes unread
            except BlockingIOError:
                return
            except OSError as error:
                _log.warning("cannot read firewall change notifications: %s", error)
                loop.remove_reader(watcher.fileno())
                return

    loop = asyncio.get_running_loop()
    with watcher:
        loop.add_reader(watcher.fileno(), drain)
        try:
            yield changed
        finally:
            loop.remove_reader(watcher.fileno())


def _open_watcher() -> socket.socket:
    watcher = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, uapi.NETLINK_NETFILTER
    )
    try:
        watcher.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        # libuv takes the error a full buffer raises for the end of the descriptor, and never
        # looks at it again. We lose nothing by not being told: what is in the buffer wakes us.
        watcher.setsockopt(uapi.SOL_NETLINK, uapi.NETLINK_NO_ENOBUFS, 1)
        watcher.bind((0, 1 << (uapi.NFNLGRP_NFTABLES - 1)))
    except BaseException:
        watcher.close()
        raise
    return watcher
