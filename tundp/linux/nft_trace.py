"""Netfilter's own account of a packet: every nftables rule it met (nft(8): meta nftrace, monitor).

A table of ours marks packets of one network; `nft monitor trace` says what becomes of them in every
table, those of iptables-nft included. The table is owned by the nft process that made it (flag
`owner`, linux 5.12): the kernel removes it when that process is gone, however it ended. Legacy
iptables' rules say nothing here.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import struct
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from tundp.errors import PlatformError, Unsupported
from tundp.linux import command

RATE: Final = 2000
"""Packets a second that are followed; of more, the rest is not."""
IDLE_NS: Final = 50_000_000
"""A packet no rule has seen for so long has left netfilter, or nft is late with its words of it."""
LATE_NS: Final = 10_000_000_000
"""What more is said of it within so long of its first mention is still taken to be of it."""
PATHS_MAX: Final = 1024
_READY_S: Final = 5.0
_LINE: Final = re.compile(r"trace id ([0-9a-f]+) (\S+) (\S+) (\S+) (\w+):? ?(.*)", re.ASCII)
_VERDICT: Final = re.compile(r"\(verdict ([^)]*)\)\s*$")
_HANDLE: Final = re.compile(r"\s*# handle (\d+)")
_FIELD: Final = re.compile(
    r'(iif|oif) "([^"]+)"|ip (saddr|daddr|id|length|protocol|ttl) (\S+)'
    r"|(tcp|udp|sctp) (sport|dport) (\d+)|icmp (id|sequence|type) (\S+)"
)
_PROTOCOLS: Final = {"icmp": 1, "tcp": 6, "udp": 17, "sctp": 132}
_ENDS: Final = ("saddr", "daddr")
_NAMES: Final = (
    *(*_ENDS, "id", "length", "protocol", "sport", "dport"),
    *("icmp id", "sequence", "type"),
)
"""What one packet is told from the next by; NAT changes some, which makes it another."""
_MARK: Final = f"counter limit rate {RATE}/second counter meta nftrace set 1"
_MARKS: Final = 4
"""Rules that mark."""
_COUNTS: Final = re.compile(r"counter packets (\d+) .*counter packets (\d+) ", re.ASCII)
"""All, and those that are followed."""
_LINE_MAX: Final = 1 << 22
"""Bytes of a line: it holds a whole rule, whose sets may have thousands of elements."""
_DISCARD_LEN: Final = 1 << 20
_PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one rule, or a chain's policy, did."""

    family: str
    table: str
    chain: str
    text: str
    """The rule; `policy` for a chain's end."""
    handle: int | None
    verdict: str
    """accept, drop, jump NAME, continue ..."""

    @property
    def where(self) -> str:
        """As nft and iptables' readers know it: ip filter FORWARD."""
        return f"{self.family} {self.table} {self.chain}"

    @property
    def is_drop(self) -> bool:
        """Whether the packet ended here."""
        return self.verdict.startswith("drop")

    @property
    def mend(self) -> str:
        """The command that lets packets pass here."""
        if self.handle is not None:
            return f"nft delete rule {self.where} handle {self.handle}"
        return f"nft 'chain {self.where} {{ policy accept; }}'"


@dataclass(slots=True)
class Path:
    """A packet's way through netfilter, as far as it is known."""

    fields: dict[str, str]
    """iif, oif, saddr, daddr, id, length, protocol, sport, dport ... of its first mention."""
    began_ns: int
    """Unix time it was heard of first: later than it happened, by a millisecond or so."""
    steps: list[Step] = field(default_factory=list)
    last_ns: int = 0

    @property
    def drop(self) -> Step | None:
        """What dropped it; None if nothing did."""
        return next((step for step in self.steps if step.is_drop), None)

    @property
    def key(self) -> tuple[int, int, int]:
        """Source, destination and IP id: what an event record's packet has as well."""
        address = {name: int(IPv4Address(self.fields.get(name, "0.0.0.0"))) for name in _ENDS}
        return address["saddr"], address["daddr"], int(self.fields.get("id", "0"))

    def header(self) -> bytes:
        """An IPv4 header, and ports, with what is known of the packet; sums are 0."""
        protocol = self.fields.get("protocol", "")
        number = _PROTOCOLS.get(protocol) or (int(protocol) if protocol.isdigit() else 0)
        length = int(self.fields.get("length", "0")) & 0xFFFF
        source, destination, ip_id = self.key
        header = struct.pack(
            ">BBHHHBBHII",
            0x45,
            0,
            length,
            ip_id,
            0,
            int(self.fields.get("ttl", "0")),
            number,
            0,
            source,
            destination,
        )
        if number == 1:
            kind = {"echo-request": 8, "echo-reply": 0}.get(self.fields.get("type", ""), 3)
            echo = [int(self.fields.get(name, "0")) for name in ("icmp id", "sequence")]
            return header + struct.pack(">BBHHH", kind, 0, 0, *echo)
        ports = [int(self.fields.get(name, "0")) for name in ("sport", "dport")]
        return header + (struct.pack(">HH", *ports) if any(ports) else b"")


class Paths:
    """Puts the lines of `nft -a monitor trace` together. Pure."""

    def __init__(self, own_table: str) -> None:
        """own_table: the table that marks packets; its own steps are left out."""
        self._own = own_table
        self._paths: dict[str, Path] = {}
        self._left: OrderedDict[str, Path] = OrderedDict()
        """Those that had left, the latest last: a busy machine's nft may have more to say."""
        self._refused: set[str] = set()
        self.lost = 0
        """Packets that came while PATHS_MAX others were on their way."""

    def add(self, line: str, now_ns: int) -> Path | None:
        """Take in a line; the path it ended, if it did: for the second time, if it came late."""
        match = _LINE.match(line)
        if match is None:
            return None
        number, family, table, chain, kind, rest = match.groups()
        path = self._paths.get(number)
        if path is None:
            if len(self._paths) >= PATHS_MAX:
                self._refuse(number)
                return None
            said = _fields(rest) if kind == "packet" else {}
            path = self._paths[number] = self._returned(number, said, now_ns) or Path({}, now_ns)
        path.last_ns = now_ns
        if kind == "packet":
            for name, value in _fields(rest).items():
                path.fields.setdefault(name, value)
            return None
        if table == self._own:
            return None
        step = _step(family, table, chain, kind, rest)
        path.steps.append(step)
        return self._paths.pop(number) if step.is_drop else None

    def _returned(self, number: str, said: Mapping[str, str], now_ns: int) -> Path | None:
        """The path that seemed to have left, if more can be said of the same packet.

        said: of the packet itself, by this line; numbers come again, with other packets.
        """
        path = self._left.pop(number, None)
        if path is None or now_ns - path.began_ns > LATE_NS:
            return None
        is_same = all(path.fields.get(each) == said[each] for each in _NAMES if each in said)
        return path if is_same else None

    def _refuse(self, number: str) -> None:
        """Count a packet, of whose lines this is one."""
        if len(self._refused) >= PATHS_MAX:
            self._refused.clear()
        if number not in self._refused:
            self._refused.add(number)
            self.lost += 1

    def idle(self, now_ns: int) -> list[Path]:
        """Paths of packets that have left netfilter, as it seems: each may come once more."""
        over = [key for key, path in self._paths.items() if now_ns - path.last_ns >= IDLE_NS]
        self._left |= {key: self._paths.pop(key) for key in over}
        found = [self._left[key] for key in over]
        while len(self._left) > PATHS_MAX:
            self._left.popitem(last=False)
        return found


def _fields(text: str) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for match in _FIELD.finditer(text):
        device, name, ip_name, ip_value, protocol, side, port, icmp_name, icmp_value = (
            match.groups()
        )
        if device:
            found[device] = name
        elif ip_name:
            found[ip_name] = ip_value
        elif protocol:
            found["protocol"] = protocol
            found[side] = port
        else:
            found["icmp id" if icmp_name == "id" else icmp_name] = icmp_value
            found["protocol"] = "icmp"
    return found


def _step(family: str, table: str, chain: str, kind: str, rest: str) -> Step:
    verdict = _VERDICT.search(rest)
    handle = _HANDLE.search(rest)
    if kind != "rule":
        # `policy accept`, `verdict return` and what newer versions may say.
        return Step(
            family=family,
            table=table,
            chain=chain,
            text=kind,
            handle=None,
            verdict=rest.strip() or kind,
        )
    text = _HANDLE.sub("", _VERDICT.sub("", rest)).strip()
    return Step(
        family=family,
        table=table,
        chain=chain,
        text=text,
        handle=int(handle[1]) if handle else None,
        verdict=verdict[1] if verdict else "continue",
    )


class NftTrace:
    """Packets on their way through netfilter, while its table is there."""

    def __init__(self, lines: asyncio.StreamReader, table: str) -> None:
        self._lines = lines
        self._table = table
        self._paths = Paths(table)
        self.unread = 0
        """Lines too long to be read."""

    @property
    def lost(self) -> int:
        """Packets that were marked, and of which too many were on their way."""
        return self._paths.lost

    async def unmarked(self) -> int | None:
        """Packets above RATE so far, which were not followed; None if that cannot be known."""
        with contextlib.suppress(PlatformError):
            done = await command.run(
                "nft", "list", "table", "inet", self._table, package="nftables"
            )
            counts = _COUNTS.findall(done.stdout)
            if len(counts) == _MARKS:
                return sum(int(all_) - int(marked) for all_, marked in counts)
        return None

    async def paths(self) -> AsyncIterator[Path]:
        """Each packet when it has left, once more if nft was late; ends with `nft monitor`."""
        while True:
            line = b"\n"
            try:
                async with asyncio.timeout(IDLE_NS / 1e9):
                    line = await self._lines.readline()
            except TimeoutError:
                pass
            except ValueError:
                # What was read of it is gone; what follows begins like no line of ours.
                self.unread += 1
            if not line:
                return
            now_ns = time.time_ns()
            if (ended := self._paths.add(line.decode(errors="replace"), now_ns)) is not None:
                yield ended
            for path in self._paths.idle(now_ns):
                yield path


@contextlib.asynccontextmanager
async def nft_trace(network: IPv4Network) -> AsyncIterator[NftTrace]:
    """Follow packets from or to `network` through netfilter while the block lasts.

    Unsupported, with the reason, where that cannot be; nothing is left on then, or after.
    """
    program = command.find("nft")
    if program is None:
        raise Unsupported("nft is not installed")
    table = f"tundp_trace_{os.getpid()}"
    async with contextlib.AsyncExitStack() as stack:
        monitor = await _start(stack, program, "-a", "monitor", "trace", stdout=PIPE)
        owner = await _start(stack, program, "-i", stdin=PIPE)
        assert owner.stdin is not None
        owner.stdin.write(_rules(table, network).encode())
        with contextlib.suppress(ConnectionError):
            await owner.stdin.drain()
        await _until_made(table)
        assert monitor.stdout is not None
        yield NftTrace(monitor.stdout, table)


async def _until_made(table: str) -> None:
    """Wait for the table: the process that owns it tells nobody when it is there."""
    deadline = time.monotonic() + _READY_S
    while True:
        done = await command.run(
            "nft", "list", "table", "inet", table, package="nftables", is_checked=False
        )
        if done.code == 0 and done.stdout.count("nftrace set 1") == _MARKS:
            return
        if time.monotonic() > deadline:
            raise Unsupported(
                "nft cannot make a table that goes with its owner: that needs linux 5.12, nftables"
                f" 0.9.9 and root ({done.complaint or 'no table came'})"
            )
        await asyncio.sleep(0.05)


def _rules(table: str, network: IPv4Network) -> str:
    lines = [f"add table inet {table} {{ flags owner; }}"]
    for hook in ("prerouting", "output"):
        # Before raw (-300), so that a drop there is seen.
        lines += [
            f"add chain inet {table} {hook} {{ type filter hook {hook} priority -350; }}",
            f"add rule inet {table} {hook} ip saddr {network} {_MARK}",
            f"add rule inet {table} {hook} ip saddr != {network} ip daddr {network} {_MARK}",
        ]
    return "\n".join(lines) + "\n"


async def _start(
    stack: contextlib.AsyncExitStack, *argv: str, stdin: int = DEVNULL, stdout: int = DEVNULL
) -> Process:
    """A child that ends with the block, and with this process, however that ends."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def die_with_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=stdin,
        stdout=stdout,
        stderr=DEVNULL,
        limit=_LINE_MAX,
        env=command.environment(),
        preexec_fn=die_with_parent,
    )
    stack.push_async_callback(_end, process)
    return process


async def _end(process: Process) -> None:
    if process.stdin is not None:
        process.stdin.close()
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    if process.stdout is not None:
        # asyncio waits for the end of the pipe, too, and stops reading a full buffer: nobody else
        # would read on.
        while await process.stdout.read(_DISCARD_LEN):
            pass
    await process.wait()
