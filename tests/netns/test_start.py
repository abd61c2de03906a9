"""Starts that must fail, each with a message that says what, where and the fix."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from tests.nodes import MakeLab, MakeOverlay
from tests.stopped import stop
from tests.wait import DEADLINE_S, until
from tundp import demo
from tundp.choices import DemoStore
from tundp.demo import HOSTS
from tundp.errors import ConfigError
from tundp.lab.lab import leftovers
from tundp.lab.overlay import LabNode, OverlayLab


async def failing_start(overlay: OverlayLab, node: LabNode, *flags: str) -> tuple[int, str]:
    """Start a daemon that cannot run; its exit code and log."""
    await overlay.start_daemon(node, *flags)
    code = await asyncio.to_thread(node.daemon.wait, DEADLINE_S)
    return code, overlay.log_tail(node)


async def test_no_default_route_and_no_iface(make_overlay: MakeOverlay) -> None:
    async with make_overlay(nodes=1, start=False) as overlay:
        one = overlay.nodes[1]
        # Its only route is the underlay's own.
        argv = [sys.executable, "-m", "tundp", "run", *overlay.store_flags]
        argv += [f"--subnet-file={one.subnet_file}", f"--admin-socket={one.admin_socket}"]
        with one.log_path.open("wb") as log:
            process = await one.host.popen(argv, log=log)
        assert await asyncio.to_thread(process.wait, DEADLINE_S) == 1
        text = overlay.log_tail(one)
        assert "unable to find default route" in text
        assert "eth0 192.0.2.1/24" in text
        assert "Traceback" not in text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--iface=nosuch0"], None),  # eth0 comes first, so this one is never needed
        (["--tun-name=eth0"], "cannot open TUN device eth0"),
        (["--public-ip=198.51.100.7"], None),
    ],
)
async def test_flags_that_work_or_name_themselves(
    make_overlay: MakeOverlay, flags: list[str], expected: str | None
) -> None:
    async with make_overlay(nodes=1, start=False) as overlay:
        one = overlay.nodes[1]
        if expected is None:
            await overlay.start_daemon(one, *flags)
            await overlay.wait_ready([one])
            return
        code, text = await failing_start(overlay, one, *flags)
        assert code == 1
        assert expected in text
        assert "Traceback" not in text


async def test_port_in_use_names_port_and_fix(make_overlay: MakeOverlay) -> None:
    async with make_overlay(nodes=1) as overlay:
        one = overlay.nodes[1]
        first = one.daemon
        code, text = await failing_start(
            overlay, one, f"--admin-socket={overlay.directory}/second.sock"
        )
        assert code == 1
        assert f"another tundp runs with --subnet-file {one.subnet_file}" in text
        code, text = await failing_start(
            overlay,
            one,
            f"--admin-socket={overlay.directory}/second.sock",
            f"--subnet-file={overlay.directory}/second.env",
        )
        assert code == 1
        assert "cannot bind UDP 192.0.2.1:8285" in text
        assert "Backend.Port" in text
        assert first.poll() is None
        assert len(await overlay.read_leases()) == 1


async def test_admin_socket_in_use_is_refused_and_a_stale_one_replaced(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(nodes=2) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        two.daemon.terminate()
        await asyncio.to_thread(two.daemon.wait, DEADLINE_S)
        code, text = await failing_start(overlay, two, f"--admin-socket={one.admin_socket}")
        assert code == 1
        assert "--admin-socket" in text
        assert "flannel0" not in {link.name for link in await two.host.netlink.links()}
        await overlay.start_daemon(two)
        await overlay.wait_ready()
        two.daemon.kill()
        await asyncio.to_thread(two.daemon.wait, DEADLINE_S)
        assert two.admin_socket.exists()
        await overlay.start_daemon(two)
        await overlay.wait_ready()


async def test_route_of_the_network_elsewhere_is_refused(make_overlay: MakeOverlay) -> None:
    # flannel ignores EEXIST here, and the overlay's packets silently go to the other device.
    async with make_overlay(nodes=1, start=False) as overlay:
        one = overlay.nodes[1]
        await one.host.route("10.5.0.0/16", via="192.0.2.254")
        code, text = await failing_start(overlay, one)
        assert code == 1
        assert "a route over eth0 for 10.5.0.0/16 is already there" in text
        assert "ip route del 10.5.0.0/16" in text


async def test_mtu_too_small_for_ipv4(make_overlay: MakeOverlay) -> None:
    async with make_overlay(nodes=1, start=False) as overlay:
        one = overlay.nodes[1]
        await one.host.configure("eth0", mtu=80)
        code, text = await failing_start(overlay, one)
        assert code == 1
        assert "interface eth0 has MTU 80" in text


async def test_unwritable_subnet_file_is_a_warning(
    make_overlay: MakeOverlay, tmp_path: Path
) -> None:
    async with make_overlay(nodes=1, start=False) as overlay:
        one = overlay.nodes[1]
        blocker = tmp_path / "file"
        blocker.write_text("")
        await overlay.start_daemon(one, f"--subnet-file={blocker}/subnet.env")
        await overlay.wait_ready([one])
        assert f"cannot write {blocker}/subnet.env" in overlay.log_tail(one)


async def test_sigterm_while_waiting_for_the_store(make_overlay: MakeOverlay) -> None:
    async with make_overlay(nodes=1, start=False) as overlay:
        one = overlay.nodes[1]
        overlay.lease_file.unlink()
        await overlay.start_daemon(one)

        async def is_waiting() -> bool:
            return "does not exist" in overlay.log_tail(one)

        await until(is_waiting)
        one.daemon.terminate()
        assert await asyncio.to_thread(one.daemon.wait, DEADLINE_S) == 0


async def test_second_signal_kills_at_once(make_overlay: MakeOverlay) -> None:
    async with make_overlay(nodes=1) as overlay:
        one = overlay.nodes[1]
        stop(one.daemon.pid)
        one.daemon.terminate()
        one.daemon.send_signal(signal.SIGINT)
        one.daemon.send_signal(signal.SIGCONT)
        code = await asyncio.to_thread(one.daemon.wait, DEADLINE_S)
        assert code in (0, -signal.SIGINT, -signal.SIGTERM)


def start_demo(*flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tundp", "demo", "--megabytes=8", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
    )


@pytest.fixture
def no_demo() -> Iterator[None]:
    """The demo's own namespaces have fixed names: clean up whatever a failed test left."""
    yield
    subprocess.run(
        [sys.executable, "-m", "tundp", "demo", "--clean"], check=True, capture_output=True
    )


@pytest.mark.parametrize("store", ["etcd", "file"])
def test_demo_passes_and_leaves_nothing(no_demo: None, store: str) -> None:
    with start_demo(f"--store={store}") as demo:
        text, _ = demo.communicate(timeout=100)
    assert demo.returncode == 0, text
    assert "all checks passed" in text
    assert "FAIL" not in text
    assert ("private etcd" in text) is (store == "etcd")
    assert leftovers("tundp", HOSTS) == []


async def test_demo_with_etcd_that_is_not_installed_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo, "find_etcd", lambda: None)
    out = io.StringIO()
    settings = demo.DemoSettings(store=DemoStore.ETCD, payload_len=1 << 20, is_kept=False)
    with pytest.raises(ConfigError, match="--store etcd: etcd is not installed"):
        await demo.run_demo(settings, Console(file=out).print)
    assert out.getvalue() == ""


async def test_demo_without_etcd_says_so_and_uses_the_file(
    no_demo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "find_etcd", lambda: None)
    out = io.StringIO()
    settings = demo.DemoSettings(store=DemoStore.AUTO, payload_len=1 << 20, is_kept=False)
    assert await demo.run_demo(settings, Console(file=out, width=200).print), out.getvalue()
    assert "etcd is not installed" in out.getvalue()
    assert "all checks passed" in out.getvalue()


@pytest.mark.parametrize("moment", ["private etcd", "daemons", "ping", "traceroute"])
def test_demo_interrupted_leaves_nothing(no_demo: None, moment: str) -> None:
    with start_demo("--megabytes=2000") as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if moment in line:
                break
        demo.send_signal(signal.SIGINT)
        text, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert "interrupted; everything torn down" in text
    assert leftovers("tundp", HOSTS) == []


def test_demo_kept_goes_on_until_cleaned(no_demo: None) -> None:
    with start_demo("--keep") as demo:
        text, _ = demo.communicate(timeout=100)
    assert demo.returncode == 0, text
    assert "everything keeps running" in text
    (line,) = [line for line in text.splitlines() if "status --admin-socket" in line]
    status = subprocess.run(line.split(), capture_output=True, text=True, check=True)
    assert "192.0.2.2:8285" in status.stdout
    with start_demo() as again:
        text, _ = again.communicate(timeout=60)
    assert again.returncode == 1
    assert "tundp demo --clean" in text
    cleaned = subprocess.run(
        [sys.executable, "-m", "tundp", "demo", "--clean"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "the demo is gone" in cleaned.stdout
    assert leftovers("tundp", HOSTS) == []
    assert not Path("/run/tundp-demo.json").exists()


def as_nobody(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run tundp without any privilege, in this very interpreter's environment."""
    program = (
        "import os, sys, tundp.cli, tundp.daemon.process, tundp.daemon.run, tundp.daemon.stores;"
        "import tundp.demo, tundp.admin, tundp.show, uvloop;"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534);"
        "sys.exit(tundp.cli.main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "--store=file:/nonexistent/leases.json"], "CAP_NET_ADMIN"),
        (["demo"], "as root"),
        (["demo", "--clean"], "as root"),
        (["status"], "no daemon answers on /run/tundp/admin.sock (No such file or directory)"),
    ],
)
def test_without_root_it_says_so(arguments: list[str], expected: str) -> None:
    answer = as_nobody(*arguments)
    assert answer.returncode == 1
    assert expected in answer.stderr
    assert "Traceback" not in answer.stderr


async def test_probe_says_what_the_kernel_has_and_leaves_the_host_alone(make_lab: MakeLab) -> None:
    async with make_lab() as lab:
        host = await lab.host("here")
        before = await host.netlink.links()
        answer = await host.call(
            subprocess.run,
            [sys.executable, "-m", "tundp", "probe", "--json"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert answer.returncode == 0, answer.stderr
        found = json.loads(answer.stdout)
        assert found["engine"] == "gso"
        assert found["not_asked"] is None
        there = {each["title"]: each["verdict"] == "ok" for each in found["findings"]}
        assert there["TSO from the TUN"]
        assert there["TCP super-packet to the TUN"]
        assert there["UDP super-packet to the TUN"]
        assert there["UDP_SEGMENT"]
        assert await host.netlink.links() == before


async def test_subnet_env_that_is_removed_or_changed_is_written_again(
    make_overlay: MakeOverlay,
) -> None:
    async with make_overlay(nodes=1) as overlay:
        one = overlay.nodes[1]
        text = one.subnet_file.read_text()

        async def is_back() -> bool:
            return one.subnet_file.exists() and one.subnet_file.read_text() == text

        one.subnet_file.unlink()
        await until(is_back)
        one.subnet_file.write_text("FLANNEL_SUBNET=10.9.9.1/24\n")
        await until(is_back)
        assert "was removed or changed: writing it again" in overlay.log_tail(one)
