"""iptables-save's output as tables of rules; see iptables-extensions(8) for the matches.

Whatever is not known here makes a rule's answer UNKNOWN, never a no.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from tundp.linux.obstacles.packet import (
    ALWAYS,
    NEVER,
    UNKNOWN,
    Address,
    AddressType,
    AnyOf,
    Device,
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

_TOKEN: Final = re.compile(r'"(?:\\.|[^"\\])*"|\S+')
_HOOKS: Final = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
_PRIORITIES: Final = {"raw": -300, "mangle": -150, "nat": -100, "filter": 0, "security": 50}
"""linux/netfilter_ipv4.h: enum nf_ip_hook_priorities; nat's source side is at 100."""
_TARGETS: Final = {
    "ACCEPT": Kind.ACCEPT,
    "DROP": Kind.DROP,
    "REJECT": Kind.DROP,
    "TARPIT": Kind.DROP,
    "RETURN": Kind.RETURN,
    "NFQUEUE": Kind.QUEUE,
    "QUEUE": Kind.QUEUE,
    # The first that fits ends the nat table.
    "DNAT": Kind.DIVERT,
    "SNAT": Kind.ACCEPT,
    "MASQUERADE": Kind.ACCEPT,
    "REDIRECT": Kind.DIVERT,
    "TPROXY": Kind.DIVERT,
    "NETMAP": Kind.ACCEPT,
}
_SOURCE_NAT: Final = frozenset({"SNAT", "MASQUERADE", "NETMAP"})
_PROTOCOLS: Final = {"6": "tcp", "17": "udp", "1": "icmp"}
_ALL_BITS: Final = 0xFFFFFFFF


def parse(text: str, program: str) -> list[Table]:
    """The tables of one `iptables-save`. program: what to type to change them."""
    tables = []
    name = ""
    chains: dict[str, tuple[str, list[str]]] = {}
    for line in text.splitlines():
        if line.startswith("*"):
            name, chains = line[1:].strip(), {}
        elif line.startswith(":"):
            chain, policy, *_ = line[1:].split()
            chains[chain] = policy, []
        elif line.startswith("-A ") and name:
            chains.setdefault(line.split(" ", 2)[1], ("-", []))[1].append(line)
        elif line.startswith("COMMIT") and name:
            tables.append(_table(program, name, chains))
            name = ""
    return tables


def _table(program: str, name: str, listed: dict[str, tuple[str, list[str]]]) -> Table:
    chains = {
        chain: Chain(
            name=chain,
            rules=tuple(
                parse_rule(line, listed.keys(), number) for number, line in enumerate(lines, 1)
            ),
            hook=chain.lower() if chain in _HOOKS else "",
            priority=_priority(name, chain),
            reroutes=(name, chain) == ("mangle", "OUTPUT"),
            drops_by_default=policy == "DROP",
        )
        for chain, (policy, lines) in listed.items()
    }
    return Table(program=program, family="ip", name=name, chains=chains)


def _priority(table: str, chain: str) -> int:
    if table == "nat" and chain in ("INPUT", "POSTROUTING"):
        return 100
    return _PRIORITIES.get(table, 0)


def parse_rule(line: str, chains: Iterable[str], place: int = 0) -> Rule:
    """One line `-A chain ...`."""
    tokens = _TOKEN.findall(line)[2:]
    tests: list[Test] = []
    module, is_negated, at = "", False, 0
    while at < len(tokens):
        word = tokens[at]
        arguments = _arguments(tokens, at + 1)
        if word == "!":
            is_negated = True
            at += 1
            continue
        if word in ("-j", "-g"):
            return _finished(line, tests, word, arguments, tokens[at + 2 :], chains, place)
        if word == "-m":
            module = arguments[0] if arguments else ""
        else:
            test = _test(word, module, arguments)
            if test is not None:
                tests.append(Not(test) if is_negated else test)
        is_negated = False
        at += 1 + len(arguments)
    return Rule(text=line, tests=tuple(tests), place=place)


def _finished(
    line: str,
    tests: Sequence[Test],
    option: str,
    arguments: Sequence[str],
    rest: Sequence[str],
    chains: Iterable[str],
    place: int,
) -> Rule:
    target = arguments[0] if arguments else ""
    if target in chains:
        kind = Kind.GOTO if option == "-g" else Kind.JUMP
        return Rule(text=line, tests=tuple(tests), kind=kind, target=target, place=place)
    return Rule(
        text=line,
        tests=tuple(tests),
        kind=_TARGETS.get(target, Kind.NONE),
        marks=_marks(target, rest),
        untracks=target == "NOTRACK" or (target == "CT" and "--notrack" in rest),
        rewrites_source=target in _SOURCE_NAT,
        place=place,
    )


def _marks(target: str, options: Sequence[str]) -> int:
    """Bits of the mark a target may set."""
    if target == "CONNMARK":
        return _ALL_BITS if "--restore-mark" in options else 0
    if target != "MARK" or len(options) < 2:
        return 0
    value = _mark(options[1])
    return _ALL_BITS if value is None else value.value


def _arguments(tokens: Sequence[str], at: int) -> list[str]:
    """The words of an option: up to the next option or negation."""
    end = at
    while end < len(tokens) and not (tokens[end] == "!" or _is_option(tokens[end])):
        end += 1
    return list(tokens[at:end])


def _is_option(token: str) -> bool:
    return len(token) > 1 and token[0] == "-" and not token[1].isdigit()


def _test(option: str, module: str, arguments: Sequence[str]) -> Test | None:
    """What an option asks; None for one that asks nothing."""
    if option in _SILENT:
        return None
    make = _TESTS.get((module, option)) or _TESTS.get(("", option))
    if make is None:
        return UNKNOWN
    try:
        return make(arguments)
    except (ValueError, IndexError):
        return UNKNOWN


_SILENT: Final = {"--comment", "--nfacct-name", "--icmp-any"}


def _networks(is_source: bool) -> Callable[[Sequence[str]], Test]:  # noqa: FBT001
    def make(arguments: Sequence[str]) -> Test:
        networks = [IPv4Network(each, strict=False) for each in arguments[0].split(",")]
        return Address(is_source, merged(map(range_of, networks)))

    return make


def _addresses(is_source: bool) -> Callable[[Sequence[str]], Test]:  # noqa: FBT001
    def make(arguments: Sequence[str]) -> Test:
        first, _, last = arguments[0].partition("-")
        return Address(is_source, ((int(IPv4Address(first)), int(IPv4Address(last or first))),))

    return make


def _device(is_input: bool) -> Callable[[Sequence[str]], Test]:  # noqa: FBT001
    def make(arguments: Sequence[str]) -> Test:
        name = arguments[0].strip('"')
        return Device(is_input, (f"{name[:-1]}*" if name.endswith("+") else name,))

    return make


def _type(is_source: bool) -> Callable[[Sequence[str]], Test]:  # noqa: FBT001
    def make(arguments: Sequence[str]) -> Test:
        return AddressType(is_source, frozenset(arguments[0].lower().split(",")))

    return make


def _protocol(arguments: Sequence[str]) -> Test:
    name = arguments[0].lower()
    return ALWAYS if name in ("all", "0") else Layer4(frozenset({_PROTOCOLS.get(name, name)}))


def _ports(is_source: bool) -> Callable[[Sequence[str]], Test]:  # noqa: FBT001
    def make(arguments: Sequence[str]) -> Test:
        ranges: list[Range] = []
        for each in arguments[0].split(","):
            first, colon, last = each.partition(":")
            ranges.append((int(first or 0), int(last or 65535) if colon else int(first)))
        return Port(merged(ranges), is_source)

    return make


def _either_port(arguments: Sequence[str]) -> Test:
    return AnyOf((_ports(True)(arguments), _ports(False)(arguments)))


def _state(arguments: Sequence[str]) -> Test:
    return State(frozenset(arguments[0].lower().split(",")))


def _flags(arguments: Sequence[str]) -> Test:
    mask, wanted = (_flag_names(each) for each in arguments[:2])
    return TcpFlags(mask, wanted)


def _flag_names(text: str) -> frozenset[str]:
    everything = frozenset({"fin", "syn", "rst", "psh", "ack", "urg"})
    names = frozenset(text.lower().split(","))
    return everything if "all" in names else names - {"none"}


def _mark(text: str) -> Mark | None:
    value, _, mask = text.partition("/")
    try:
        return Mark(int(value, 0), int(mask, 0) if mask else _ALL_BITS)
    except ValueError:
        return None


_TESTS: Final[dict[tuple[str, str], Callable[[Sequence[str]], Test]]] = {
    ("", "-s"): _networks(True),
    ("", "-d"): _networks(False),
    ("", "-i"): _device(True),
    ("", "-o"): _device(False),
    ("", "-p"): _protocol,
    ("", "-f"): lambda _: NEVER,
    ("", "--sport"): _ports(True),
    ("", "--dport"): _ports(False),
    ("multiport", "--sports"): _ports(True),
    ("multiport", "--dports"): _ports(False),
    ("multiport", "--ports"): _either_port,
    ("tcp", "--tcp-flags"): _flags,
    ("tcp", "--syn"): lambda _: _flags(("FIN,SYN,RST,ACK", "SYN")),
    ("icmp", "--icmp-type"): lambda words: IcmpType(frozenset({words[0].lower()})),
    ("state", "--state"): _state,
    ("conntrack", "--ctstate"): _state,
    ("mark", "--mark"): lambda words: _mark(words[0]) or UNKNOWN,
    ("addrtype", "--src-type"): _type(True),
    ("addrtype", "--dst-type"): _type(False),
    ("iprange", "--src-range"): _addresses(True),
    ("iprange", "--dst-range"): _addresses(False),
    ("pkttype", "--pkt-type"): lambda words: ALWAYS if words[0] == "unicast" else NEVER,
    # Of a packet that is routed, and not bridged.
    ("physdev", "--physdev-is-bridged"): lambda _: NEVER,
    # The way back is asked of the kernel: routes.py.
    ("rpfilter", "--invert"): lambda _: NEVER,
    ("rpfilter", "--loose"): lambda _: ALWAYS,
    ("rpfilter", "--validmark"): lambda _: ALWAYS,
    ("rpfilter", "--accept-local"): lambda _: ALWAYS,
}
