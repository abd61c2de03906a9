"""The way of echo replies from the packet threads to the event loop.

No packet filter stands in it. A raw ICMP socket, which needs CAP_NET_RAW, gets a reply behind the
INPUT rules (net/ipv4/ip_input.c: NF_INET_LOCAL_IN, then raw_local_deliver), and those of ufw and
firewalld drop what conntrack calls invalid: the request left inside a datagram, unseen by it.
"""

from __future__ import annotations

import random
from typing import Final

from tundp.linux.hand_over import HandOver

_HEAD_LEN_MAX: Final = 84
"""Bytes of the longest IPv4 header, and of an ICMP message up to its cookie."""


class EchoReplies(HandOver):
    """Receives the heads of echo replies whose identifier is `identifier`, a random number."""

    def __init__(self) -> None:
        """PlatformError if the process may have no further socket."""
        super().__init__("echo replies", _HEAD_LEN_MAX)
        self.identifier = random.SystemRandom().getrandbits(16)
