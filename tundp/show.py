"""Status as people read it: tables on a terminal, plain text in a pipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tundp.wire.drop import DropReason


def print_status(status: dict[str, Any], console: Console | None = None) -> None:
    """The whole answer of the admin socket, most important first."""
    console = console or Console(highlight=False)
    for part in _parts(status):
        console.print(part, soft_wrap=isinstance(part, Text))


def _parts(status: dict[str, Any]) -> Iterator[RenderableType]:
    if "starting" in status:
        yield Text(f"starting, pid {status['pid']}: waiting for {status['starting']}")
        return
    yield from map(_text, _not_ready_lines(_escaped(status)))
    yield from map(_text, _head_lines(_escaped(status)))
    yield peers_table(status)
    yield from map(_text, _trouble_lines(_escaped(status)))
    yield counters_table(status["counters"])
    yield from map(_text, drop_lines(status["counters"]))


def _head_lines(status: dict[str, Any]) -> Iterator[str]:
    tun = status["tun"]
    store = status["store"]
    yield (
        f"[bold]{status['subnet']}[/] of {status['network']}"
        f" on {tun['name']} (MTU {tun['mtu']}),"
        f" udp {status['interface']['address']}:{status['port']}"
        f" via {status['interface']['name']}"
    )
    yield f"lease {status['lease']['key']} {_lease_text(status['lease'])}"
    answering = "answering" if store["is_answering"] else "[red]not answering, peers kept[/]"
    age = f", [red]leases {store['age_s']} s old[/]" if store["age_s"] else ""
    memory = " (from disk)" if store["is_from_memory"] else ""
    yield f"{store['description']} {answering}, revision {store['revision']}{age}{memory}"
    yield f"engine {status['engine']} on {status['loop']}, pid {status['pid']}"
    yield f"  {status['engine_uses']}"


def _not_ready_lines(status: dict[str, Any]) -> Iterator[str]:
    for check in status["checks"]:
        if not check["ok"]:
            yield f"[red]not ready:[/] {check['name']}: {check['detail']}"


def _trouble_lines(status: dict[str, Any]) -> Iterator[str]:
    for warning in status["interface"]["warnings"]:
        yield f"[yellow]interface:[/] {warning}"
    for refused in status["refused"]:
        yield f"[yellow]no peer:[/] {refused['key']} {refused['means']}"
    for entry in status["bad_entries"]:
        yield f"[yellow]ignored:[/] {entry['name']}: {entry['why']}"


def _text(markup: str) -> Text:
    # Emoji off: a lease key such as 10.5.1.0-24&fd00:b:a::-64 is full of their codes.
    return Text.from_markup(markup, emoji=False)


def print_brief(found: dict[str, dict[str, Any]], console: Console | None = None) -> None:
    """One line a daemon: `tundp status --all`."""
    console = console or Console(highlight=False)
    if not found:
        console.print("no daemon on this host")
    for path, status in found.items():
        if "error" in status:
            console.print(Text(f"{path}  {status['error']}", style="red"), soft_wrap=True)
            continue
        if "starting" in status:
            console.print(f"{path}  starting: waiting for {status['starting']}", soft_wrap=True)
            continue
        failing = [check["name"] for check in status["checks"] if not check["ok"]]
        line = Text(
            f"{path}  {status['subnet']} of {status['network']} on {status['tun']['name']},"
            f" udp {status['port']}, {len(status['peers'])} peers, pid {status['pid']}: "
        )
        line.append(f"not ready ({', '.join(failing)})" if failing else "ready")
        console.print(line, soft_wrap=True)


def peers_table(status: dict[str, Any]) -> Table:
    """One line a peer."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("peer subnet", "at"):
        table.add_column(column)
    for peer in status["peers"]:
        table.add_row(Text(peer["subnet"]), Text(f"{peer['public_ip']}:{status['port']}"))
    if not status["peers"]:
        table.add_row("none yet", "")
    return table


def counters_table(counters: dict[str, Any]) -> Table:
    """Both directions, packets a read and a write, and whether every packet is accounted for."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("packets", no_wrap=True)
    for column in ("in", "out", "dropped", "MB out", "/read", "/write"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("balance", no_wrap=True)
    for name in ("encap", "decap"):
        counted = counters[name]
        dropped = sum(counted["drops"].values())
        conserved = counted["packets_in"] == counted["packets_out"] + dropped
        table.add_row(
            name,
            f"{counted['packets_in']:,}",
            f"{counted['packets_out']:,}",
            f"{dropped:,}",
            f"{counted['bytes_out'] / 1e6:,.1f}",
            _mean(counted["packets_in"], counted["reads"]),
            _mean(counted["packets_out"], counted["writes"]),
            "[green]holds[/]" if conserved else "[red]VIOLATED[/]",
        )
    return table


def _mean(packets: int, calls: int) -> str:
    return f"{packets / calls:.1f}" if calls else "-"


def drop_lines(counters: dict[str, Any]) -> list[str]:
    """Each reason that occurred: how often, what it means, what to look at."""
    meanings = {reason.label: reason for reason in DropReason}
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
        ("destination_mismatches", "datagrams delivered though their destination is not our own"),
        ("icmp_rate_limited", "ICMP errors held back by the rate limit"),
        ("offload_fallbacks", "super-packets the kernel refused; their packets went one by one"),
    ):
        if counters[name]:
            lines.append(f"[yellow]{name}[/] {counters[name]:,}: {text}")
    for name, text in (
        ("errnos", "refused by the kernel"),
        ("coalesce_misses", "written alone, not merged"),
    ):
        if counters[name]:
            counted = ", ".join(f"{label} {count:,}" for label, count in counters[name].items())
            lines.append(f"{text}: {counted}")
    return lines


def print_probe(found: dict[str, Any], console: Console | None = None) -> None:
    """What `tundp probe` found: a line a question, then the engine it means."""
    console = console or Console(highlight=False)
    console.print(
        f"Linux {found['kernel']} on {found['machine']}, {found['cpus']} CPUs;"
        f" native module {found['native']};"
        f" checksums by {', '.join(found['sums']) or 'Python'}",
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "kernel feature", "here", "since Linux", "without it"):
        table.add_column(column)
    for finding in found["findings"]:
        mark = {True: "[green]yes[/]", False: "[red]no[/]", None: "?"}[finding["is_there"]]
        table.add_row(
            mark,
            *(Text(finding[key]) for key in ("name", "detail", "since")),
            Text("" if finding["is_there"] else finding["without"]),
        )
    console.print(table)
    if found["not_asked"]:
        console.print(f"TUN not tried: {found['not_asked']}; run as root", soft_wrap=True)
    console.print(f"engine {found['engine']}: {found['why']}", soft_wrap=True)
    console.print(f"  uses: {', '.join(found['offloads']) or 'no offloads'}", soft_wrap=True)
    for name, why in found["missing"].items():
        console.print(f"  without {name}: {why}", soft_wrap=True)


def print_findings(findings: list[dict[str, Any]], console: Console | None = None) -> None:
    """What `tundp config check` found, a line each."""
    console = console or Console(highlight=False)
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for finding in findings:
        line = Text(f"{finding['verdict'].upper():<5}", style=colours[finding["verdict"]])
        line.append(f"{finding['what']}: {finding['detail']}", style="default")
        console.print(line, soft_wrap=True)


def _escaped(value: Any) -> Any:
    """`value` with every string safe from being read as rich's markup: stores hold anything."""
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return escape(value) if isinstance(value, str) else value


def _lease_text(lease: dict[str, Any]) -> str:
    colour = "green" if lease["state"] == "held" else "red"
    left = lease["expires_in_s"]
    if left is None:
        expiry = "never expires" if lease["state"] == "held" else "not confirmed by the store"
    elif left < 0:
        expiry = f"expired {-left} s ago"
    else:
        expiry = f"{left // 3600}h{left // 60 % 60:02}m left"
    return f"[{colour}]{lease['state']}[/], {expiry}"
