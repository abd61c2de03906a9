"""`nft -j list table` as tables of rules; see libnftables-json(5) for the format.

Whatever is not known here makes a rule's answer UNKNOWN, never a no.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Final

from tundp.linux.obstacles.packet import (
    ALWAYS,
    NEVER,
    UNKNOWN,
    Address,
    AddressType,
    AllOf,
    AnyOf,
    Device,
    EtherType,
    IcmpType,
    Layer4,
    Mark,
    Not,
    Port,
    Range,
    State,
    TcpFlags,
    Test,
    merged,
    range_of,
)
from tundp.linux.obstacles.rules import Chain, Kind, Rule, Table

Json = Any
_FAMILIES: Final = ("ip", "inet", "netdev", "bridge", "arp")
_PREFIXED: Final = ("bridge", "arp")
"""Families with hooks of their own, which other packets do not meet."""
_VERDICTS: Final = {
    "accept": Kind.ACCEPT,
    "drop": Kind.DROP,
    "reject": Kind.DROP,
    "return": Kind.RETURN,
    "jump": Kind.JUMP,
    "goto": Kind.GOTO,
    "queue": Kind.QUEUE,
    "fwd": Kind.QUEUE,
    "dnat": Kind.DIVERT,
    "snat": Kind.ACCEPT,
    "masquerade": Kind.ACCEPT,
    "redirect": Kind.DIVERT,
    "tproxy": Kind.DIVERT,
}
_SILENT: Final = frozenset(
    {
        *("counter", "log", "dup", "set", "map", "flow", "continue", "last"),
        *("ct helper", "ct timeout", "ct expectation", "secmark", "comment"),
    }
)
"""Statements that decide nothing."""
_ALL_BITS: Final = 0xFFFFFFFF
_MALFORMED: Final = (ValueError, KeyError, TypeError, AttributeError, IndexError)
_CHAIN: Final = re.compile(r"\s*chain (\S+) {")
_HOOK_DEVICES: Final = re.compile(r"hook (?:ingress|egress) devices? (.*?) priority")
_NAME: Final = re.compile(r'[^\s"={},]+')
_UNNATTED: Final = frozenset({"dnat", "snat"})
_SOURCE_NAT: Final = frozenset({"snat", "masquerade"})
_IP: Final = EtherType(frozenset({"ip"}))
_ARP: Final = EtherType(frozenset({"arp"}))


def table_names(text: str) -> list[tuple[str, str]]:
    """Family and name of the tables in `nft -j list tables` that IPv4 or ARP packets may meet."""
    tables = [each["table"] for each in json.loads(text)["nftables"] if "table" in each]
    return [(each["family"], each["name"]) for each in tables if each["family"] in _FAMILIES]


def parse(text: str) -> list[Table]:
    """The tables of the families IPv4 passes. ValueError if it is no such JSON."""
    objects = json.loads(text)["nftables"]
    sets: dict[tuple[str, str, str], list[Json]] = {}
    chains: dict[tuple[str, str], dict[str, Json]] = {}
    rules: dict[tuple[str, str, str], list[Json]] = {}
    for each in objects:
        ((kind, body),) = each.items()
        if kind == "metainfo" or body["family"] not in _FAMILIES:
            continue
        table = (body["family"], body["table"] if kind != "table" else body["name"])
        if kind in ("set", "map"):
            sets[*table, body["name"]] = body.get("elem", [])
        elif kind == "chain":
            chains.setdefault(table, {})[body["name"]] = body
        elif kind == "rule":
            rules.setdefault((*table, body["chain"]), []).append(body)
    return [
        Table(
            program="nft",
            family=family,
            name=name,
            chains={
                each: _chain(body, rules.get((family, name, each), ()), _Sets(sets, family, name))
                for each, body in listed.items()
            },
        )
        for (family, name), listed in chains.items()
    ]


def devices_of(text: str) -> dict[str, tuple[str, ...]]:
    """The devices of chains at `ingress` and `egress`, by chain, in `nft list table`.

    nft's JSON names them since 1.0.7 only.
    """
    found: dict[str, tuple[str, ...]] = {}
    chain = ""
    for line in text.splitlines():
        if named := _CHAIN.match(line):
            chain = named[1]
        elif hook := _HOOK_DEVICES.search(line):
            found[chain] = tuple(_NAME.findall(hook[1]))
    return found


class _Sets:
    """The named sets and maps of a table."""

    def __init__(
        self, everything: Mapping[tuple[str, str, str], list[Json]], family: str, table: str
    ) -> None:
        self._all = everything
        self._table = family, table

    def elements(self, value: Json) -> list[Json] | None:
        """Of `{"set": [...]}` or `@name`, without what surrounds them; None for neither."""
        found = value.get("set") if isinstance(value, dict) else None
        if isinstance(value, str) and value.startswith("@"):
            found = self._all.get((*self._table, value[1:]))
        if found is None:
            return None
        listed = found if isinstance(found, list) else [found]
        return [_bare(each) for each in listed]


def _bare(element: Json) -> Json:
    """An element without its timeout, counter and comment."""
    if isinstance(element, dict) and "elem" in element:
        return element["elem"]["val"]
    return element


def _chain(body: Json, rules: Sequence[Json], sets: _Sets) -> Chain:
    devices, hook = body.get("dev", []), body.get("hook", "")
    return Chain(
        name=body["name"],
        rules=tuple(made for rule in rules for made in _readable(rule, sets)),
        hook=f"{body['family']} {hook}" if hook and body["family"] in _PREFIXED else hook,
        priority=body.get("prio", 0) if isinstance(body.get("prio", 0), int) else 0,
        devices=tuple(map(str, devices if isinstance(devices, list) else [devices])),
        reroutes=body.get("type") == "route",
        drops_by_default=body.get("policy") == "drop",
    )


def _readable(body: Json, sets: _Sets) -> list[Rule]:
    """The rule, or one that may do anything where its JSON is of another form than is known."""
    try:
        return list(_rules(body, sets))
    except _MALFORMED:
        place = body.get("handle", 0)
        return [Rule(text=json.dumps(body), tests=(UNKNOWN,), kind=Kind.QUEUE, place=place)]


def _rules(body: Json, sets: _Sets) -> Iterator[Rule]:
    """The rule; one for each element if it ends in a verdict map."""
    text, place = json.dumps(body["expr"]), body["handle"]
    tests: list[Test] = []
    marks = 0
    untracks = False
    for statement in body["expr"]:
        ((kind, value),) = statement.items()
        if kind == "notrack":
            untracks = True
        elif kind == "match":
            tests.append(_match(value, sets))
        elif kind == "mangle":
            marks |= _marks(value)
        elif kind == "vmap":
            yield from _vmap(value, tests, text, place, sets)
            return
        elif kind in _VERDICTS:
            target = value["target"] if kind in ("jump", "goto") else ""
            yield Rule(
                text=text,
                tests=tuple(tests),
                kind=_VERDICTS[kind],
                target=target,
                marks=marks,
                untracks=untracks,
                rewrites_source=kind in _SOURCE_NAT,
                place=place,
            )
            return
        elif kind not in _SILENT:
            tests.append(UNKNOWN)
    yield Rule(text=text, tests=tuple(tests), marks=marks, untracks=untracks, place=place)


def _vmap(value: Json, tests: Sequence[Test], text: str, place: int, sets: _Sets) -> Iterator[Rule]:
    pairs = sets.elements(value["data"])
    if pairs is None:
        yield Rule(text=text, tests=(*tests, UNKNOWN), kind=Kind.QUEUE, place=place)
        return
    for pair in pairs:
        key, verdict = _bare(pair[0]), pair[1]
        ((kind, more),) = verdict.items()
        yield Rule(
            text=text,
            tests=(*tests, _equal(value["key"], key, sets)),
            kind=_VERDICTS.get(kind, Kind.NONE),
            target=more["target"] if kind in ("jump", "goto") else "",
            place=place,
        )


def _marks(value: Json) -> int:
    """Bits of the packet's mark a statement may set."""
    if value["key"] != {"meta": {"key": "mark"}}:
        return 0
    new = value["value"]
    if isinstance(new, int):
        return new
    if isinstance(new, dict) and isinstance((either := new.get("|")), list):
        return int(either[1]) if isinstance(either[1], int) else _ALL_BITS
    if isinstance(new, dict) and "&" in new:
        return 0
    return _ALL_BITS


def _match(value: Json, sets: _Sets) -> Test:
    op, left, right = value["op"], value["left"], value["right"]
    test = _equal(left, right, sets) if op in ("==", "!=", "in") else UNKNOWN
    if op != "!=":
        return test
    # A header our packets do not have is neither equal nor unequal to anything.
    if test is NEVER and isinstance(left, dict) and "payload" in left:
        return NEVER
    if isinstance(test, AllOf):
        first, second = test.tests
        return AllOf((first, Not(second)))
    return Not(test)


def _equal(left: Json, right: Json, sets: _Sets) -> Test:
    """Whether what `left` names is `right`, or among it."""
    try:
        if isinstance(left, dict) and "concat" in left:
            return _equal_concat(left["concat"], right, sets)
        values = _values(right, sets)
        ((kind, what),) = left.items()
        if kind == "meta":
            return _meta(what["key"], values)
        if kind == "payload":
            return _payload(what, values)
        if kind == "ct":
            return _ct(what, values)
        if kind == "fib":
            return _fib(what, values)
        if kind == "&":
            return _masked(what[0], what[1], values)
    except _MALFORMED:
        pass
    return UNKNOWN


def _equal_concat(parts: Sequence[Json], right: Json, sets: _Sets) -> Test:
    elements = sets.elements(right)
    keys = [right] if elements is None else elements
    return AnyOf(
        tuple(
            AllOf(
                tuple(
                    _equal(part, value, sets)
                    for part, value in zip(parts, _bare(key)["concat"], strict=True)
                )
            )
            for key in keys
        )
    )


def _values(right: Json, sets: _Sets) -> list[Json]:
    elements = sets.elements(right)
    if elements is not None:
        return elements
    if isinstance(right, str) and right.startswith("@"):
        raise ValueError(right)
    return right if isinstance(right, list) else [right]


def _meta(key: str, values: Sequence[Json]) -> Test:
    if key in ("iifname", "oifname", "iif", "oif"):
        return Device(key.startswith("i"), tuple(map(str, values)))
    names = frozenset(map(str, values))
    if key == "l4proto":
        return Layer4(names)
    if key in ("nfproto", "protocol"):
        return EtherType(names)
    if key == "pkttype":
        # For an address of ARP all are asked, and one is answered.
        return AnyOf((AllOf((_IP, _constant(names & {"host", "unicast"}))), AllOf((_ARP, UNKNOWN))))
    if key == "mark":
        return AnyOf(tuple(Mark(int(value)) for value in values))
    return UNKNOWN


def _constant(holds: object) -> Test:
    return ALWAYS if holds else NEVER


def _payload(what: Mapping[str, str], values: Sequence[Json]) -> Test:
    protocol, name = what.get("protocol"), what.get("field")
    names = frozenset(map(str, values))
    if protocol in ("ip6", "icmpv6"):
        return NEVER
    if protocol == "arp":
        if name in ("saddr ip", "daddr ip"):
            return AllOf((_ARP, Address(name == "saddr ip", merged(map(_addresses, values)))))
        return AllOf((_ARP, UNKNOWN))
    if protocol == "ether" and name == "type":
        return EtherType(names)
    if protocol == "ip" and name in ("saddr", "daddr"):
        return AllOf((_IP, Address(name == "saddr", merged(map(_addresses, values)))))
    if protocol == "ip" and name == "protocol":
        return AllOf((_IP, Layer4(names)))
    if protocol in ("tcp", "udp", "th") and name in ("sport", "dport"):
        ports = Port(merged(map(_ports, values)), is_source=name == "sport")
        return ports if protocol == "th" else AllOf((Layer4(frozenset({protocol})), ports))
    if protocol == "icmp" and name == "type":
        return AllOf((Layer4(frozenset({"icmp"})), IcmpType(names)))
    if protocol == "tcp":
        return AllOf((Layer4(frozenset({"tcp"})), UNKNOWN))
    return UNKNOWN


def _ct(what: Mapping[str, str], values: Sequence[Json]) -> Test:
    names = frozenset(map(str, values))
    if what["key"] == "state":
        return State(names)
    if what["key"] == "status" and names <= _UNNATTED:
        return NEVER
    return UNKNOWN


def _fib(what: Mapping[str, Json], values: Sequence[Json]) -> Test:
    flags = set(what["flags"])
    if what["result"] == "type" and flags <= {"daddr", "iif", "oif", "saddr"}:
        return AddressType("saddr" in flags, frozenset(map(str, values)))
    if what["result"] == "oif" and "saddr" in flags and values in ([False], [True], [0]):
        # The way back is asked of the kernel: routes.py.
        return ALWAYS if values == [True] else NEVER
    return UNKNOWN


def _masked(left: Json, mask: Json, values: Sequence[Json]) -> Test:
    if left == {"meta": {"key": "mark"}}:
        return AnyOf(tuple(Mark(int(value), int(mask)) for value in values))
    if left == {"payload": {"protocol": "tcp", "field": "flags"}}:
        masks = mask if isinstance(mask, list) else [mask]
        flags = TcpFlags(frozenset(map(str, masks)), frozenset(map(str, values)))
        return AllOf((Layer4(frozenset({"tcp"})), flags))
    return UNKNOWN


def _addresses(value: Json) -> Range:
    if isinstance(value, dict) and "prefix" in value:
        prefix = value["prefix"]
        return range_of(IPv4Network((prefix["addr"], prefix["len"]), strict=False))
    if isinstance(value, dict) and "range" in value:
        first, last = value["range"]
        return int(IPv4Address(first)), int(IPv4Address(last))
    return int(IPv4Address(value)), int(IPv4Address(value))


def _ports(value: Json) -> Range:
    if isinstance(value, dict) and "range" in value:
        first, last = value["range"]
        return int(first), int(last)
    return int(value), int(value)
