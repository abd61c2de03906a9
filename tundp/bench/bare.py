"""`python -m tundp.bench.bare TUN LOCAL REMOTE [READY]`: the least a TUN-to-UDP forwarder does.

One TUN with vnet headers and one UDP socket between two addresses, and one thread in C for both
ways (native/bench/bare.c). It has no leases, no counters and no control: two of them
with the same arguments swapped are a tunnel. What they lose is not counted but by the kernel. The
row `bare` of the bench is two of these. It does less than any engine, and is no limit as yet: its
many pieces a call cost the kernel more than one copy costs an engine (gso is 1.0 to 1.4 times it).
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Final

from tundp.lab import generators
from tundp.linux import uapi
from tundp.linux.tun import Tun, TunMode
from tundp.linux.udp import grow_buffers

PORT: Final = 8285


def main() -> None:
    """Run until killed; once all is open, the file READY, if given, is made."""
    name, local, remote, *ready = sys.argv[1:]
    tun = Tun(name, TunMode(has_vnet_header=True, wants_tso=True, wants_uso=True))
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    grow_buffers(sock)
    sock.setsockopt(socket.IPPROTO_UDP, uapi.UDP_GRO, 1)
    sock.bind((local, PORT))
    sock.connect((remote, PORT))
    for path in ready:
        Path(path).touch()
    generators.forward(tun.fd, sock.fileno(), has_uso=tun.knows_uso)


if __name__ == "__main__":
    main()
