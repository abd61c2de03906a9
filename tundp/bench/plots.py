"""The report's plots, as SVG texts. matplotlib is an extra, imported only here."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any, Final

from tundp.bench.paths import BASELINE, NULL
from tundp.bench.results import Results, workload_named
from tundp.errors import Unsupported

_COLOURS: Final = (
    *("#3b6ea5", "#d1873f", "#5a9367", "#a65a7e", "#7a7a7a", "#8c6bb1", "#b5a642"),
    *("#4fb3bf", "#c0504d", "#1f3b57", "#9bbb59", "#e6b8af", "#5b4636"),
)
_KINDS: Final = (
    ("user_s_per_gb", "user"),
    ("system_s_per_gb", "system"),
    ("softirq_s_per_gb", "softirq"),
)
_LATENCIES: Final = ("p50_us", "p90_us", "p99_us", "p99.9_us")
_COSTS: Final = (
    ("syscalls_per_packet", "system calls per packet"),
    ("crossings_per_packet", "user/kernel crossings per packet"),
    ("copied_per_byte", "bytes copied per byte carried"),
    ("switches_per_packet", "context switches per packet"),
)


def draw(results: Results) -> list[tuple[str, str]]:
    """Captions and SVGs; Unsupported if matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise Unsupported(f"no plots: {error}; pip install 'tundp[bench]' has matplotlib") from None
    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "tundp", "font.size": 9, "axes.spines.top": False})
    mpl.rcParams.update({"axes.spines.right": False, "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    plots: list[tuple[str, Callable[[Results, Any], Any]]] = [
        (
            "Ratio to kernel VXLAN with 95 % intervals, by workload. The grey band is the noise:"
            " VXLAN over itself. To the right is always better: the bar of a latency is the inverse"
            " of the ratio written beside it.",
            _ratios,
        ),
        (
            "CPU seconds of the whole machine per GB of payload, on a logarithmic scale, and the"
            " shares of user, system and softirq time in them.",
            _cpu,
        ),
        ("Round-trip times of one request at a time: median to 99.9th percentile.", _latencies),
        ("What each packet costs in crossings and copies, both nodes together.", _costs),
    ]
    found: list[tuple[str, str]] = []
    for caption, plot in plots:
        figure = plot(results, plt)
        if figure is None:
            continue
        out = io.StringIO()
        figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
        # Several SVGs in one page must not share ids.
        svg = out.getvalue()[out.getvalue().index("<svg") :]
        found.append((caption, _with_own_ids(svg, len(found))))
    return found


def _with_own_ids(svg: str, number: int) -> str:
    svg = re.sub(r'\bid="', f'id="f{number}-', svg)
    svg = re.sub(r'href="#', f'href="#f{number}-', svg)
    return re.sub(r"url\(#", f"url(#f{number}-", svg)


def _rows(results: Results) -> list[str]:
    names = dict.fromkeys(row for lab in results.labs() for row in results.row_names(lab))
    return [name for name in names if name != NULL]


def _colour(results: Results, row: str) -> str:
    return _COLOURS[_rows(results).index(row) % len(_COLOURS)]


def _ratios(results: Results, pyplot: Any) -> Any:
    labs = results.labs()
    if not labs:
        return None
    rows = [row for row in _rows(results) if row != BASELINE]
    height = sum(len(results.workloads(lab)) for lab in labs[:1]) * (0.16 * len(rows) + 0.25) + 1
    figure, axes = pyplot.subplots(1, len(labs), figsize=(5.5 * len(labs), height), squeeze=False)
    for axis, lab in zip(axes[0], labs, strict=True):
        ticks, names = [], []
        at = 0.0
        for workload in results.workloads(lab):
            kind = workload_named(workload)
            start = at
            for row in rows:
                ratio = results.ratio(lab, row, workload, kind.headline)
                if ratio is None:
                    continue
                middle, low, high = ratio.median, ratio.low, ratio.high
                if not kind.more_is_better:
                    middle, low, high = 1 / middle, 1 / high, 1 / low
                axis.barh(at, middle, height=0.8, color=_colour(results, row), label=row)
                axis.plot([low, high], [at, at], color="#222", linewidth=1.2)
                # The figure of the tables, though the bar of a latency is its inverse.
                text = f"{ratio.median:.2f}x"
                axis.text(max(high, middle) * 1.04, at, text, va="center", fontsize=7)
                at += 1
            noise = results.noise(lab, workload, kind.headline)
            if noise is not None:
                axis.fill_betweenx(
                    [start - 0.5, at - 0.5],
                    1 - noise,
                    1 + noise,
                    color="#999",
                    alpha=0.35,
                    linewidth=0,
                )
            ticks.append((start + at - 1) / 2)
            names.append(kind.label if kind.more_is_better else f"{kind.label}\n(bar: inverse)")
            at += 0.8
        axis.axvline(1, color="#444", linewidth=0.8)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(pyplot.FuncFormatter(lambda x, _: f"{x:g}x"))
        axis.xaxis.set_minor_formatter(pyplot.NullFormatter())
        axis.margins(x=0.12)
        axis.set_yticks(ticks, names)
        axis.invert_yaxis()
        axis.set_title(f"{lab} lab", loc="left")
    _legend(figure, axes[0][0])
    figure.tight_layout()
    return figure


def _cpu(results: Results, pyplot: Any) -> Any:
    panels = [
        (lab, workload)
        for lab in results.labs()
        for workload in results.workloads(lab)
        if any(results.cell(lab, row, workload, "cpu_s_per_gb") for row in _rows(results))
        and workload in ("tcp1", "tcp4", "udp1400")
    ]
    if not panels:
        return None
    rows = _rows(results)
    # Two beside each other: labels that can be read.
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    figure, axes = pyplot.subplots(
        *(down, across),
        figsize=(5.2 * across + 1.0, (0.24 * len(rows) + 0.9) * down),
        squeeze=False,
        sharey=True,
    )
    places = [axis for line in axes for axis in line]
    for axis in places[len(panels) :]:
        axis.set_visible(False)
    for axis, (lab, workload) in zip(places, panels, strict=False):
        for at, row in enumerate(rows):
            total = results.cell(lab, row, workload, "cpu_s_per_gb")
            if total is None or total.median <= 0:
                axis.text(0.02, at, " n/a", va="center", fontsize=8, color="#777")
                continue
            kinds = [results.cell(lab, row, workload, value) for value, _ in _KINDS]
            shares = [0.0 if each is None else each.median / total.median for each in kinds]
            text = " / ".join(f"{share:.0%}" for share in shares)
            axis.barh(at, total.median, color=_colour(results, row))
            axis.text(total.median, at, f" {total.median:.2g}  ({text})", va="center", fontsize=8)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(pyplot.FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(pyplot.NullFormatter())
        axis.set_title(f"{lab} · {workload}", loc="left", fontsize=9)
        axis.set_xlabel("CPU s/GB (user / system / softirq)")
        axis.margins(x=0.6)
        axis.set_yticks(range(len(rows)), rows)
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    return figure


def _latencies(results: Results, pyplot: Any) -> Any:
    panels = [
        (lab, workload)
        for lab in results.labs()
        for workload in results.workloads(lab)
        if "_rr" in workload
    ]
    if not panels:
        return None
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(3.2 * len(panels) + 0.5, 2.8), squeeze=False, sharey=True
    )
    for axis, (lab, workload) in zip(axes[0], panels, strict=True):
        for row in _rows(results):
            cells = [results.cell(lab, row, workload, name) for name in _LATENCIES]
            points = [cell.median for cell in cells if cell is not None]
            if points:
                ticks = [name.removesuffix("_us") for name in _LATENCIES[: len(points)]]
                axis.plot(
                    ticks, points, marker="o", markersize=3, color=_colour(results, row), label=row
                )
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(pyplot.FuncFormatter(lambda y, _: f"{y:g}"))
        axis.yaxis.set_minor_formatter(pyplot.FuncFormatter(lambda y, _: f"{y:g}"))
        axis.tick_params(axis="y", which="minor", labelsize=7)
        axis.set_title(f"{lab} · {workload_named(workload).label}", loc="left", fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel("microseconds")
    _legend(figure, axes[0][0])
    figure.tight_layout()
    return figure


def _costs(results: Results, pyplot: Any) -> Any:
    lab = results.labs()[-1] if results.labs() else None
    if lab is None or "tcp1" not in results.workloads(lab):
        return None
    rows = [row for row in _rows(results) if row in results.row_names(lab)]
    figure, axes = pyplot.subplots(1, len(_COSTS), figsize=(11, 2.4), squeeze=False, sharey=True)
    for axis, (value, title) in zip(axes[0], _COSTS, strict=True):
        for at, row in enumerate(rows):
            cell = results.cell(lab, row, "tcp1", value)
            if cell is None:
                axis.text(0, at, " n/a: no daemon", va="center", fontsize=7, color="#777")
                continue
            axis.barh(at, cell.median, color=_colour(results, row))
            axis.text(cell.median, at, f" {cell.median:.2g}", va="center", fontsize=7)
        axis.set_title(f"{title}\n({lab} lab, TCP x1)", loc="left", fontsize=8)
        axis.margins(x=0.25)
        axis.set_yticks(range(len(rows)), rows)
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    return figure


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        unique.values(),
        unique.keys(),
        loc="lower center",
        ncols=6,
        frameon=False,
        bbox_to_anchor=(0.5, 1.0),
        fontsize=8,
    )
