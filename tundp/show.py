"""Status as people read it: tables on a terminal, plain text in a pipe."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tundp.wire.drop import MEANINGS, DropReason


def print_status(status: dict[str, Any], console: Console | None = None) -> None:
    """The whole answer of the admin socket, most important first."""
    console = console or Console(highlight=False)
    tun = status["tun"]
    store = status["store"]
    console.print(
        f"[bold]{status['subnet']}[/] of {status['network']}"
        f" on {tun['name']} (MTU {tun['mtu']}),"
        f" udp {status['interface']['address']}:{status['port']}"
        f" via {status['interface']['name']}"
    )
    console.print(f"lease {status['lease']['key']} {_lease_text(status['lease'])}")
    answering = "answering" if store["is_answering"] else "[red]not answering, peers kept[/]"
    console.print(f"{store['description']} {answering}, revision {store['revision']}")
    console.print(f"engine {status['engine']} on {status['loop']}, pid {status['pid']}")
    console.print(peers_table(status))
    for refused in status["refused"]:
        console.print(f"[yellow]no peer:[/] {refused['key']} {refused['means']}")
    for entry in status["bad_entries"]:
        console.print(f"[yellow]ignored:[/] {entry['name']}: {entry['why']}")
    console.print(counters_table(status["counters"]))
    for line in drop_lines(status["counters"]):
        console.print(line)


def peers_table(status: dict[str, Any]) -> Table:
    """One line a peer."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("peer subnet", "at"):
        table.add_column(column)
    for peer in status["peers"]:
        table.add_row(peer["subnet"], f"{peer['public_ip']}:{status['port']}")
    if not status["peers"]:
        table.add_row("none yet", "")
    return table


def counters_table(counters: dict[str, Any]) -> Table:
    """Both directions, and whether every packet is accounted for."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("packets", no_wrap=True)
    for column in ("in", "out", "dropped", "MB out"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("in=out+dropped", no_wrap=True)
    for name, way in (("encap", "TUN>UDP"), ("decap", "UDP>TUN")):
        counted = counters[name]
        dropped = sum(counted["drops"].values())
        conserved = counted["packets_in"] == counted["packets_out"] + dropped
        table.add_row(
            f"{name} {way}",
            f"{counted['packets_in']:,}",
            f"{counted['packets_out']:,}",
            f"{dropped:,}",
            f"{counted['bytes_out'] / 1e6:,.1f}",
            "[green]holds[/]" if conserved else "[red]VIOLATED[/]",
        )
    return table


def drop_lines(counters: dict[str, Any]) -> list[str]:
    """Each reason that occurred: how often, what it means, what to look at."""
    meanings = {reason.label: MEANINGS[reason] for reason in DropReason}
    lines = []
    for direction in ("encap", "decap"):
        for label, count in counters[direction]["drops"].items():
            meaning = meanings[label]
            lines.append(
                f"[yellow]{direction} {label}[/] {count:,}: {meaning.means}. {meaning.next_step}"
            )
    for name, text in (
        ("socket_overflows", "datagrams lost because the UDP socket's buffer was full"),
        ("source_mismatches", "datagrams delivered though their sender does not own the source"),
        ("icmp_rate_limited", "ICMP errors held back by the rate limit"),
    ):
        if counters[name]:
            lines.append(f"[yellow]{name}[/] {counters[name]:,}: {text}")
    return lines


def _lease_text(lease: dict[str, Any]) -> str:
    colour = "green" if lease["state"] == "held" else "red"
    left = lease["expires_in_s"]
    if left is None:
        expiry = "never expires"
    elif left < 0:
        expiry = f"expired {-left} s ago"
    else:
        expiry = f"{left // 3600}h{left // 60 % 60:02}m left"
    return f"[{colour}]{lease['state']}[/], {expiry}"
