"""A fault that lasts costs two log lines a minute, and is in status and readyz with its reason.

[node1] .. [node5] eth0 -- [switch, lease file]     faults of the host
[node1] .. [node4] eth0 -- [switch, etcd]           faults of the store
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import HEALTH_PORT, MakeOverlay, is_ready, log_contains, readiness
from tests.wait import until
from tundp.lab.overlay import LabNode, OverlayLab
from tundp.observe.status import DaemonState

HEALTH = f"--healthz-port={HEALTH_PORT}"
FOR_S = 20.0
"""How long a fault lasts here. Its first two lines are those of a minute."""


async def boot(
    overlay: OverlayLab, node: LabNode, *flags: str, script: str = "", **environment: str
) -> None:
    """Start tundp in a mount namespace of its own, after a shell script in it."""
    command = [
        *("unshare", "--mount", "sh", "-ec", f'{script or ":"}; exec "$@"', "sh"),
        *(sys.executable, "-m", "tundp", "run", "--iface=eth0", HEALTH),
        *(f"--subnet-file={node.subnet_file}", f"--admin-socket={node.admin_socket}"),
        *(f"--state-dir={node.state_dir}", *(flags or overlay.store_flags)),
    ]
    with node.log_path.open("ab") as log:
        node.daemon = await node.host.popen(command, log=log, environment=environment)


def warnings(node: LabNode, words: str = "", after: int = 0) -> list[str]:
    """Lines of a log that are more than routine, from a position on."""
    lines = node.log_path.read_text()[after:].splitlines()
    return [line for line in lines if line[24:25] in ("W", "E", "C") and words in line]


async def findings_of(node: LabNode) -> dict[str, tuple[str, str]]:
    """Verdict and evidence of every finding in the status that is not all right."""
    try:
        document = await node.status_document()
    except OSError:
        return {}
    return {
        each["id"]: (each["verdict"], each["evidence"])
        for each in document["findings"]
        if each["verdict"] != "ok"
    }


async def until_named(node: LabNode, finding: str, words: str) -> None:
    """Status has the finding with these words, and so has readyz."""

    async def is_named() -> dict[str, tuple[str, str]] | bool:
        found = await findings_of(node)
        return found if words in found.get(finding, ("", ""))[1] else False

    await until(is_named, f"{finding} with {words!r} in the status of node{node.number}")
    _, text = await node.get(HEALTH_PORT, "/readyz?verbose")
    assert any(finding in line and words in line for line in text.splitlines()), text


@contextlib.asynccontextmanager
async def again_and_again(
    what: Callable[[], Awaitable[Any]], *, every_s: float = 0.5
) -> AsyncIterator[None]:
    """Somebody does `what` all the time."""

    async def spoil() -> None:
        while True:
            await what()
            await asyncio.sleep(every_s)

    task = asyncio.ensure_future(spoil())
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def running(node: LabNode, *argv: str) -> Callable[[], Awaitable[Any]]:
    return lambda: node.host.run(*argv)


async def test_faults_of_the_host(make_overlay: MakeOverlay, tmp_path: Path) -> None:
    async with make_overlay(nodes=5, start=False) as overlay:
        full, spoilt, tun, rules, address = overlay.nodes.values()
        disk = tmp_path / "full"
        disk.mkdir()
        full.state_dir.write_text("a file where the directory should be")
        taken = await full.host.socket(socket.SOCK_STREAM)
        with contextlib.closing(taken):
            taken.bind(("127.0.0.1", 9285))
            taken.listen()
            await boot(
                overlay,
                full,
                *overlay.store_flags,
                f"--subnet-file={disk}/subnet.env",
                "--metrics-addr=127.0.0.1:9285",
                script=f"mount -t tmpfs -o size=8k none {disk};"
                f" dd if=/dev/zero of={disk}/fill bs=1k count=64 2>/dev/null || true",
                NOTIFY_SOCKET="/nonexistent/notify",
            )
            broken = tmp_path / "bin"
            broken.mkdir()
            for name in ("iptables", "iptables-nft", "iptables-legacy", "nft"):
                (broken / name).write_text("#!/bin/sh\necho 'no such table' >&2; exit 4\n")
                (broken / name).chmod(0o755)
            await boot(overlay, spoilt, PATH=f"{broken}:/usr/sbin:/usr/bin:/sbin:/bin")
            for node in (tun, rules, address):
                await boot(overlay, node)
            others = len(overlay.nodes) - 1
            for node in (tun, rules, address):
                await until(lambda node=node: is_ready(node))
                # Peers that come later would be lines, too.
                await until(partial(log_contains, node, ": peer 10.5.", times=others))
            starts = [(node, len(node.log_path.read_text())) for node in (tun, rules, address)]
            began = time.monotonic()
            async with contextlib.AsyncExitStack() as stack:
                for spoil in (
                    lambda: asyncio.to_thread(full.admin_socket.unlink, missing_ok=True),
                    lambda: asyncio.to_thread(spoilt.subnet_file.write_text, "X=1\n"),
                    running(tun, "ip", "link", "del", "flannel0"),
                    running(rules, "iptables", "-F", "FORWARD"),
                    running(address, "ip", "addr", "flush", "dev", "flannel0"),
                ):
                    await stack.enter_async_context(again_and_again(spoil))
                contest = "another program has undone it"
                await until_named(spoilt, "subnet-file", contest)
                await until_named(spoilt, "firewall", "no such table")
                await until_named(tun, "device-contest", contest)
                await until_named(rules, "firewall-contest", contest)
                await until_named(address, "kernel-contest", contest)
                # It has no socket to answer on, but readyz.
                told = (
                    "[-]subnet-file failed: No space left on device",
                    "[!]metrics warning: cannot listen on 127.0.0.1:9285",
                    "[!]systemd warning: cannot notify systemd at /nonexistent/notify",
                    f"[!]state-dir warning: {full.state_dir}",
                    "[!]admin-socket warning: ",
                )

                async def tells_all() -> bool:
                    status, text = await full.get(HEALTH_PORT, "/readyz?verbose")
                    assert status == 503
                    return all(line in text for line in told)

                # For a moment the admin socket is there again, until it is removed again.
                await until(tells_all, "/readyz names all five")
                await asyncio.sleep(max(0.0, began + FOR_S - time.monotonic()))
                for node, start in starts:
                    lines = warnings(node, after=start)
                    assert 1 <= len(lines) <= 2, (node.number, lines)
                    # What was put back, and that it works again if that took two tries.
                    assert node.log_path.read_text()[start:].count(" I ") <= 2, node.log_tail()
                for node, words in (
                    (full, "cannot write"),
                    (full, "cannot listen on"),
                    (full, "cannot notify systemd"),
                    (full, "stranger to its own lease"),
                    (full, "admin socket"),
                    (spoilt, "was removed or changed"),
                    (spoilt, "no such table"),
                ):
                    assert 1 <= len(warnings(node, words)) <= 2, (words, warnings(node))
                assert len(warnings(full)) <= 10, warnings(full)
                assert len(warnings(spoilt)) <= 4, warnings(spoilt)
        # Once the faults are over, all is well again, and said so.
        await until(lambda: full.admin_socket.exists())

        async def has_metrics() -> bool:
            with contextlib.suppress(OSError):
                return (await full.get(9285, "/metrics"))[0] == 200
            return False

        await until(has_metrics, "metrics, now that the port is free")
        for node in (tun, rules, address):
            await until(lambda node=node: is_ready(node))
            assert node.daemon.poll() is None


def post(url: str, body: dict[str, Any]) -> None:
    with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=5):
        pass


async def lock_etcd(overlay: OverlayLab) -> None:
    """etcd asks for passwords: `reader` may only read, `root` is nobody's."""

    async def v3(method: str, **body: Any) -> None:
        await overlay.switch.call(post, f"{overlay.etcd.url}/v3/auth/{method}", body)

    def b64(text: str) -> str:
        return base64.b64encode(text.encode()).decode()

    prefix = "/coreos.com/network"
    for user in ("root", "reader"):
        await v3("user/add", name=user, password="secret")
        await v3("role/add", name=user)
        await v3("user/grant", user=user, role=user)
    everything = {"permType": "READ", "key": b64(f"{prefix}/"), "rangeEnd": b64(f"{prefix}0")}
    await v3("role/grant", name="reader", perm=everything)
    await v3("enable")


@pytest.mark.parametrize("api", ["v3"])
async def test_faults_of_the_store(make_overlay: MakeOverlay, api: str) -> None:
    async with make_overlay(store="etcd", nodes=5, start=False) as overlay:
        nobody, name, password, denied, started = overlay.nodes.values()
        await boot(overlay, started)
        await until(lambda: is_ready(started))
        await lock_etcd(overlay)
        url, version = overlay.store_flags[0], f"--etcd-api={api}"
        login = ("--etcd-username=reader", url, version)
        mark = len(started.log_path.read_text())
        began = time.monotonic()
        faults: Sequence[tuple[LabNode, tuple[str, ...], str]] = (
            (nobody, ("--etcd-endpoints=http://192.0.2.254:9", version), "refused"),
            (name, ("--etcd-endpoints=http://etcd.invalid:2379", version), "etcd.invalid"),
            (password, (*login, "--etcd-password=wrong"), "authentication failed"),
            (denied, (*login, "--etcd-password=secret"), "permission denied"),
        )
        for node, flags, _ in faults:
            await boot(overlay, node, *flags)
        for node, _, words in faults:

            async def is_named(node: LabNode = node, words: str = words) -> bool:
                try:
                    found = await readiness(node)
                except OSError:
                    return False
                return words in found.details

            await until(is_named, f"{words!r} in readyz of node{node.number}")
            status = await node.status()
            assert status.state is DaemonState.STARTING
            assert words in status.waiting_for
        await asyncio.sleep(max(0.0, began + FOR_S - time.monotonic()))
        for node, _, words in faults:
            lines = warnings(node)
            assert 1 <= len(lines) <= 2, (words, lines)
            assert words in "".join(lines)
        # One that had a lease when its rights went: known peers stay, readyz tells of the store.
        lines = warnings(started, after=mark)
        assert len(lines) <= 2, lines
