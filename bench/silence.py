"""What a silent name server beside a lost etcd costs: `python -m bench.silence`, or `make silence`.

Two nodes know etcd by a name and ping each other every 50 ms. Then their name server keeps silent
(it takes queries and answers none), etcd is stopped, and started again 15 s later. One row an API:
pings lost each way, the longest row of lost ones, daemons that ended, and how long after etcd's
return both nodes had its answer again.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
import time
from pathlib import Path

from tundp.errors import LabError, PlatformError
from tundp.lab.lab import Lab
from tundp.lab.overlay import STORE_ADDRESS, LabNode, OverlayLab, make_directory
from tundp.lab.traffic import PingStream

NAME = "etcd.example"
NAME_SERVER = "192.0.2.53"
AWAY_S = 15.0
AFTER_S = 20.0
"""How long a node may take to see etcd again, and how long pings go on."""
NETWORK = {"Network": "10.5.0.0/16", "Backend": {"Type": "udp"}}


def main() -> None:
    print(
        f"{'API':<6}{'lost there':>11}{'back':>10}{'longest':>9}{'ended':>7}{'etcd seen after':>17}"
    )
    for api in sys.argv[1:] or ("v3", "v2"):
        asyncio.run(row(api))


async def row(api: str) -> None:
    directory = make_directory()
    try:
        async with Lab(f"bs{os.getpid()}") as lab:
            overlay = OverlayLab(lab, directory)
            await overlay.build(2)
            await overlay.start_etcd(NETWORK, api=api)
            await overlay.switch.configure("br0", f"{NAME_SERVER}/24")
            with await overlay.switch.socket(socket.SOCK_DGRAM) as server:
                server.bind((NAME_SERVER, 53))  # and nobody reads it
                try:
                    await measure(overlay, directory, api)
                finally:
                    await overlay.close_etcd()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def measure(overlay: OverlayLab, directory: Path, api: str) -> None:
    hosts, resolv_conf = directory / "hosts", directory / "resolv.conf"
    hosts.write_text(f"127.0.0.1 localhost\n{STORE_ADDRESS} {NAME}\n")
    resolv_conf.write_text(f"nameserver {NAME_SERVER}\noptions timeout:3 attempts:2\n")
    one, two = overlay.nodes[1], overlay.nodes[2]
    for node in (one, two):
        await start(overlay, node, (hosts, resolv_conf), api)
    for node in (one, two):
        await node.wait_for_peers(1)
    async with (
        PingStream(one.host, two.tunnel_address, pause_s=0.05) as there,
        PingStream(two.host, one.tunnel_address, pause_s=0.05) as back,
    ):
        hosts.write_text("127.0.0.1 localhost\n")
        await overlay.etcd.stop()
        await asyncio.sleep(AWAY_S)
        await overlay.etcd.start()
        began = time.monotonic()
        seen_s = [await seen_after(node, began) for node in (one, two)]
        await asyncio.sleep(max(0.0, began + AFTER_S - time.monotonic()))
    ended = sum(node.daemon.poll() is not None for node in (one, two))
    seen = "never" if None in seen_s else f"{max(s for s in seen_s if s is not None):.1f} s"
    gap_s = max(there.longest_gap_s, back.longest_gap_s)
    print(
        f"{api:<6}{there.lost:>6}/{there.sent:<5}{back.lost:>4}/{back.sent:<5}{gap_s:>7.2f} s"
        f"{ended:>6}{seen:>17}",
        flush=True,
    )


async def start(overlay: OverlayLab, node: LabNode, resolver: tuple[Path, Path], api: str) -> None:
    """A daemon with /etc/hosts and /etc/resolv.conf of its own, which knows etcd by its name."""
    hosts, resolv_conf = resolver
    mounts = f"mount --bind {hosts} /etc/hosts; mount --bind {resolv_conf} /etc/resolv.conf"
    command = [
        *("unshare", "--mount", "sh", "-ec", f'{mounts}; exec "$@"', "sh"),
        *(sys.executable, "-m", "tundp", "run", "--iface=eth0", f"--etcd-api={api}"),
        f"--etcd-endpoints={overlay.etcd.url.replace(STORE_ADDRESS, NAME)}",
        f"--subnet-file={node.subnet_file}",
        f"--admin-socket={node.admin_socket}",
        f"--state-dir={node.state_dir}",
    ]
    with node.log_path.open("ab") as log:
        node.daemon = await node.host.popen(command, log=log)


async def seen_after(node: LabNode, began: float) -> float | None:
    """Seconds until a node's store answers; None if it does not, or the daemon has ended."""
    while time.monotonic() - began < AFTER_S and node.daemon.poll() is None:
        try:
            if (await node.status_document())["store"]["is_answering"]:
                return time.monotonic() - began
        except (OSError, PlatformError, LabError):
            pass
        await asyncio.sleep(0.05)
    return None


if __name__ == "__main__":
    main()
