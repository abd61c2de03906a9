"""README.txt of a report: what is what, what was removed, what that cannot promise."""

from __future__ import annotations

import textwrap
from typing import Final

from tundp.bugreport.archive import FOLDER, Report
from tundp.bugreport.secrets import LEAST_LEN

_WIDTH: Final = 88


def readme(report: Report) -> str:
    """The text; the report's members are in it, one a line."""
    head = report.head
    versions = head["versions"]
    parts = [
        f"A report of one node of a tundp overlay, made {head['made']} by tundp"
        f" {versions['tundp']}; daemon: {head['daemon']}.",
        "Read doctor.json first: each finding names what is wrong, and the command that mends it."
        " Then daemon/status.json, MISSING.txt, which names what is not here and why, and the log.",
        "Packets: tundp replay capture/packets.pcapng --leases=daemon/ledger.json judges each by"
        " the node's own lease table; tshark and Wireshark open both captures. The last dropped"
        " packets and log lines: tundp blackbox --file=daemon/blackbox.json. What would become of"
        " a packet, by the leases as they were: tundp explain SRC DST"
        " --store=file:store/leases.json, which looks at routes and rules of the host it runs on.",
        "Secrets: passwords, tokens and private keys are ***, in whatever form they are known to"
        " stand: those of settings, variables, command lines and URLs wherever they occur, others"
        f" by the word before them. A password of fewer than {LEAST_LEN} characters is found by the"
        " word before it only. Key files and certificates were not read. No payload of a packet is"
        " here. What somebody wrote into a rule's comment, a host's name or another program's log"
        " line is as it was: look through it before you give it away.",
        _pseudonym_words(is_anonymous=bool(head["has_pseudonyms"])),
        "Texts of other programs have their control characters escaped. Nothing in here is a"
        " command to run unread.",
    ]
    lines = [line for part in parts for line in (*textwrap.wrap(part, _WIDTH), "")]
    lines += [f"Files, in {FOLDER}/:", ""]
    for each in sorted(report.members, key=lambda each: each.name):
        lines.append(f"{each.name:<34} {each.about}")
        if each.note:
            lines.append(f"{'':<34} ({each.note})")
    return "\n".join([*lines, ""])


def _pseudonym_words(*, is_anonymous: bool) -> str:
    if not is_anonymous:
        return (
            "Addresses and host names are the real ones: tundp bugreport --redact-addresses"
            " replaces them."
        )
    return (
        "Addresses and host names are pseudonyms: the same one for the same address everywhere,"
        " in texts, documents and captures. Structure is kept: addresses of one subnet are in one"
        " subnet, private ones stay in their block, the last byte of an IPv4 address stays, so does"
        " its first byte where the block it is in has a meaning (10, 127, 192.168, ...); loopback"
        " and multicast addresses stay whole. In captures header checksums are computed anew, those"
        " of TCP, UDP and ICMP errors are 0. The key of the pseudonyms is kept nowhere. What this"
        " cannot promise: host names nobody declared (in a rule's comment, in another program's log"
        " line) stay, and so do interface names, node ids and times; who knows a few of the"
        " addresses, or how much they talk, can guess others by their places."
    )
