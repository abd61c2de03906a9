"""The firewall against the real iptables (both back ends) and nft, each test in its own namespace.

golden/ holds what flannel's rules look like when printed; it was written from the
contract's tables, not from this code's output.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import re
import socket
import subprocess
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from tests.loops import LOOPS
from tests.netns.firewall_box import (
    BACK_ENDS,
    BARE,
    FLAVOURS,
    OTHER_N,
    OTHER_S,
    V6,
    MakeBox,
    N,
    S,
    echo_source,
    make,
    neighbours,
)
from tests.nodes import MakeLab
from tests.wait import until
from tundp.errors import PlatformError
from tundp.lab.lab import processes_in
from tundp.linux import command, uapi
from tundp.linux.firewall.choose import (
    Previous,
    Removal,
    leftovers,
    remove_all,
    watch_ruleset,
)

GOLDEN = Path(__file__).parent / "golden"
NOTHING = Removal()


def golden(name: Any) -> Any:
    return (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


# What is made


@pytest.mark.parametrize("binary", BACK_ENDS)
async def test_iptables_rules_are_flannels(box: MakeBox, binary: str) -> None:
    async with box() as at:
        for masq, forward in itertools.product([False, True], repeat=2):
            changes = {"is_masquerading": masq, "is_forwarding": forward}
            await at.do(make(binary, **changes, **V6).set_up, None)
            for six, (table, wanted) in itertools.product(
                ["", "6"], {"nat": (masq, "masq"), "filter": (forward, "forward")}.items()
            ):
                family = f"ip{six}tables"
                has = await at.sh(f"{binary.replace('ip', f'ip{six}', 1)} -t {table} -S")
                assert has == (golden(f"{family}-{wanted[1]}") if wanted[0] else BARE[table])
            await at.do(remove_all, None)


@pytest.mark.parametrize("binary", BACK_ENDS)
async def test_random_ports_can_be_off_and_ipv6_left_alone(box: MakeBox, binary: str) -> None:
    async with box() as at:
        await at.do(make(binary, is_random_fully=False).set_up, None)
        assert await at.sh(f"{binary} -t nat -S") == golden("iptables-masq-plain")
        assert await at.sh("ip6tables-save; ip6tables-legacy-save") == ""


async def test_nftables_rules_are_flannels(box: MakeBox) -> None:
    async with box() as at:
        for masq, forward in itertools.product([False, True], repeat=2):
            kind = {(0, 0): "none", (1, 0): "masq", (0, 1): "forward", (1, 1): "both"}
            changes = {"is_masquerading": masq, "is_forwarding": forward}
            await at.do(make("nftables", **changes, **V6).set_up, None)
            ruleset = await at.sh("nft list ruleset")
            name = kind[masq, forward]
            wanted = golden(f"nft-{name}") + golden(f"nft6-{name}") if name != "none" else ""
            assert ruleset == wanted
            await at.do(remove_all, None)
        # Without IPv6 its table is there all the same, and empty.
        await at.do(make("nftables", is_random_fully=False, is_forwarding=False).set_up, None)
        assert await at.sh("nft list ruleset") == golden("nft-masq-plain") + golden("nft6-none")


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_setting_up_again_changes_nothing(box: MakeBox, flavour: str, loop: str) -> None:
    async with box() as at:
        await at.do(make(flavour).set_up, None, loop=loop)
        before = await at.everything()
        # iptables-restore --noflush with the same input twice would double the jump.
        await at.do(make(flavour).set_up, Previous(network=N, subnet=S), loop=loop)
        assert await at.everything() == before


@pytest.mark.parametrize("binary", BACK_ENDS)
async def test_a_restart_leaves_the_jumps_where_they_are(box: MakeBox, binary: str) -> None:
    async with box() as at:
        await at.do(make(binary).set_up, None)
        # iptables-restore --noflush of a saved file doubles the jumps.
        await at.sh(
            f"{binary} -A FORWARD -s 192.0.2.9 -j DROP; {binary} -I FORWARD -j FLANNEL-FWD;"
            f"{binary} -t nat -A POSTROUTING -s 192.0.2.9 -j ACCEPT;"
            f'{binary} -A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD'
        )
        await at.do(make(binary).set_up, None)
        forward = (await at.sh(f"{binary} -S FORWARD")).splitlines()
        # One without the comment is an administrator's.
        assert forward[1:] == [
            "-A FORWARD -j FLANNEL-FWD",
            '-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD',
            "-A FORWARD -s 192.0.2.9/32 -j DROP",
        ]
        post = (await at.sh(f"{binary} -t nat -S POSTROUTING")).splitlines()
        assert [line.endswith("FLANNEL-POSTRTG") for line in post] == [False, True, False]


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_another_subnet_leaves_nothing_of_the_old_one(box: MakeBox, flavour: str) -> None:
    async with box() as at:
        await at.do(make(flavour, network=OTHER_N, subnet=OTHER_S).set_up, None)
        assert any("10.6.9.0" in line for line in await at.everything())
        await at.do(make(flavour).set_up, Previous(network=OTHER_N, subnet=OTHER_S))
        now = await at.everything()
        assert not any("10.6." in line for line in now)
        await at.do(remove_all, None)
        await at.do(make(flavour).set_up, None)
        # Only the order in which chains were made may differ.
        assert sorted(await at.everything()) == sorted(now)


# What goes


def names_of_flannel(lines: Any) -> Any:
    return [line for line in lines if "flannel" in line.lower()]


@pytest.mark.parametrize("binary", BACK_ENDS)
async def test_iptables_replaces_nftables(box: MakeBox, binary: str) -> None:
    async with box() as at:
        await at.do(make("nftables", **V6).set_up, None)
        await at.do(make(binary, **V6).set_up, None)
        assert "flannel-ip" not in await at.sh("nft list tables")
        assert await at.sh(f"{binary} -t nat -S") == golden("iptables-masq")


@pytest.mark.parametrize("binary", BACK_ENDS)
async def test_nftables_replaces_iptables(box: MakeBox, binary: str) -> None:
    # flannel looks for FLANNEL-FWD in nat, and forgets the jumps.
    async with box() as at:
        await at.do(make(binary, **V6).set_up, None)
        await at.do(make("nftables", **V6).set_up, None)
        six = binary.replace("ip", "ip6", 1)
        for name, table in itertools.product((binary, six), BARE):
            assert await at.sh(f"{name} -t {table} -S") == BARE[table]
        assert await at.sh("nft list table ip flannel-ipv4") == golden("nft-both")


@pytest.mark.parametrize("binary", BACK_ENDS)
async def test_another_instance_keeps_its_rules_of_the_other_flavour(
    box: MakeBox, binary: str
) -> None:
    async with box() as at:
        for first, second in (("nftables", binary), (binary, "nftables")):
            await at.do(make(first).set_up, None)
            before = await at.sh(f"nft list ruleset; {binary}-save")
            await at.do(make(second, mark="deadbeef", network=OTHER_N, subnet=OTHER_S).set_up, None)
            after = await at.sh(f"nft list ruleset; {binary}-save")
            ours = [line for line in before.splitlines() if "10.5." in line]
            assert len(ours) >= 6
            assert [line for line in after.splitlines() if "10.5." in line] == ours
            await at.do(remove_all, [N])
            await at.do(remove_all, None, "deadbeef")


def v011(
    binary: str, network: IPv4Network, subnet: IPv4Network | str, random: str = " --random-fully"
) -> str:
    """What flannel v0.11 runs."""
    nat, filter_ = f"{binary} -t nat -A POSTROUTING", f"{binary} -A FORWARD"
    return "\n".join(
        [
            f"{nat} -s {network} -d {network} -j RETURN",
            f"{nat} -s {network} ! -d 224.0.0.0/4 -j MASQUERADE{random}",
            f"{nat} ! -s {network} -d {subnet} -j RETURN",
            f"{nat} ! -s {network} -d {network} -j MASQUERADE{random}",
            f"{filter_} -s {network} -j ACCEPT",
            f"{filter_} -d {network} -j ACCEPT",
        ]
    )


@pytest.mark.parametrize("random", ["", " --random-fully"])
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("is_wanted", [True, False])
async def test_v011_rules_of_now_and_before_go(
    box: MakeBox, flavour: str, random: str, is_wanted: bool
) -> None:
    binary = "iptables" if flavour == "nftables" else flavour
    async with box() as at:
        # It forgets the rule of a subnet when the network stays.
        await at.sh(
            f"{binary} -t nat -A POSTROUTING ! -s 10.6.0.0/16 -d 10.6.9.0/24 -j RETURN\n"
            + v011(binary, OTHER_N, "10.6.8.0/24", random)
        )
        await at.sh(v011(binary, N, S, random))
        await at.sh(v011(binary, N, S, random))
        changes = {"is_masquerading": is_wanted, "is_forwarding": is_wanted}
        new = make(flavour, **changes)
        await at.do(new.set_up, Previous(network=OTHER_N, subnet=IPv4Network("10.6.8.0/24")))
        rest = await at.sh(f"{binary} -t nat -S POSTROUTING; {binary} -S FORWARD")
        lines = [line for line in rest.splitlines() if "FLANNEL" not in line]
        assert lines == [
            "-P POSTROUTING ACCEPT",
            "-P FORWARD ACCEPT",
        ]
        await at.do(remove_all, None)
        assert await at.sh(f"{binary} -t nat -S") == BARE["nat"]


FOREIGN = """
{ipt} -A FORWARD -s 10.5.0.0/16 -j ACCEPT
{ipt} -A FORWARD -s 192.0.2.0/24 -m comment --comment "flanneld forward" -j DROP
{ipt} -A FORWARD -d 10.5.0.0/16 -j ACCEPT
{ipt} -P FORWARD DROP
{ipt} -t nat -N KUBE-POSTROUTING
{ipt} -t nat -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
{ipt} -t nat -A POSTROUTING -s 10.5.0.0/16 -d 10.5.0.0/16 -j RETURN
{ipt} -t nat -A POSTROUTING -j KUBE-POSTROUTING
{ipt} -t nat -A POSTROUTING -s 10.5.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE
{ip6t} -A FORWARD -j ACCEPT
{ip6t} -t nat -A POSTROUTING -j ACCEPT
"""
FOREIGN_NFT = """
table inet firewalld { chain forward { type filter hook forward priority 10; reject; }; }
table ip flannel-ipv5 { chain postrtg { type nat hook postrouting priority 100; masquerade; }; }
table inet flannel-ipv4 { chain forward { counter accept; }; }
"""


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_what_is_not_ours_is_as_before(box: MakeBox, flavour: str) -> None:
    async with box() as at:
        for binary in BACK_ENDS:
            await at.sh(FOREIGN.format(ipt=binary, ip6t=binary.replace("ip", "ip6", 1)))
        await at.sh(f"nft -f - <<'END'\n{FOREIGN_NFT}\nEND\n")
        before = await at.everything()
        new = make(flavour, **V6)
        await at.do(new.set_up, Previous(network=OTHER_N, subnet=OTHER_S))
        during = await at.everything()
        assert firewall_of(during) and set(before) <= set(during)
        assert await at.do(new.repair) == []
        assert await at.everything() == during
        networks = [N, V6["network6"]]
        found = await at.do(leftovers, networks)
        assert await at.everything() == during
        assert found.removed
        assert await at.do(remove_all, networks) == found
        assert await at.everything() == before
        assert await at.do(leftovers, networks) == NOTHING


def firewall_of(lines: Any) -> Any:
    return [line for line in lines if "FLANNEL-FWD" in line or "flannel-ipv6" in line]


async def test_cleaning_up_takes_both_back_ends_and_jumps_of_others(box: MakeBox) -> None:
    async with box() as at:
        # A start with one back end removes what the other has: somebody restores it.
        await at.do(make("iptables", **V6).set_up, None)
        of_nft = [await at.sh(f"ip{six}tables-save") for six in ("", "6")]
        await at.do(make("iptables-legacy", **V6).set_up, None)
        assert await at.sh("{ iptables-save; ip6tables-save; } | grep FLANNEL || true") == ""
        for six, saved in zip(("", "6"), of_nft, strict=True):
            await at.sh(f"ip{six}tables-restore <<'END'\n{saved}\nEND\n")
        for binary in BACK_ENDS:
            await at.sh(
                f"{binary} -N DOCKER-USER; {binary} -A DOCKER-USER -j FLANNEL-FWD;"
                f"{binary} -I FORWARD -i eth0 -g FLANNEL-FWD"
            )
        await at.sh(v011("iptables-legacy", N, S))
        removed = (await at.do(remove_all, [N, V6["network6"]])).removed
        assert "iptables filter: chain FLANNEL-FWD, 2 rules, 3 jumps to it" in removed
        assert "ip6tables-legacy nat: chain FLANNEL-POSTRTG, 6 rules, 1 jumps to it" in removed
        assert "iptables-legacy nat: 4 rules of a flannel before v0.20 in POSTROUTING" in removed
        for binary in BACK_ENDS:
            assert await at.sh(f"{binary} -S") == BARE["filter"] + "-N DOCKER-USER\n"
            assert await at.sh(f"{binary} -t nat -S") == BARE["nat"]


async def test_looking_leaves_no_trace(box: MakeBox) -> None:
    # iptables-legacy -t nat -S would make a nat table, and with it connection tracking.
    async with box() as at:
        assert await at.do(leftovers, None) == NOTHING
        off = {"is_masquerading": False, "is_forwarding": False}
        for binary in BACK_ENDS:
            await at.do(make(binary, **off).set_up, Previous(network=N, subnet=S))
        assert await at.everything() == []


# What is put back

IPTABLES_DAMAGE = {
    "chain flushed": "{ipt} -t nat -F FLANNEL-POSTRTG",
    "other chain flushed": "{ipt} -F FLANNEL-FWD",
    "all flushed": "{ipt} -F; {ipt} -X; {ipt} -t nat -F; {ipt} -t nat -X",
    "chain gone": "{ipt} -D FORWARD 1; {ipt} -F FLANNEL-FWD; {ipt} -X FLANNEL-FWD",
    "rule deleted": "{ipt} -t nat -D FLANNEL-POSTRTG 4",
    "last rule deleted": "{ipt} -D FLANNEL-FWD 2",
    "order": "{ipt} -t nat -D FLANNEL-POSTRTG 1; {ipt} -t nat -A FLANNEL-POSTRTG"
    ' -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN',
    "jump deleted": "{ipt} -D FORWARD 1",
    "other jump deleted": "{ipt} -t nat -F POSTROUTING",
    "table deleted": "nft delete table ip nat",
    "all tables deleted": "nft flush ruleset",
}


@pytest.mark.parametrize("binary", BACK_ENDS)
async def test_iptables_damage_is_seen_and_mended(box: MakeBox, binary: str) -> None:
    async with box() as at:
        new = make(binary)
        await at.do(new.set_up, None)
        whole = await at.everything()
        for name, damage in IPTABLES_DAMAGE.items():
            if "nft" in damage and binary == "iptables-legacy":
                continue
            await at.sh(damage.format(ipt=binary))
            assert await at.everything() != whole, name
            done = await at.do(new.repair)
            assert done, name
            assert all(line.startswith(f"{binary} ") for line in done)
            assert sorted(await at.everything()) == sorted(whole), name
            assert await at.do(new.repair) == []
        await at.sh(f"{binary} -t nat -D FLANNEL-POSTRTG 4; {binary} -F FORWARD")
        assert await at.do(new.repair) == [
            f"{binary} nat: 1 of 6 rules of FLANNEL-POSTRTG",
            f"{binary} filter: jump from FORWARD to FLANNEL-FWD",
        ]


NFT_DAMAGE = {
    "chain flushed": "flush chain ip flannel-ipv4 postrtg",
    "chain gone": "delete chain ip flannel-ipv4 forward",
    "rule deleted": "delete rule ip flannel-ipv4 forward handle {handle}",
    "order": "delete rule ip flannel-ipv4 forward handle {handle};"
    "add rule ip flannel-ipv4 forward ip saddr 10.5.0.0/16 accept",
    "table deleted": "delete table ip flannel-ipv4",
    "other table deleted": "delete table ip6 flannel-ipv6",
    "all tables deleted": "flush ruleset",
}


async def test_nftables_damage_is_seen_and_mended(box: MakeBox) -> None:
    async with box() as at:
        new = make("nftables")
        await at.do(new.set_up, None)
        whole = await at.everything()
        for name, damage in NFT_DAMAGE.items():
            listed = await at.sh("nft -a list chain ip flannel-ipv4 forward")
            (handle,) = re.findall(r"saddr 10.5.0.0/16 accept # handle (\d+)", listed)
            await at.sh(f"nft '{damage.format(handle=handle)}'")
            assert await at.everything() != whole, name
            done = await at.do(new.repair)
            assert done, name
            assert all(line.startswith("nftables: ") for line in done)
            assert sorted(await at.everything()) == sorted(whole), name
            assert await at.do(new.repair) == []


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_looking_costs_at_most_four_processes_and_leaves_additions(
    box: MakeBox, flavour: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with box() as at:
        new = make(flavour)
        await at.do(new.set_up, None)
        add = "nft insert rule ip flannel-ipv4 forward counter"
        if flavour != "nftables":
            add = f"{flavour} -I FLANNEL-FWD -s 192.0.2.1 -j DROP"
        await at.sh(add)
        before = await at.everything()
        counted = tmp_path / "ran"
        for name in ("iptables", "iptables-legacy", "nft"):
            wrapper = tmp_path / name
            wrapper.write_text(
                f'#!/bin/sh\necho {name} >>{counted}\nexec {command.find(name)} "$@"\n'
            )
            wrapper.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert await at.do(new.repair) == []
        monkeypatch.undo()
        assert await at.everything() == before
        ran = counted.read_text().splitlines()
        assert ran == (["nft"] * 2 if flavour == "nftables" else [flavour] * 4)


# What goes wrong


async def test_one_table_refused_does_not_stop_the_other_and_is_tried_again(
    box: MakeBox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "refuse").touch()
    restore = tmp_path / "iptables-odd-restore"
    restore.write_text(
        "#!/bin/sh\nrules=$(cat)\n"
        f'case "$rules" in *"*nat"*) if [ -e {tmp_path}/refuse ]; then\n'
        "echo '# Warning: legacy tables present' >&2\n"
        "echo 'Another app is currently holding the xtables lock' >&2; exit 4; fi;; esac\n"
        f'printf "%s\\n" "$rules" | exec {command.find("iptables-restore")} "$@"\n'
    )
    restore.chmod(0o755)
    # Not a link: the multi-call binary goes by its name, which must be one that it knows.
    plain = tmp_path / "iptables-odd"
    plain.write_text(f'#!/bin/sh\nexec {command.find("iptables")} "$@"\n')
    plain.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    async with box() as at:
        new = make("iptables-odd")
        with pytest.raises(PlatformError) as caught:
            await at.do(new.set_up, None)
        assert "iptables-odd-restore --noflush --wait failed with exit code 4" in str(caught.value)
        assert "Another app is currently holding" in str(caught.value)
        assert await at.sh("iptables -S") == golden("iptables-forward")
        with pytest.raises(PlatformError):
            await at.do(new.repair)
        (tmp_path / "refuse").unlink()
        assert await at.do(new.repair) == [
            "iptables-odd nat: chain FLANNEL-POSTRTG (could not be set up before)"
        ]
        assert await at.sh("iptables -t nat -S") == golden("iptables-masq")


async def test_a_missing_program_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(command, "SYSTEM_PATH", "")
    for flavour, package in {"iptables": "iptables", "nftables": "nftables"}.items():
        new = make(flavour)
        for attempt in (lambda new=new: new.set_up(None), new.repair):
            with pytest.raises(PlatformError, match=f"Debian package {package}") as caught:
                await attempt()
            assert isinstance(caught.value, OSError)
            assert caught.value.errno == errno.ENOENT
    assert await remove_all([N]) == await leftovers(None) == NOTHING
    await make("iptables", is_masquerading=False, is_forwarding=False).set_up(None)


async def test_what_replaces_nothing_needs_no_other_program(
    box: MakeBox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "SYSTEM_PATH", "")
    async with box() as at:
        for flavour, names in {
            "iptables": ("iptables", "iptables-restore", "iptables-save"),
            "nftables": ("nft",),
        }.items():
            directory = tmp_path / flavour
            directory.mkdir()
            for name in names:
                (directory / name).symlink_to(f"/usr/sbin/{name}")
            with monkeypatch.context() as context:
                context.setenv("PATH", str(directory))
                await at.do(make(flavour).set_up, None)
        assert "flannel-ipv4" in await at.sh("nft list tables")


@pytest.mark.parametrize("loop", LOOPS)
async def test_no_program_outlives_its_time_or_its_caller(
    box: MakeBox, tmp_path: Path, loop: str
) -> None:
    started_file = tmp_path / "started"
    endless = ["sh", "-c", f": >{started_file}; sleep 99; :"]

    async def started() -> Any:
        return started_file.exists()

    async def cancelled() -> None:
        task = asyncio.ensure_future(command.run(*endless, package="dash"))
        await until(started)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def overdue() -> None:
        with pytest.raises(PlatformError, match=r"more than 0\.05 s") as caught:
            await command.run(*endless, package="dash", timeout_s=0.05)
        assert caught.value.errno == errno.ETIMEDOUT

    async with box() as at:

        async def is_over() -> Any:
            return processes_in(at.host.namespace) == []

        for end in (cancelled, overdue):
            await at.do(end, loop=loop)
            await until(is_over)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("turns", range(6))
async def test_a_program_cancelled_while_it_starts_is_over(
    box: MakeBox, turns: int, loop: str
) -> None:
    left: list[int] = []

    async with box() as at:

        async def cancelled() -> None:
            task = asyncio.ensure_future(command.run("sleep", "99", package="coreutils"))
            for _turn in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            left.extend(processes_in(at.host.namespace))

        await at.do(cancelled, loop=loop)
    assert left == []


async def test_commands_get_input_and_a_small_environment() -> None:
    done = await command.run("sh", "-c", "cat; env", package="dash", stdin="\u00e4\n")
    assert done.stdout.startswith("\u00e4\n")
    names = {line.split("=")[0] for line in done.stdout.splitlines()[1:]}
    assert names - {"PWD", "_", "SHLVL", "OLDPWD"} == {"PATH", "LC_ALL"}
    with pytest.raises(PlatformError, match=r"exit code 3: oops$"):
        await command.run("sh", "-c", "echo '# hm' >&2; echo oops >&2; exit 3", package="dash")


# What the kernel tells


def sh(script: Any) -> None:
    """In the namespace of the calling thread, and while its loop stands still."""
    subprocess.run(["sh", "-ec", script], check=True)


@pytest.mark.parametrize("loop", LOOPS)
async def test_a_change_wakes_the_watcher_and_silence_does_not(box: MakeBox, loop: str) -> None:
    async def watch() -> None:
        async with watch_ruleset() as changed:
            assert not await changed(0.01)
            sh("nft add table ip somebody")
            assert await changed(20)
            assert not await changed(0.01)
            sh("iptables -A FORWARD -j ACCEPT")
            assert await changed(20)
            assert not await changed(0.01)
            # More than the socket's buffer holds: the kernel drops the rest.
            sh("seq 500 | sed 's/^/add table ip many/' | nft -f -")
            assert await changed(20)
            assert not await changed(0.01)
            sh("nft delete table ip somebody")
            assert await changed(20)
            assert not await changed(0.01)
        # The next socket gets the same number, which the loop must have forgotten.
        async with watch_ruleset() as changed:
            sh("nft add table ip somebody")
            assert await changed(20)

    async with box() as at:
        await at.do(watch, loop=loop)


async def test_repairing_waits_for_a_change_and_then_mends(box: MakeBox) -> None:
    async def watch() -> None:
        new = make("iptables")
        await new.set_up(None)
        async with watch_ruleset() as changed:
            assert not await changed(0.01)
            sh("iptables -F")
            assert await changed(20)
            assert len(await new.repair()) == 1
            while await changed(0.01):
                assert await new.repair() == []

    async with box() as at:
        await at.do(watch)


async def test_without_the_socket_only_time_passes(
    box: MakeBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uapi, "NETLINK_NETFILTER", 31)  # no such protocol

    async def watch() -> None:
        async with watch_ruleset() as changed:
            sh("nft add table ip somebody")
            assert not await changed(0.01)

    async with box() as at:
        await at.do(watch)


async def test_watching_again_and_again_leaves_no_descriptor_open() -> None:
    async def count() -> Any:
        async with watch_ruleset() as changed:
            await changed(0)
        return len(os.listdir("/proc/self/fd"))

    counts = [await count() for _ in range(20)]
    assert counts[-1] <= counts[0]


# What packets do


@pytest.mark.parametrize("flavour", FLAVOURS)
async def test_packets_are_let_through_and_masqueraded(make_lab: MakeLab, flavour: str) -> None:
    async with neighbours(make_lab) as (at, pod, peer, outside):
        assert await echo_source(pod, outside, "192.0.2.2") == "10.5.7.2"
        if flavour != "nftables":
            # An accept in a table of our own does not overrule a policy in another.
            await at.sh(f"{flavour} -P FORWARD DROP")
            with await pod.socket(socket.SOCK_DGRAM) as sender:

                async def is_dropped() -> Any:
                    sender.sendto(b"lost", ("192.0.2.2", 9))
                    return "policy DROP 0 packets" not in await at.sh(f"{flavour} -vL FORWARD")

                await until(is_dropped)
        await at.do(make(flavour).set_up, None)
        assert await echo_source(pod, outside, "192.0.2.2") == "192.0.2.1"
        assert await echo_source(pod, peer, "10.5.8.2") == "10.5.7.2"
        assert await echo_source(peer, pod, "10.5.7.2") == "10.5.8.2"
        assert await echo_source(outside, pod, "10.5.7.2") == "192.0.2.2"
        # What kube-proxy marked, it masquerades itself.
        await at.sh(
            "nft 'add table ip kube; add chain ip kube marking {"
            " type filter hook forward priority -150; };"
            " add rule ip kube marking mark set 0x4000'"
        )
        assert await echo_source(pod, outside, "192.0.2.2") == "10.5.7.2"
        await at.sh("nft delete table ip kube")
        await at.do(make(flavour, is_masquerading=False).set_up, None)
        await at.do(remove_all, None)
        await at.do(make(flavour, is_masquerading=False).set_up, None)
        assert await echo_source(pod, outside, "192.0.2.2") == "10.5.7.2"
