"""Parts of etcd that drop every packet, beside one that answers: a start finds the latter."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from tests.netns.test_name_server import Resolver
from tests.nodes import MakeOverlay, lease_is, must_run
from tests.wait import until
from tundp.errors import PlatformError
from tundp.lab.overlay import STORE_ADDRESS, LabNode, OverlayLab

APIS = ("v2", "v3", "auto", "both")
SILENT = tuple(f"192.0.2.{number}" for number in range(245, 250))
NAME = "etcd.test"


async def drop(overlay: OverlayLab) -> None:
    """Addresses of the switch whose etcd takes no packet and refuses none."""
    for address in SILENT:
        await overlay.switch.configure("br0", f"{address}/24")
        await must_run(overlay.switch, "iptables", "-A", "INPUT", "-d", address, "-j", "DROP")


async def start(node: LabNode, wrap: Resolver, api: str, endpoints: str) -> None:
    command = [
        *(sys.executable, "-m", "tundp", "run", "--iface=eth0", "--iptables-forward-rules=false"),
        *(f"--etcd-api={api}", f"--etcd-endpoints={endpoints}"),
        f"--subnet-file={node.subnet_file}",
        f"--admin-socket={node.admin_socket}",
        f"--state-dir={node.state_dir}",
    ]
    with node.log_path.open("ab") as log:
        node.daemon = await node.host.popen(wrap.wrap(*command), log=log)


async def is_held(node: LabNode) -> bool:
    if node.daemon.poll() is not None:
        raise AssertionError(f"the daemon ended: {node.log_tail()}")
    try:
        status = await node.status_document()
        is_told = node.subnet_file.exists()
        return status["state"] == "running" and is_told and await lease_is(node, "held")
    except PlatformError:
        return False


async def test_silent_addresses_and_endpoints_of_each_api(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    """Five silent addresses of a name; then a silent endpoint, and a subnet given away."""
    async with make_overlay(nodes=len(APIS), store="etcd", start=False) as overlay:
        await overlay.write_etcd("config", '{"Network": "10.5.0.0/16"}', api="v2")
        await drop(overlay)
        resolver = Resolver(tmp_path, timeout_s=1)
        resolver.hosts.write_text(
            "".join(f"{address} {NAME}\n" for address in (*SILENT, STORE_ADDRESS))
        )
        nodes = dict(zip(APIS, overlay.nodes.values(), strict=True))
        for api, node in nodes.items():
            await start(node, resolver, api, f"http://{NAME}:2379")
        for api, node in nodes.items():
            await until(lambda node=node: is_held(node), f"a lease over {api}", deadline_s=40)

        checked = await overlay.nodes[1].host.run(
            *resolver.wrap(
                *(sys.executable, "-m", "tundp", "config", "check", "--etcd-api=v2"),
                *("--iface=eth0", f"--etcd-endpoints=http://{NAME}:2379"),
            )
        )
        assert "OK   store: etcd v2" in checked.stdout, checked.stdout + checked.stderr

        given = {}
        for api, node in nodes.items():
            given[api] = str(node.gateway.network)
            assert await node.stop_daemon() == 0
        for api in APIS:
            key = f"subnets/{given[api].replace('/', '-')}"
            for each in ("v2", "v3") if api == "both" else ("v3" if api == "auto" else api,):
                value = {"PublicIP": f"192.0.2.{70 + APIS.index(api)}"}
                await overlay.write_etcd(key, json.dumps(value), api=each)
        endpoints = f"http://{SILENT[0]}:2379,http://{STORE_ADDRESS}:2379"
        for api, node in nodes.items():
            await start(node, resolver, api, endpoints)
        for api, node in nodes.items():
            await until(lambda node=node: is_held(node), f"a new lease over {api}", deadline_s=40)
            await until(
                lambda node=node, api=api: str(node.gateway.network) != given[api],
                f"another subnet over {api}",
            )
            assert "going on with the leases of" not in node.log_path.read_text()
        await asyncio.gather(*(node.stop_daemon() for node in nodes.values()))

        one = overlay.nodes[1]
        cleaned = await one.host.run(
            *(sys.executable, "-m", "tundp", "cleanup", f"--subnet-file={one.subnet_file}"),
            *(f"--etcd-endpoints=http://{SILENT[1]}:2379,{endpoints}", "--etcd-api=v3"),
            *(f"--state-dir={one.state_dir}", f"--admin-socket={one.admin_socket}"),
        )
        assert cleaned.returncode == 0, cleaned.stderr
        assert str(one.subnet_file) in cleaned.stdout
