"""iptables programs that are not what their names say: wrappers, as distributions ship them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from tests.loops import LOOPS, run_on
from tests.nodes import HEALTH_PORT, OVERLAY, MakeLab, MakeOverlay, must_run
from tests.wait import until
from tundp.lab.overlay import LabNode
from tundp.linux.capability import CAP_NET_ADMIN, CAP_NET_RAW
from tundp.linux.command import find
from tundp.linux.firewall.choose import FirewallSettings, leftovers, make_firewall, remove_all

ALL = ("", "-save", "-restore")


def wrap(directory: Path, program: str, *, before: str = "", suffixes: Sequence[str] = ALL) -> None:
    """Scripts iptables, iptables-save and iptables-restore that run `program`'s."""
    for suffix in suffixes:
        path = directory / f"iptables{suffix}"
        path.write_text(f'#!/bin/sh\n{before}exec {find(program + suffix)} "$@"\n')
        path.chmod(0o755)


async def firewall_line(node: LabNode) -> str:
    try:
        _, text = await node.get(HEALTH_PORT, "/readyz?verbose")
    except OSError:
        return ""
    return next((line for line in text.splitlines() if "firewall " in line), "")


@pytest.mark.parametrize("program", ["iptables-legacy", "iptables-nft"])
async def test_a_daemon_keeps_what_the_wrapped_program_needs(
    make_overlay: MakeOverlay, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str
) -> None:
    wrap(tmp_path, program)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    async with make_overlay(f"--healthz-port={HEALTH_PORT}", "--ip-masq", nodes=1) as overlay:
        node = overlay.nodes[1]

        async def has_rules() -> bool:
            return "[+]firewall ok: our iptables rules are there" in await firewall_line(node)

        await until(has_rules, "the rules are made")
        for table, chain in (("filter", "FLANNEL-FWD"), ("nat", "FLANNEL-POSTRTG")):
            assert chain in await must_run(node.host, program, "-t", table, "-S")
        status = Path(f"/proc/{node.daemon.pid}/status").read_text()
        permitted = int(status.split("CapPrm:")[1].split()[0], 16)
        raw = program == "iptables-legacy"
        assert permitted == 1 << CAP_NET_ADMIN | raw << CAP_NET_RAW


async def test_a_wrapper_that_prints_lines_of_its_own(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrap(tmp_path, "iptables", before='date "+called at %N"\n')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    settings = FirewallSettings(
        network=OVERLAY,
        subnet=IPv4Network("10.5.7.0/24"),
        is_masquerading=True,
        is_forwarding=True,
    )
    made = make_firewall(settings, is_nftables=False)

    async def set_up_and_look() -> list[str]:
        await made.set_up(None)
        return await made.repair()

    async with make_lab() as lab:
        host = await lab.host("fw")
        assert await host.call(lambda: run_on(LOOPS["asyncio"], set_up_and_look())) == []


@pytest.mark.parametrize("suffixes", [("",), ALL, ("-save",)], ids=["program", "all", "save"])
async def test_what_is_removed_is_listed_once(
    make_lab: MakeLab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, suffixes: tuple[str, ...]
) -> None:
    """A wrapper around the legacy program alone, beside -save and -restore of nft."""
    rules = {}
    for program in ("iptables-legacy", "iptables-nft"):
        rules[program] = [find(f"{program}{suffix}") for suffix in ALL]
        assert all(rules[program]), f"{program} is not installed"
    async with make_lab() as lab:
        host = await lab.host("fw")
        for program in rules:
            await must_run(host, program, "-N", "FLANNEL-FWD")
            await must_run(host, program, "-A", "FLANNEL-FWD", "-s", str(OVERLAY), "-j", "ACCEPT")
        wrap(tmp_path, "iptables-legacy", suffixes=suffixes)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

        async def list_and_remove() -> tuple[list[str], list[str], list[str]]:
            before = (await leftovers([OVERLAY])).removed
            removed = (await remove_all([OVERLAY])).removed
            return before, removed, (await leftovers([OVERLAY])).removed

        before, removed, after = await host.call(
            lambda: run_on(LOOPS["asyncio"], list_and_remove())
        )
        assert len(before) == 2, before
        assert removed == before
        assert after == []
        for program in rules:
            assert "FLANNEL-FWD" not in await must_run(host, program, "-S")
