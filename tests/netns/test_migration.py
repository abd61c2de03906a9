"""Takeover from each version of flannel and roll-back to it: one set of rules is left each time.

The rules are written down here as each version writes them and as iptables prints them, from
flannel's documents and sources: nothing of them comes from the code under test.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.netns.firewall_box import (
    BACK_ENDS,
    V6,
    Box,
    MakeBox,
    N,
    S,
    echo_source,
    make,
    neighbours,
)
from tests.nodes import MakeLab
from tundp.linux.firewall import choose
from tundp.linux.firewall.choose import Previous, Removal, leftovers, remove_all

MASQ = '-m comment --comment "flanneld masq"'
FWD = '-m comment --comment "flanneld forward"'
MARK = f"-m mark --mark 0x4000/0x4000 {MASQ} -j RETURN"
NAT_JUMP, FILTER_JUMP = f"{MASQ} -j FLANNEL-POSTRTG", f"{FWD} -j FLANNEL-FWD"


def old_masq(comment: str = "") -> list[str]:
    """Four rules, as from v0.11 to v0.21."""
    return [
        f"-s 10.5.0.0/16 -d 10.5.0.0/16{comment} -j RETURN",
        f"-s 10.5.0.0/16 ! -d 224.0.0.0/4{comment} -j MASQUERADE --random-fully",
        f"! -s 10.5.0.0/16 -d 10.5.7.0/24{comment} -j RETURN",
        f"! -s 10.5.0.0/16 -d 10.5.0.0/16{comment} -j MASQUERADE --random-fully",
    ]


NEW_MASQ = [
    MARK,
    f"-s 10.5.7.0/24 -d 10.5.0.0/16 {MASQ} -j RETURN",
    f"-s 10.5.0.0/16 -d 10.5.7.0/24 {MASQ} -j RETURN",
    f"! -s 10.5.0.0/16 -d 10.5.7.0/24 {MASQ} -j RETURN",
    f"-s 10.5.0.0/16 ! -d 224.0.0.0/4 {MASQ} -j MASQUERADE --random-fully",
    f"! -s 10.5.0.0/16 -d 10.5.0.0/16 {MASQ} -j MASQUERADE --random-fully",
]
NEW_FORWARD = [f"-s 10.5.0.0/16 {FWD} -j ACCEPT", f"-d 10.5.0.0/16 {FWD} -j ACCEPT"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """What a flannel writes: rules of each chain, and how the jumps get in."""

    name: str
    postrouting: list[str]
    forward: list[str]
    chains: dict[str, list[str]]
    jumps: str = "-A"

    def rules(self, *, masq: bool, forward: bool) -> dict[tuple[str, str], list[str]]:
        """Rules by table and chain, in the order they are written."""
        found = {}
        if masq:
            found["nat", "POSTROUTING"] = self.postrouting
            if self.chains:
                found["nat", "FLANNEL-POSTRTG"] = self.chains["nat"]
        if forward:
            found["filter", "FORWARD"] = self.forward
            if self.chains:
                found["filter", "FLANNEL-FWD"] = self.chains["filter"]
        return found


VERSIONS = [
    Version(
        name="0.11",
        postrouting=old_masq(),
        forward=["-s 10.5.0.0/16 -j ACCEPT", "-d 10.5.0.0/16 -j ACCEPT"],
        chains={},
    ),
    Version(
        name="0.16.2",
        postrouting=old_masq(f" {MASQ}"),
        forward=NEW_FORWARD,
        chains={},
    ),
    Version(
        name="0.20",
        postrouting=[NAT_JUMP],
        forward=[FILTER_JUMP],
        chains={"nat": [MARK, *old_masq(f" {MASQ}")], "filter": NEW_FORWARD},
        jumps="-I",
    ),
    Version(
        name="0.22",
        postrouting=[NAT_JUMP],
        forward=[FILTER_JUMP],
        chains={"nat": NEW_MASQ, "filter": NEW_FORWARD},
    ),
]
BY_NAME = {version.name: version for version in VERSIONS}


def start(binary: str, version: Version, *, masq: bool, forward: bool) -> str:
    """A script that does what this flannel does at its start.

    It empties its chains, then writes each rule; one that is there is deleted first (v0.11: left
    where it is).
    """
    lines = []
    for (table, chain), rules in version.rules(masq=masq, forward=forward).items():
        ipt = f"{binary} -t {table}"
        if chain.startswith("FLANNEL"):
            lines.append(f"{ipt} -N {chain} 2>/dev/null || {ipt} -F {chain}")
            lines += [f"{ipt} -A {chain} {rule}" for rule in rules]
    for (table, chain), rules in version.rules(masq=masq, forward=forward).items():
        ipt = f"{binary} -t {table}"
        for rule in () if chain.startswith("FLANNEL") else rules:
            if version.name == "0.11":
                lines.append(f"{ipt} -C {chain} {rule} 2>/dev/null || {ipt} -A {chain} {rule}")
                continue
            lines.append(f"{ipt} -D {chain} {rule} 2>/dev/null || true")
            lines.append(f"{ipt} {version.jumps} {chain} {rule}")
    return "\n".join(lines) or "true"


BEFORE, AFTER = "-s 192.0.2.9/32 -j ACCEPT", "-s 203.0.113.0/24 -j DROP"
"""An administrator's rules, made before flannel's and after them."""


def admins(binary: str, rule: str) -> str:
    match = rule.split(" -j")[0]
    return f"{binary} -A FORWARD {rule}; {binary} -t nat -A POSTROUTING {match} -j ACCEPT"


async def chains(at: Box, binary: str) -> dict[tuple[str, str], list[str]]:
    """The rules of POSTROUTING, FORWARD and every chain that is not built in."""
    found: dict[tuple[str, str], list[str]] = {}
    for table in ("nat", "filter"):
        for line in (await at.sh(f"{binary} -t {table} -S")).splitlines():
            kind, chain, *rest = line.split(" ", 2)
            if kind in ("-N", "-P") and chain not in ("PREROUTING", "INPUT", "OUTPUT"):
                found[table, chain] = []
            elif kind == "-A":
                found[table, chain].append(rest[0])
    return found


def expected(
    version: Version, *, masq: bool, forward: bool, jumps_only: bool
) -> dict[tuple[str, str], list[str]]:
    """What must be there: the administrator's rules with flannel's or ours in their place."""
    rules = version.rules(masq=masq, forward=forward)
    if jumps_only:
        ours = BY_NAME["0.22"].rules(masq=masq, forward=forward)
        rules = {key: ours[key] for key in ours}
    found = dict(rules)
    for table, chain, verdict in (("nat", "POSTROUTING", "ACCEPT"), ("filter", "FORWARD", "")):
        middle = rules.get((table, chain), [])
        first, last = (
            rule if not verdict else f"{rule.split(' -j')[0]} -j {verdict}"
            for rule in (BEFORE, AFTER)
        )
        found[table, chain] = (
            [*middle, first, last] if version.jumps == "-I" else [first, *middle, last]
        )
    return found


@pytest.mark.parametrize("binary", BACK_ENDS)
@pytest.mark.parametrize("name", BY_NAME)
async def test_one_set_after_the_takeover_and_after_the_roll_back(
    box: MakeBox, name: str, binary: str
) -> None:
    version = BY_NAME[name]
    for masq, forward in itertools.product([True, False], repeat=2):
        async with box() as at:
            flannel = start(binary, version, masq=masq, forward=forward)
            await at.sh(f"{admins(binary, BEFORE)}\n{flannel}\n{admins(binary, AFTER)}")
            of_flannel = expected(version, masq=masq, forward=forward, jumps_only=False)
            assert await chains(at, binary) == of_flannel

            new = make(binary, is_masquerading=masq, is_forwarding=forward)
            await at.do(new.set_up, Previous(network=N, subnet=S))
            wanted = expected(version, masq=masq, forward=forward, jumps_only=True)
            assert await chains(at, binary) == wanted, (masq, forward)
            assert await at.do(new.repair) == []

            # The documented order: stop tundp, clean up, start flannel.
            await at.do(remove_all, [N])
            await at.sh(flannel)
            ended = {key: sorted(rules) for key, rules in (await chains(at, binary)).items()}
            assert ended == {key: sorted(rules) for key, rules in of_flannel.items()}
            assert list((await chains(at, binary)).get(("nat", "FLANNEL-POSTRTG"), [])) == list(
                of_flannel.get(("nat", "FLANNEL-POSTRTG"), [])
            )


@pytest.mark.parametrize("binary", BACK_ENDS)
@pytest.mark.parametrize("name", BY_NAME)
async def test_what_flannel_did_and_we_are_not_to_do_ends_with_the_takeover(
    box: MakeBox, name: str, binary: str
) -> None:
    """flannel with masquerading and forwarding, tundp without: nothing decides in its place."""
    async with box() as at:
        await at.sh(start(binary, BY_NAME[name], masq=True, forward=True))
        new = make(binary, is_masquerading=False, is_forwarding=False)
        assert not new.is_wanted
        await at.do(new.set_up, Previous(network=N, subnet=S))
        assert await chains(at, binary) == {("nat", "POSTROUTING"): [], ("filter", "FORWARD"): []}


@pytest.mark.parametrize("name", ["0.11", "0.16.2"])
async def test_clean_up_beside_an_old_flannel_takes_the_chains_alone(
    box: MakeBox, name: str
) -> None:
    """Somebody started flannel first: it has no chains, so they are ours."""
    async with box() as at:
        await at.do(make("iptables").set_up, None)
        await at.sh(start("iptables", BY_NAME[name], masq=True, forward=True))
        removed = await at.do(remove_beside, [N])
        assert any("FLANNEL-POSTRTG" in line for line in removed.removed)
        assert await chains(at, "iptables") == BY_NAME[name].rules(masq=True, forward=True)


async def remove_beside(networks: Any) -> Any:
    return await remove_all(networks, spares_direct=True)


async def test_a_new_flannel_started_without_cleaning_up_has_one_set(box: MakeBox) -> None:
    async with box() as at:
        await at.do(make("iptables").set_up, None)
        for name in ("0.20", "0.22"):
            await at.sh(start("iptables", BY_NAME[name], masq=True, forward=True))
            assert await chains(at, "iptables") == BY_NAME[name].rules(masq=True, forward=True)


NFT_OF_FLANNEL = """
table ip flannel-ipv4 {
  comment "rules for flannel-ipv4"
  chain postrtg {
    comment "chain to manage traffic masquerading by flannel"
    type nat hook postrouting priority srcnat; policy accept;
    meta mark 0x4000 return
    ip saddr 10.5.7.0/24 ip daddr 10.5.0.0/16 return
    ip saddr 10.5.0.0/16 ip daddr 10.5.7.0/24 return
    ip saddr != 10.5.7.0/24 ip daddr 10.5.0.0/16 return
    ip saddr 10.5.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random
    ip saddr != 10.5.0.0/16 ip daddr 10.5.0.0/16 masquerade fully-random
  }
  chain forward {
    comment "chain to accept flannel traffic"
    type filter hook forward priority filter; policy accept;
    ip saddr 10.5.0.0/16 accept
    ip daddr 10.5.0.0/16 accept
  }
}
table ip6 flannel-ipv6 {
  comment "rules for flannel-ipv6"
}
"""
"""v0.25 and later, with EnableNFTables."""


async def test_flannels_nftables_are_taken_over_and_given_back(box: MakeBox) -> None:
    plant = f"nft -f - <<'END'\n{NFT_OF_FLANNEL}\nEND\n"
    for masq, forward in itertools.product([True, False], repeat=2):
        async with box() as at:
            await at.sh(plant)
            whole = await at.sh("nft list ruleset")
            wanted = {"is_masquerading": masq, "is_forwarding": forward}
            await at.do(make("nftables", **wanted).set_up, Previous(network=N, subnet=S))
            now = await at.sh("nft list ruleset")
            if masq and forward:
                assert now == whole
            assert ("chain postrtg" in now, "chain forward" in now) == (masq, forward)
            assert set(now.splitlines()) <= set(whole.splitlines())
            await at.do(remove_all, [N])
            assert await at.sh("nft list ruleset") == ""
            await at.sh(plant)
            await at.do(make("iptables", **wanted).set_up, Previous(network=N, subnet=S))
            assert "table ip flannel" not in await at.sh("nft list ruleset")


ODD_ORDERS = {
    "duplicates, reported of v0.11": [
        old_masq()[1],
        old_masq()[3],
        *old_masq(),
    ],
    "reversed": list(reversed(old_masq())),
    "somebody's rule between": [*old_masq()[:2], "-s 192.0.2.7/32 -j RETURN", *old_masq()[2:]],
    "not random": [rule.replace(" --random-fully", "") for rule in old_masq()],
    "a subnet long given up": [
        *old_masq(),
        "! -s 10.5.0.0/16 -d 10.5.99.0/24 -j RETURN",
    ],
    "with comments, one alone": [old_masq(f" {MASQ}")[1]],
    "both forms": [*old_masq(), *old_masq(f" {MASQ}")],
}


@pytest.mark.parametrize("case", ODD_ORDERS)
async def test_direct_rules_go_in_whatever_order_they_stand(box: MakeBox, case: str) -> None:
    async with box() as at:
        for rule in ODD_ORDERS[case]:
            await at.sh(f"iptables -t nat -A POSTROUTING {rule}")
        # Without a subnet.env of before: what the rules say is enough.
        await at.do(make("iptables", is_forwarding=False).set_up, None)
        foreign = [rule for rule in ODD_ORDERS[case] if "192.0.2.7" in rule]
        found = await chains(at, "iptables")
        assert found["nat", "POSTROUTING"] == [NAT_JUMP, *foreign]
        assert found["nat", "FLANNEL-POSTRTG"] == NEW_MASQ


ODD_FORWARD = {
    "reversed": ["-d 10.5.0.0/16 -j ACCEPT", "-s 10.5.0.0/16 -j ACCEPT"],
    "with comments, apart": [NEW_FORWARD[0], "-s 192.0.2.7/32 -j ACCEPT", NEW_FORWARD[1]],
}


@pytest.mark.parametrize("case", ODD_FORWARD)
async def test_direct_forward_rules_go_in_whatever_order(box: MakeBox, case: str) -> None:
    async with box() as at:
        for rule in ODD_FORWARD[case]:
            await at.sh(f"iptables -A FORWARD {rule}")
        await at.do(make("iptables", is_masquerading=False).set_up, None)
        found = await chains(at, "iptables")
        foreign = [rule for rule in ODD_FORWARD[case] if "192.0.2.7" in rule]
        assert found["filter", "FORWARD"] == [FILTER_JUMP, *foreign]


async def test_ipv6_rules_of_old_flannels_go_too(box: MakeBox) -> None:
    """v0.16.2 to v0.19.2 signed them; those of v0.15 and v0.16.1 are unsigned."""
    n, s = V6["network6"], V6["subnet6"]
    for comment in ("", f" {MASQ}"):
        async with box() as at:
            for rule in (
                f"-s {n} -d {n}{comment} -j RETURN",
                f"-s {n} ! -d ff00::/8{comment} -j MASQUERADE --random-fully",
                f"! -s {n} -d {s}{comment} -j RETURN",
                f"! -s {n} -d {n}{comment} -j MASQUERADE --random-fully",
            ):
                await at.sh(f"ip6tables -t nat -A POSTROUTING {rule}")
            wanted = {"is_masquerading": False, "is_forwarding": False}
            assert len((await at.do(leftovers, [n])).removed) == 1
            await at.do(make("iptables", **wanted, **V6).set_up, None)
            assert await at.sh("ip6tables -t nat -S POSTROUTING") == "-P POSTROUTING ACCEPT\n"


AGED = """#!/bin/sh
case " $* " in *" --version "*) echo iptables v1.4.7; exit;; esac
for each in "$@"; do case $each in -w|--wait|--random-fully) exit 2;; esac; done
/usr/sbin/iptables-legacy{suffix} "$@" | sed 's/$/ /'
"""
"""An iptables of 2010: no --wait, no --random-fully, and a space at the end of lines."""


async def test_an_iptables_without_wait_takes_over_too(
    box: MakeBox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for suffix in ("", "-save", "-restore"):
        program = tmp_path / f"iptables-aged{suffix}"
        program.write_text(AGED.format(suffix=suffix))
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    async with box() as at:
        old = start("iptables-legacy", BY_NAME["0.16.2"], masq=True, forward=True)
        await at.sh(old.replace(" --random-fully", ""))
        new = make("iptables-aged")
        await at.do(new.set_up, None)
        found = await chains(at, "iptables-legacy")
        assert found["nat", "POSTROUTING"] == [NAT_JUMP]
        assert found["filter", "FORWARD"] == [FILTER_JUMP]
        assert found["nat", "FLANNEL-POSTRTG"] == [
            rule.replace(" --random-fully", "") for rule in NEW_MASQ
        ]
        assert await at.do(new.repair) == []
        await at.do(make("iptables-aged", is_masquerading=False).set_up, None)
        assert ("nat", "FLANNEL-POSTRTG") not in await chains(at, "iptables-legacy")


# Changed settings


@pytest.mark.parametrize("first", [*BACK_ENDS, "nftables"])
@pytest.mark.parametrize("second", [*BACK_ENDS, "nftables"])
async def test_what_former_settings_made_goes(box: MakeBox, first: str, second: str) -> None:
    """Another tool or back end, and masquerading turned off, between two starts."""
    async with box() as at:
        await at.do(make(first, **V6).set_up, None)
        await at.do(make(second, **V6, is_masquerading=False).set_up, None)
        everything = "\n".join(await at.everything())
        assert "asquerade" not in everything.replace("chain to manage traffic masquerading", "")
        assert "MASQUERADE" not in everything
        assert "POSTRTG" not in everything
        assert "postrtg" not in everything
        forward = {"nftables": "chain forward {"}.get(second, "-A FORWARD -m comment")
        if second == "iptables":
            everything = await at.sh("iptables-save; ip6tables-save")
        assert everything.count(forward) == 2  # one a family
        await at.do(make(second, **V6, is_masquerading=False, is_forwarding=False).set_up, None)
        left = "\n".join(await at.everything())
        assert "FLANNEL" not in left
        assert "flannel" not in left


async def test_old_rules_that_cannot_be_removed_are_tried_again(
    box: MakeBox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any
) -> None:
    program = tmp_path / "nft"
    program.write_text(
        f"#!/bin/sh\n[ ! -e {tmp_path}/refuse ] || {{ echo busy >&2; exit 1; }}\n"
        'exec /usr/sbin/nft "$@"\n'
    )
    program.chmod(0o755)
    (tmp_path / "refuse").touch()
    async with box() as at:
        await at.do(make("nftables").set_up, None)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr(choose, "OLD_RETRY_S", 0.0)
        new = make("iptables", is_masquerading=False, is_forwarding=False)
        await at.do(new.set_up, None)
        assert "older rules may be left" in caplog.text
        assert "busy" in caplog.text
        assert new.needs_care
        (tmp_path / "refuse").unlink()
        assert await at.do(new.repair) == []
        assert not new.needs_care
        assert "flannel" not in await at.sh("/usr/sbin/nft list ruleset")


async def test_rules_saved_before_and_restored_do_not_double_or_outlive(box: MakeBox) -> None:
    """netfilter-persistent brings back, after a reboot, what was saved with another subnet."""
    async with box() as at:
        await at.do(make("iptables", subnet="10.5.99.0/24").set_up, None)
        saved = await at.sh("iptables-save -c")
        new = make("iptables")
        await at.do(new.set_up, None)
        fresh = await chains(at, "iptables")
        for options in ("--counters", "--counters --noflush"):
            await at.sh(f"iptables-restore {options} <<'END'\n{saved}\nEND\n")
            assert await chains(at, "iptables") != fresh
            assert await at.do(new.repair) != []
            assert await chains(at, "iptables") == fresh
            assert await at.do(new.repair) == []
        # And at a start, with the old file restored before it, and no subnet.env.
        await at.sh(f"iptables-restore <<'END'\n{saved}\nEND\n")
        await at.do(make("iptables").set_up, None)
        assert await chains(at, "iptables") == fresh


async def test_rules_of_an_old_flannel_that_come_back_go_again(box: MakeBox) -> None:
    async with box() as at:
        new = make("iptables")
        await at.do(new.set_up, None)
        fresh = await chains(at, "iptables")
        await at.sh(start("iptables", BY_NAME["0.16.2"], masq=True, forward=True))
        assert await at.do(new.repair) == [
            "iptables nat: 4 rules of an old flannel in POSTROUTING",
            "iptables filter: 2 rules of an old flannel in FORWARD",
        ]
        assert await chains(at, "iptables") == fresh


# Others of this host


K3S = BY_NAME["0.22"]


def of_k3s(rules: list[str]) -> list[str]:
    return [rule.replace("10.5.", "10.42.") for rule in rules]


async def test_another_networks_flannel_keeps_its_rules_in_the_same_chains(box: MakeBox) -> None:
    """k3s has a flannel inside, which uses flannel's own names."""
    async with box() as at:
        theirs = start("iptables", K3S, masq=True, forward=True).replace("10.5.", "10.42.")
        await at.sh(theirs)
        alone = await chains(at, "iptables")
        new = make("iptables")
        await at.do(new.set_up, None)
        both = await chains(at, "iptables")
        assert both["nat", "FLANNEL-POSTRTG"] == [*NEW_MASQ, *of_k3s(NEW_MASQ[1:])]
        assert both["filter", "FLANNEL-FWD"] == [*NEW_FORWARD, *of_k3s(NEW_FORWARD)]
        assert both["filter", "FORWARD"] == [FILTER_JUMP]
        # It looks for its rules only, and finds them all; at its start it empties the chain.
        await at.sh(theirs)
        assert await at.do(new.repair) != []
        assert await chains(at, "iptables") == both
        done = await at.do(remove_all, [N])
        assert "iptables nat: chain FLANNEL-POSTRTG, for 10.42.0.0/16" in done.kept
        assert await chains(at, "iptables") == alone
        # Of no network that is known, nothing goes.
        assert (await at.do(remove_all, [])).removed == []
        assert await chains(at, "iptables") == alone


async def test_another_networks_flannel_keeps_its_nftables_rules(box: MakeBox) -> None:
    """It never looks at them again: what is flushed stays away."""
    async with box() as at:
        await at.do(make("nftables").set_up, None)
        ours = await at.sh("nft list table ip flannel-ipv4")
        theirs = ours.replace("10.5.", "10.42.")
        await at.sh(f"nft flush ruleset; nft -f - <<'END'\n{theirs}\nEND\n")
        new = make("nftables")
        await at.do(new.set_up, None)
        both = (await at.sh("nft list table ip flannel-ipv4")).splitlines()
        assert {line for line in both if "10.42." in line} == {
            line for line in theirs.splitlines() if "10.42." in line
        }
        assert {line for line in ours.splitlines() if "10.5." in line} <= set(both)
        assert await at.do(new.repair) == []
        await at.do(make("nftables", is_masquerading=False).set_up, None)
        done = await at.do(remove_all, [N])
        assert "nftables: table ip flannel-ipv4, for 10.42.0.0/16" in done.kept
        assert await at.sh("nft list table ip flannel-ipv4") == theirs


async def test_a_network_with_chains_of_its_own_name_replaces_flannels(box: MakeBox) -> None:
    """flannel has one name for all networks; tundp, with another --subnet-file, its own."""
    async with box() as at:
        await at.sh(start("iptables", K3S, masq=True, forward=True))
        await at.do(make("iptables", mark="deadbeef").set_up, None)
        found = await chains(at, "iptables")
        assert found["filter", "FORWARD"] == [f"{FWD} -j FLANNEL-FWD-deadbeef"]
        assert ("nat", "FLANNEL-POSTRTG") not in found
        await at.do(remove_all, None, "deadbeef")
        # Another network's are none of its business, nor chains just emptied.
        for theirs in (
            start("iptables", K3S, masq=True, forward=True).replace("10.5.", "10.42."),
            "iptables -F FLANNEL-FWD",
            "iptables -N FLANNEL-FWD || true; nft add table ip flannel-ipv4",
        ):
            await at.sh(theirs)
            before = await chains(at, "iptables")
            for flavour in ("nftables", "iptables"):
                await at.do(make(flavour, mark="deadbeef").set_up, None)
                assert await at.do(remove_all, [N], "deadbeef") != Removal()
                assert await chains(at, "iptables") == before
        assert "table ip flannel-ipv4 {" in await at.sh("nft list ruleset")


async def test_a_network_around_ours_keeps_its_rules(box: MakeBox) -> None:
    async with box() as at:
        theirs = start("iptables", K3S, masq=True, forward=True)
        await at.sh(theirs.replace("10.5.0.0/16", "10.0.0.0/8").replace("10.5.7.", "10.99.7."))
        before = await chains(at, "iptables")
        await at.do(make("iptables").set_up, None)
        await at.do(remove_all, [N])
        assert await chains(at, "iptables") == before


# What packets do


@pytest.mark.parametrize("masq", [True, False])
@pytest.mark.parametrize("name", BY_NAME)
async def test_packets_after_a_takeover(make_lab: MakeLab, name: str, masq: bool) -> None:
    """Before somebody's DROP in FORWARD, and masqueraded if that is wanted, not otherwise."""
    async with neighbours(make_lab) as (at, pod, peer, outside):
        flannel = start("iptables", BY_NAME[name], masq=True, forward=True)
        await at.sh(f"{flannel}; iptables -A FORWARD -j DROP")
        assert await echo_source(pod, outside, "192.0.2.2") == "192.0.2.1"
        await at.do(make("iptables", is_masquerading=masq).set_up, None)
        seen = "192.0.2.1" if masq else "10.5.7.2"
        assert await echo_source(pod, outside, "192.0.2.2") == seen
        assert await echo_source(pod, peer, "10.5.8.2") == "10.5.7.2"
        assert await echo_source(outside, pod, "10.5.7.2") == "192.0.2.2"
