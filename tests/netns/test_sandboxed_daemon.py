"""A whole daemon with --sandbox=on does everything one without does."""

from __future__ import annotations

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.netns.test_sandbox import needs
from tests.nodes import (
    HEALTH_PORT,
    MakeOverlay,
    answers,
    is_ready,
    log_contains,
    must_run,
    readiness,
    store_is,
)
from tests.store.pki import Pki
from tests.wait import until
from tundp.errors import PlatformError
from tundp.lab.etcd import PrivateEtcd
from tundp.lab.overlay import PREFIX, STORE_ADDRESS, LabNode
from tundp.linux.command import find

ON = ("--sandbox=on", "--ip-masq", f"--healthz-port={HEALTH_PORT}")
NETWORK = {"Network": "10.5.0.0/16", "Backend": {"Type": "udp"}}


def put_in_path(
    directory: Path, program: str, monkeypatch: pytest.MonkeyPatch, *, is_copied: bool = False
) -> None:
    """iptables and the like, found first, are this multi-call program."""
    path = find(program)
    assert path, f"{program} is not installed"
    multi = os.path.realpath(path)
    for name in ("iptables", "ip6tables"):
        for suffix in ("", "-save", "-restore"):
            if is_copied:
                shutil.copy(multi, directory / f"{name}{suffix}")
            else:
                (directory / f"{name}{suffix}").symlink_to(multi)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


async def holds_everything(node: LabNode) -> bool:
    document = await node.status_document()
    found = document["sandbox"]
    return bool(found["landlock_abi"] >= 6 and found["seccomp"] and found["missing"] == [])


async def lives_through_it(node: LabNode, flush: str, rules: str, jump: str) -> None:
    """Rules flushed and TUN lost: both are there again, and nothing was refused."""
    await until(partial(is_ready, node), "ready")
    assert jump in await must_run(node.host, *rules.split())
    await must_run(node.host, *flush.split())

    async def has_rules() -> bool:
        done = await node.host.run(*rules.split())
        return jump in done.stdout

    await until(has_rules, "the rules are back")
    await must_run(node.host, "ip", "link", "del", "flannel0")

    async def has_device() -> bool:
        return (await node.host.run("ip", "link", "show", "flannel0")).returncode == 0

    await until(has_device, "the TUN is back")
    await until(partial(is_ready, node), "ready again")
    # Of the device's, which was made within the sandbox, twice.
    sysctl = "/proc/sys/net/ipv4/conf/flannel0/accept_local"
    assert (await must_run(node.host, "cat", sysctl)).strip() == "1"
    log = node.log_path.read_text()
    assert "Permission denied" not in log, log
    assert "not permitted" not in log, log


FLAVOURS = {
    "iptables-nft": ("iptables -F FORWARD", "iptables -S FORWARD", "FLANNEL-FWD"),
    "iptables-legacy": ("iptables -F FORWARD", "iptables -S FORWARD", "FLANNEL-FWD"),
    "nft": ("nft flush ruleset", "nft list ruleset", "flannel-ipv4"),
}


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_firewall_and_device(
    make_overlay: MakeOverlay, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flavour: str
) -> None:
    needs(6)
    network = NETWORK | ({"EnableNFTables": True} if flavour == "nft" else {})
    if flavour != "nft":
        put_in_path(tmp_path, flavour, monkeypatch)
    async with make_overlay(*ON, nodes=1, network=network) as overlay:
        node = overlay.nodes[1]
        assert await holds_everything(node)
        await lives_through_it(node, *FLAVOURS[flavour])
        before = node.environment["FLANNEL_SUBNET"]
        assert await node.stop_daemon() == 0
        await overlay.start_daemon(node, *ON)
        await overlay.wait_ready()
        assert node.environment["FLANNEL_SUBNET"] == before
        assert await node.stop_daemon() == 0
        cleaned = await node.host.run(
            *(sys.executable, "-m", "tundp", "cleanup", f"--subnet-file={node.subnet_file}"),
            *(f"--state-dir={node.state_dir}", f"--admin-socket={node.admin_socket}"),
            f"--store=file:{overlay.lease_file}",
        )
        assert cleaned.returncode == 0, cleaned.stderr
        assert FLAVOURS[flavour][2] not in await must_run(
            node.host, *("nft list ruleset" if flavour == "nft" else "iptables -S").split()
        )


async def test_a_program_that_is_replaced_is_named_with_the_remedy(
    make_overlay: MakeOverlay, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    needs(1)
    put_in_path(tmp_path, "iptables-nft", monkeypatch, is_copied=True)
    async with make_overlay("--ip-masq", f"--healthz-port={HEALTH_PORT}", nodes=1) as overlay:
        node = overlay.nodes[1]
        await until(partial(is_ready, node), "ready")
        for path in list(tmp_path.iterdir()):
            shutil.copy(path, tmp_path / "new")
            (tmp_path / "new").rename(path)
        await must_run(node.host, "iptables", "-F", "FORWARD")

        async def is_named() -> bool:
            found = await readiness(node)
            return found.failing == ["firewall"] and "restart tundp" in found.details

        await until(is_named, "readyz names the cause")
        assert await node.stop_daemon() == 0
        await overlay.start_daemon(node, "--ip-masq", f"--healthz-port={HEALTH_PORT}")
        await until(partial(is_ready, node), "a restart mends it")


async def test_the_admin_socket_comes_back_by_its_second_name(make_overlay: MakeOverlay) -> None:
    """In the sandbox there is no new one; that one which is there gets its path back."""
    async with make_overlay(f"--healthz-port={HEALTH_PORT}", nodes=1) as overlay:
        node = overlay.nodes[1]
        kept = node.admin_socket.with_name(f".{node.admin_socket.name}")
        await until(kept.is_socket, "a second name")
        inode = node.admin_socket.stat().st_ino
        node.admin_socket.unlink()
        await until(node.admin_socket.is_socket, "the path is there again")
        assert node.admin_socket.stat().st_ino == inode
        assert (await node.status_document())["sandbox"]["seccomp"]
        node.admin_socket.unlink()
        kept.unlink()

        async def is_named() -> bool:
            _, text = await node.get(HEALTH_PORT, "/readyz?verbose")
            return "--sandbox refuses a new one: restart tundp" in text

        await until(is_named, "readyz names the cause")
        assert await node.stop_daemon() == 0
        await overlay.start_daemon(node, "--sandbox=off")
        await overlay.wait_ready()
        await until(kept.is_socket, "a second name")
        for path in (node.admin_socket, kept):
            path.unlink()
        await until(node.admin_socket.is_socket, "without a sandbox there is a new one")
        await until(lambda: answers_status(node), "it answers")
        assert await node.stop_daemon() == 0
        assert not kept.exists()


async def answers_status(node: LabNode) -> bool:
    try:
        return bool(await node.status_document())
    except PlatformError:
        return False


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
async def test_etcd_of_both_apis_with_renewed_certificates(
    make_overlay: MakeOverlay, tmp_path: Path, loop: str
) -> None:
    needs(6)
    pki = Pki(tmp_path)
    for age in ("old", "new"):
        pki.make_ca(f"{age}-ca")
        address = f"IP:{STORE_ADDRESS}"
        pki.make(f"{age}-server", ca=f"{age}-ca", usage="serverAuth", alt_name=address)
        pki.make(f"{age}-client", ca=f"{age}-ca", usage="clientAuth")
    used = Pki(tmp_path / "used")
    used.directory.mkdir()

    def put_in_place(age: str) -> None:
        for name in ("ca", "server", "client"):
            for kind in (Pki.cert, Pki.key):
                new = used.directory / "part"
                shutil.copy(kind(pki, f"{age}-{name}"), new)
                new.rename(kind(used, name))

    put_in_place("old")
    async with make_overlay(start=False) as overlay:
        etcd = PrivateEtcd(
            STORE_ADDRESS,
            overlay.switch,
            directory=tmp_path / "etcd",
            client_tls=used.server("server", client_ca="ca"),
        )
        (tmp_path / "etcd").mkdir()
        await etcd.start()
        try:
            for api in ("v2", "v3"):
                await etcd.put(f"{PREFIX}/config", json.dumps(NETWORK), api=api)
            flags = (
                *(*ON, "--etcd-api=both", "--store=etcd", f"--etcd-endpoints={etcd.url}"),
                *(f"--loop={loop}", f"--etcd-cafile={used.cert('ca')}"),
                *(
                    f"--etcd-certfile={used.cert('client')}",
                    f"--etcd-keyfile={used.key('client')}",
                ),
            )
            for node in overlay.nodes.values():
                await overlay.start_daemon(node, *flags)
            await overlay.wait_ready()
            one, two = overlay.nodes.values()
            await etcd.stop()
            await until(partial(store_is, one, answering=False), "etcd is missed")
            put_in_place("new")
            await etcd.start()
            for node in (one, two):
                assert await holds_everything(node)
                await until(partial(store_is, node, answering=True), "etcd with new certificates")
                await until(partial(log_contains, node, "certificate files have changed"), "read")
                assert "Permission denied" not in node.log_path.read_text()
            await until(partial(answers, one.host, two.tunnel_address), "packets pass")
        finally:
            await etcd.close()
