"""What sandboxes refuse a daemon: it goes on with a warning, or ends with one line and code 1."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from tests.netns.machine import TUNDP
from tests.netns.test_tried_process import MMSG, SECCOMP, run_argv, start
from tests.nodes import MakeOverlay, answers, until_logged
from tests.wait import DEADLINE_S, until
from tundp.lab.overlay import LabNode, OverlayLab

NUMBERS = {
    # asm/unistd.h
    "x86_64": {
        "rlimits": "97,160,302",
        "clone3": "435",
        "getrandom": "318",
        "eventfd2": "290",
        "capget": "125",
        "landlock": "444,445,446",
    },
    "aarch64": {
        "rlimits": "163,164,261",
        "clone3": "435",
        "getrandom": "278",
        "eventfd2": "19",
        "capget": "90",
        "landlock": "444,445,446",
    },
}
NO_PROC = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]


def refusing(calls: str, code: int = errno.EPERM) -> list[str]:
    """The command before a command: a seccomp filter that answers `code` to these calls."""
    numbers = NUMBERS.get(os.uname().machine)
    if numbers is None:
        pytest.skip(f"system call numbers of {os.uname().machine} are not known here")
    return [sys.executable, "-c", SECCOMP, str(code), numbers[calls]]


def limited(files: int) -> list[str]:
    return ["prlimit", f"--nofile={files}"]


async def run_once(
    overlay: OverlayLab, node: LabNode, wrapper: list[str], *words: str
) -> subprocess.CompletedProcess[str]:
    """A command with the node's settings; `run` must end by itself."""
    argv = run_argv(overlay, node)
    at = argv.index("run")
    return await node.host.call(
        subprocess.run,
        [*wrapper, *argv[:at], *(words or ("run",)), *argv[at + 1 :]],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@pytest.mark.parametrize(
    ("wrapper", "said", "finding"),
    [
        ("rlimits", "limit of open files stays as it is", "getrlimit or setrlimit: "),
        ("eventfd2", "uvloop cannot run", "eventfd2: Operation not permitted"),
        ("capget", "", ""),
        ("no /proc", "there is no /proc; switches such as ip_forward", "there is no /proc"),
    ],
)
async def test_a_daemon_goes_on_with_less(
    make_overlay: MakeOverlay, wrapper: str, said: str, finding: str
) -> None:
    """Each of these was a traceback."""
    prefix = NO_PROC if wrapper == "no /proc" else refusing(wrapper)
    async with make_overlay(start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await overlay.start_daemon(two)
        await start(overlay, one, prefix)
        await overlay.wait_ready()
        await until(lambda: answers(one.host, two.tunnel_address))
        if said:
            await until_logged(one, said)
        assert "Traceback" not in one.log_path.read_text()
        await one.stop_daemon()
        check = await run_once(overlay, one, prefix, "config", "check")
        assert "Traceback" not in check.stderr
        assert check.returncode == 0, check.stdout + check.stderr
        assert finding in " ".join(check.stdout.split()), check.stdout
        if wrapper == "no /proc":
            assert "/proc/sys/net/ipv4/ip_forward: No such file" in " ".join(check.stdout.split())
            cleanup = await run_once(overlay, one, prefix, "cleanup")
            (line,) = cleanup.stderr.splitlines()
            assert cleanup.returncode == 1
            assert "cannot see other processes" in line
            assert "mount -t proc" in line


async def test_what_the_sandbox_lacks_is_in_log_status_and_check(make_overlay: MakeOverlay) -> None:
    """A kernel without Landlock, by a filter that answers as one does."""
    lacks = "does not hold: files and programs: the kernel has no Landlock"
    prefix = refusing("landlock", errno.ENOSYS)
    async with make_overlay(start=False, nodes=1) as overlay:
        one = overlay.nodes[1]
        await start(overlay, one, prefix)
        await overlay.wait_ready()
        document = await one.status_document()
        held = document["sandbox"]
        assert (held["landlock_abi"], held["seccomp"]) == (0, True)
        assert held["missing"][0].startswith(lacks.partition(": ")[2])
        (finding,) = [each for each in document["findings"] if each["id"] == "sandbox"]
        assert finding["verdict"] == "warn"
        assert lacks in finding["evidence"]
        shown = await one.host.run(TUNDP, "status", f"--admin-socket={one.admin_socket}")
        assert lacks in " ".join(shown.stdout.split()), shown.stdout
        await until_logged(one, lacks)
        await one.stop_daemon()
        check = await run_once(overlay, one, prefix, "config", "check")
        text = " ".join(check.stdout.split())
        assert check.returncode == 0, check.stdout + check.stderr
        assert lacks in text
        assert f"written are files below {one.directory}" in text
        asked = await run_once(overlay, one, prefix, "config", "check", "--sandbox=on")
        assert asked.returncode == 1, asked.stdout
        ended = await run_once(overlay, one, prefix, "run", "--sandbox=on")
        assert ended.returncode == 1
        assert "--sandbox=on: files and programs: the kernel has no Landlock" in ended.stderr
        off = await run_once(overlay, one, prefix, "config", "check", "--sandbox=off")
        assert "off: nothing is refused" in " ".join(off.stdout.split())


async def test_no_thread_can_start(make_overlay: MakeOverlay) -> None:
    """clone3 refused, as by container runtimes older than glibc 2.34; ENOSYS is fine."""
    async with make_overlay(start=False, nodes=1) as overlay:
        one = overlay.nodes[1]
        prefix = refusing("clone3")
        # Our own filter answers ENOSYS, and of two filters the later one's answer counts.
        await start(overlay, one, prefix)
        await overlay.wait_ready()
        await one.stop_daemon()
        for words in (
            ("run", "--sandbox=off"),
            ("config", "check"),
            ("cleanup", "--dry-run"),
        ):
            done = await run_once(overlay, one, prefix, *words)
            assert done.returncode == 1, done.stderr
            assert "Traceback" not in done.stderr, done.stderr
            line = done.stderr.splitlines()[-1]
            assert "cannot start the thread" in line
            assert "a seccomp filter refuses clone3(2)" in line
            assert "newer container runtime" in line
        await start(overlay, one, refusing("clone3", errno.ENOSYS))
        await overlay.wait_ready()


async def test_loop_asked_for_by_name_that_cannot_run(make_overlay: MakeOverlay) -> None:
    async with make_overlay(start=False, nodes=1) as overlay:
        one = overlay.nodes[1]
        done = await run_once(overlay, one, refusing("eventfd2"), "run", "--loop=uvloop")
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "--loop=uvloop cannot run here, eventfd2: " in done.stderr
        assert "use --loop=asyncio" in done.stderr


@pytest.mark.parametrize("files", [8, 16, 23])
async def test_too_few_open_files_end_in_a_line(make_overlay: MakeOverlay, files: int) -> None:
    """16 were a traceback, 8 an abort of libuv's; the limit and what to do are named."""
    async with make_overlay(start=False, nodes=1) as overlay:
        one = overlay.nodes[1]
        # With 8 CPython itself complains of an event loop half made.
        for words in ((), ("config", "check")) if files > 8 else ((),):
            done = await run_once(overlay, one, limited(files), *words)
            text = " ".join((done.stdout + done.stderr).split())
            assert done.returncode == 1, text
            assert "Traceback" not in text
            assert f"only {files} files may be open" in text or "Too many open files" in text
            assert "LimitNOFILE" in text


async def test_without_random_numbers(make_overlay: MakeOverlay) -> None:
    """getrandom refused: OpenSSL cannot work, and spoke of memory."""
    async with make_overlay(start=False, nodes=1) as overlay:
        for words in ((), ("config", "check")):
            done = await run_once(overlay, overlay.nodes[1], refusing("getrandom"), *words)
            line = done.stderr.splitlines()[-1]
            assert done.returncode == 1, done.stderr
            assert "Traceback" not in done.stderr
            assert "cannot work without getrandom(2): Operation not permitted" in line
            assert "seccomp" in line


async def test_few_open_files(make_overlay: MakeOverlay) -> None:
    """Packets pass with 50, and somebody is told what may fail."""
    async with make_overlay(start=False) as overlay:
        one, two = overlay.nodes[1], overlay.nodes[2]
        await overlay.start_daemon(two)
        await start(overlay, one, limited(50))
        await overlay.wait_ready()
        await until(lambda: answers(one.host, two.tunnel_address))
        await until_logged(one, "only 50 files may be open")
        check = await run_once(overlay, one, limited(50), "config", "check")
        assert check.returncode == 0, check.stdout + check.stderr
        assert "only 50 files may be open" in " ".join(check.stdout.split())
        text = one.log_path.read_text()
        assert "removed or changed" not in text
        assert "Traceback" not in text


async def test_workers_in_a_sandbox_without_batches(make_overlay: MakeOverlay) -> None:
    """The advice is one that helps, and names the flag that was given."""
    async with make_overlay(start=False, nodes=1) as overlay:
        one = overlay.nodes[1]
        prefix = [sys.executable, "-c", SECCOMP, str(errno.EPERM), MMSG[os.uname().machine]]
        for flags, said in (
            ((), "--workers=2 needs --engine=gso or --engine=mmsg, and neither can run here"),
            (("--engine=gso",), "use --engine=simple and --workers=1"),
            (("--engine=simple",), "--workers=2: engine simple has one; use --workers=1, or"),
        ):
            done = await run_once(overlay, one, prefix, "run", "--workers=2", *flags)
            assert done.returncode == 1
            assert "Traceback" not in done.stderr
            assert said in done.stderr
