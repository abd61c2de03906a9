"""A result of `tundp bench` into docs/performance: report, plots, and the tables to quote.

    python -m bench.publish REPORT_DIR

copies report.md, writes the plots as SVG files, and prints the tables of
docs/performance.md for somebody to paste, look at and write the words around.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Final

from tundp.bench.plots import draw
from tundp.bench.results import Results, load, workload_named

DOCS: Final = Path(__file__).parents[1] / "docs" / "performance"
PLOTS: Final = ("ratios", "cpu", "latency", "costs")
BARS: Final = (
    ("tcp1", "virtual", ">= 0.9x"),
    ("tcp1", "wire", ">= 1.3x"),
    ("tcp4", "virtual", ">= 0.5x"),
    ("tcp4", "wire", ">= 1.0x"),
    ("udp1400", "virtual", ">= 1.0x"),
    ("udp1400", "wire", ">= 1.0x"),
    ("udp64", "virtual", ">= 1.0x"),
    ("udp64", "wire", ">= 1.0x"),
    ("tcp_rr", "virtual", "<= 2.0x"),
    ("tcp_rr", "wire", "<= 2.0x"),
)
CPU_BARS: Final = (("virtual", "<= 1.6x"), ("wire", "<= 1.1x"))
ENGINE: Final = "tundp-gso"


def median(results: Results, lab: str, row: str, workload: str, value: str) -> float:
    """The median of a cell, nan if it was not measured."""
    cell = results.cell(lab, row, workload, value)
    return float("nan") if cell is None else cell.median


def versus(results: Results, lab: str, row: str, workload: str, other: str = "vxlan") -> float:
    """The median ratio of a row to another, paired by round."""
    headline = workload_named(workload).headline
    ours = results.by_round(lab, row, workload, headline)
    theirs = results.by_round(lab, other, workload, headline)
    ratios = sorted(value / theirs[at] for at, value in ours.items() if at in theirs)
    return ratios[len(ratios) // 2] if ratios else float("nan")


def bars(results: Results) -> list[str]:
    """Each bar, what was measured, and whether it holds."""
    lines = ["| workload | lab | bar | measured | |", "|---|---|---|---|---|"]

    def line(what: str, lab: str, bar: str, value: float) -> None:
        sign, limit = bar.split()
        bound = float(limit.rstrip("x"))
        holds = value >= bound if sign == ">=" else value <= bound
        lines.append(f"| {what} | {lab} | {bar} | {value:.2f}x | {'met' if holds else 'missed'} |")

    for workload, lab, bar in BARS:
        line(workload_named(workload).label, lab, bar, versus(results, lab, ENGINE, workload))
    for lab, bar in CPU_BARS:
        ours = median(results, lab, ENGINE, "tcp1", "cpu_s_per_gb")
        line(
            "CPU s/GB, TCP, 1 stream",
            lab,
            bar,
            ours / median(results, lab, "vxlan", "tcp1", "cpu_s_per_gb"),
        )
    for lab in results.labs():
        line("TCP x1 over `simple`", lab, ">= 15x", versus(results, lab, ENGINE, "tcp1", "simple"))
        line("UDP 64 over `simple`", lab, ">= 3x", versus(results, lab, ENGINE, "udp64", "simple"))
    return lines


def ladder(results: Results) -> list[str]:
    """Rungs, bottom first: ratio to VXLAN of each workload in each lab."""
    present = results.row_names(results.labs()[0])
    rows = ["simple", "tundp-mmsg", *(name for name in present if name.startswith("rung"))]
    rows.append(ENGINE)
    labels = {row.name: row.label for row in results.rows}
    columns = [(lab, w) for lab in results.labs() for w in results.workloads(lab)]
    lines = [
        "| " + " | ".join(["row", *(f"{lab} {name}" for lab, name in columns)]) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in rows:
        cells = (f"{versus(results, lab, row, workload):.2f}x" for lab, workload in columns)
        lines.append("| " + " | ".join([labels.get(row, row), *cells]) + " |")
    return lines


def main() -> None:
    """Publish the directory named on the command line."""
    source = Path(sys.argv[1])
    results = load(source / "results.json")
    DOCS.mkdir(exist_ok=True)
    shutil.copy(source / "report.md", DOCS / "report.md")
    for name, (_, svg) in zip(PLOTS, draw(results), strict=False):
        (DOCS / f"{name}.svg").write_text(svg, encoding="utf-8")
    sys.stdout.write("\n".join([results.headline, "", *bars(results), "", *ladder(results), ""]))


if __name__ == "__main__":
    main()
