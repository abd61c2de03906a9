"""`python -m tundp.bench.bare TUN LOCAL REMOTE [READY]`: the least a TUN-to-UDP forwarder does.

One TUN with vnet headers and one UDP socket between two addresses, a thread each way in C
(native/bench/bare.c), both blocking. It has no leases, no counters and no control: two of them
with the same arguments swapped are a tunnel. What they lose is not counted but by the kernel. The
row `bare` of the bench is two of these: no forwarder of user space does less.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
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
    library = generators.require()
    tun = Tun(name, TunMode(has_vnet_header=True, wants_tso=True, wants_uso=True))
    os.set_blocking(tun.fd, True)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    grow_buffers(sock)
    sock.setsockopt(socket.IPPROTO_UDP, uapi.UDP_GRO, 1)
    sock.bind((local, PORT))
    sock.connect((remote, PORT))
    for path in ready:
        Path(path).touch()
    counts = [library.ffi.new("struct traffic *") for _ in range(2)]
    threading.Thread(
        target=library.lib.bare_decap, args=(sock.fileno(), tun.fd, counts[1]), daemon=True
    ).start()
    library.lib.bare_encap(tun.fd, sock.fileno(), counts[0])
    sys.exit(f"bare: reading {name}: {os.strerror(counts[0].error)}")


if __name__ == "__main__":
    main()
