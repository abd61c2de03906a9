"""`tundp replay`: files and tables for observe/replay.py."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Final

from tundp.choices import ReplayWay as Way
from tundp.choices import SourceCheck
from tundp.errors import ConfigError, PlatformError
from tundp.files import read_regular
from tundp.observe.codec import Malformed
from tundp.observe.ledger import Ledger, LedgerRow
from tundp.observe.replay import Decision, Replayed, Rules
from tundp.observe.replay import replay as decide
from tundp.wire.capture_file import CaptureFormatError, read_capture

LARGEST: Final = 64 << 20
"""Bytes of a lease table or of expected decisions: 65,000 leases are 15 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What the command line says over the table. None: what the table says."""

    way: Way = Way.AUTO
    subnet: IPv4Network | None = None
    public_ip: IPv4Address | None = None
    port: int | None = None
    mtu: int | None = None
    source_check: SourceCheck | None = None
    admitted: tuple[IPv4Network, ...] | None = None


def rules_of(leases: Ledger, given: Given) -> Rules:
    """The rules by a table, with what was given over it.

    subnet: the lease of it, if the table has one, is this node's own then.
    """
    table = leases
    if given.subnet is not None:
        table = _owned(table, given.subnet)
    if given.public_ip is not None:
        table = replace(
            table,
            public_ip=given.public_ip,
            own_addresses=(*table.own_addresses, given.public_ip),
        )
    if given.port is not None:
        table = replace(table, port=given.port, leases=_at_port(table.leases, given.port))
    if given.source_check is not None:
        table = replace(table, source_check=given.source_check)
    if given.admitted is not None:
        table = replace(table, admitted=given.admitted)
    mtu = given.mtu or leases.mtu
    return Rules(table, given.way) if mtu is None else Rules(table, given.way, mtu)


def _owned(table: Ledger, subnet: IPv4Network) -> Ledger:
    """The table of the node that holds `subnet`."""
    own = next((each for each in table.leases if each.subnet == subnet), None)
    return replace(table, subnet=subnet) if own is None else table.owned_by(own)


def _at_port(rows: Sequence[LedgerRow], port: int) -> tuple[LedgerRow, ...]:
    return tuple(each if each.port is None else replace(each, port=port) for each in rows)


def read_leases(path: Path) -> Ledger:
    """The lease table of a file. ConfigError names what is wrong with it."""
    try:
        return Ledger.from_json(json.loads(_text(path)))
    except ValueError as error:
        raise ConfigError(f"--leases {path}: {error}") from None


def read_expected(path: Path) -> Replayed:
    """The decisions of a file that `tundp replay -o json` wrote. ConfigError likewise."""
    try:
        return Replayed.from_json(json.loads(_text(path)))
    except (Malformed, ValueError) as error:
        raise ConfigError(f"--expect {path}: {error}") from None


def _text(path: Path) -> str:
    try:
        return read_regular(path, most_len=LARGEST)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def decisions(path: Path, rules: Rules) -> Iterator[Decision]:
    """A decision for each packet of a capture file, one at a time.

    PlatformError for a file that cannot be read on, after those before the fault.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise PlatformError(f"cannot open {path}: {error.strerror}", error.errno) from None
    with file:
        try:
            yield from decide(read_capture(file.read), rules)
        except CaptureFormatError as error:
            raise PlatformError(f"{path}: {error}") from None
        except OSError as error:
            raise PlatformError(f"cannot read {path}: {error.strerror}", error.errno) from None
