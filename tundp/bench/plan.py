"""What a bench measures: profiles, what was asked for, and the plan that follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tundp.bench.paths import (
    BASELINE,
    LIMIT,
    NULL,
    BenchPath,
    FlanneldPath,
    TundpPath,
    all_paths,
    ladder,
)
from tundp.bench.workloads import WORKLOADS, Workload
from tundp.errors import ConfigError

LABS: Final = ("virtual", "wire")


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """How much is measured."""

    workloads: tuple[str, ...]
    rounds: int
    step: int
    """Rounds that are added at a time where the interval leaves the verdict open,"""
    rounds_max: int
    """up to so many in all,"""
    limit_s: float
    """and until the bench has taken so long."""
    seconds: float
    warmup_s: float
    rows: tuple[str, ...] = ()
    """If not all are measured unless they are asked for."""


PROFILES: Final = {
    "quick": Profile(
        workloads=("tcp1", "tcp4", "udp64", "udp1400", "tcp_rr"),
        rounds=5,
        step=4,
        rounds_max=9,
        limit_s=140,
        seconds=0.3,
        warmup_s=0.1,
        # What they leave out is slower, or a variant, or no tunnel: three minutes hold no more.
        rows=(BASELINE, NULL, LIMIT, "simple", "tundp-gso"),
    ),
    "default": Profile(
        workloads=tuple(w.name for w in WORKLOADS if not w.name.endswith(("-loss", "-rev"))),
        rounds=7,
        step=7,
        rounds_max=21,
        limit_s=2400,
        seconds=1.0,
        warmup_s=0.3,
    ),
    "full": Profile(
        workloads=tuple(w.name for w in WORKLOADS),
        rounds=10,
        step=10,
        rounds_max=30,
        limit_s=4 * 3600,
        seconds=2.0,
        warmup_s=0.5,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What the command line asked for."""

    profile: str
    only: tuple[str, ...]
    """Names of rows, workloads and labs to restrict to; of each kind none means all."""
    rounds: int | None
    seconds: float | None
    topology: str
    """`host` or `pods`."""
    flanneld: str | None
    rows: tuple[str, ...] = ()
    """More rows, NAME=FLAGS of tundp run."""
    has_ladder: bool = False
    patience_s: float = 10.0
    """What is waited before the start for an idle machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will run."""

    labs: tuple[str, ...]
    paths: tuple[BenchPath, ...]
    workloads: tuple[Workload, ...]
    rounds: int
    step: int
    rounds_max: int
    limit_s: float
    seconds: float
    warmup_s: float
    has_pods: bool
    iperf3_runs: int

    @property
    def run_count(self) -> int:
        """Measurements in all, if every row can be built."""
        return len(self.labs) * len(self.paths) * len(self.workloads) * self.rounds


def make_plan(settings: BenchSettings) -> Plan:
    """Check the settings; ConfigError names what is unknown and what there is."""
    profile = PROFILES[settings.profile]
    extra: list[BenchPath] = [TundpPath.of_text(text) for text in settings.rows]
    if settings.has_ladder:
        extra += ladder()
    paths = [*all_paths(settings.flanneld), *extra]
    names = [path.name for path in paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--row {twice[0]}: there is a row of this name already")
    kinds: dict[str, list[str]] = {
        "lab": list(LABS),
        "row": [path.name for path in paths],
        "workload": [workload.name for workload in WORKLOADS],
    }
    chosen: dict[str, list[str]] = {kind: [] for kind in kinds}
    for name in settings.only:
        kind = next((kind for kind, names in kinds.items() if name in names), None)
        if kind is None:
            raise ConfigError(
                f"--only {name}: no such row, workload or lab; rows: {', '.join(kinds['row'])};"
                f" workloads: {', '.join(kinds['workload'])}; labs: {', '.join(LABS)}"
            )
        chosen[kind].append(name)
    # The baseline and its double are what everything is compared with.
    own = [path.name for path in extra]
    rows = [BASELINE, NULL, *chosen["row"], *own]
    if not chosen["row"]:
        rows = [*(profile.rows or kinds["row"]), *own]
        rows += [path.name for path in paths if isinstance(path, FlanneldPath)]
    workloads = chosen["workload"] or list(profile.workloads)
    return Plan(
        labs=tuple(lab for lab in LABS if lab in (chosen["lab"] or LABS)),
        paths=tuple(path for path in paths if path.name in rows),
        workloads=tuple(w for w in WORKLOADS if w.name in workloads),
        rounds=settings.rounds or profile.rounds,
        # Who asks for a number of rounds gets that.
        step=profile.step,
        rounds_max=settings.rounds or profile.rounds_max,
        limit_s=profile.limit_s,
        seconds=settings.seconds or profile.seconds,
        warmup_s=profile.warmup_s,
        has_pods=settings.topology == "pods",
        iperf3_runs=1 if profile.rows else 3,
    )
