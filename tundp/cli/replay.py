"""`tundp replay`: what would become of each packet of a capture file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING

from tundp.choices import Output, ReplayWay
from tundp.cli.command import DAEMON_FLAGS, Command, Given, run_async
from tundp.cli.explain import asks_daemon
from tundp.cli.output import EXIT_FAILED, EXIT_OK, print_json, print_line
from tundp.settings.declare import option
from tundp.settings.parsers import parse_int, parse_path

if TYPE_CHECKING:
    from tundp.daemon.replay import Given as GivenRules
    from tundp.observe.ledger import Ledger
    from tundp.observe.replay import Decision


def _port(text: str) -> int:
    value = parse_int(text)
    if not 1 <= value <= 65_535:
        raise ValueError("is out of range: 1 to 65535")
    return value


def _mtu(text: str) -> int:
    value = parse_int(text)
    if not 68 <= value <= 65_535:
        raise ValueError("is out of range: 68 to 65535 bytes")
    return value


def _subnet(text: str) -> IPv4Network:
    try:
        return IPv4Network(text)
    except ValueError:
        raise ValueError("is no subnet such as 10.5.1.0/24") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """What `tundp replay` can be told."""

    leases: Path | None = option(
        parse=parse_path,
        default=None,
        metavar="FILE",
        takes_file=True,
        help='lease table: an object of subnets and PublicIPs, {"10.5.2.0/24": "192.0.2.2"}, or'
        " what GET /v1/ledger of the admin socket gives",
        default_text="the running daemon's, or the store's",
        since="0.2.0",
    )
    subnet: IPv4Network | None = option(
        parse=_subnet,
        default=None,
        metavar="NETWORK",
        help="the subnet of the node that is played; its lease in the table is its own then",
        default_text="the table's",
        since="0.2.0",
    )
    port: int | None = option(
        parse=_port,
        default=None,
        metavar="PORT",
        help="UDP port of the overlay",
        default_text="the table's, or 8285",
        since="0.2.0",
    )
    mtu: int | None = option(
        parse=_mtu,
        default=None,
        metavar="BYTES",
        help="largest inner packet the paths carry",
        default_text="the table's, or any size fits",
        since="0.2.0",
    )
    direction: ReplayWay = option(
        choice=ReplayWay,
        default=ReplayWay.AUTO,
        help="take every packet for an inner one read from the TUN (encap), every datagram for the"
        " port for one received (decap), or tell by headers, addresses and interface names",
        since="0.2.0",
    )
    output: Output = option(
        choice=Output,
        default=Output.TEXT,
        help="a line a packet, or JSON, which --expect takes; also -o",
        since="0.2.0",
    )
    expect: Path | None = option(
        parse=parse_path,
        default=None,
        metavar="FILE",
        takes_file=True,
        help="compare with the decisions of this file, made by -o json: print differences only,"
        " and fail if there is any",
        default_text="none",
        since="0.2.0",
    )


def replay(given: Given[ReplayOptions]) -> int:
    """Print a decision for each packet; failed if they are not what was expected."""
    from tundp.daemon.replay import decisions, read_expected, rules_of
    from tundp.observe.replay import Replayed, differences, summed

    options = given.options
    expected = None if options.expect is None else read_expected(options.expect)
    rules = rules_of(_leases(given), _over(given))
    made: Iterator[Decision] = decisions(Path(given.operands[0]), rules)
    if expected is not None:
        found = list(differences(expected.decisions, list(made)))
        for line in found:
            print_line(line)
        print_line(f"{len(expected.decisions)} packets expected, {len(found)} differences")
        return EXIT_FAILED if found else EXIT_OK
    if options.output is Output.JSON:
        kept = tuple(made)
        print_json(Replayed(decisions=kept, summary=summed(kept)).to_json())
        return EXIT_OK
    _print_text(made)
    return EXIT_OK


def _print_text(made: Iterator[Decision]) -> None:
    """A line a packet as it is judged, then how many of each."""
    from collections import Counter

    from tundp.observe.replay import described, kind_of

    counts: Counter[str] = Counter()
    for each in made:
        counts[kind_of(each)] += 1
        print_line(f"{each.number:>6}  {described(each)}")
    print_line("")
    for kind, count in counts.most_common():
        print_line(f"{count:>6}  {kind}")


def _leases(given: Given[ReplayOptions]) -> Ledger:
    """The table of the file, else the running daemon's or the store's."""
    from tundp.daemon.known_leases import KnownLeases, known_leases
    from tundp.daemon.replay import read_leases
    from tundp.linux.netlink import Netlink

    if given.options.leases is not None:
        return read_leases(given.options.leases)

    async def ask() -> KnownLeases:
        async with Netlink() as netlink:
            return await known_leases(
                given.settings(), netlink, asks_daemon=asks_daemon(given.flags)
            )

    return run_async(ask()).leases


def _over(given: Given[ReplayOptions]) -> GivenRules:
    from tundp.daemon.replay import Given as GivenRules

    options, flags = given.options, given.flags
    return GivenRules(
        way=options.direction,
        subnet=options.subnet,
        public_ip=flags.get("public-ip"),
        port=options.port,
        mtu=options.mtu,
        source_check=flags.get("source-check"),
        admitted=flags.get("source-admit"),
    )


def rewrite(arguments: Sequence[str]) -> list[str]:
    """-o is --output, and - standard input."""
    other = {"-o": "--output", "-": "/dev/stdin"}
    return [other.get(word, word) for word in arguments]


COMMAND = Command(
    name="replay",
    summary="what would become of each packet of a capture file, by a lease table",
    description="""\
Push the packets of a pcap or pcapng file through the rules of the overlay, offline, and print a
decision for each: forward to which peer, deliver, drop and why, the ICMP error. Outer datagrams
for the overlay's port are decapsulated, inner packets encapsulated. The rules are the very ones
the engines follow; the kernel's routes and firewall have no part in it (tundp explain). With
--public-ip, --source-check and --source-admit the table's own are replaced. FILE is - for
standard input. Nothing is sent or changed.""",
    run=replay,
    options=ReplayOptions,
    settings=DAEMON_FLAGS,
    operands=("FILE",),
    rewrite=rewrite,
    examples=(
        ("tundp replay bug.pcapng", "by the running daemon's leases"),
        ("tundp replay bug.pcap --leases=leases.json --subnet=10.5.1.0/24", "anywhere"),
        ("tundp replay bug.pcap --leases=leases.json -o json > golden.json", ""),
        ("tundp replay bug.pcap --leases=leases.json --expect=golden.json", "a regression test"),
    ),
    notes="exit codes: 0 all judged, with --expect as expected; 1 not as expected, or the file"
    " cannot\nbe read on; 2 wrong usage.",
)
