"""`tundp explain`: what would become of a packet. Nothing is sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any, Final

from tundp.cli.command import DAEMON_FLAGS, Command, Given, run_async
from tundp.cli.output import EXIT_FAILED, EXIT_OK, print_json, print_parts
from tundp.errors import ConfigError
from tundp.settings.declare import option

if TYPE_CHECKING:
    from tundp.observe.explain.model import Explanation, Question

EXIT_UNKNOWN: Final = 3
"""Nothing seen drops the packet, and not everything could be looked at or judged."""
SIZE_MIN: Final = 28
"""Headers of IPv4, and of UDP or ICMP."""
SIZE_MAX: Final = 65_535


def _size(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise ValueError("is not a whole number") from None
    if not SIZE_MIN <= value <= SIZE_MAX:
        raise ValueError(f"is out of range: {SIZE_MIN} to {SIZE_MAX} bytes")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainOptions:
    """What `tundp explain` can be told."""

    size: int = option(
        parse=_size,
        default=84,
        metavar="BYTES",
        help="length of the packet, its IPv4 header included; 84 is what ping sends",
        since="0.2.0",
    )
    df: bool = option(
        default=False, help="with Don't Fragment, as TCP and most UDP have it", since="0.2.0"
    )
    json: bool = option(default=False, help="print the steps as JSON", since="0.2.0")


def explain(given: Given[ExplainOptions]) -> int:
    """Print the steps of the packet; the exit code tells its end."""
    question = _question(given)
    found = run_async(_explain(given, question))
    if given.options.json:
        print_json(found.to_json())
    else:
        from tundp.show import explain_parts

        print_parts(explain_parts(found))
    return {"delivered": EXIT_OK, "dropped": EXIT_FAILED}.get(found.verdict.value, EXIT_UNKNOWN)


async def _explain(given: Given[ExplainOptions], question: Question) -> Explanation:
    from tundp.daemon.explain import explain_packet
    from tundp.daemon.known_leases import known_leases
    from tundp.linux.netlink import Netlink

    async with Netlink() as netlink:
        known = await known_leases(
            given.settings(),
            netlink,
            asks_daemon=asks_daemon(given.flags),
            about=(question.source, question.destination),
        )
        return await explain_packet(netlink, known, question)


def asks_daemon(flags: Mapping[str, Any]) -> bool:
    """Whether the running daemon is meant: no flag names a store."""
    return not any(name == "store" or name.startswith("etcd-") for name in flags)


def _question(given: Given[ExplainOptions]) -> Question:
    """The packet in question. ConfigError names what of the command line is wrong."""
    from tundp.observe.explain.model import Question

    source, destination, *rest = given.operands
    proto = rest[0].lower() if rest else ""
    if proto not in ("", "tcp", "udp", "icmp"):
        raise ConfigError(f"PROTO {rest[0]!r} is none of tcp, udp, icmp")
    port = None
    if len(rest) > 1:
        if proto == "icmp":
            raise ConfigError(f"PORT {rest[1]!r}: ICMP has none")
        if not (rest[1].isascii() and rest[1].isdecimal() and 1 <= int(rest[1]) <= 65_535):
            raise ConfigError(f"PORT {rest[1]!r} is no port: 1 to 65535")
        port = int(rest[1])
    if proto == "tcp" and given.options.size < 40:
        raise ConfigError("--size is below the 40 bytes of an IPv4 and a TCP header")
    return Question(
        source=_address("SRC", source),
        destination=_address("DST", destination),
        proto=proto,
        port=port,
        size=given.options.size,
        dont_fragment=given.options.df,
    )


def _address(name: str, text: str) -> IPv4Address:
    try:
        return IPv4Address(text)
    except ValueError:
        raise ConfigError(f"{name} {text!r} is no IPv4 address") from None


COMMAND = Command(
    name="explain",
    summary="what would become of a packet, step by step, without sending it",
    description="""\
Follow a packet from SRC to DST that nobody sends: whose the addresses are, the kernel's routes,
rules of every firewall table, masquerade, the lease, the packet's size and the path's MTU, the
datagram on the underlay, and what the receiver's source check says. Each step has a verdict,
what was seen, and where something is wrong the command that mends it. The leases are the running
daemon's; where none answers, or flags name a store, they are read from the store once. Run it on
the node of SRC, and for the other half on the node of DST. Nothing is sent or changed. Needs
root.""",
    run=explain,
    options=ExplainOptions,
    settings=DAEMON_FLAGS,
    operands=("SRC", "DST"),
    optional=("PROTO", "PORT"),
    examples=(
        ("tundp explain 10.5.1.2 10.5.2.3", "any protocol"),
        ("tundp explain 10.5.1.2 10.5.2.3 tcp 443 --size=1500 --df", ""),
        ("tundp explain 10.5.1.2 10.5.2.3 --json | jq .verdict", "for programs"),
        ("tundp explain 10.5.1.2 10.5.2.3 --store=file:/var/lib/tundp/leases.json", "no daemon"),
    ),
    notes="exit codes: 0 delivered, as far as this node decides; 1 dropped; 2 wrong usage; 3"
    " nothing seen\ndrops it, but something could not be looked at or judged: it is named.",
)
