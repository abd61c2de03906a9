"""One record for everything that was checked: health, start-up checks, probes, benchmarks.

`/healthz` and `/readyz`, `tundp config check`, `tundp probe` and the validity block of
`tundp bench` are lists of these, and differ in what they check only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, unique
from typing import Any

from tundp.printable import LINE_MAX, printable


@unique
class Verdict(Enum):
    """How bad it is; the value is its name in JSON."""

    OK = "ok"
    NOTE = "note"
    """Good to know; nothing is wrong."""
    WARN = "warn"
    """Works, but not as somebody may expect."""
    FAIL = "fail"
    """Does not work, or makes what depends on it worthless."""
    UNKNOWN = "unknown"
    """Could not be found out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was checked, and what was found."""

    id: str
    """Stable, for programs: `lease`, `udp-segment`. Several findings may share one."""
    verdict: Verdict
    evidence: str
    """What was seen."""
    title: str = ""
    """For people; the id, if none is given."""
    meaning: str = ""
    """Why it matters, or what follows from it."""
    next_step: str = ""
    """What to do about it."""
    facts: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Further facts by name, for programs and tables: `since` a kernel version."""

    def __post_init__(self) -> None:
        """What is seen may quote names that somebody else chose."""
        if not self.title:
            object.__setattr__(self, "title", self.id)
        for name in ("title", "evidence", "meaning", "next_step"):
            text = getattr(self, name)
            # A program's words on several lines (iptables, nft) are read as one.
            line = " ".join(text.splitlines()) if "\n" in text else text
            if (shown := printable(line, LINE_MAX)) is not text:
                object.__setattr__(self, name, shown)

    @property
    def is_failure(self) -> bool:
        """Whether what was checked does not hold."""
        return self.verdict is Verdict.FAIL

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every field, empty ones included."""
        return {
            "id": self.id,
            "title": self.title,
            "verdict": self.verdict.value,
            "evidence": self.evidence,
            "meaning": self.meaning,
            "next_step": self.next_step,
            "facts": dict(self.facts),
        }


def must_hold(
    finding_id: str,
    holds: bool,  # noqa: FBT001  (reads as a sentence: must_hold("lease", is_held, ...))
    evidence: str,
    *,
    next_step: str = "",
) -> Finding:
    """A requirement: OK if it holds, else FAIL."""
    return Finding(
        id=finding_id,
        verdict=Verdict.OK if holds else Verdict.FAIL,
        evidence=evidence,
        next_step=next_step,
    )


def worries(finding_id: str, evidence: str, *, next_step: str = "") -> list[Finding]:
    """A WARN of what works, but not for sure; none if `evidence` is empty."""
    if not evidence:
        return []
    return [Finding(id=finding_id, verdict=Verdict.WARN, evidence=evidence, next_step=next_step)]


def failures(findings: Iterable[Finding]) -> list[Finding]:
    """Those that do not hold, in order."""
    return [finding for finding in findings if finding.is_failure]
