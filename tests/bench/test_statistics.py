"""Numbers in, verdicts out: medians, intervals, noise, results.json, diff, validity."""

from __future__ import annotations

import asyncio
import copy
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from tests.wait import until_sync
from tundp.bench import stats, validity
from tundp.bench.foreign import Foreign, Process, foreign, parse, processes
from tundp.bench.paths import BASELINE, LADDER, LIMIT, NULL
from tundp.bench.plan import BenchSettings, make_plan
from tundp.bench.report import difference_parts, report_parts, to_html, to_markdown
from tundp.bench.results import Results, Row, Sample, derive, diff, load
from tundp.bench.stats import Estimate
from tundp.engine.choose import ENGINES
from tundp.errors import ConfigError
from tundp.finding import Finding, Verdict
from tundp.linux.offload import Offload


def sample(row: str, number: int, gbps: float, **values: float) -> Sample:
    base = {"gbps": gbps, "payload_bytes": gbps * 1e9, "packets": gbps * 1e6, "corrupt": 0.0}
    base |= {"busy_s": 1.0, "user_s": 0.1, "system_s": 0.6, "softirq_s": 0.3, "steal_s": 0.0}
    base |= {"window_s": 1.0, "context_switches": 1000.0, "retransmits": 0.0}
    return Sample(lab="wire", row=row, workload="tcp1", round=number, values=base | values)


def results(fast: float = 20.0, *, jitter: float = 0.01, **values: float) -> Results:
    found = Results(
        profile="quick", settings={}, started="then", environment={"tundp": "0", "commit": "c"}
    )
    found.rows = [
        Row(lab="wire", name=n, label=n.upper(), is_encrypted=False, why_not=None)
        for n in (BASELINE, NULL, "fast")
    ]
    for number in range(7):
        wobble = 1 + jitter * (number % 3 - 1)
        found.samples += [
            sample(BASELINE, number, 10 * (1 + number / 10)),  # drifts; the ratios must not
            sample(NULL, number, 10 * (1 + number / 10) * wobble),
            sample("fast", number, fast * (1 + number / 10), **values),
        ]
    found.is_partial = False
    return found


def test_estimate_is_a_median_with_an_interval_that_holds_it() -> None:
    found = stats.estimate([5.0, 1.0, 3.0, 2.0, 4.0])
    assert found is not None
    assert found.median == 3
    assert found.low <= 3 <= found.high
    assert found.spread == 4
    assert stats.estimate([]) is None
    assert stats.estimate([float("nan")]) is None
    assert stats.estimate([5.0, 1.0, 3.0]) == stats.estimate([5.0, 1.0, 3.0])


def test_interval_of_steady_samples_is_narrow_and_of_wild_ones_wide() -> None:
    steady = stats.estimate([10, 10.1, 9.9, 10, 10.05])
    wild = stats.estimate([1, 30, 9, 12, 80])
    assert steady is not None
    assert wild is not None
    assert steady.high - steady.low < 0.5 < wild.high - wild.low


def test_ratios_are_paired_by_round_so_drift_cancels() -> None:
    found = results()
    ratio = found.ratio("wire", "fast", "tcp1", "gbps")
    assert ratio is not None
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 2.0)
    cell = found.cell("wire", "fast", "tcp1", "gbps")
    assert cell is not None
    assert cell.spread > 10


@pytest.mark.parametrize(
    ("ratio", "noise", "more_is_better", "expected"),
    [
        ((1.2, 1.3, 1.4), 0.05, True, "better"),
        ((1.2, 1.3, 1.4), 0.05, False, "worse"),
        ((0.6, 0.7, 0.8), 0.05, True, "worse"),
        ((0.6, 0.7, 0.8), 0.05, False, "better"),
        ((1.03, 1.2, 1.4), 0.05, True, "undecided"),  # the interval touches the noise
        ((0.9, 1.0, 1.1), 0.05, True, "same"),
        ((0.89, 1.0, 1.1), 0.05, True, "undecided"),  # too wide to be the same
        ((0.95, 1.0, 1.05), 0.2, True, "undecided"),
        ((1.2, 1.3, 1.4), 0.25, True, "undecided"),  # a noisy machine claims nothing
        ((9.0, 9.0, 9.0), 0.26, True, "not comparable"),
    ],
)
def test_a_win_is_claimed_only_outside_the_noise(
    ratio: tuple[float, float, float], noise: float, more_is_better: bool, expected: str
) -> None:
    low, median, high = ratio
    found = Estimate(median=median, low=low, high=high, spread=0, count=5)
    assert stats.verdict(found, noise, more_is_better=more_is_better) == expected


@pytest.mark.parametrize(("rounds", "status"), [(1, "fail"), (4, "fail"), (5, "ok")])
def test_few_rounds_claim_nothing(rounds: int, status: str) -> None:
    few = Estimate(median=9, low=8, high=10, spread=0, count=rounds)
    assert (stats.verdict(few, 0.1, more_is_better=True) == "n/a") is (status == "fail")
    assert validity.check_rounds(rounds).verdict.value == status


def test_a_bench_without_its_baseline_is_red() -> None:
    found = results()
    found.samples = [each for each in found.samples if each.row != NULL]
    checks = {check.title: check for check in validity.checks_after(found)}
    assert checks["baseline"].verdict is Verdict.FAIL
    found.samples = []
    checks = {check.title: check for check in validity.checks_after(found)}
    assert checks["baseline"].verdict is Verdict.FAIL


def test_newer_fields_are_passed_over_and_unknown_workloads_named(tmp_path: Path) -> None:
    found = results()
    found.save(tmp_path / "results.json")
    document = json.loads((tmp_path / "results.json").read_text())
    document["samples"][0]["colour"] = "blue"
    (tmp_path / "newer.json").write_text(json.dumps(document))
    assert load(tmp_path / "newer.json").samples == found.samples
    document["samples"][2]["workload"] = "quic9"
    (tmp_path / "other.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="quic9"):
        diff(load(tmp_path / "other.json"), found)


def test_without_a_null_test_nothing_is_claimed() -> None:
    found = Estimate(median=9, low=8, high=10, spread=0, count=5)
    assert stats.verdict(found, None, more_is_better=True) == "n/a"
    assert stats.verdict(None, 0.1, more_is_better=True) == "n/a"


def test_a_path_that_corrupts_cannot_win() -> None:
    assert results(30).verdict("wire", "fast", "tcp1") == "better"
    assert results(30, corrupt=1.0).verdict("wire", "fast", "tcp1") == "INVALID"


def test_costs_follow_from_what_was_measured_and_are_none_otherwise() -> None:
    values = sample("x", 0, 2.0).values
    assert derive(values, "cpu_s_per_gb") == pytest.approx(0.5)
    assert derive(values, "cpu_ns_per_packet") == pytest.approx(500)
    assert derive(values, "switches_per_packet") == pytest.approx(0.0005)
    assert derive(values, "syscalls_per_packet") is None
    assert derive({"busy_s": 1.0}, "cpu_s_per_gb") is None


def test_results_come_back_as_they_were_saved(tmp_path: Path) -> None:
    found = results()
    found.checks = [Finding(id="load", title="load", evidence="0.1", verdict=Verdict.OK)]
    found.save(tmp_path / "results.json")
    again = load(tmp_path / "results.json")
    assert again.samples == found.samples
    assert again.rows == found.rows
    assert again.checks == found.checks
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["schema"] == 1
    assert {line["row"] for line in document["summary"]} == {BASELINE, NULL, "fast"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1}', "nonsense"])
def test_a_file_that_holds_no_bench_results_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"other\.json"):
        load(path)
    with pytest.raises(ConfigError, match=r"absent\.json"):
        load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("after", "expected"), [(20.0, "same"), (20.1, "same"), (30.0, "better"), (12.0, "worse")]
)
def test_diff_says_what_changed_beyond_noise(after: float, expected: str) -> None:
    found = diff(results(20.0), results(after))[0]
    assert found.metric == "gbps"
    assert found.verdict == expected
    assert found.before == pytest.approx(2)


def test_diff_fails_what_must_not_pass() -> None:
    gone = results(20.0)
    gone.samples = [each for each in gone.samples if each.row != "fast"]
    assert {each.verdict for each in diff(results(20.0), gone)} == {"gone"}
    assert {each.verdict for each in diff(results(20.0), results(40.0, corrupt=1.0))} == {"worse"}
    dear = {each.metric: each.verdict for each in diff(results(20.0), results(20.0, busy_s=5.0))}
    assert dear == {"gbps": "same", "cpu_s_per_gb": "worse", "cpu_ns_per_packet": "worse"}
    assert diff(Results(profile="", settings={}, started="", environment={}), gone) == []


def test_diff_of_noisy_benches_says_nothing() -> None:
    found = diff(results(20.0, jitter=0.5), results(24.0, jitter=0.5))[0]
    assert found.verdict == "not comparable"
    found = diff(results(20.0, jitter=0.2), results(24.0, jitter=0.2))[0]
    assert found.verdict == "undecided"


def test_headline_names_every_red_check_and_an_interruption() -> None:
    found = results()
    assert found.headline.startswith("comparable")
    found.checks = [
        Finding(id="steal", title="steal", evidence="9 %", verdict=Verdict.FAIL),
        Finding(id="load", title="load", evidence="0.1", verdict=Verdict.OK),
    ]
    assert found.headline == "NOT COMPARABLE: steal 9 %"
    found.is_partial = True
    assert "PARTIAL" in found.headline


@pytest.mark.parametrize(
    ("values", "red"),
    [
        ({}, None),
        ({"corrupt": 1.0}, "payloads"),
        ({"duplicates": 3.0}, "payloads"),
        ({"steal_s": 5.0}, "steal"),
    ],
)
def test_validity_after(values: dict[str, Any], red: str | None) -> None:
    checks = validity.checks_after(results(**values))
    assert [check.title for check in checks if check.verdict is Verdict.FAIL] == (
        [red] if red else []
    )


def test_validity_notes_a_noisy_null_test() -> None:
    checks = validity.checks_after(results(jitter=0.5))
    (check,) = [check for check in checks if check.title == "null test wire tcp1"]
    assert check.verdict is Verdict.NOTE


@pytest.mark.parametrize(
    ("sizes", "status"),
    [({1514: 100, 66: 50}, "ok"), ({1515: 1, 66: 50}, "fail"), ({64000: 9}, "fail"), ({}, "fail")],
)
def test_frames_of_a_wire(sizes: dict[int, Any], status: str) -> None:
    assert validity.check_frames(Counter(sizes), 0, "wire x").verdict.value == status


def test_losses_are_red_when_fragments_were_made() -> None:
    before = {"fragments": 5, "softirq drops": 1}
    (fragments, drops) = validity.check_losses("wire", before, before)
    assert (fragments.verdict.value, drops.verdict.value) == ("ok", "ok")
    (fragments, drops) = validity.check_losses("wire", before, {"fragments": 7, "softirq drops": 2})
    assert (fragments.verdict.value, drops.verdict.value) == ("fail", "note")


async def test_accounting_that_misses_a_burner_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    async def blind() -> tuple[float, float]:
        return 0.5, 0.1

    monkeypatch.setattr(validity, "check_accounting", blind)
    checks = await validity.checks_before(0)
    assert {check.title: check.verdict for check in checks}["CPU accounting"] is Verdict.FAIL


async def test_a_busy_machine_is_waited_for_and_then_red(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [0.5, 0.4, 0.01]

    async def busy(_: float) -> tuple[float, Foreign]:
        await asyncio.sleep(0.01)
        return shares.pop(0) if len(shares) > 1 else shares[0], Foreign(1.0, 0.0, ("cc1",))

    monkeypatch.setattr(validity, "busy_share", busy)
    checks = {check.title: check for check in await validity.checks_before(60)}
    assert checks["busy before"].verdict is Verdict.OK
    assert shares == [0.01]
    shares[:] = [0.5]
    checks = {check.title: check for check in await validity.checks_before(0.05)}
    assert checks["busy before"].verdict is Verdict.FAIL
    assert checks["busy before"].evidence == "50%, by cc1"


def test_what_others_take_is_red_and_named() -> None:
    found = results(foreign_s=0.01)
    checks = {check.title: check for check in validity.checks_after(found)}
    assert checks["foreign CPU"].verdict is Verdict.OK
    # Of a cell's seven rounds together: one bad round is averaged, and seven are not.
    share = validity.FOREIGN_MAX * (os.cpu_count() or 1)
    found.samples[2].values["foreign_s"] = share * 1.1
    checks = {check.title: check for check in validity.checks_after(found)}
    assert checks["foreign CPU"].verdict is Verdict.OK
    for each in found.samples[2::3]:
        each.values["foreign_s"] = share * 1.1
    checks = {check.title: check for check in validity.checks_after(found)}
    assert checks["foreign CPU"].verdict is Verdict.FAIL
    assert checks["foreign CPU"].evidence.startswith("1 of 3 cells: wire tcp1 fast 3%")


def process(pid: int, parent: int, name: str, user: float, **changes: Any) -> Process:
    base = {"system": 0.0, "started": 7}
    return Process(pid=pid, parent=parent, name=name, user=user, **(base | changes))


def test_foreign_is_what_is_neither_ours_nor_the_kernels() -> None:
    def all_(second: int) -> dict[int, Process]:
        return {
            each.pid: each
            for each in (
                process(2, 0, "kthreadd", second),
                process(9, 2, "ksoftirqd/0", 3 * second),
                process(100, 1, "bench", 5 * second),
                process(101, 100, "daemon", 5 * second),
                process(102, 101, "its child", 5 * second),
                # The first cc1 is waited for meanwhile: its 2 s are the job's then, and old.
                process(200, 1, "cron job", second + 2 * (second - 1), system=second / 2),
                process(201, 200, "cc1", 2 * second, started=7 + second),
                process(202, 1, "idle", 1.0),
            )
        }

    took = foreign(all_(1), all_(2), own=100)
    # cc1 is another process of the same number: all it has used it used meanwhile.
    assert (took.user, took.system, took.names) == (1 + 4, 0.5, ("cc1", "cron job"))
    assert foreign(all_(1), all_(1), own=100).busy == 0


def test_what_a_child_used_before_is_not_charged_when_its_parent_inherits_it() -> None:
    """Who waits for a child gets all it ever used, and its grandchildren's."""
    before = [
        process(1, 0, "init", 1.0),
        process(300, 1, "make", 1.0),
        process(301, 300, "sh", 2.0),
        process(302, 301, "cc1", 600.0, system=60.0),
    ]
    after = [process(1, 0, "init", 1.0), process(300, 1, "make", 603.2, system=60.1)]
    took = foreign({p.pid: p for p in before}, {p.pid: p for p in after}, own=100)
    assert (round(took.user, 6), round(took.system, 6)) == (0.2, 0.1)
    # Nobody has waited for it: it is nobody's.
    took = foreign({p.pid: p for p in before}, {p.pid: p for p in before[:2]}, own=100)
    assert took.busy == 0


def test_number_2_is_a_thread_of_the_kernel_only_where_it_is_one() -> None:
    """In a container it is an ordinary process."""
    before = {2: process(2, 1, "postgres", 1.0), 5: process(5, 2, "postgres", 1.0)}
    after = {2: process(2, 1, "postgres", 2.0), 5: process(5, 2, "postgres", 4.0)}
    assert foreign(before, after, own=100).user == 4.0


def test_a_burner_that_is_no_child_of_ours_is_foreign() -> None:
    """A process of another session, whose parent is gone."""
    burn = "import os, time\nif os.fork(): os._exit(0)\nprint(os.getpid(), flush=True)\n"
    burn += "until = time.monotonic() + 20\nwhile time.monotonic() < until: pass\n"
    child = subprocess.Popen(
        [sys.executable, "-c", burn], stdout=subprocess.PIPE, start_new_session=True
    )
    assert child.stdout is not None
    pid = int(child.stdout.readline())
    child.wait()
    try:
        before = processes()
        assert before[pid].parent != os.getpid()
        until_sync(lambda: processes()[pid].user - before[pid].user > 0.2)
        took = foreign(before, processes())
        assert took.user > 0.1
        assert before[pid].name in took.names
        parents = {
            each: replace(p, parent=os.getpid()) for each, p in before.items() if each == pid
        }
        assert foreign(before, before | parents).busy == 0
    finally:
        os.kill(pid, signal.SIGKILL)
        child.stdout.close()


@pytest.mark.parametrize("name", ["x", "a) b", "((", "x 1 2 3)"])
def test_a_process_is_read_whatever_it_calls_itself(name: str) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    fields = ["S", "1", *"0" * 9, str(ticks), str(2 * ticks), "0", str(ticks), *"0" * 4, "77", "0"]
    found = parse(f"42 ({name}) {' '.join(fields)}\n")
    assert found == process(42, 1, name, 1.0, system=3.0, started=77)


def with_limit(limit: float) -> Results:
    found = results()
    found.rows.append(Row(lab="wire", name=LIMIT, label="l", is_encrypted=False, why_not=None))
    found.samples += [sample(LIMIT, number, limit * (1 + number / 10)) for number in range(7)]
    return found


def test_tables_say_how_much_of_the_limit_a_row_reaches() -> None:
    found = with_limit(25.0)
    ratio = found.of_limit("wire", "fast", "tcp1", "gbps")
    assert ratio is not None and ratio.median == 0.8
    text = to_markdown(found)
    assert "| of bare |" in text
    assert "| 0.80x [0.80, 0.80] |" in text
    assert found.of_limit("wire", LIMIT, "tcp1", "gbps") is None
    assert found.of_limit("wire", BASELINE, "tcp1", "gbps") is None, "the kernel's own"
    assert "of bare" not in to_markdown(results())
    # Of what engines batch and it does not, it is no limit.
    found.samples = [replace(each, workload="udp64") for each in found.samples]
    assert found.of_limit("wire", "fast", "udp64", "gbps") is None


def test_rounds_go_on_until_every_row_has_a_verdict() -> None:
    assert results(20).is_decided("wire", "tcp1")
    assert results(10).is_decided("wire", "tcp1")
    found = results(10)
    found.samples += [sample("fast", number, 30.0 + number) for number in range(3)]
    assert not found.is_decided("wire", "tcp1")
    assert not results(20, jitter=0.4).is_decided("wire", "tcp1")
    found = results(20)
    found.samples = [each for each in found.samples if each.row != "fast" or each.round < 4]
    assert not found.is_decided("wire", "tcp1"), "a round is missing"


def test_a_headline_names_the_cells_that_are_too_noisy() -> None:
    assert results().headline == "comparable: every validity check passed"
    assert results(jitter=0.4).headline == (
        "comparable: every validity check passed, but no verdict in tcp1 wire ±40%: too noisy"
    )


def settings(*only: str, **changes: Any) -> BenchSettings:
    base = {"rounds": None, "seconds": None, "topology": "host", "flanneld": None}
    return BenchSettings(profile="quick", only=only, **(base | changes))


def test_plan_has_every_engine_and_always_the_baseline_twice() -> None:
    plan = make_plan(replace(settings(), profile="default"))
    names = [path.name for path in plan.paths]
    assert names[:3] == [BASELINE, NULL, "vxlan-csum"]
    assert (plan.rounds, plan.rounds_max) == (7, 21)
    assert len([name for name in names if name == "simple" or "tundp-" in name]) == len(ENGINES)
    plan = make_plan(settings("veth", "tcp_rr", "wire"))
    assert [path.name for path in plan.paths] == [BASELINE, NULL, "veth"]
    assert [workload.name for workload in plan.workloads] == ["tcp_rr"]
    assert plan.labs == ("wire",)
    quick = make_plan(settings())
    assert [path.name for path in quick.paths] == [
        *(BASELINE, NULL, LIMIT, "tundp-gso", "simple"),
    ]
    assert "flanneld" in [path.name for path in make_plan(settings(flanneld="/x")).paths]
    assert make_plan(replace(settings(), rounds=3)).rounds_max == 3


def test_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match="no such row, workload or lab") as caught:
        make_plan(settings("vxlam"))
    for name in ("vxlan-csum", "tcp_crr", "virtual"):
        assert name in str(caught.value)


def test_reports_print_na_where_nothing_was_measured_and_escape_markup() -> None:
    found = results()
    found.checks = [Finding(id="b", title="<b>", evidence="|", verdict=Verdict.FAIL, meaning="x")]
    text = to_markdown(found)
    assert "NOT COMPARABLE" in text
    assert "| n/a |" in text
    assert "\\|" in text
    page = to_html(found, [("a plot", "<svg></svg>")])
    assert "&lt;b&gt;" in page
    assert "<svg></svg>" in page
    for outside in ("http://", "https://", "<script", "src="):
        assert outside not in page


def test_what_others_chose_is_on_one_line_of_a_report_and_escaped() -> None:
    """A reason carries whatever a daemon's log or a server said; a CPU's name is firmware's."""
    nasty = "a\x1b[2J\u202e\ud800\x9b\u2028| x |\n# forged <b>" + "k" * 100_000
    found = results()
    found.environment = {**found.environment, "cpu": nasty}
    found.checks = [Finding(id="b", title="t", evidence=nasty, verdict=Verdict.FAIL)]
    for text in (to_markdown(found), to_html(found, [])):
        assert not set("\x1b\u202e\ud800\x9b\u2028") & set(text)
        assert not any(line.startswith("# forged") for line in text.splitlines())
        assert "<b>" not in text
        assert max(map(len, text.splitlines())) < 50_000
        text.encode()


NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=60)


def printed(parts: Iterable[RenderableType], *, is_terminal: bool) -> str:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=is_terminal, color_system=None)
    for part in parts:
        console.print(part, crop=False)
    return file.getvalue()


@pytest.mark.parametrize("is_terminal", [True, False])
@hypothesis.settings(deadline=None, max_examples=10)
@given(name=NAMES, gbps=st.floats(0.001, 2.0**63), losses=st.floats(0, 1))
def test_no_figure_and_no_row_of_a_report_is_cut(
    is_terminal: bool, name: str, gbps: float, losses: float
) -> None:
    found = results()
    found.rows.append(Row(lab="wire", name=name, label=name, is_encrypted=False, why_not=None))
    found.samples += [
        replace(sample(name, number, gbps, loss=losses), workload=workload)
        for workload in ("tcp1", "udp1400")
        for number in range(5)
    ]
    text = printed(report_parts(found), is_terminal=is_terminal)
    assert "…" not in text
    for workload in ("TCP", "UDP 1400"):
        assert workload in text
    lines = [line.split() for line in text.splitlines() if line.split()[:1] == [name]]
    assert len(lines) >= 2
    assert any(f"{gbps:,.2f}" in line for line in lines)
    after = copy.deepcopy(found)
    after.samples = [replace(each, values=each.values | {"gbps": 1.0}) for each in after.samples]
    text = printed(difference_parts(diff(found, after)), is_terminal=is_terminal)
    assert "…" not in text
    for metric in ("gbps", "cpu_s_per_gb", "cpu_ns_per_packet"):
        assert [line for line in text.splitlines() if {name, metric} <= set(line.split())]


def test_a_brief_report_fits_eighty_columns() -> None:
    text = printed(report_parts(results()), is_terminal=True)
    assert max(map(len, text.splitlines())) <= 80
    for head in ("path", "Gbit/s", "vs VXLAN", "CPU s/GB"):
        assert head in text


def test_nothing_to_compare_is_said() -> None:
    assert printed(difference_parts([]), is_terminal=False) == "nothing in common to compare\n"


def test_columns_of_text_begin_and_columns_of_figures_end_in_line() -> None:
    found = results()
    found.checks = [
        Finding(id="load", title="load", evidence="0.10", verdict=Verdict.OK, meaning="a reason")
    ]
    page = to_html(found, [])
    assert "<th>why</th>" in page
    assert "<td>a reason</td>" in page
    assert '<th class="figure">Gbit/s</th>' in page
    assert re.search(r'<td class="figure">2\.00x \[2\.00, 2\.00\]</td>', page)
    assert page.count("<table>") == page.count("<div class=scroll><table>") > 3
    assert page.count("<caption>") == page.count("<table>")


def test_a_report_of_another_day_is_read(tmp_path: Path) -> None:
    found = results()
    found.checks = [
        Finding(id="load", title="load", evidence="0.1", verdict=Verdict.FAIL, meaning="why")
    ]
    path = tmp_path / "results.json"
    found.save(path)
    document = json.loads(path.read_text())
    assert document["checks"] == [
        {"id": "load", "name": "load", "value": "0.1", "status": "red", "why": "why"}
    ]
    del document["checks"][0]["id"]  # written before there was one
    path.write_text(json.dumps(document))
    assert load(path).checks == found.checks


def test_rows_of_ones_own_join_whatever_else_is_asked_for() -> None:
    plan = make_plan(settings("veth", "tcp1", rows=("spin=--engine=gso --spin=30",)))
    assert [path.name for path in plan.paths] == ["vxlan", "vxlan-again", "veth", "spin"]


def test_the_ladder_has_a_rung_for_each_offload_but_the_last() -> None:
    plan = make_plan(settings("tundp-gso", "tcp1", has_ladder=True))
    names = [path.name for path in plan.paths]
    assert names == ["vxlan", "vxlan-again", "tundp-gso", *(f"rung{n}" for n in range(1, 6))]
    assert set(LADDER) == {offload.value for offload in Offload}


@pytest.mark.parametrize(
    "row", ["", "x", "=--spin=1", "x=", "UP=--spin=1", "much-too-long=--spin=1", "veth=--spin=1"]
)
def test_a_row_that_is_none_is_refused_by_name(row: str) -> None:
    with pytest.raises(ConfigError, match="--row"):
        make_plan(settings(rows=(row,)))
