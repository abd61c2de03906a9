"""results.json: every sample and what follows from them; docs/benchmarking.md has the schema."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, TypeVar

from tundp.bench import stats
from tundp.bench.paths import BASELINE, KERNEL, LIMIT, NULL
from tundp.bench.stats import Estimate
from tundp.bench.workloads import WORKLOADS, Values
from tundp.errors import ConfigError
from tundp.files import write_atomically
from tundp.finding import Finding, Verdict, failures

SCHEMA: Final = 1
RecordT = TypeVar("RecordT")

DERIVED: Final = {
    # name: (numerator, denominator, factor)
    "cpu_s_per_gb": ("busy_s", "payload_bytes", 1e9),
    "user_s_per_gb": ("user_s", "payload_bytes", 1e9),
    "system_s_per_gb": ("system_s", "payload_bytes", 1e9),
    "softirq_s_per_gb": ("softirq_s", "payload_bytes", 1e9),
    "cpu_ns_per_packet": ("busy_s", "packets", 1e9),
    "switches_per_packet": ("context_switches", "packets", 1.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One run of one workload over one row."""

    lab: str
    row: str
    workload: str
    round: int
    values: Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One path in one lab: there, or why not."""

    lab: str
    name: str
    label: str
    is_encrypted: bool
    why_not: str | None


@dataclass(slots=True)
class Results:
    """All of one bench."""

    profile: str
    settings: dict[str, Any]
    started: str
    environment: dict[str, str]
    checks: list[Finding] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    is_partial: bool = True
    finished: str = ""

    @property
    def reds(self) -> list[Finding]:
        """What makes the numbers not comparable."""
        return failures(self.checks)

    @property
    def headline(self) -> str:
        """The first line of every report."""
        words = []
        if self.reds:
            words.append(
                "NOT COMPARABLE: " + "; ".join(f"{c.title} {c.evidence}" for c in self.reds)
            )
        if self.is_partial:
            words.append("PARTIAL: the bench was interrupted")
        if words:
            return " · ".join(words)
        open_ = [
            f"{workload} {lab} ±{noise:.0%}"
            for lab in self.labs()
            for workload in self.workloads(lab)
            if (noise := self.noise(lab, workload, workload_named(workload).headline)) is not None
            and noise > stats.NOISE_LIMIT
        ]
        but = f", but no verdict in {', '.join(open_)}: too noisy" if open_ else ""
        return f"comparable: every validity check passed{but}"

    def labs(self) -> list[str]:
        """Labs with samples, in the order they ran."""
        return list(dict.fromkeys(sample.lab for sample in self.samples))

    def workloads(self, lab: str) -> list[str]:
        """Workloads with samples in a lab."""
        return list(dict.fromkeys(s.workload for s in self.samples if s.lab == lab))

    def row_names(self, lab: str) -> list[str]:
        """Rows with samples in a lab, the baseline first, in the order they were built."""
        measured = {s.row for s in self.samples if s.lab == lab}
        return [row.name for row in self.rows if row.lab == lab and row.name in measured]

    def label(self, row: str) -> str:
        """A row's label."""
        return next((r.label for r in self.rows if r.name == row), row)

    def by_round(self, lab: str, row: str, workload: str, value: str) -> dict[int, float]:
        """One value of one cell, round by round."""
        found = {}
        for sample in self.samples:
            if (sample.lab, sample.row, sample.workload) == (lab, row, workload):
                number = derive(sample.values, value)
                if number is not None:
                    found[sample.round] = number
        return found

    def cell(self, lab: str, row: str, workload: str, value: str) -> Estimate | None:
        """The estimate of one value of one cell, None if it was not measured."""
        return stats.estimate(list(self.by_round(lab, row, workload, value).values()))

    def ratio(self, lab: str, row: str, workload: str, value: str) -> Estimate | None:
        """The row over kernel VXLAN, paired by round."""
        return self.ratio_to(BASELINE, lab, row, workload, value)

    def ratio_to(self, base: str, lab: str, row: str, workload: str, value: str) -> Estimate | None:
        """The row over another one, paired by round."""
        return stats.paired_ratio(
            self.by_round(lab, row, workload, value), self.by_round(lab, base, workload, value)
        )

    def of_limit(self, lab: str, row: str, workload: str, value: str) -> Estimate | None:
        """The row over the least a forwarder in user space does; None where that is no limit.

        It is one of bulk TCP: of datagrams and requests it makes one at a time, so that what
        batches them does less than it. It has one thread, and is none of the kernel's.
        """
        if not workload.startswith("tcp") or "_" in workload or row in (LIMIT, *KERNEL):
            return None
        return self.ratio_to(LIMIT, lab, row, workload, value)

    def noise(self, lab: str, workload: str, value: str) -> float | None:
        """How far VXLAN over itself was from 1."""
        return stats.noise_floor(self.ratio(lab, NULL, workload, value))

    def verdict(self, lab: str, row: str, workload: str) -> str:
        """How it compares with VXLAN by the workload's headline (stats.verdict); or INVALID."""
        kind = workload_named(workload)
        if any(self.by_round(lab, row, workload, "corrupt").values()):
            return "INVALID"
        return stats.verdict(
            self.ratio(lab, row, workload, kind.headline),
            self.noise(lab, workload, kind.headline),
            more_is_better=kind.more_is_better,
        )

    def is_decided(self, lab: str, workload: str) -> bool:
        """Whether no further rounds are needed: every row has a verdict, and the noise is low."""
        kind = workload_named(workload)
        noise = self.noise(lab, workload, kind.headline)
        rows = [row for row in self.row_names(lab) if row not in (BASELINE, NULL)]
        open_ = ("undecided", "not comparable", "n/a")
        return (noise or 0.0) <= stats.NOISE_LIMIT and all(
            self.verdict(lab, row, workload) not in open_ for row in rows
        )

    def save(self, path: Path) -> None:
        """Write results.json."""
        document = {"schema": SCHEMA} | asdict(self) | {"headline": self.headline}
        document["checks"] = [_to_check(finding) for finding in self.checks]
        document["summary"] = self._summary()
        write_atomically(path, json.dumps(document, indent=1) + "\n")

    def _summary(self) -> list[dict[str, Any]]:
        lines = []
        for lab in self.labs():
            for workload in self.workloads(lab):
                headline = workload_named(workload).headline
                for row in self.row_names(lab):
                    cell = self.cell(lab, row, workload, headline)
                    ratio = self.ratio(lab, row, workload, headline)
                    limit = self.of_limit(lab, row, workload, headline)
                    lines.append(
                        {
                            "lab": lab,
                            "workload": workload,
                            "row": row,
                            "metric": headline,
                            "value": None if cell is None else asdict(cell),
                            "ratio_to_vxlan": None if ratio is None else asdict(ratio),
                            "ratio_to_limit": None if limit is None else asdict(limit),
                            "noise": self.noise(lab, workload, headline),
                            "verdict": self.verdict(lab, row, workload),
                        }
                    )
        return lines


def derive(values: Values, name: str) -> float | None:
    """A value as measured, or one that follows from two of them; None if not measured."""
    if name in values:
        return values[name]
    if name not in DERIVED:
        return None
    numerator, denominator, factor = DERIVED[name]
    if not values.get(denominator) or numerator not in values:
        return None
    return values[numerator] / values[denominator] * factor


def workload_named(name: str) -> Any:
    """The workload behind a name in results."""
    for workload in WORKLOADS:
        if workload.name == name:
            return workload
    raise ConfigError(f"workload {name!r} is not known here: was it made by another version?")


def load(path: Path) -> Results:
    """Read results.json; ConfigError if it is something else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ConfigError(
            f"{path} is no results.json of schema {SCHEMA}: was it made by another version?"
        )
    try:
        return Results(
            profile=document["profile"],
            settings=document["settings"],
            started=document["started"],
            environment=document["environment"],
            checks=[_from_check(check) for check in document["checks"]],
            rows=[_known(Row, row) for row in document["rows"]],
            samples=[_known(Sample, sample) for sample in document["samples"]],
            is_partial=document["is_partial"],
            finished=document["finished"],
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not whole: {error}") from None


_STATUS: Final = {Verdict.OK: "ok", Verdict.NOTE: "note", Verdict.FAIL: "red"}
"""What results.json calls the verdicts of the validity block."""


def _to_check(finding: Finding) -> dict[str, str]:
    """A line of the validity block, under the names schema 1 has for its fields."""
    return {
        "id": finding.id,
        "name": finding.title,
        "value": finding.evidence,
        "status": _STATUS[finding.verdict],
        "why": finding.meaning,
    }


def _from_check(check: dict[str, str]) -> Finding:
    """The reverse; before 0.2 there was no id."""
    verdicts = {status: verdict for verdict, status in _STATUS.items()}
    return Finding(
        id=check.get("id", check["name"]),
        title=check["name"],
        evidence=check["value"],
        verdict=verdicts[check["status"]],
        meaning=check["why"],
    )


def status_of(finding: Finding) -> str:
    """How reports call a verdict: ok, note, or red, which makes numbers not comparable."""
    return _STATUS[finding.verdict]


def _known(kind: type[RecordT], document: dict[str, Any]) -> RecordT:
    """A record from its JSON; fields a newer version added are passed over."""
    names = {each.name for each in fields(kind)}  # type: ignore[arg-type]  # always a dataclass
    return kind(**{name: value for name, value in document.items() if name in names})


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One value of one cell in two benches, both as ratios to VXLAN."""

    lab: str
    workload: str
    row: str
    metric: str
    before: float | None
    after: float | None
    noise: float
    verdict: str
    """better, worse, same, undecided, not comparable, gone (measured only before) or new."""


def diff(before: Results, after: Results) -> list[Difference]:
    """What changed between two benches, beyond the noise of both.

    Ratios to VXLAN are compared, not figures: two runs are two moods of one machine. The
    workload's own value is compared, and what it costs: CPU per GB and per packet.
    """
    cells = dict.fromkeys(
        (sample.lab, sample.workload, sample.row)
        for sample in (*before.samples, *after.samples)
        if sample.row not in (BASELINE, NULL)
    )
    found = []
    for lab, workload, row in cells:
        kind = workload_named(workload)
        for metric, more_is_better in (
            (kind.headline, kind.more_is_better),
            ("cpu_s_per_gb", False),
            ("cpu_ns_per_packet", False),
        ):
            old = before.ratio(lab, row, workload, metric)
            new = after.ratio(lab, row, workload, metric)
            if old is None and new is None:
                continue
            noises = [r.noise(lab, workload, metric) or 0.0 for r in (before, after)]
            verdict = _compare(old, new, sum(noises), more_is_better=more_is_better)
            if max(noises) > stats.NOISE_LIMIT and verdict not in ("gone", "new"):
                verdict = "not comparable"
            if after.verdict(lab, row, workload) == "INVALID":
                verdict = "worse"
            found.append(
                Difference(
                    lab=lab,
                    workload=workload,
                    row=row,
                    metric=metric,
                    before=None if old is None else old.median,
                    after=None if new is None else new.median,
                    noise=sum(noises),
                    verdict=verdict,
                )
            )
    return found


def _compare(
    old: Estimate | None, new: Estimate | None, noise: float, *, more_is_better: bool
) -> str:
    if new is None:
        return "gone"
    if old is None:
        return "new"
    if new.low > old.high * (1 + noise):
        return "better" if more_is_better else "worse"
    if new.high < old.low * (1 - noise):
        return "worse" if more_is_better else "better"
    within = stats.SAME_WITHIN
    is_close = new.high <= old.low * (1 + within) and new.low >= old.high * (1 - within)
    return "same" if is_close and noise <= within else "undecided"
